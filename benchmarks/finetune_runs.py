"""What the benchmarks of `jaxdp finetune` share: one run of the command, and what of its report goes into a record."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from jaxdp.cli import main

_REPORTED = (
    "epsilon", "delta", "neighboring_relation", "accountant", "privacy_unit", "noise_multiplier", "clipping", "sampling_prob",
    "padded_batch_size", "num_steps", "num_examples", "expected_batch_size", "num_trainable_parameters", "wall_seconds",
    "peak_host_bytes", "peak_host_bytes_meter",
)  # fmt: skip
_PATHS = ("--model", "--data", "--eval")


def finetune(
    model: Path, data: Path, held_out: Path, options: list[str], *, out: Path, keep: bool = False
) -> dict[str, Any]:
    """Runs the command and returns the row of the record: command, plan, settings, and the scores `before` and `after`.

    The command is written without the folders of the machine that it ran on. With `keep`, a finished run in `out` stays as it is.
    """
    arguments = ["finetune", "--model", str(model), "--data", str(data), "--eval", str(held_out), *options]
    if not (keep and (out / "report.json").exists()):
        main([*arguments, "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    shown = [
        Path(value).name if previous in _PATHS else value
        for previous, value in zip(["", *arguments[:-1]], arguments, strict=True)
    ]
    return {
        "command": shlex.join(["jaxdp", *shown]),
        "before": report["evaluation"]["before"],
        "after": report["evaluation"]["after"],
        **{name: report[name] for name in _REPORTED},
        "settings": report["settings"],
        "tokens_per_second": report["not_private"]["tokens_per_second"],
        "versions": report["versions"],
    }


def without_versions(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The versions, which are the same in all rows, and the rows without them."""
    versions = rows[0]["versions"]
    assert all(row["versions"] == versions for row in rows)
    return versions, [{name: value for name, value in row.items() if name != "versions"} for row in rows]


def goal_of(row: dict[str, Any]) -> str:
    """How a row is called in print."""
    return "without privacy" if row["epsilon"] is None else f"epsilon {row['epsilon']:.3g}"
