"""Grimm's tales under differential privacy: perplexity on held-out tales after `jaxdp finetune` of a model of TinyStories.

    python -m benchmarks.grimm --text GrimmsFairyTales.txt --model stories260K-hf --json benchmarks/results/grimm_stories260k.json

One paragraph is one privacy unit. The last tales are held out, whole, so that no sentence of theirs is trained on. The
settings were tuned on these tales, which are public; on private text the tuning would cost privacy.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks import finetune_runs, harness

SETTINGS = [
    "--record", "paragraph", "--max-length", "128", "--on-long", "truncate", "--expected-batch-size", "128", "--num-steps", "30",
    "--optimizer", "adam", "--learning-rate", "4e-3", "--schedule", "linear", "--l2-clip-norm", "1.0", "--microbatch-size", "32",
]  # fmt: skip
#: The first tale that is held out.
FIRST_HELD_OUT = "THE SALAD"


@dataclasses.dataclass(frozen=True)
class Grimm:
    """Fine-tunes on most of Grimm's tales at several epsilons, and reports the perplexity on the others."""

    text: Path
    """GrimmsFairyTales.txt of Project Gutenberg, without its header."""
    model: Path
    """Hugging Face folder of the model."""
    json: Path | None = None
    """Where to write the record."""
    folder: Path | None = None
    """Where to keep the two files and the runs; a temporary folder by default."""
    epsilons: tuple[float, ...] = (8.0, 2.0)
    """Privacy goals; a run without privacy comes last."""


def split(text: str) -> tuple[list[str], list[str]]:
    """The paragraphs of the tales before `FIRST_HELD_OUT`, and of the others; titles are no records."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.replace("\r\n", "\n").split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if paragraphs.count(FIRST_HELD_OUT) != 1:
        raise ValueError(f"the text has no tale {FIRST_HELD_OUT!r}; give the Grimm's Fairy Tales of Project Gutenberg.")
    border = paragraphs.index(FIRST_HELD_OUT)

    def tales(part: list[str]) -> list[str]:
        return [paragraph for paragraph in part if paragraph != paragraph.upper()]

    return tales(paragraphs[:border]), tales(paragraphs[border:])


def run(config: Grimm) -> dict[str, Any]:
    """Runs every goal and the baseline, and returns the record that is written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        private, public = split(config.text.read_text(encoding="utf-8"))
        for name, paragraphs in (("private.txt", private), ("public.txt", public)):
            (folder / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
        goals = {f"epsilon-{goal:g}": ["--target-epsilon", f"{goal:g}"] for goal in config.epsilons}
        goals["no-privacy"] = ["--no-privacy"]
        rows = [
            finetune_runs.finetune(
                config.model, folder / "private.txt", folder / "public.txt", [*SETTINGS, *goal], out=folder / name
            )
            for name, goal in goals.items()
        ]
    versions, rows = finetune_runs.without_versions(rows)
    record = {
        "benchmark": "perplexity on held-out tales of Grimm, after private fine-tuning on the others",
        "model": config.model.name,
        "num_training_paragraphs": len(private),
        "num_held_out_paragraphs": len(public),
        "perplexity_before": rows[0]["before"]["perplexity"],
        "machine": harness.machine(),
        "versions": versions,
        "runs": [{**row, "fall": 1 - row["after"]["perplexity"] / row["before"]["perplexity"]} for row in rows],
    }
    if config.json is not None:
        harness.write_json(config.json, record)
    return record


if __name__ == "__main__":
    for row in run(tyro.cli(Grimm))["runs"]:
        before, after = (row[when]["perplexity"] for when in ("before", "after"))
        print(
            f"{finetune_runs.goal_of(row)}: perplexity {before:.2f} to {after:.2f} ({row['fall']:.1%} lower) in "
            f"{row['wall_seconds']:.0f} s"
        )
