"""Clipped sum -> released mean: the one mechanism that every private pipeline calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.clipping import ClippedSum, Groups, Quantile
from jaxdp.mechanism.privacy_plan import PrivacyPlan
from jaxdp.noise import add_noise, allocate_stddevs, standard_normal

# Streams within one step's key.
_GRADIENT_STREAM, _COUNT_STREAM = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Release:
    """What one step makes public.

    Attributes:
        mean: The noised sum divided by the plan's expected batch size, in float32 or wider.
        stddevs: The noise std of each clipping group on the scale of the *sum*, `[K]`.
        clip_norms: The clip norms of this step, `[K]`.
        next_clip_norms: Those of the next step; they differ under adaptive clipping only.
    """

    mean: Any
    stddevs: jax.Array
    clip_norms: jax.Array
    next_clip_norms: jax.Array


def privatize(
    clipped: ClippedSum, groups: Groups, plan: PrivacyPlan, clip_norms: jax.Array, *, key: Key, step: Any
) -> Release:
    """Noises a clipped sum once and divides it by the expected batch size.

        mean_k = (S_k + N(0, s_k^2 I)) / (q N),        sum_k C_k^2 / s_k^2 = 1 / z_grad^2

    **Guarantee**: if one example moves group k of `clipped.value` by at most C_k = `clip_norms[k]`, the release is one
    Gaussian mechanism of noise multiplier `plan.noise_multiplier` (S5), to be charged once: call it once for each logical
    step, after microbatches and devices have been summed (S7), and never with one (key, step) for two sums (S8).

    Args:
        clipped: The sum over a batch, from `clip_and_sum` or `clipped_grad`.
        groups: The partition of its leaves.
        plan: Owner of the noise multiplier, the allocation and the divisor.
        clip_norms: C_k, `[K]`.
        key: The run's secret noise key.
        step: Index of the step, a nonnegative integer.
    """
    _validate.typed_key("key", key)
    step_key = jax.random.fold_in(key, step)
    stddevs = allocate_stddevs(
        clip_norms,
        groups.sizes,
        noise_multiplier=plan.gradient_noise_multiplier,
        allocation=plan.clipping.noise_allocation,
    )
    total = clipped.value
    if plan.noise_multiplier > 0:
        total = add_noise(total, stddevs, groups.leaf_groups, key=jax.random.fold_in(step_key, _GRADIENT_STREAM))
    mean = jax.tree.map(lambda leaf: leaf / plan.expected_batch_size, total)  # S2: a constant, not the realized size
    next_clip_norms = clip_norms
    if isinstance(plan.clipping, Quantile):
        next_clip_norms = _follow_quantile(
            plan.clipping, plan, clipped.centered_count, clip_norms, key=jax.random.fold_in(step_key, _COUNT_STREAM)
        )
    return Release(mean, stddevs, clip_norms, next_clip_norms)


def _follow_quantile(
    policy: Quantile, plan: PrivacyPlan, centered_count: jax.Array, clip_norms: jax.Array, *, key: Key
) -> jax.Array:
    noise = standard_normal(key, centered_count.shape, centered_count.dtype)
    noisy_count = centered_count + plan.count_stddev * noise
    unclipped_fraction = 0.5 + noisy_count / plan.expected_batch_size
    moved = clip_norms * jnp.exp(-policy.learning_rate * (unclipped_fraction - policy.target_quantile))
    return jnp.clip(moved, _validate.SMALLEST_CLIP_NORM, _validate.LARGEST_CLIP_NORM)
