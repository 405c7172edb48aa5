"""SST-2 under differential privacy: accuracy of `jaxdp finetune` on a small model of TinyStories, full and LoRA.

    python -m benchmarks.sst2 --folder sst2 --model stories260K-hf --json benchmarks/results/sst2_stories260k.json

One phrase is one privacy unit; a phrase may be part of another, which the guarantee does not know. Accuracy is that on the 872
sentences of GLUE's validation set. The two words of the classes are one token each in this vocabulary of 512, so that one
sequence scores both. The settings were tuned on SST-2, which is public; on private text the tuning would cost privacy.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks import finetune_runs, harness

SETTINGS = [
    "--text-field", "sentence", "--label-field", "label", "--verbalizers", "0=little,1=happy", "--max-length", "64",
    "--on-long", "truncate", "--expected-batch-size", "1024", "--optimizer", "adam", "--schedule", "linear",
    "--l2-clip-norm", "1.0", "--microbatch-size", "64",
]  # fmt: skip
#: What is trained, and the learning rate that suits it.
TUNED = {"full": ["--learning-rate", "4e-3"], "lora": ["--lora-rank", "8", "--learning-rate", "1e-2"]}


@dataclasses.dataclass(frozen=True)
class Sst2:
    """Fine-tunes on SST-2 with and without privacy, fully and by adapters, and reports the accuracies."""

    folder: Path
    """Folder of train.tsv and test.tsv with the columns sentence and label; test.tsv holds GLUE's validation set."""
    model: Path
    """Hugging Face folder of the model."""
    json: Path | None = None
    """Where to write the record."""
    runs: Path | None = None
    """Where to keep the runs; a temporary folder by default."""
    target_epsilon: float = 3.0
    """The privacy goal."""
    num_steps: int = 150
    """Steps of every run."""


def run(config: Sst2) -> dict[str, Any]:
    """Runs both goals with both parts trained, and returns the record that is written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for tune, settings in TUNED.items():
            for name, goal in (
                ("private", ["--target-epsilon", f"{config.target_epsilon:g}"]),
                ("not", ["--no-privacy"]),
            ):
                options = [*SETTINGS, "--num-steps", str(config.num_steps), "--tune", tune, *settings, *goal]
                rows.append(
                    finetune_runs.finetune(
                        config.model,
                        config.folder / "train.tsv",
                        config.folder / "test.tsv",
                        options,
                        out=folder / f"{tune}-{name}",
                    )
                )
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
