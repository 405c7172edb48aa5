"""What `jaxdp finetune` leaves behind: a report, and a folder to publish with its model card."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from jaxdp._files import write_whole
from jaxdp.cli import cost, meters, run_folder
from jaxdp.cli.curve import EpsilonCurve, curve_png
from jaxdp.cli.model_card import model_card
from jaxdp.cli.outcome import Outcome
from jaxdp.cli.plan_check import PlanCheck
from jaxdp.cli.tuning_job import Records, Tuning
from jaxdp.mechanism import PrivacyPlan
from jaxdp.models.lora import merge
from jaxdp.models.peft import save_adapter
from jaxdp.models.saving import save_model
from jaxdp.models.weights import Pretrained

_NOTE = (
    "Computed without noise from records that get no protection. It costs no privacy if none of them is among the private "
    "records, which is assumed."
)


def report(
    plan: PrivacyPlan,
    outcome: Outcome,
    *,
    tuning: Tuning,
    records: Records,
    privacy_unit: str,
    settings: dict[str, Any],
    check: PlanCheck,
) -> dict[str, Any]:
    """The contents of `report.json`. All that may not be published stands under `not_private`.

    `num_examples` is the plan's name for the number of privacy units, which the report also has under their own.
    """
    ledger, progress = outcome.ledger, outcome.progress
    spent, (peak_host_bytes, meter) = plan.epsilon_so_far(ledger), meters.peak_host_memory()
    peak_device_bytes, device_meter = meters.peak_device_memory() or (None, None)
    evaluation = None
    if outcome.before is not None and outcome.after is not None:
        evaluation = {
            "before": outcome.before,
            "after": outcome.after,
            "num_records": records.num_evaluation_records,
            "note": _NOTE,
        }
    last_loss = progress.losses[-1]
    num_tokens = ledger.num_steps * plan.sampling_prob * records.report.num_tokens
    return {
        "private": plan.noise_multiplier > 0,
        "method": settings["method"],
        "epsilon": None if math.isinf(spent) else spent,
        "delta": plan.target_delta,
        "neighboring_relation": plan.neighboring_relation.name,
        "accountant": plan.accountant,
        "sampler": "truncated Poisson",
        "noise": plan.noise,
        "noise_multiplier": plan.noise_multiplier,
        "clipping": plan.clipping_in_words(check.unit),
        "sampling_prob": plan.sampling_prob,
        "padded_batch_size": plan.padded_batch_size,
        "num_steps": ledger.num_steps,
        "num_examples": plan.num_examples,
        "num_privacy_units": plan.num_examples,
        "expected_batch_size": plan.expected_batch_size,
        "privacy_unit": privacy_unit,
        "statement": plan.describe(unit=check.unit),
        "weak_points": cost.weak_points(spent, plan, unit=check.unit),
        "base_model": base_model(tuning.base),
        "tuning": in_words(tuning, settings),
        "num_parameters": check.num_trainable + check.num_frozen,
        "num_trainable_parameters": check.num_trainable,
        "evaluation": evaluation,
        "updates": outcome.updates.to_json(),
        "settings": settings,
        "step_bytes": check.step_bytes,
        "step_bytes_meter": "XLA compiled memory_analysis",
        "available_bytes": check.available_bytes,
        "available_bytes_meter": check.meter,
        "peak_host_bytes": peak_host_bytes,
        "peak_host_bytes_meter": meter,
        "peak_device_bytes": peak_device_bytes,
        "peak_device_bytes_meter": device_meter,
        "wall_seconds": progress.wall_seconds,
        "device": jax.devices()[0].device_kind,
        "versions": meters.versions("flax", "safetensors", "tokenizers"),
        "command": shlex.join(["jaxdp", *sys.argv[1:]]),
        **outcome.more,
        "not_private": {
            "final_training_loss": last_loss if math.isfinite(last_loss) else None,
            "tokens_per_second": num_tokens / progress.wall_seconds,
            "records": str(records.report),
        },
    }


def base_model(base: Pretrained) -> str:
    name = base.hf_config.get("_name_or_path")
    return name if isinstance(name, str) and name else (base.folder or Path("model")).resolve().name


def in_words(tuning: Tuning, settings: dict[str, Any]) -> str:
    lora, start = tuning.model.lora, "Drawn at random, then " if settings["from_scratch"] else ""
    if lora is None:
        how = {"full": "full fine-tuning", "bitfit": "fine-tuning of the biases (BitFit)"}
        how["last-k"] = f"fine-tuning of the last {settings['last_k'] or 1} blocks"
        words = how[settings["tune"]]
    else:
        kind = "LoRA" if settings["tune"] == "lora" else "LoRA with A as drawn (FFA-LoRA)"
        words = f"{kind} of rank {lora.rank} and alpha {lora.alpha:g} on {', '.join(lora.targets)}"
    return start + words if start else words[0].upper() + words[1:]


def write(
    folder: Path,
    released: Pretrained,
    contents: dict[str, Any],
    *,
    losses: list[float],
    plan: PrivacyPlan,
    merged: bool,
    unit: str | None,
) -> None:
    """Writes the model or adapter with its card, the curve and last the report, each of them whole or not at all.

    What may be published is in `model/` and `adapter/`, and nothing else is. The folder around them has no card, so that it does
    not pass for one to publish: the report, the curve and the checkpoints or secrets in it are private.
    """
    card = model_card(contents).encode()
    written = write_weights(folder, released, base_model=contents["base_model"], merged=merged)
    for name in written:
        write_whole(folder / name / "README.md", card)
    curve = curve_png(losses, EpsilonCurve(plan), title=contents["base_model"], private=contents["private"])
    run_folder.write_report(folder, contents, curve)
    if contents["epsilon"] is None:
        print("epsilon infinite: this run is not private")
    else:
        numbers = {"relation": contents["neighboring_relation"], "accountant": contents["accountant"]}
        print(f"epsilon {cost.cost_in_words(contents['epsilon'], contents['delta'], **numbers, unit=unit)}")
    cost.say_weak_points(contents["weak_points"])
    print(
        f"released: {', '.join(str(folder / name) for name in written)}   private, with losses of the training set: "
        f"{folder / 'report.json'}, {folder / 'curve.png'}"
    )


def write_weights(folder: Path, released: Pretrained, *, base_model: str, merged: bool) -> list[str]:
    """Writes `model/`, or `adapter/` and with `merged` both; returns their names."""
    written = []
    if released.model.lora is not None:
        save_adapter(folder / "adapter", released.model, released.params, base_model=base_model)
        written.append("adapter")
        if merged:
            released = _merged(released)
    if released.model.lora is None:
        save_model(folder / "model", released)
        written.append("model")
    return written


def _merged(released: Pretrained) -> Pretrained:
    model, params = merge(released.model, released.params)
    return Pretrained(model, params, released.hf_config, released.folder)
