"""SST-2 under differential privacy: accuracy of `jaxdp finetune` on a small model of TinyStories, full and LoRA.

    python -m benchmarks.sst2 --folder sst2 --model stories260K-hf --tune lora --json benchmarks/results/sst2_lora.json

One phrase is one privacy unit; a phrase may be part of another, which the guarantee does not know. Accuracy is that on the 872
sentences of GLUE's validation set. The two words of the classes are one token each in this vocabulary of 512, so that one
sequence scores both. The settings were tuned on SST-2, which is public; on private text the tuning would cost privacy. The
clip norm is near the norms of the gradients: with one far below them every record has one vote whatever its loss, and the
model falls to the larger class.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import finetune_runs, harness

SETTINGS = [
    "--text-field", "sentence", "--label-field", "label", "--verbalizers", "0=little,1=happy", "--max-length", "48",
    "--on-long", "truncate", "--expected-batch-size", "768", "--optimizer", "adam", "--schedule", "cosine",
    "--warmup-steps", "20", "--l2-clip-norm", "30", "--microbatch-size", "64",
]  # fmt: skip
#: What is trained, and the learning rate that suits it.
TUNED = {"full": ["--learning-rate", "1e-3"], "lora": ["--lora-rank", "8", "--learning-rate", "5e-3"]}


@dataclasses.dataclass(frozen=True)
class Sst2:
    """Fine-tunes on SST-2 with and without privacy, and reports the accuracies."""

    folder: Path
    """Folder of train.tsv and test.tsv with the columns sentence and label; test.tsv holds GLUE's validation set."""
    model: Path
    """Hugging Face folder of the model."""
    tune: Literal["full", "lora"] = "full"
    """What is trained."""
    json: Path | None = None
    """Where to write the record."""
    runs: Path | None = None
    """Where to keep the runs; a temporary folder by default."""
    target_epsilon: float = 3.0
    """The privacy goal."""
    num_steps: int = 150
    """Steps of every run."""


def run(config: Sst2) -> dict[str, Any]:
    """Runs both goals, and returns the record that is written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        goals = {"private": ["--target-epsilon", f"{config.target_epsilon:g}"], "not-private": ["--no-privacy"]}
        settings = [*SETTINGS, "--num-steps", str(config.num_steps), "--tune", config.tune, *TUNED[config.tune]]
        rows = [
            finetune_runs.finetune(
                config.model,
                config.folder / "train.tsv",
                config.folder / "test.tsv",
                [*settings, *goal],
                out=folder / name,
            )
            for name, goal in goals.items()
        ]
    versions, rows = finetune_runs.without_versions(rows)
    record = {
        "benchmark": "accuracy on SST-2's sentences, after private fine-tuning on its phrases",
        "model": config.model.name,
        "accuracy_before": rows[0]["before"]["accuracy"],
        "machine": harness.machine(),
        "versions": versions,
        "runs": rows,
    }
    if config.json is not None:
        harness.write_json(config.json, record)
    return record


if __name__ == "__main__":
    for row in run(tyro.cli(Sst2))["runs"]:
        before, after = (row[when]["accuracy"] for when in ("before", "after"))
        print(
            f"{row['settings']['tune']}, {finetune_runs.goal_of(row)}: accuracy {before:.3f} to {after:.3f} in "
            f"{row['wall_seconds']:.0f} s"
        )
