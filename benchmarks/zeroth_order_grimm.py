r"""Grimm's tales without a backward pass: MeZO, LOZO and FZOO on a streamed model, beside backpropagation.

    python -m benchmarks.zeroth_order_grimm --text GrimmsFairyTales.txt --model stories260K-hf \
        --json benchmarks/results/zeroth_order_grimm.json

Full fine-tuning on the tales before the held-out ones of `benchmarks.grimm`, without privacy. Blocks stream from host memory,
which on a CPU is a copy. Every method has the time of the same number of forward passes, of which a backward pass counts as
two. Learning rates were tuned on these tales. The loss of a step is that of its batch; curves are smoothed. A record that is
there already, with the same settings, keeps the methods that are not run again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
from benchmarks.grimm import split
from jaxdp import text
from jaxdp.block_model import BlockParams, loss_fn
from jaxdp.models import load_model, load_tokenizer
from jaxdp.text import language_model_blocks
from jaxdp.zeroth_order import LowRank, OneSided, Placement, Rademacher, Sgd, TwoSided, make_step

#: Estimator, law of the directions, and update.
METHODS = {
    "mezo": (TwoSided(1, 1e-3), Rademacher(), {"learning_rate": 2e-4}),
    "lozo": (TwoSided(1, 1e-3), LowRank(rank=2, refresh_every=50), {"learning_rate": 2e-4}),
    "fzoo": (OneSided(8, 1e-3), Rademacher(), {"learning_rate": 2e-3, "is_normalized": True}),
}
#: Of SGD along the gradient.
_BACKPROP_RATE = 0.1
#: Forward passes that take as long as a step.
PASSES_PER_STEP = {"mezo": 2, "lozo": 2, "fzoo": 9, "backprop": 3}
_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes on most of Grimm's tales by forward passes, and reports the perplexity on the others."""

    text: Path
    """GrimmsFairyTales.txt of Project Gutenberg, without its header."""
    model: Path
    """Hugging Face folder of the model."""
    num_passes: int = 1200
    """Forward passes of every method, or time of as many."""
    batch: int = 16
    """Paragraphs in a batch."""
    methods: tuple[str, ...] = tuple(PASSES_PER_STEP)
    """Which."""
    seed: int = 0
    """Of batches and directions."""
    json: Path | None = None
    """Where to write the record; the figure goes beside it."""

    def num_steps(self, method: str) -> int:
        """Steps of a method."""
        return self.num_passes // PASSES_PER_STEP[method]

    def settings(self) -> dict[str, Any]:
        """What all methods share."""
        return {"num_passes": self.num_passes, "batch": self.batch, "length": _LENGTH, "seed": self.seed}


@dataclasses.dataclass(frozen=True)
class _Task:
    model: Any
    blocks: Any
    params: BlockParams
    training: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    def batches(self, config: Config, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(config.seed)
        num_rows = len(self.training["tokens"])
        for _ in range(num_steps):
            rows = rng.choice(num_rows, config.batch, replace=False)
            yield {name: values[rows] for name, values in self.training.items()}

    def perplexity(self, params: BlockParams) -> float:
        whole = {**params.resident, "blocks": params.blocks}
        return text.evaluate_language_model(self.model.logits, whole, self.held_out, batch_rows=16).perplexity


def run(config: Config) -> dict[str, Any]:
    """Runs every method, and returns the record that is written."""
    task = _task(config)
    record: dict[str, Any] = {
        "benchmark": "perplexity on held-out tales of Grimm after fine-tuning by forward passes, without privacy",
        "model": config.model.name,
        "command": "python -m benchmarks.zeroth_order_grimm --text GrimmsFairyTales.txt --model stories260K-hf "
        f"--num-passes {config.num_passes} --batch {config.batch} --seed {config.seed}",
        "config": config.settings(),
        "perplexity_before": task.perplexity(task.params),
        "machine": harness.machine(),
        "versions": {"jax": jax.__version__},
        "runs": _others(config),
    }
    for name in config.methods:
        begin = time.perf_counter()
        params, losses = _backprop(task, config) if name == "backprop" else _zeroth_order(task, config, name)
        after = task.perplexity(params)
        record["runs"].append(
            {
                "method": name,
                "settings": {"learning_rate": _BACKPROP_RATE} if name == "backprop" else _settings(name),
                "num_steps": config.num_steps(name),
                "perplexity_after": after,
                "fall": 1 - after / record["perplexity_before"],
                "seconds": time.perf_counter() - begin,
                "losses": [round(float(value), 4) for value in _smoothed(losses)],
            }
        )
        print(
            f"{name}: {record['perplexity_before']:.2f} to {after:.2f} ({record['runs'][-1]['fall']:.1%} lower)",
            flush=True,
        )
        if config.json is not None:
            harness.write_json(config.json, record)
            config.json.with_suffix(".png").write_bytes(_figure(record))
    return record


def _task(config: Config) -> _Task:
    pretrained, tokenizer = load_model(config.model), load_tokenizer(config.model)
    private, public = split(config.text.read_text(encoding="utf-8"))
    training, _ = text.encode_texts(_records(private), tokenizer, max_length=_LENGTH, on_long="truncate")
    held_out, _ = text.encode_texts(
        _records(public), tokenizer, max_length=_LENGTH, max_sequences=None, on_long="split"
    )
    params = pretrained.params
    resident = {part: params[part] for part in ("embed", "head") if part in params}
    blocks = language_model_blocks(pretrained.model)
    return _Task(pretrained.model, blocks, BlockParams(resident, params["blocks"]), training, held_out)


def _others(config: Config) -> list[dict[str, Any]]:
    """The methods of an earlier run with these settings that are not run again."""
    if config.json is None or not config.json.exists():
        return []
    record = json.loads(config.json.read_text())
    if record["config"] != config.settings():
        raise ValueError(f"{config.json} has other settings, {record['config']}; remove it, or write another file.")
    return [run for run in record["runs"] if run["method"] not in config.methods]


def _records(paragraphs: list[str]) -> list[text.Record]:
    return [text.Record(prompt="", completion=paragraph) for paragraph in paragraphs]


def _settings(name: str) -> dict[str, Any]:
    estimator, law, update = METHODS[name]
    return {"estimator": repr(estimator), "law": repr(law), **update}


def _zeroth_order(task: _Task, config: Config, name: str) -> tuple[BlockParams, np.ndarray]:
    estimator, law, update = METHODS[name]
    num_steps = config.num_steps(name)
    rate = optax.linear_schedule(update["learning_rate"], 0.0, num_steps)
    steps = make_step(
        task.blocks,
        Sgd(**{**update, "learning_rate": rate}),
        estimator=estimator,
        law=law,
        placement=Placement(is_streamed=True),
    )
    state = steps.init(task.params, direction_key=jax.random.key(config.seed))
    losses = []
    for batch in task.batches(config, num_steps):
        state, info = steps.step(state, batch)
        losses.append(info.not_private.mean_loss())
    return steps.flush(state).params(), np.asarray(jax.device_get(losses))


def _backprop(task: _Task, config: Config) -> tuple[BlockParams, np.ndarray]:
    num_steps = config.num_steps("backprop")
    tx = optax.sgd(optax.linear_schedule(_BACKPROP_RATE, 0.0, num_steps))

    def mean_loss(params: BlockParams, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(lambda example: loss_fn(task.blocks, params, example))(batch))

    @jax.jit
    def step(params: BlockParams, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params: Any = jax.tree.map(jnp.asarray, task.params)
    opt_state, losses = tx.init(params), []
    for batch in task.batches(config, num_steps):
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(loss)
    return params, np.asarray(jax.device_get(losses))


def _smoothed(losses: np.ndarray, num_points: int = 25) -> np.ndarray:
    """Means of equal stretches."""
    return np.asarray([part.mean() for part in np.array_split(losses, min(num_points, len(losses)))])


def _figure(record: dict[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for found in record["runs"]:
        passes = (np.arange(len(found["losses"])) + 0.5) / len(found["losses"]) * record["config"]["num_passes"]
        axis.plot(passes, found["losses"], label=f"{found['method']}: perplexity {found['perplexity_after']:.2f}")
    axis.set(xlabel="time in forward passes", ylabel="training loss")
    axis.set_title(f"Grimm's tales, {record['model']}: perplexity {record['perplexity_before']:.2f} before")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run(tyro.cli(Config))
