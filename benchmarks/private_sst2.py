r"""SST-2 at epsilon 2 and 6 without a backward pass: MeZO, DPZero and DP-AggZO beside DP-SGD, from a model of public text.

    python -m benchmarks.private_sst2 --folder sst2 --json benchmarks/results/private_sst2.json

The model is pretrained by `jaxdp finetune --from-scratch --no-privacy` on public phrases with a verdict behind each, and is then
fine-tuned on private sentences for other words: `benchmarks.sst2_sentences` tells the two apart. All methods train adapters of one
rank. Accuracy is that on the 872 sentences of GLUE's validation set. Each row is repeated; repetitions differ in directions,
samples and noise. Learning rates and clip norms were tuned on SST-2, which is public; on private text the tuning would cost
privacy.

    recovered = (DP-AggZO - DPZero) / (MeZO - DPZero),    of the means over repetitions; MeZO is the long run

DP-AggZO's K = 16 directions share each arrival of a streamed block, so what a step costs on the link does not depend on K. DPZero
is there twice: with as many steps, which move as many bytes, and with as many forward passes in 16 times the steps.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import finetune_runs, harness, sst2_sentences
from jaxdp.cli import main

#: Of the model.
SIZES: dict[str, Any] = {
    "vocabulary": 2560, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
PRETRAINING = [
    "--from-scratch", "--no-privacy", "--text-field", "text", "--max-length", "40", "--on-long", "truncate",
    "--expected-batch-size", "192", "--num-steps", "900", "--learning-rate", "3e-3", "--schedule", "cosine",
    "--warmup-steps", "50", "--microbatch-size", "64",
]  # fmt: skip
TASK = [
    "--text-field", "text", "--label-field", "label", "--verbalizers", "0=awful,1=wonderful", "--template", "{text} it was",
    "--max-length", "40", "--on-long", "truncate", "--tune", "lora", "--lora-rank", "4", "--schedule", "linear",
    "--expected-batch-size", "64", "--padded-batch-size", "88",
]  # fmt: skip
NUM_PRIVATE = 2048
#: As tuned. Zeroth-order methods have as many steps as DP-AggZO, or, where they are long, as many forward passes.
OPTIONS = {
    "mezo": ["--method", "mezo", "--num-steps", "200", "--learning-rate", "5e-3"],
    "mezo, long": ["--method", "mezo", "--num-steps", "3200", "--learning-rate", "2e-3"],
    "dpzero": ["--method", "dpzero", "--num-steps", "200", "--learning-rate", "4e-2", "--l2-clip-norm", "2"],
    "dpzero, long": ["--method", "dpzero", "--num-steps", "3200", "--learning-rate", "2e-2", "--l2-clip-norm", "0.5"],
    "dp-aggzo": [
        "--method", "dp-aggzo", "--num-directions", "16", "--num-steps", "200", "--learning-rate", "0.1", "--l2-clip-norm", "0.5",
    ],
    "dpsgd": [
        "--method", "dpsgd", "--num-steps", "200", "--learning-rate", "2e-3", "--l2-clip-norm", "1", "--microbatch-size", "44",
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Pretrains the model, fine-tunes it by every method, and reports the accuracies."""

    folder: Path
    """Folder of SST-2's train.tsv, dev.tsv and test.tsv; test.tsv holds GLUE's validation set."""
    json: Path | None = None
    """Where to write the record, after each run."""
    runs: Path | None = None
    """Where to keep the model and the runs; a temporary folder by default. What is finished there is not run again."""
    epsilons: tuple[float, ...] = (2.0, 6.0)
    """Privacy goals."""
    num_repetitions: int = 2
    """Runs of each row, but for DPZero's long ones, which take the longest and run once."""
    methods: tuple[str, ...] = tuple(OPTIONS)
    """Which."""


def rows(names: Iterable[str], epsilons: Iterable[float]) -> dict[str, list[str]]:
    """Options of every row: each private method has one for each epsilon."""
    found = {}
    for name in names:
        if name.startswith("mezo"):
            found[name] = [*OPTIONS[name], "--no-privacy"]
            continue
        for epsilon in epsilons:
            found[f"{name}, epsilon {epsilon:g}"] = [*OPTIONS[name], "--target-epsilon", f"{epsilon:g}"]
    return found


def prepare(folder: Path, sst2: Path) -> tuple[Path, Path, Path]:
    """Pretrains the model, unless it is there, and returns its folder, the private records and those to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    phrases = sst2_sentences.read_phrases(sst2 / "train.tsv", sst2 / "dev.tsv")
    private, public = sst2_sentences.split(phrases, num_private=NUM_PRIVATE)
    data = sst2_sentences.write_records(folder / "private.jsonl", private)
    held_out = sst2_sentences.write_records(folder / "validation.jsonl", sst2_sentences.read_phrases(sst2 / "test.tsv"))
    out = folder / "pretrained"
    if not (out / "report.json").exists():
        sizes = dict(SIZES)
        untrained = sst2_sentences.write_untrained_model(
            folder / "untrained", public, vocabulary=sizes.pop("vocabulary"), **sizes
        )
        corpus = sst2_sentences.write_public_text(folder / "public.jsonl", public)
        main(["finetune", "--model", str(untrained), "--data", str(corpus), *PRETRAINING, "--out", str(out)])
    return out / "model", data, held_out


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each row's accuracies, and the part of DPZero's loss that DP-AggZO recovers."""
    accuracies: dict[str, list[float]] = {}
    for row in found:
        accuracies.setdefault(row["row"], []).append(row["after"]["accuracy"])
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    recovered = {}
    for name, mean in means.items():
        method, _, goal = name.partition(", ")
        if method != "dp-aggzo":
            continue
        for steps, dpzero in {"steps": f"dpzero, {goal}", "passes": f"dpzero, long, {goal}"}.items():
            if {dpzero, "mezo, long"} <= means.keys():
                gap = means["mezo, long"] - means[dpzero]
                part = (mean - means[dpzero]) / gap if gap > 0 else None  # nothing was lost
                recovered[f"{goal}, of DPZero with as many {steps}"] = part
    return {
        "zero_shot": found[0]["before"]["accuracy"],
        "accuracy": {
            name: {
                "mean": means[name],
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "all": values,
            }
            for name, values in accuracies.items()
        },
        "recovered": recovered,
    }


def run(config: Config) -> dict[str, Any]:
    """Runs every row, repetition after repetition, and returns the record that is written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.runs or Path(temporary)
        model, data, held_out = prepare(folder, config.folder)
        record: dict[str, Any] = {
            "benchmark": "accuracy on SST-2's sentences, fine-tuned without a backward pass at several epsilons",
            "command": "python -m benchmarks.private_sst2 --folder sst2",
            "pretraining": shlex.join(["jaxdp", "finetune", *PRETRAINING]),
            "model": SIZES,
            "num_private": NUM_PRIVATE,
            "machine": harness.machine(),
        }
        found: list[dict[str, Any]] = []
        for repetition in range(config.num_repetitions):
            for name, options in rows(config.methods, config.epsilons).items():
                if repetition > 0 and name.startswith("dpzero, long"):
                    continue
                out = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{repetition}"
                arguments = [*TASK, *options, "--init-seed", str(repetition)]
                row = finetune_runs.finetune(model, data, held_out, arguments, out=out, keep=True)
                found.append({"row": name, "repetition": repetition, **row})
                print(
                    f"{name}, {repetition}: {row['after']['accuracy']:.3f} in {row['wall_seconds']:.0f} s", flush=True
                )
                versions, plain = finetune_runs.without_versions(found)
                record |= {"versions": versions, "summary": summary(plain), "runs": plain}
                if config.json is not None:
                    harness.write_json(config.json, record)
    return record


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Config))["summary"], indent=2))
