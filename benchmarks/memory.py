"""Compiled temporary memory of one GPT-2 step: jaxdp by every method, its peers in JAX, and training without privacy.

    python -m benchmarks.memory --json benchmarks/results/memory_gpt2_small.json

Everything is compiled and nothing is run, so it takes no more memory than the compiler does. The number is XLA's own
`temp_size_in_bytes`: what the step needs beside its arguments and results. Each form of the model is compiled for itself:
`unrolled` keeps all activations, `scan_remat` scans over the blocks and recomputes them in the backward pass.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.language_models import Gpt2
from benchmarks.peers import METHODS, NON_PRIVATE, OTHERS, Contender, Problem, Settings, jaxdp_contender, parse_names

FORMS = {
    "unrolled": {"scan": False, "remat": False},
    "unrolled_remat": {"scan": False, "remat": True},
    "scan": {"scan": True, "remat": False},
    "scan_remat": {"scan": True, "remat": True},
}
_PEERS = ("optax", "jax_privacy")
_SETTINGS = Settings(l2_clip_norm=1.0, noise_multiplier=1.0, learning_rate=0.01)
_TAKES_MICROBATCHES = (NON_PRIVATE.name, "jax_privacy")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile one step of GPT-2 and read off its temporary memory.

    Attributes:
        methods: Comma-separated: the methods of jaxdp.
        peers: Comma-separated; those not installed are reported as skipped.
        forms: Comma-separated: unrolled, unrolled_remat, scan, scan_remat.
        batch: Examples in the batch.
        microbatch_size: Compile each contender that can split the batch at this size, too; 0 for none.
        gpt2: The model, GPT-2 small by default; `forms` decides on scan and remat.
        json: File to write the record to, after each row.
    """

    methods: str = ",".join(METHODS)
    peers: str = ",".join(_PEERS)
    forms: str = "unrolled,scan_remat"
    batch: int = 32
    microbatch_size: int = 8
    gpt2: Gpt2 = dataclasses.field(default_factory=lambda: Gpt2.of_size("small"))
    json: Path | None = None

    def __post_init__(self) -> None:
        parse_names(self.methods, METHODS, "method")
        parse_names(self.peers, _PEERS, "peer")
        parse_names(self.forms, tuple(FORMS), "form")
        if self.microbatch_size < 0 or (self.microbatch_size and self.batch % self.microbatch_size):
            raise ValueError(f"microbatch_size must divide the batch of {self.batch}, got {self.microbatch_size}.")


def contenders(config: Config) -> tuple[list[Contender], dict[str, str]]:
    """What to compile for each form of the model, the baseline first; and what cannot be compiled here, with the reason."""
    wanted = [NON_PRIVATE, *map(jaxdp_contender, parse_names(config.methods, METHODS, "method"))]
    wanted += [contender for contender in OTHERS if contender.peer in parse_names(config.peers, _PEERS, "peer")]
    reasons = {contender.name: contender.why_skipped() for contender in wanted}
    rows: list[Contender] = []
    for contender in wanted:
        if reasons[contender.name] is None:
            rows.append(contender)
            splits = contender.name in _TAKES_MICROBATCHES or contender.name.startswith("jaxdp")
            if config.microbatch_size and splits:
                rows.append(contender.with_microbatch_size(config.microbatch_size))
    return rows, {name: reason for name, reason in reasons.items() if reason is not None}


def measure(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Compiles everything and returns the record."""
    rows, skipped = contenders(config)
    packages = {"jaxdp", *(package for contender in rows for package in contender.packages)}
    record: dict[str, Any] = {
        "benchmark": "memory",
        "command": harness.command("benchmarks.memory", arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": harness.machine(),
        "device": harness.device(),
        "environment": harness.environment(),
        "versions": harness.versions(packages),
        "jaxdp_source_digest": harness.source_digest("jaxdp"),
        "meter": "XLA compiled memory_analysis, temp_size_in_bytes",
        "config": {
            "model": dataclasses.asdict(config.gpt2),
            "num_params": Problem(config.gpt2, config.batch, 0).num_params(),
            "batch": config.batch,
        },
        "skipped": skipped,
        "rows": [],
    }
    for form in parse_names(config.forms, tuple(FORMS), "form"):
        problem = Problem(dataclasses.replace(config.gpt2, **FORMS[form]), config.batch, seed=0)
        baseline: int | None = None
        for contender in rows:
            row = {"form": form, "contender": contender.name, "microbatch_size": contender.microbatch_size}
            row |= _compiled(contender, problem)
            if contender == NON_PRIVATE:
                baseline = row.get("temp_bytes")
            if baseline and "temp_bytes" in row:
                row["temp_over_non_private"] = row["temp_bytes"] / baseline
            record["rows"].append(row)
            if config.json is not None:
                harness.write_json(config.json, record)
    return record


def _compiled(contender: Contender, problem: Problem) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        trainer = contender.make(problem, _SETTINGS)
        assert trainer.xla_memory is not None  # those outside JAX are not in the list
        memory = trainer.xla_memory()
    except Exception as error:  # the next one may still compile
        return {"error": f"{type(error).__name__}: {error}"}
    return {"temp_bytes": memory["temp_bytes"], "memory": memory, "compile_seconds": time.perf_counter() - start}


def tabulate(record: dict[str, Any]) -> Table:
    model, config = record["config"]["model"], record["config"]
    table = Table(
        title=f"Temporary memory of one step: GPT-2, {config['num_params']:,} parameters, {config['batch']} x "
        f"{model['length']} tokens, {model['dtype']}, {record['device']['kind']}"
    )
    for header in ("form", "contender"):
        table.add_column(header, no_wrap=True)
    for header in ("rows at once", "GiB", "/ non-private", "compile s"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in record["rows"]:
        cells = [row["form"], row["contender"], str(row["microbatch_size"] or config["batch"])]
        if "error" in row:
            cells.append(row["error"].splitlines()[0][:60])
        else:
            cells += [f"{row['temp_bytes'] / 2**30:.2f}", f"{row.get('temp_over_non_private', float('nan')):.2f}"]
            cells.append(f"{row['compile_seconds']:.0f}")
        table.add_row(*cells)
    for name, reason in record["skipped"].items():
        table.add_row("", name, f"skipped: {reason}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, prog="python -m benchmarks.memory")
    record = measure(config, arguments)
    Console(width=None if sys.stdout.isatty() else 120).print(tabulate(record))
    if any("error" in row for row in record["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
