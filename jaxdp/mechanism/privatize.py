"""Clipped sum -> released mean: the one mechanism that every private pipeline calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp import _replicas, _validate, noise_keys
from jaxdp._typing import Key
from jaxdp.clipping import Automatic, ClippedSum, Flat, Groups, Quantile
from jaxdp.mechanism.privacy_plan import PrivacyPlan
from jaxdp.noise import add_laplace_noise, add_noise, allocate_stddevs, laplace_stddevs, standard_normal
from jaxdp.noise_keys import Stream


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
    clipped: ClippedSum,
    groups: Groups,
    plan: PrivacyPlan,
    clip_norms: jax.Array,
    *,
    key: Key,
    step: Any,
    bound_to: Any = None,
    facts: Any = (),
) -> Release:
    """Noises a clipped sum once and divides it by the expected batch size.

        mean_k = (S_k + N(0, s_k^2 I)) / (q N),        sum_k C_k^2 / s_k^2 = 1 / z_grad^2
        mean   = (S + Laplace(b C)) / (q N),           for one number S and b = plan.noise_multiplier

    **Guarantee**: if one example moves group k of `clipped.value` by at most C_k = `clip_norms[k]`, the release is one
    Gaussian mechanism of noise multiplier `plan.noise_multiplier` (S5), or one Laplace mechanism, as `plan.noise` says, to be
    charged once: call it once for each logical step, after microbatches and devices have been summed (S7).

    The noise is a function of `key`, `step` and the digest of `bound_to`, of the clip norms, and of the plan's noise and
    clipping (S8, `jaxdp.noise_keys`). So one (key, step) with another sum, clip norm or noise multiplier draws noise of its
    own, which is a release of its own, to be charged once more; repeated exactly, it is the same release.

    Args:
        clipped: The sum over a batch, from `clip_and_sum` or `clipped_grad`.
        groups: The partition of its leaves.
        plan: Owner of the noise multiplier, the allocation and the divisor.
        clip_norms: C_k, `[K]`.
        key: The run's secret noise key, typed.
        step: Index of the step, a nonnegative integer.
        bound_to: Pytree of arrays that decides `clipped`. None, the safe choice, is `clipped` itself, as it stands to the last bit.
            Another choice must differ where the sum does.
        facts: Static values that decide it besides, such as how it is computed, with a `repr`: a record whose gradient cancels is
            another one in another program.

    Raises:
        ValueError: the plan has Laplace noise, and the sum is not one number; or it is called on each device of a `jax.shard_map`
            or `jax.pmap`, unless JAX knows that the sum is the same on all of them.
    """
    _validate.typed_key("key", key)
    _replicas.check_released_once("privatize", clipped)
    draws = _bound_keys(key, step, (clip_norms, clipped if bound_to is None else bound_to), plan, facts)
    if plan.noise == "laplace":
        _refuse_all_but_one_number(plan, groups)
        stddevs = laplace_stddevs(clip_norms, noise_multiplier=plan.noise_multiplier)
    else:
        stddevs = allocate_stddevs(
            clip_norms,
            groups.sizes,
            noise_multiplier=plan.gradient_noise_multiplier,
            allocation=plan.clipping.noise_allocation,
        )
    total = clipped.value
    if plan.noise_multiplier > 0:
        noise_key = draws[Stream.GRADIENT]
        if plan.noise == "laplace":
            total = add_laplace_noise(total, plan.noise_multiplier * clip_norms[0], key=noise_key)
        else:
            total = add_noise(total, stddevs, groups.leaf_groups, key=noise_key)
    mean = jax.tree.map(lambda leaf: leaf / plan.expected_batch_size, total)  # S2: a constant, not the realized size
    next_clip_norms = clip_norms
    if isinstance(plan.clipping, Quantile):
        next_clip_norms = _follow_quantile(
            plan.clipping, plan, clipped.centered_count, clip_norms, key=draws[Stream.COUNT]
        )
    return Release(mean, stddevs, clip_norms, next_clip_norms)


def _bound_keys(key: Key, step: Any, bound_to: Any, plan: PrivacyPlan, facts: Any) -> dict[Stream, Key]:
    """The keys of the two draws of a step."""
    streams = noise_keys.stream_keys(noise_keys.step_key(key, step))
    # Equal sums under two noise multipliers would give both away: S + s n and S + t n.
    known = repr((plan.noise, plan.noise_multiplier, plan.count_stddev, plan.clipping, facts))
    digest = noise_keys.digest(bound_to, streams=streams, facts=known)
    return {name: noise_keys.bound_key(streams[name], digest) for name in (Stream.GRADIENT, Stream.COUNT)}


def _refuse_all_but_one_number(plan: PrivacyPlan, groups: Groups) -> None:
    """The L1 sensitivity of d numbers clipped to the L2 norm C is sqrt(d) C, and the plan charges for C."""
    if sum(groups.sizes) != 1 or not isinstance(plan.clipping, Flat | Automatic):
        raise ValueError(
            f"the plan has noise='laplace', which is for one number a step, and this sum has {sum(groups.sizes)} under "
            f"{plan.clipping}; release one number under flat or automatic clipping, or plan with noise='gaussian'."
        )


def _follow_quantile(
    policy: Quantile, plan: PrivacyPlan, centered_count: jax.Array, clip_norms: jax.Array, *, key: Key
) -> jax.Array:
    noise = standard_normal(key, centered_count.shape, centered_count.dtype)
    noisy_count = centered_count + plan.count_stddev * noise
    unclipped_fraction = 0.5 + noisy_count / plan.expected_batch_size
    moved = clip_norms * jnp.exp(-policy.learning_rate * (unclipped_fraction - policy.target_quantile))
    return jnp.clip(moved, _validate.SMALLEST_CLIP_NORM, _validate.LARGEST_CLIP_NORM)
