"""Throughput and peak memory of one DP-SGD step: jaxdp, its peers, and training without privacy.

    python -m benchmarks.dp_sgd --peers jax_privacy,opacus,optax --model mlp --json results.json

All contenders train one model on one batch: flat clipping at one norm, Gaussian noise of one multiplier, SGD. Before anything
is timed, each must produce jaxdp's update: the noiseless one to `TOLERANCE`, and noise of the right standard deviation. Then
they run in turns, round after round, in this process. Peak memory is what XLA reserves and, for PyTorch as well, how far the
resident set of a fresh process rises while it runs the contender alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import Spread
from benchmarks.models import Mlp, Model, Params, Transformer
from benchmarks.peers import CONTENDERS, PEERS, Contender, Problem, Settings, Trainer, memory_alone, parse_peers

# Float32 implementations of one sum differ by rounding, some 1e-7; jaxdp also clips a few units in the last place below the
# clip norm, so that rounding cannot exceed it, and Opacus adds 1e-6 to every norm.
TOLERANCE = 1e-5

# The check reads the update off the parameters, so a step must move them far enough for rounding not to matter.
CHECK_LEARNING_RATE = 1024.0

_DEFAULT_ROWS = {"mlp": 128, "transformer": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure one DP-SGD step of jaxdp and its peers against the non-private step.

    Attributes:
        peers: Comma-separated; those not installed are reported as skipped.
        model: The model to train; its size is set by the flags of its name.
        batch: Examples in the batch; by default 128 for the mlp, 16 for the transformer.
        rounds: Turns of each contender.
        turn_seconds: A turn repeats its step for about this long.
        l2_clip_norm: The clip norm; by default the median gradient norm, so that half of the examples are clipped.
        noise_multiplier: Noise standard deviation over the clip norm.
        learning_rate: Of SGD.
        seed: Of the parameters and the batch.
        process_memory: Also run each contender alone in a fresh process, to see its resident set.
        json: File to write the record to.
        mlp: Size of the mlp.
        transformer: Size of the transformer.
    """

    peers: str = ",".join(PEERS)
    model: Literal["mlp", "transformer"] = "mlp"
    batch: int | None = None
    rounds: int = 10
    turn_seconds: float = 0.5
    l2_clip_norm: float | None = None
    noise_multiplier: float = 1.0
    learning_rate: float = 0.01
    seed: int = 0
    process_memory: bool = True
    json: Path | None = None
    mlp: Mlp = dataclasses.field(default_factory=Mlp)
    transformer: Transformer = dataclasses.field(default_factory=Transformer)

    def __post_init__(self) -> None:
        parse_peers(self.peers)
        for name in ("rounds", "noise_multiplier", "learning_rate", "batch", "l2_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")

    @property
    def problem(self) -> Problem:
        model: Model = self.mlp if self.model == "mlp" else self.transformer
        return Problem(model, self.batch or _DEFAULT_ROWS[self.model], self.seed)


def gradient_norms(problem: Problem) -> np.ndarray:
    """The gradient norm of each example at the initial parameters, `[B]`."""
    params = problem.params()

    @jax.jit
    def norms(batch: Any) -> jax.Array:
        return jax.lax.map(lambda example: optax.tree.norm(jax.grad(problem.model.loss)(params, example)), batch)

    return np.asarray(norms(problem.batch()))


def choose(peers: str) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run here, and peer -> reason for those that do not."""
    wanted = parse_peers(peers)
    running: list[Contender] = []
    skipped: dict[str, str] = {}
    for contender in CONTENDERS:
        if contender.peer is not None and contender.peer not in wanted:
            continue
        reason = contender.why_skipped()
        if reason is None:
            running.append(contender)
        else:
            skipped[str(contender.peer)] = reason
    return running, skipped


def _gradient(trainer: Trainer, before: Params, learning_rate: float) -> np.ndarray:
    """What one step of SGD subtracted, over the learning rate, as one vector."""
    trainer.step()
    after = trainer.params()
    assert after.keys() == before.keys()
    return np.concatenate(
        [(before[name].astype(np.float64) - after[name]).ravel() / learning_rate for name in sorted(before)]
    )


def check_updates(
    contenders: Sequence[Contender], problem: Problem, settings: Settings
) -> tuple[dict[str, Any], np.ndarray]:
    """Compares the noiseless update of every contender with jaxdp's.

    The private ones are compared at the clip norm of the benchmark, the others with jaxdp at an infinite clip norm.

    Returns:
        Name -> the relative L2 difference; and the noiseless private gradient.

    Raises:
        RuntimeError: a contender computes something else.
    """
    (ours,) = [contender for contender in CONTENDERS if contender.name == "jaxdp"]
    before = problem.params()
    quiet = dataclasses.replace(settings, noise_multiplier=0.0, learning_rate=CHECK_LEARNING_RATE)

    def gradient(contender: Contender, l2_clip_norm: float) -> np.ndarray:
        trainer = contender.make(problem, dataclasses.replace(quiet, l2_clip_norm=l2_clip_norm))
        return _gradient(trainer, before, CHECK_LEARNING_RATE)

    references = {True: gradient(ours, settings.l2_clip_norm), False: gradient(ours, math.inf)}
    differences: dict[str, float] = {}
    for contender in contenders:
        if contender.name == ours.name:
            continue
        reference = references[contender.is_private]
        difference = np.linalg.norm(gradient(contender, settings.l2_clip_norm) - reference) / np.linalg.norm(reference)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{contender.name} does not compute the update of jaxdp: without noise they differ by {difference:.2g} "
                f"(relative L2, tolerance {TOLERANCE:g}); timing them against each other would mean nothing."
            )
        differences[contender.name] = float(difference)
    return differences, references[True]


def check_noise(
    trainers: dict[str, Trainer], problem: Problem, settings: Settings, noiseless: np.ndarray
) -> dict[str, Any]:
    """Compares the standard deviation of each private contender's noise with sigma C / B; runs one step of each.

    Raises:
        RuntimeError: a contender adds another amount of noise.
    """
    expected = settings.noise_multiplier * settings.l2_clip_norm / problem.rows
    tolerance = 6 / math.sqrt(2 * noiseless.size) + 1e-3  # six standard errors
    measured: dict[str, float] = {}
    for name, trainer in trainers.items():
        noise = _gradient(trainer, problem.params(), settings.learning_rate) - noiseless
        measured[name] = float(np.sqrt(np.mean(np.square(noise))))
        if not abs(measured[name] / expected - 1) <= tolerance:
            raise RuntimeError(
                f"{name} adds noise of standard deviation {measured[name]:.6g}, expected {expected:.6g}."
            )
    return {"expected": expected, "relative_tolerance": tolerance, "measured": measured}


def measure(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    running, skipped = choose(config.peers)
    problem = config.problem
    norms = gradient_norms(problem)
    l2_clip_norm = float(np.median(norms)) if config.l2_clip_norm is None else config.l2_clip_norm
    settings = Settings(l2_clip_norm, config.noise_multiplier, config.learning_rate)

    load_before = os.getloadavg()
    differences, noiseless = check_updates(running, problem, settings)
    trainers = {contender.name: contender.make(problem, settings) for contender in running}
    private = {contender.name: trainers[contender.name] for contender in running if contender.is_private}
    noise = check_noise(private, problem, settings, noiseless)
    for name in trainers.keys() - private.keys():
        trainers[name].step()  # the first step compiles

    times, counts = harness.alternate(
        {name: trainer.step for name, trainer in trainers.items()},
        rounds=config.rounds,
        turn_seconds=config.turn_seconds,
    )
    load_after = os.getloadavg()
    memory: dict[str, list[dict[str, Any]]] = {
        name: [] if trainer.xla_memory is None else [trainer.xla_memory()] for name, trainer in trainers.items()
    }
    trainers.clear()
    private.clear()
    if config.process_memory:
        for contender in running:
            memory[contender.name].append(harness.in_fresh_process(memory_alone, contender, problem, settings))

    packages = {"jaxdp", "jax", "jaxlib", *(package for contender in running for package in contender.packages)}
    return {
        "benchmark": "dp_sgd",
        "command": harness.command("benchmarks.dp_sgd", arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": harness.machine() | {"load_average_before": load_before, "load_average_after": load_after},
        "device": harness.device(),
        "environment": harness.environment(),
        "versions": harness.versions(packages),
        "jaxdp_source_digest": harness.source_digest("jaxdp"),
        "config": {
            "model": {"name": config.model, **dataclasses.asdict(problem.model)},
            "num_params": sum(leaf.size for leaf in problem.params().values()),
            "batch": problem.rows,
            "dtype": "float32",
            "rounds": config.rounds,
            "turn_seconds": config.turn_seconds,
            "seed": config.seed,
            **dataclasses.asdict(settings),
        },
        "check": {
            "reference": "jaxdp",
            "tolerance": TOLERANCE,
            "relative_difference_without_noise": differences,
            "noise_stddev": noise,
            "fraction_of_examples_clipped": float(np.mean(norms > l2_clip_norm)),
        },
        "skipped": skipped,
        "contenders": {
            contender.name: _result(contender, times, problem.rows)
            | {"steps_per_turn": counts[contender.name], "peak_memory": memory[contender.name]}
            for contender in running
        },
    }


def _result(contender: Contender, times: dict[str, list[float]], rows: int) -> dict[str, Any]:
    seconds = times[contender.name]
    ratios = [own / base for own, base in zip(seconds, times[contender.baseline], strict=True)]
    return {
        "baseline": contender.baseline,
        "seconds_per_step": seconds,
        "seconds_per_step_summary": dataclasses.asdict(Spread.of(seconds)),
        "examples_per_second": dataclasses.asdict(Spread.of([rows / value for value in seconds])),
        "time_over_baseline": ratios,
        "time_over_baseline_summary": dataclasses.asdict(Spread.of(ratios)),
    }


def tabulate(record: dict[str, Any]) -> Table:
    config = record["config"]
    table = Table(
        title=f"One DP-SGD step: {config['model']['name']}, {config['num_params']:,} parameters, batch {config['batch']}, "
        f"{record['device']['kind']}\nmedian and quartiles of {config['rounds']} rounds"
    )
    table.add_column("contender", no_wrap=True)
    for header in ("examples/s", "time / non-private", "XLA memory", "process memory"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, result in record["contenders"].items():
        by_meter = {entry["meter"]: entry["bytes"] for entry in result["peak_memory"]}
        is_baseline = result["baseline"] == name
        table.add_row(
            name,
            _interval(result["examples_per_second"], ".4g"),
            "1" if is_baseline else _interval(result["time_over_baseline_summary"], ".3g"),
            *(_mebibytes(by_meter.get(meter)) for meter in (harness.XLA_METER, harness.PROCESS_METER)),
        )
    for peer, reason in record["skipped"].items():
        table.add_row(peer, f"skipped: {reason}")
    return table


def _interval(spread: dict[str, float], spec: str) -> str:
    return f"{spread['median']:{spec}} ({spread['q25']:{spec}} to {spread['q75']:{spec}})"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, prog="python -m benchmarks.dp_sgd")
    harness.let_idle_threads_sleep()
    record = measure(config, arguments)
    if config.json is not None:
        harness.write_json(config.json, record)
    Console(width=None if sys.stdout.isatty() else 120).print(tabulate(record))


if __name__ == "__main__":
    main()
