"""`jaxdp replay`: the model of a run, bit for bit, from its base model and its trajectory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxdp.cli import block_job, export_trajectory, run_folder, run_trajectory, tuning_job, tuning_outputs
from jaxdp.cli.finetune_options import ModelOptions
from jaxdp.cli.options import Flag, hint
from jaxdp.cli.tuning_job import Tuning
from jaxdp.zeroth_order import (
    Gaussian,
    Header,
    Law,
    LowRank,
    Rademacher,
    Sgd,
    TwoSided,
    make_step,
    read_trajectory,
    replayed,
)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes the model of a zeroth-order run again, bit for bit, from its base model and a file of kilobytes.

    jaxdp replay --base models/opt-125m --out model runs/opt-125m/released.jaxdpzo
    """

    trajectory: tyro.conf.Positional[Path]
    """File that `jaxdp export-trajectory` wrote."""
    base: Path
    """Hugging Face folder of the model that the run began with."""
    out: Path
    """Folder to make; it gets model/ or adapter/."""
    adapter: Annotated[Path | None, hint("default: none", "DIR")] = None
    """PEFT adapter folder that the run began with, if it did."""
    merge: Flag[bool] = False
    """Also write the model with its adapters merged in, as the run did with --merge."""


def run(config: Replay) -> None:
    """Reads both, checks that they belong together, applies every step, and writes the result.

    Raises:
        ValueError, TypeError, OSError: bad input, or another base, with nothing written.
    """
    run_folder.check_free(config.out)
    trajectory = read_trajectory(config.trajectory)
    tuning = _tuning(config, trajectory.header)
    header, (trained, _) = trajectory.header, block_job.parts_of(tuning, None)
    steps = make_step(
        block_job.loss(tuning.model, is_choice=False, head_tokens=1),  # not run: a replay needs no data
        _sgd(header.recipe),
        estimator=TwoSided(header.recipe["num_directions"]),
        law=_law(header.recipe["law"]),
        write_every=header.recipe["write_every"],
        rounding=header.recipe["rounding"],
    )
    state = steps.init(trained, direction_key=run_trajectory.key_of(header))
    state = steps.flush(replayed(steps, state, trajectory))
    released = tuning.released(block_job.whole(state.params_in_place()))
    run_folder.new_run_folder(config.out, "")
    written = tuning_outputs.write_weights(
        config.out, released, base_model=header.about["base_model"], merged=config.merge
    )
    print(
        f"{trajectory.num_steps} steps of {header.about['method']} replayed; {export_trajectory.statement(trajectory)}"
    )
    print(f"released: {', '.join(str(config.out / name) for name in written)}")


def _tuning(config: Replay, header: Header) -> Tuning:
    """The parameters that the run began with.

    Raises:
        ValueError: the folder holds others.
    """
    if "model" not in header.about:
        raise ValueError(
            f"{config.trajectory} does not say how its parameters were made; jaxdp finetune did not write it. Use "
            "jaxdp.zeroth_order.replayed."
        )
    rebuilding: dict[str, Any] = header.about["model"]
    if rebuilding["has_adapter"] != (config.adapter is not None):
        raise ValueError(
            f"the run began with {'an' if rebuilding['has_adapter'] else 'no'} adapter folder, and --adapter is {config.adapter}; "
            f"{'give that folder' if rebuilding['has_adapter'] else 'leave it out'}."
        )
    if config.merge and not rebuilding["keep_float32"]:
        raise ValueError(
            "--merge: the run was not one with --merge, and its base was read in another precision; leave it out."
        )
    is_new = rebuilding["lora_rank"] is not None and config.adapter is None
    options = ModelOptions(
        model=config.base,
        tune=rebuilding["tune"],
        lora_rank=rebuilding["lora_rank"] if is_new else None,
        lora_alpha=rebuilding["lora_alpha"] if is_new else None,
        lora_targets=tuple(rebuilding["lora_targets"]) if is_new else (),
        adapter=config.adapter,
        from_scratch=rebuilding["from_scratch"],
        init_seed=rebuilding["init_seed"],
    )
    tuning, _ = tuning_job.load_tuning(
        options,
        dtype=rebuilding["dtype"],
        param_dtype=rebuilding["param_dtype"],
        keep_float32=rebuilding["keep_float32"],
    )
    found, expected = tuning.fingerprint(), header.about["base_sha256"]
    if found != expected:
        raise ValueError(
            f"{config.base} is not the model that the run began with, {header.about['base_model']}: its parameters have SHA-256 "
            f"{found[:16]}…, and the run's {expected[:16]}…; give that model's folder."
        )
    return tuning


def _sgd(recipe: dict[str, Any]) -> Sgd:
    """Learning rates are those of the trajectory."""
    window = recipe["momentum_window"] if recipe["momentum"] else None
    return Sgd(1.0, weight_decay=recipe["weight_decay"], momentum=recipe["momentum"], momentum_window=window)


def _law(recipe: dict[str, Any]) -> Law:
    values = {name: value for name, value in recipe.items() if name != "name"}
    return {"Rademacher": Rademacher, "Gaussian": Gaussian, "LowRank": LowRank}[recipe["name"]](**values)
