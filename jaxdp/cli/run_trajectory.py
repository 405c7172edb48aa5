"""The trajectory of a run of `jaxdp finetune`: its only checkpoint, and what makes its model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdp
from jaxdp._typing import Key
from jaxdp.cli import tuning_job, tuning_outputs
from jaxdp.cli.finetune_options import DataOptions
from jaxdp.cli.tuning_job import Tuning
from jaxdp.mechanism import PrivacyPlan
from jaxdp.zeroth_order import Header, Journal, Trajectory

NAME = "trajectory.jaxdpzo"

#: Settings that, with the base model, make the trained tree again.
_REBUILDING = ("tune", "lora_rank", "lora_alpha", "lora_targets", "init_seed", "from_scratch", "dtype", "param_dtype")


def path_in(folder: Path) -> Path:
    return folder / NAME


def direction_key(init_seed: int) -> Key:
    """The key of a run's directions: public, and of another stream than fresh parameters."""
    return jax.random.fold_in(jax.random.key(init_seed, impl="threefry2x32"), 2)


def key_of(header: Header) -> Key:
    """The direction key that a trajectory names."""
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(header.direction_words, np.uint32)), impl="threefry2x32")


def about(
    tuning: Tuning,
    settings: dict[str, Any],
    plan: PrivacyPlan,
    data: DataOptions,
    *,
    has_adapter: bool,
    merge: bool,
) -> dict[str, Any]:
    """What a trajectory says beside its numbers; all of it may be published."""
    return {
        "jaxdp": jaxdp.__version__,
        "method": settings["method"],
        "base_model": tuning_outputs.base_model(tuning.base),
        "base_sha256": settings["base_sha256"],
        "model": {name: settings[name] for name in _REBUILDING} | {"has_adapter": has_adapter, "keep_float32": merge},
        "privacy_unit": tuning_job.privacy_unit(data),
        "unit": tuning_job.unit_noun(data),
        "statement": plan.describe(unit=tuning_job.unit_noun(data)),
    }


def open_journal(folder: Path, header: Header) -> tuple[Journal, Trajectory | None]:
    """The journal of the run in a folder: a new one, or that of the run to go on with, and what it holds."""
    path = path_in(folder)
    if path.exists():
        return Journal.resume(path)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # a run was killed before it had a header, and so before its first step
    journal = Journal.create(partial, header)
    partial.replace(path)
    return journal, None
