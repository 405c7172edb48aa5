"""What every pipeline checks before it touches a batch."""

from __future__ import annotations

from typing import Any

import jax

from jaxdp import _validate
from jaxdp._typing import Batch
from jaxdp.mechanism.privacy_plan import PrivacyPlan


def check_plan(plan: Any) -> PrivacyPlan:
    if not isinstance(plan, PrivacyPlan):
        raise TypeError(f"plan must be a PrivacyPlan from jaxdp.plan(...), got {type(plan).__name__}.")
    return plan


def check_gradient_plan(plan: Any) -> PrivacyPlan:
    """`check_plan`, for pipelines that release gradients: noise for one number is refused."""
    if check_plan(plan).noise != "gaussian":
        raise ValueError(
            f"the plan has noise={plan.noise!r}, which is for one number a step, and a gradient has one for each parameter: its L1 "
            "sensitivity is up to the root of their number times the clip norm. Plan with noise='gaussian', or train by "
            "jaxdp.zeroth_order.make_step with one direction."
        )
    return plan


def check_batch(plan: PrivacyPlan, batch: Batch, is_padding_example: Any) -> jax.Array:
    """Checks that the batch has the plan's padded shape, and returns the mask as a bool array `[padded_batch_size]`."""
    size = _validate.batch_axis(batch)
    if size != plan.padded_batch_size:
        raise ValueError(
            f"batch has {size} rows, the plan's padded_batch_size is {plan.padded_batch_size}; draw batches with "
            "jaxdp.poisson_batches(source, plan, rng), or pad to that size with is_padding_example=True."
        )
    if is_padding_example is None and plan.sampling_prob < 1:
        raise ValueError(
            "is_padding_example is missing: a Poisson batch has rows of padding, and counting them as examples doubles the "
            "sensitivity. Pass the mask that jaxdp.poisson_batches yields beside the batch."
        )
    return _validate.padding_mask(is_padding_example, size)
