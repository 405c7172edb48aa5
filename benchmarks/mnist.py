"""MNIST at epsilon 3: test accuracy of `jaxdp train --dataset mnist`, over several runs with fresh noise and sampling.

    python -m benchmarks.mnist --data-dir DIR --json benchmarks/results/mnist_epsilon3.json

Only `--data-dir` is needed; the hyper-parameters are the command's defaults. The non-private run is the same command with
`--no-privacy`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks import harness
from jaxdp.cli import train


@dataclasses.dataclass(frozen=True)
class Mnist:
    """Trains MNIST privately and reports the test accuracy."""

    data_dir: Path
    """Folder of the four IDX files."""
    json: Path | None = None
    """Where to write the record."""
    runs: int = 3
    """Private runs; each draws its own noise and batches."""
    target_epsilon: float = 3.0
    target_delta: float = 1e-5
    num_steps: int | None = None
    """Default: that of `jaxdp train`."""


_REPORTED = (
    "epsilon", "delta", "neighboring_relation", "accountant", "noise_multiplier", "clipping", "sampling_prob",
    "padded_batch_size", "num_steps", "num_examples", "expected_batch_size", "num_parameters", "num_test_examples",
)  # fmt: skip


def run(config: Mnist) -> dict[str, Any]:
    """Runs the private runs and one baseline, and returns the record that is written."""
    private = [_train(config) for _ in range(config.runs)]
    baseline = _train(config, no_privacy=True)
    accuracies = [report["test_accuracy"] for report in private]
    record = {
        "benchmark": "test accuracy of a private classifier on MNIST",
        "command": harness.command("benchmarks.mnist", _public(sys.argv[1:])),
        "machine": harness.machine(),
        "versions": private[0]["versions"],
        "plan": {name: private[0][name] for name in _REPORTED},
        "settings": private[0]["settings"],
        "test_accuracy": {
            "median": statistics.median(accuracies),
            "min": min(accuracies),
            "max": max(accuracies),
            "runs": accuracies,
        },
        "test_accuracy_without_privacy": baseline["test_accuracy"],
        "wall_seconds": [report["wall_seconds"] for report in private],
        "wall_seconds_without_privacy": baseline["wall_seconds"],
        "peak_host_bytes": max(report["peak_host_bytes"] for report in private),
        "peak_host_bytes_meter": private[0]["peak_host_bytes_meter"],
    }
    if config.json is not None:
        harness.write_json(config.json, record)
    return record


def _train(config: Mnist, *, no_privacy: bool = False) -> dict[str, Any]:
    goal: dict[str, Any] = {"no_privacy": True} if no_privacy else {"target_epsilon": config.target_epsilon}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train.run(
            train.Train(
                dataset="mnist",
                data_dir=config.data_dir,
                target_delta=config.target_delta,
                num_steps=config.num_steps,
                out=out,
                **goal,
            )
        )
        return json.loads((out / "report.json").read_text())


def _public(arguments: list[str]) -> list[str]:
    """The arguments as another machine would write them."""
    position = arguments.index("--data-dir") + 1 if "--data-dir" in arguments else len(arguments)
    return [*arguments[:position], "DIR", *arguments[position + 1 :]] if position < len(arguments) else arguments


if __name__ == "__main__":
    result = run(tyro.cli(Mnist))
    accuracy = result["test_accuracy"]
    print(f"test accuracy {accuracy['median']:.4f} (min {accuracy['min']:.4f}, max {accuracy['max']:.4f}) at epsilon 3")
