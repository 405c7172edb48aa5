"""Projected gradients of a batch -> the K numbers of the step: the one place of a zeroth-order step where examples meet.

Without a plan, their mean. With one, DP-AggZO (USENIX Security 2025), which for K = 1 is DPZero (arXiv 2310.09639):

    v_i = (D_i1, ..., D_iK) / K;    y = sum_i v_i min(1, C / ||v_i||) + N(0, (sigma C)^2 I_K);    g = K y / (q N)

so that the update along sum_k g_k z_k / K is the paper's along sum_k y_k z_k / (q N). Examples are clipped, summed and noised
by what DP-SGD uses: v_i is a gradient with K coordinates. For K = 1 the noise may be Laplace(b C), and epsilon pure: DP-ZO (arXiv
2401.04343).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp import _validate, noise_keys
from jaxdp._typing import Batch, Key
from jaxdp.clipping import Automatic, Flat, clip_and_sum
from jaxdp.mechanism import Ledger, PrivacyPlan, check_batch, check_plan, privatize
from jaxdp.noise import secret_key
from jaxdp.noise_keys import Domain
from jaxdp.zeroth_order.key_relations import relation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotPrivate:
    """Per-example values of one step. They are the data: look at them, and never publish them or feed them back (S15).

    Attributes:
        loss: Mean of the perturbed losses of each example, `[B]`; the loss itself under OneSided and ForwardMode.
        projected_gradients: D, before the clip, `[B, K]`.
        contributed: Bool `[B]`: False for padding and for examples with a non-finite loss or projected gradient.
    """

    loss: jax.Array
    projected_gradients: jax.Array
    contributed: jax.Array

    def mean_loss(self) -> jax.Array:
        """Mean loss of the examples that contributed; NaN if none did."""
        total = jnp.sum(jnp.where(self.contributed, self.loss, 0.0))
        return total / jnp.sum(self.contributed).astype(total.dtype)


def check_zeroth_order_plan(plan: Any, *, num_directions: int) -> PrivacyPlan:
    """Refuses plans whose clip norm would have to be carried beside the scalars, that clip by layer, or whose noise is for less."""
    if not isinstance(check_plan(plan).clipping, Flat | Automatic):
        raise ValueError(
            f"a zeroth-order step clips one vector of projected gradients for each example, and the plan has {plan.clipping}; "
            "plan with jaxdp.flat(C) or jaxdp.automatic(C)."
        )
    if plan.noise == "laplace" and num_directions != 1:
        raise ValueError(
            f"num_directions={num_directions} with noise='laplace': the L1 sensitivity of so many numbers clipped together is the "
            "root of their number times the clip norm, and the plan charges for the clip norm. Use one direction, or plan with "
            "noise='gaussian'."
        )
    return plan


def unrelated_noise_key(noise_key: Key | None, direction_key: Key, pipeline: Domain, *params: Any) -> Key:
    """The secret noise key of a run, from the given one or, by default, the operating system's entropy (S8).

    Args:
        noise_key: A key that does not follow from the direction key, nor the direction key from it.
        direction_key: The public key of the directions.
        pipeline: What runs.
        params: The other arguments of `init`.

    Raises:
        TypeError: inside `jax.jit`, `jax.vmap` or `jax.eval_shape`.
        ValueError: the keys are related, as far as `key_relations` can tell.
    """
    noise_keys.refuse_tracers("init of a private run", params, noise_key, direction_key)
    if noise_key is None:
        return noise_keys.run_key(secret_key(), pipeline)
    _validate.typed_key("noise_key", noise_key)
    remedy = "Leave noise_key out, or give another, jaxdp.secret_key()."
    if (found := relation(noise_key, direction_key, name="direction_key")) is not None:
        what = "the direction key" if found == "direction_key itself" else f"derived from the direction key ({found})"
        raise ValueError(f"noise_key is {what}, which is public: anyone could subtract the noise. {remedy}")
    if (found := relation(direction_key, noise_key, name="noise_key")) is not None:
        raise ValueError(f"direction_key, which is public, is derived from the secret noise_key ({found}). {remedy}")
    return noise_keys.run_key(noise_key, pipeline)


def check_examples(
    plan: PrivacyPlan | None, ledger: Ledger, noise_key: Key | None, batch: Batch, is_padding_example: Any
) -> jax.Array:
    """What a step refuses before it runs; the mask of the batch, bool `[B]`."""
    if plan is None:
        return _validate.padding_mask(is_padding_example, _validate.batch_axis(batch))
    if noise_key is None:
        raise ValueError("state was made without a plan and has no noise key; start with the init of this step.")
    ledger.check_budget(plan)
    return check_batch(plan, batch, is_padding_example)


def examples_of(projected_gradients: jax.Array, losses: jax.Array, mask: jax.Array) -> NotPrivate:
    """An estimator's results `[K, B]` and `[B]` as per-example values; a row of padding, or one that is not finite, is out (S9)."""
    contributed = ~mask & jnp.all(jnp.isfinite(projected_gradients), axis=0) & jnp.isfinite(losses)
    return NotPrivate(losses, projected_gradients.T.astype(jnp.float32), contributed)


def released(examples: NotPrivate, plan: PrivacyPlan | None, *, key: Key | None, step: jax.Array) -> jax.Array:
    """g `[K]`: the private mean under a plan, and the mean without one."""
    if plan is None:
        return mean(examples.projected_gradients, examples.contributed)
    assert key is not None  # `check_examples` refuses a state without one
    return private_mean(examples.projected_gradients, examples.contributed, plan, key=key, step=step)


def mean(projected_gradients: jax.Array, contributed: jax.Array) -> jax.Array:
    """Mean over the examples that contribute, `[B, K]` to `[K]`; zeros if none does. Not private."""
    total = jnp.sum(jnp.where(contributed[:, None], projected_gradients, 0.0), axis=0)  # zeroed before any product (S9)
    return total / jnp.maximum(jnp.sum(contributed), 1).astype(jnp.float32)


def private_mean(
    projected_gradients: jax.Array, contributed: jax.Array, plan: PrivacyPlan, *, key: Key, step: jax.Array
) -> jax.Array:
    """The released g `[K]`.

    **Guarantee**: one Gaussian mechanism of noise multiplier `plan.noise_multiplier`, whatever K: the K numbers are clipped as
    one vector and noised by one draw (S11 v). Or one Laplace mechanism, for K = 1, as `plan.noise` says. All that follows from
    them and the directions is post-processing (S14).

    Args:
        projected_gradients: D, float32 `[B, K]`; row i depends on example i and on released values only (S3).
        contributed: Bool `[B]`; False for padding, and for what is known to be non-finite.
        plan: As `check_zeroth_order_plan` takes it.
        key: The secret noise key (S8).
        step: Index of the step. The noise is keyed by (key, step, digest of the clipped sum), so another batch at that step is
            a release of its own (S8).
    """
    K = projected_gradients.shape[1]
    per_example = projected_gradients / K
    groups = plan.clipping.groups(jnp.zeros(K, jnp.float32))
    clip_norms = jnp.asarray(plan.clipping.clip_norms(groups))
    clipped, _, _ = clip_and_sum(per_example, plan.clipping, groups, clip_norms, counts=contributed)
    return K * privatize(clipped, groups, plan, clip_norms, key=key, step=step).mean
