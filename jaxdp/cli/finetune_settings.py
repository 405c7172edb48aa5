"""What the options of `jaxdp finetune` come to, once model and records are known: every setting, and the plan."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdp import _validate
from jaxdp.cli import options, tuning_job, zeroth_order_methods
from jaxdp.cli.optimizers import learning_rate_schedule
from jaxdp.cli.tuning_job import Tuning
from jaxdp.mechanism import PrivacyPlan

if TYPE_CHECKING:
    from jaxdp.cli.finetune import Finetune


def make_plan(config: Finetune, num_units: int, *, stacked: tuple[str, ...] = ()) -> PrivacyPlan:
    """The plan that the options describe, for so many privacy units and parameters `stacked` over layers."""
    privacy, batch_size = config.privacy, config.privacy.expected_batch_size
    if batch_size is None and privacy.sampling_prob is None:
        batch_size = 64.0
    num_steps = privacy.num_steps
    if num_steps is None and privacy.epochs is None and zeroth_order_methods.is_zeroth_order(privacy.method):
        num_steps = 1000
    if num_steps is None:
        if batch_size is None:
            sampling_prob = _validate.probability("sampling_prob", privacy.sampling_prob)
        else:
            sampling_prob = _validate.positive("expected_batch_size", batch_size) / num_units
        epochs = _validate.positive("epochs", 3.0 if privacy.epochs is None else privacy.epochs)
        num_steps = math.ceil(round(epochs / sampling_prob, 6))  # the inner rounding keeps 3 / 0.01 at 300 steps
    return options.make_plan(
        privacy,
        num_examples=num_units,
        num_steps=num_steps,
        expected_batch_size=batch_size,
        l2_clip_norm=_l2_clip_norm(config),
        target_delta=num_units**-1.1 if privacy.target_delta is None else privacy.target_delta,
        stacked=stacked,
        noise=privacy.noise,
    )


def schedule(config: Finetune, num_steps: int | None) -> float | Callable[[Any], Any]:
    """The learning rate of a run of `num_steps`, None if their number is not known yet; a number if it is constant."""
    chosen, rate = config.optimizer, _learning_rate(config)
    found = learning_rate_schedule(
        rate,
        schedule=chosen.schedule,
        warmup_steps=chosen.warmup_steps,
        num_steps=chosen.warmup_steps + 1 if num_steps is None else num_steps,
    )
    return rate if chosen.schedule == "constant" and not chosen.warmup_steps else found


def resolved(config: Finetune, tuning: Tuning) -> dict[str, Any]:
    """Every setting that decides what a step computes, with its default filled in."""
    method, is_zeroth_order = config.privacy.method, zeroth_order_methods.is_zeroth_order(config.privacy.method)
    sections = (config.model, config.data, config.privacy, config.optimizer)
    settings = {name: value for section in sections for name, value in dataclasses.asdict(section).items()}
    for name in ("model", "adapter", "data", "eval"):  # where they lie; what they hold is compared by fingerprints
        del settings[name]
    if is_zeroth_order:
        for name in ("microbatch_size", "remat", "optimizer_options"):
            del settings[name]
        settings |= zeroth_order_methods.resolved(method, config.zeroth_order, tune=config.model.tune)
    lora = tuning.model.lora
    settings |= {
        "optimizer": config.optimizer.optimizer or ("sgd" if is_zeroth_order else "adam"),
        "learning_rate": _learning_rate(config),
        "l2_clip_norm": _l2_clip_norm(config),
        "max_length": tuning_job.max_length(config.data, tuning.model),
        "lora_rank": lora and lora.rank,
        "lora_alpha": lora and lora.alpha,
        "lora_targets": lora and lora.targets,
        "base_sha256": tuning.fingerprint(),
        "numpy": np.__version__,  # NumPy may change its random streams between releases
    }
    return json.loads(json.dumps(settings))  # as it will be read again


def _learning_rate(config: Finetune) -> float:
    tune, method = config.model.tune, config.privacy.method
    if config.optimizer.learning_rate is not None:
        return config.optimizer.learning_rate
    if zeroth_order_methods.is_zeroth_order(method):
        return zeroth_order_methods.learning_rate(method, tune=tune)
    return 5e-4 if tune in ("full", "last-k") else 2e-3


def _l2_clip_norm(config: Finetune) -> float:
    if config.privacy.l2_clip_norm is not None:
        return config.privacy.l2_clip_norm
    if zeroth_order_methods.is_zeroth_order(config.privacy.method):
        return zeroth_order_methods.l2_clip_norm(config.privacy.method, config.zeroth_order)
    return 1.0
