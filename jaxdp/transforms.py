"""`dp_aggregate`: the mechanism as an optax transformation of per-example gradients."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxdp import _replicas, _validate, noise_keys
from jaxdp._typing import Key, Params
from jaxdp.clipping import clip_and_sum
from jaxdp.mechanism import PrivacyPlan, check_batch, check_gradient_plan, privatize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPAggregateState:
    """State of `dp_aggregate`. It holds the noise key, so it is secret.

    A state may be stepped again: with the same gradients it gives the same update, with others noise of its own (S8). That is
    then a second release, which neither state's count includes: do not publish both.

    Attributes:
        noise_key: The secret noise key of the run, derived from that of the transformation.
        step: Number of updates released, int32; `plan.epsilon(num_steps=int(state.step))` is what they cost.
        clip_norms: The clip norm of each group, `[K]`.
        plan_id: Fingerprint of the plan that the count belongs to; a transformation of another plan refuses the state.
    """

    noise_key: Key = dataclasses.field(repr=False)
    step: jax.Array
    clip_norms: jax.Array
    plan_id: str = dataclasses.field(metadata={"static": True})


def _plan_id(plan: PrivacyPlan) -> str:
    numbers = dataclasses.replace(plan, num_steps=1, target_epsilon=None, target_delta=None)
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]


def dp_aggregate(plan: PrivacyPlan, key: Key) -> optax.GradientTransformationExtraArgs:
    """Turns per-example gradients into their private mean: clip, sum, add noise, divide by the expected batch size.

    **Put it first in `optax.chain`.** Everything after it is post-processing (S14). **Nothing may come before it, and no error says
    so**: what stands before it changes raw per-example gradients, which look the same afterwards. `optax.clip_by_global_norm`
    and other normalizations scale each record by all others; `optax.trace`, `ema`, `apply_every` and every optimizer mix
    records of several steps. One record then moves more than its clip norm, and the guarantee is void (S3). Around it,
    `optax.MultiSteps` hands it averages without a batch axis, which it refuses.

    `update` takes gradients with a leading batch axis, as `jax.vmap(jax.grad(loss), (None, 0))` gives them, and
    `is_padding_example=`; it ignores other extra arguments. Differentiate the trainable parameters only.

    **Guarantee**: `plan.num_steps` updates on batches from `jaxdp.poisson_batches` are (plan.epsilon(), delta)-differentially
    private. Later updates are zero and release nothing (outside `jax.jit` they raise). Examples with a non-finite entry, and
    padding, contribute zero; an empty batch gives noise only.

    Args:
        plan: The privacy numbers, from `jaxdp.plan`, with Gaussian noise.
        key: A secret noise key, `jaxdp.secret_key()`: a fresh one whenever a program starts (S8), and in a group of processes
            the same in all of them: drawn once, and broadcast. Each `init` derives a key of its own
            from it. Noise is a function of that, the step and the bits of the clipped sum (`jaxdp.noise_keys`).

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its updates have the shapes and dtypes of `params`; noise is drawn and
        added in float32 or wider, whatever those dtypes.

    Raises:
        TypeError: `init` is called inside `jax.jit`, `jax.vmap` or `jax.eval_shape`, where all calls would share a key.
        ValueError: at trace time, if `params` is missing, or a leaf is not `[B, *param.shape]`, naming the leaf; `update` inside
            `jax.shard_map` or `jax.pmap`, where noise would be drawn on each device; `init` in a group of processes that differ
            in key or plan.
    """
    check_gradient_plan(plan)
    _validate.typed_key("key", key)
    plan_id = _plan_id(plan)
    runs = itertools.count()

    def init(params: Params) -> DPAggregateState:
        noise_keys.refuse_tracers("init of dp_aggregate", params)
        run = next(runs)
        _replicas.check_noise_key(key, plan=plan, run=run)
        _refuse_masks(params)
        _validate.floating_params(params)
        clip_norms = jnp.asarray(plan.clipping.clip_norms(plan.clipping.groups(params)))
        # S8: a second run of one transformation must not repeat the noise of the first.
        noise_key = noise_keys.run_key(key, noise_keys.Domain.AGGREGATE, run)
        return DPAggregateState(noise_key, jnp.zeros((), jnp.int32), clip_norms, plan_id)

    def update(
        updates: Any,
        state: DPAggregateState,
        params: Params | None = None,
        *,
        is_padding_example: Any = None,
        **extra_args: Any,
    ) -> tuple[Params, DPAggregateState]:
        del extra_args
        if params is None:
            raise ValueError(
                "dp_aggregate needs params, to check that every gradient leaf is [B, *param.shape]: pass params."
            )
        if state.plan_id != plan_id:
            raise ValueError(
                "this optimizer state was made under another plan, so its count of steps would be charged at the wrong noise; "
                "start a new state with init(params)."
            )
        _check_shapes(updates, params)
        _replicas.check_released_once("the update of dp_aggregate")
        mask = check_batch(plan, updates, is_padding_example)
        exhausted = state.step >= plan.num_steps
        if not isinstance(exhausted, Tracer) and bool(exhausted):
            raise _validate.BudgetExhaustedError(
                f"all {plan.num_steps} steps of this plan have been released; make the plan with a larger num_steps."
            )
        groups = plan.clipping.groups(params)
        clipped, _, _ = clip_and_sum(updates, plan.clipping, groups, state.clip_norms, counts=~mask)
        release = privatize(clipped, groups, plan, state.clip_norms, key=state.noise_key, step=state.step)
        mean = jax.tree.map(
            lambda m, p: jnp.where(exhausted, jnp.zeros_like(m), m).astype(p.dtype), release.mean, params
        )  # noise first, then cast (S21)
        next_clip_norms = jnp.where(exhausted, state.clip_norms, release.next_clip_norms)
        step = state.step + jnp.where(exhausted, 0, 1).astype(jnp.int32)
        return mean, DPAggregateState(state.noise_key, step, next_clip_norms, plan_id)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]  # our state is a dataclass


def _refuse_masks(params: Params) -> None:
    if any(
        isinstance(x, optax.MaskedNode)
        for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    ):
        raise ValueError(
            "dp_aggregate is inside optax.masked or optax.multi_transform: the leaves it does not see would keep their batch "
            "axis, and apply_updates would grow their parameters. Differentiate the trainable leaves only, and put "
            "dp_aggregate before the mask in optax.chain."
        )


def _check_shapes(updates: Any, params: Params) -> None:
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            f"per-example gradients and params differ in structure: {jax.tree.structure(updates)} against "
            f"{jax.tree.structure(params)}; differentiate exactly the pytree that is passed as params."
        )
    for (name, gradient), param in zip(_validate.named_leaves(updates), jax.tree.leaves(params), strict=True):
        if gradient.ndim != param.ndim + 1 or gradient.shape[1:] != param.shape:
            raise ValueError(
                f"gradient leaf {name!r} has shape {gradient.shape}, expected [B, *{param.shape}]: dp_aggregate takes "
                "per-example gradients, with the batch axis first. Differentiate trainable leaves only; do not mask."
            )
