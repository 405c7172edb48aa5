"""Throughput and peak memory of one DP-SGD step: jaxdp, its peers, and training without privacy.

    python -m benchmarks.dp_sgd --peers jax_privacy,opacus,optax --preset mlp_small --json results.json

All contenders train one model on one batch: clipping at one norm, Gaussian noise of one multiplier, SGD. Those that can
split the batch run at the size of microbatch that a short run before finds fastest. Before anything is timed, each must
produce the update of the definition: the noiseless one to `checks.TOLERANCE`, and noise of the right standard deviation.
Then they run in turns, round after round, in this process. `jaxdp_clip_only` is jaxdp without its noise, so that the two
costs are seen apart; `jaxdp_low_memory` is jaxdp in microbatches that take no more memory than jax_privacy at its best.
Peak memory is what XLA reserves and, for PyTorch as well, how far the resident set of a fresh process rises while it runs
the contender alone.
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

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import checks, harness, tuning
from benchmarks.harness import Spread
from benchmarks.models import Mlp, Transformer
from benchmarks.peers import (
    METHODS,
    PEERS,
    Contender,
    Problem,
    Settings,
    choose,
    jaxdp_contender,
    memory_alone,
    parse_names,
)
from benchmarks.presets import PRESETS

_YARDSTICK_OF_MEMORY = "jax_privacy"
_DEFAULT_ROWS = {"mlp": 128, "transformer": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure one DP-SGD step of jaxdp and its peers against the non-private step.

    Attributes:
        peers: Comma-separated; those not installed are reported as skipped.
        methods: Comma-separated: the methods that jaxdp runs by, beside its own choice; per_layer is another mechanism,
            whose update is compared with its own definition.
        preset: A named problem; instead of `model`.
        model: The model to train, mlp by default; its size is set by the flags of its name.
        batch: Examples in the batch; by default the preset's, 128 for the mlp, 16 for the transformer.
        microbatch_size: Rows that jaxdp differentiates at once; by default all.
        tune: Run the others at their fastest microbatch size.
        tune_jaxdp: Run jaxdp at its fastest, too.
        low_memory: Also run jaxdp at the largest microbatch size at which XLA reserves no more than for jax_privacy.
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
    methods: str = ""
    preset: Literal["mlp_small", "transformer_d512", "transformer_d128"] | None = None
    model: Literal["mlp", "transformer"] | None = None
    batch: int | None = None
    microbatch_size: int | None = None
    tune: bool = True
    tune_jaxdp: bool = False
    low_memory: bool = False
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
        parse_names(self.peers, PEERS, "peer")
        parse_names(self.methods, METHODS, "method")
        if self.tune_jaxdp and (self.microbatch_size is not None or not self.tune):
            raise ValueError("tune_jaxdp chooses the microbatch size: leave out --microbatch-size and --no-tune.")
        if self.low_memory and _YARDSTICK_OF_MEMORY not in parse_names(self.peers, PEERS, "peer"):
            raise ValueError(f"low_memory compares with {_YARDSTICK_OF_MEMORY}: add it to --peers.")
        if self.preset is not None and self.model is not None:
            raise ValueError(f"preset {self.preset!r} is a model already: leave out --model.")
        for name in ("rounds", "noise_multiplier", "learning_rate", "batch", "microbatch_size", "l2_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")

    @property
    def problem(self) -> Problem:
        if self.preset is not None:
            model, rows = PRESETS[self.preset]
        else:
            model, rows = (
                self.transformer if self.model_name == "transformer" else self.mlp,
                _DEFAULT_ROWS[self.model_name],
            )
        return Problem(model, self.batch or rows, self.seed)

    @property
    def model_name(self) -> str:
        return self.preset or self.model or "mlp"


def measure(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    running, skipped = choose(
        parse_names(config.peers, PEERS, "peer"),
        parse_names(config.methods, METHODS, "method"),
        microbatch_size=config.microbatch_size,
        tune_jaxdp=config.tune_jaxdp,
    )
    problem = config.problem
    norms = checks.gradient_norms(problem)
    l2_clip_norm = float(np.median(norms)) if config.l2_clip_norm is None else config.l2_clip_norm
    settings = Settings(l2_clip_norm, config.noise_multiplier, config.learning_rate)

    load_before = os.getloadavg()
    tuned_on: dict[str, Any] = {}
    if config.tune:
        running, tuned_on = tuning.tune(running, problem, settings, turn_seconds=config.turn_seconds)
    if config.low_memory:
        running, skipped = with_low_memory(running, skipped, problem, settings)
    differences, references = checks.check_updates(running, problem, settings)
    trainers = {contender.name: contender.make(problem, settings) for contender in running}
    noise = checks.check_noise(running, trainers, problem, settings, references)
    for contender in running:
        if not contender.adds_noise:
            trainers[contender.name].step()  # the first step compiles

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
            "model": {"name": config.model_name, **dataclasses.asdict(problem.model)},  # type: ignore[call-overload]
            "num_params": problem.num_params(),
            "batch": problem.rows,
            "dtype": "float32",
            "rounds": config.rounds,
            "turn_seconds": config.turn_seconds,
            "seed": config.seed,
            **dataclasses.asdict(settings),
        },
        "tuning": {"rounds": tuning.ROUNDS, "contenders": tuned_on},
        "check": {
            "reference": checks.REFERENCE,
            "tolerance": checks.TOLERANCE,
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


def with_low_memory(
    running: list[Contender], skipped: dict[str, str], problem: Problem, settings: Settings
) -> tuple[list[Contender], dict[str, str]]:
    """Adds jaxdp at the largest microbatch size whose step takes no more memory than that of the yardstick."""

    def needs(contender: Contender) -> int:
        memory = contender.make(problem, settings).xla_memory
        assert memory is not None
        return memory()["bytes"]

    name = "jaxdp_low_memory"
    yardstick = [contender for contender in running if contender.name == _YARDSTICK_OF_MEMORY]
    if not yardstick:
        return running, skipped | {name: f"without {_YARDSTICK_OF_MEMORY} there is nothing to compare with"}
    limit, fitting = needs(yardstick[0]), None
    for size in (*(size for size in tuning.candidates(problem.rows) if size), None):
        contender = dataclasses.replace(jaxdp_contender(microbatch_size=size), name=name)
        if needs(contender) > limit:
            break
        fitting = contender
    if fitting is None:
        return running, skipped | {name: f"no microbatch size fits into the {limit:,} bytes of {_YARDSTICK_OF_MEMORY}"}
    return [*running, fitting], skipped


def _result(contender: Contender, times: dict[str, list[float]], rows: int) -> dict[str, Any]:
    seconds = times[contender.name]
    ratios = [own / base for own, base in zip(seconds, times[contender.baseline], strict=True)]
    return {
        "baseline": contender.baseline,
        "clipping": contender.policy,
        "microbatch_size": contender.microbatch_size,
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
    for header in ("examples/s", "time / non-private", "rows", "XLA memory", "process memory"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, result in record["contenders"].items():
        by_meter = {entry["meter"]: entry["bytes"] for entry in result["peak_memory"]}
        is_baseline = result["baseline"] == name
        table.add_row(
            name,
            _interval(result["examples_per_second"], ".4g"),
            "1" if is_baseline else _interval(result["time_over_baseline_summary"], ".3g"),
            str(result["microbatch_size"] or "-"),
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
    Console(width=None if sys.stdout.isatty() else 132).print(tabulate(record))


if __name__ == "__main__":
    main()
