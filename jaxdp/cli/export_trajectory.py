"""`jaxdp export-trajectory`: a run of a zeroth-order method as a few kilobytes, to publish in the place of its model.

The journal of a run holds nothing secret: its noise key, sampling and losses lie elsewhere. What is exported is the journal up to
its last complete step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from dp_accounting import NeighboringRelation

from jaxdp import accounting
from jaxdp._files import write_whole
from jaxdp.accounting import SampledRelease
from jaxdp.cli import cost, run_trajectory
from jaxdp.cli.options import hint
from jaxdp.zeroth_order import Trajectory, read_trajectory

_OF_PLAN = {
    "accountant",
    "neighboring_relation",
    "noise",
    "noise_multiplier",
    "num_examples",
    "padded_batch_size",
    "sampling_prob",
    "target_delta",
}


@dataclasses.dataclass(frozen=True)
class ExportTrajectory:
    """Writes the directions' key and the released scalars of a run, with its plan and epsilon, and without the noise key.

    jaxdp export-trajectory runs/opt-125m
    """

    run: tyro.conf.Positional[Path]
    """Output folder of `jaxdp finetune` with a zeroth-order method."""
    out: Annotated[Path | None, hint("default: RUN/released.jaxdpzo", "FILE")] = None
    """File to write."""


def run(config: ExportTrajectory) -> None:
    """Checks the journal of a run, writes its complete steps, and says what they cost.

    Raises:
        ValueError, OSError: the folder holds no such run, or the file exists.
    """
    journal = run_trajectory.path_in(config.run)
    if not journal.is_file():
        raise FileNotFoundError(
            f"{config.run} has no {run_trajectory.NAME}; give the output folder of jaxdp finetune with --method mezo, lozo, fzoo, "
            "dpzero or dp-aggzo."
        )
    out = config.run / "released.jaxdpzo" if config.out is None else config.out
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing was overwritten. Choose another --out.")
    trajectory = read_trajectory(journal)
    said = statement(trajectory)
    content = journal.read_bytes()[: trajectory.num_bytes]
    write_whole(out, content)
    print(f"{trajectory.num_steps} steps, {len(content):,} bytes: {out}")
    print(said)


def statement(trajectory: Trajectory) -> str:
    """What the steps that a trajectory holds cost, by the numbers of its plan.

    Raises:
        ValueError: the plan lacks a number, as that of another version may.
    """
    privacy = trajectory.header.privacy
    if privacy is not None and (missing := sorted(_OF_PLAN - privacy.keys())):
        raise ValueError(
            f"the plan of this trajectory lacks {', '.join(missing)}; it was written by another version of jaxdp "
            f"({trajectory.header.about.get('jaxdp', 'unknown')}): use that version."
        )
    if privacy is None or privacy["noise_multiplier"] == 0:
        return (
            "epsilon infinite: this trajectory is not private. Publish it only if its training data may be published."
        )
    epsilon = accounting.epsilon(
        [
            SampledRelease(
                noise=privacy["noise"],
                num_examples=privacy["num_examples"],
                sampling_prob=privacy["sampling_prob"],
                padded_batch_size=privacy["padded_batch_size"],
                noise_multiplier=privacy["noise_multiplier"],
                num_steps=trajectory.num_steps,
            )
        ],
        privacy["target_delta"],
        neighboring_relation=NeighboringRelation[privacy["neighboring_relation"]],
        accountant=privacy["accountant"],
    )
    numbers: Any = {"relation": privacy["neighboring_relation"], "accountant": privacy["accountant"]}
    unit = trajectory.header.about.get("unit")
    spent = cost.cost_in_words(epsilon, privacy["target_delta"], **numbers, unit=unit)
    weak = accounting.judge(epsilon, privacy["target_delta"], privacy["num_examples"], unit=unit or "record")
    return "\nweak guarantee: ".join([f"epsilon {spent}, for the trajectory and every model made from it", *weak])
