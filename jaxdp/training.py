"""DP-SGD: `init` and `step` over (state, batch), around any optax optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxdp import _replicas, _validate, noise_keys
from jaxdp._typing import Batch, Key, LossFn, Params
from jaxdp.gradients import ClippedGrad, Method, NotPrivate, clipped_grad
from jaxdp.mechanism import Ledger, PrivacyPlan, check_batch, check_gradient_plan, privatize
from jaxdp.noise import secret_key
from jaxdp.noise_keys import Domain
from pallas_kernels import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What a run carries from step to step. It holds the noise key, so it is secret: publish `params` only.

    A copy of a state may be stepped: with the same batch it gives the same release, with another one noise of its own (S8). That
    is then a second release, on the budget of the same records, and each copy's ledger counts only its own: do not publish both.

    Attributes:
        params: The model: released.
        opt_state: The optimizer's state, computed from released values only.
        clip_norms: The clip norm of each group, `[K]`.
        noise_key: The secret noise key of the run (S8), derived from that of `init`. It never changes; noise is keyed by it,
            the step and a digest of parameters and batch.
        ledger: How many steps were released at which noise.
    """

    params: Params
    opt_state: Any
    clip_norms: jax.Array
    noise_key: Key = dataclasses.field(repr=False)
    ledger: Ledger

    @property
    def step(self) -> int:
        """The number of steps released, and the index of the next one."""
        return self.ledger.num_steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a step reports.

    Attributes:
        noise_stddevs: Noise std of each clipping group on the scale of the sum, `[K]`. Divide by
            `plan.expected_batch_size` for the std in the mean that the optimizer saw.
        clip_norms: The clip norms of this step, `[K]`.
        not_private: Per-example losses, norms and auxiliaries. Not covered by the guarantee (S15).
    """

    noise_stddevs: jax.Array
    clip_norms: jax.Array
    not_private: NotPrivate


InitFn = Callable[..., TrainingState]
StepFn = Callable[..., tuple[TrainingState, StepInfo]]


def make_dp_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    plan: PrivacyPlan,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method = "auto",
    implementation: Implementation | None = None,
) -> tuple[InitFn, StepFn]:
    """Makes the two functions of a DP-SGD run.

        S = sum_i clip(grad loss_fn(params, example_i));   mean = (S + noise) / (q N);   params = tx(mean)

    **Guarantee**: the sequence of parameters of `plan.num_steps` steps, on batches drawn by `jaxdp.poisson_batches` with
    this plan, is (plan.epsilon(), delta)-differentially private. The optimizer sees the noised mean only, so it is
    post-processing (S14). A step past `num_steps` is refused before it runs.

    **Noise** is a function of the key, the step, and the bits of the trainable parameters, the clip norms, the batch and, where
    `plan.sampling_prob < 1`, its mask; and of `method`, `microbatch_size`, `implementation`, the version of JAX and the kind of
    device, since a record whose gradient cancels has another sum in another program. A step repeated from one state with one batch
    in one program repeats its release, and any other draws noise of its own (S8, `jaxdp.noise_keys`). The digest does not see
    another `loss_fn`, another number of devices, `frozen` arrays that differ, nor, at `sampling_prob = 1`, a mask that differs:
    there nothing is drawn, and it marks the padding of a data set, a public constant. Change them in a run with a fresh key
    only, and never give one explicit `noise_key` to two runs: over the same data at the same parameters they would share noise.
    By default every `init` draws a key.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`, or `-> (scalar, aux)` with `has_aux=True`; one example, no batch axis.
            With `frozen` arrays, `loss_fn(params, example, frozen)`.
        tx: Any optax optimizer. It must not contain a privacy transformation of its own.
        plan: The privacy numbers, from `jaxdp.plan`, with Gaussian noise.
        has_aux: As in `jax.grad`.
        microbatch_size: Rows differentiated at once; bounds memory.
        method: How the clipped sum is computed, as in `clipped_grad`.
        implementation: What takes its norms and sums, XLA or a kernel, as in `clipped_grad`. None of the three changes the law of
            the released parameters; each draws noise of its own.

    Returns:
        `init(params, *, noise_key=None) -> TrainingState` copies `params` and, by default, draws the noise key from the
        operating system's entropy; in a group of processes it must be given, the same in all of them, or init raises a
        ValueError. Inside `jax.jit`, `jax.vmap` or `jax.eval_shape` it raises a TypeError: all calls would
        share a key.

        `step(state, batch, is_padding_example, frozen=None) -> (TrainingState, StepInfo)` is compiled once, whatever the
        realized batch size, and donates the arrays of `state`: use the state it returns. It keeps the ledger on the host,
        so call it directly rather than inside `jax.jit` or `lax.scan`. `frozen` is a pytree that `loss_fn` takes as its
        third argument, such as the weights below an adapter: it is public, neither differentiated nor donated, and unlike
        arrays that `loss_fn` closes over it does not become part of the compiled program.

    Source: DP-SGD, arXiv 1607.00133.
    """

    def grad_fn(fun: LossFn) -> ClippedGrad:
        return clipped_grad(
            fun,
            clipping=plan.clipping,
            has_aux=has_aux,
            microbatch_size=microbatch_size,
            method=method,
            implementation=implementation,
        )

    check_gradient_plan(plan)
    grad_fn(loss_fn)  # complains about its arguments now
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx must be an optax.GradientTransformation, such as optax.adam(1e-3); got {tx!r}.")

    program = (method, microbatch_size, implementation, jax.__version__, jax.default_backend())

    def init(params: Params, *, noise_key: Key | None = None) -> TrainingState:
        noise_keys.refuse_tracers("init", params, noise_key)
        _replicas.check_noise_key(noise_key, plan=plan)
        _validate.floating_params(params)
        key = secret_key() if noise_key is None else _validate.typed_key("noise_key", noise_key)
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)  # the step donates its input
        clip_norms = jnp.asarray(plan.clipping.clip_norms(plan.clipping.groups(params)))
        return TrainingState(params, tx.init(params), clip_norms, noise_keys.run_key(key, Domain.DP_STEP), Ledger())

    def released(
        params: Params,
        opt_state: Any,
        clip_norms: jax.Array,
        key: Key,
        step: jax.Array,
        batch: Batch,
        mask: jax.Array,
        frozen: Any,
    ) -> tuple[tuple[Params, Any, jax.Array, Key], StepInfo]:
        fun = loss_fn if frozen is None else lambda params, example: loss_fn(params, example, frozen)
        clipped, not_private = grad_fn(fun).clipped_sum(params, batch, is_padding_example=mask, clip_norms=clip_norms)
        # At other parameters the same batch has another clipped sum. Where every example is in every batch the mask is no draw,
        # and noise that does not follow it is how sensitivity is measured.
        bound_to = (params, batch) if plan.sampling_prob == 1 else (params, batch, mask)
        groups = plan.clipping.groups(params)
        release = privatize(clipped, groups, plan, clip_norms, key=key, step=step, bound_to=bound_to, facts=program)
        mean = jax.tree.map(lambda m, p: m.astype(p.dtype), release.mean, params)  # noise first, then cast (S21)
        updates, opt_state = tx.update(mean, opt_state, params)
        info = StepInfo(release.stddevs, release.clip_norms, not_private)
        return (optax.apply_updates(params, updates), opt_state, release.next_clip_norms, key), info

    compiled = jax.jit(released, donate_argnums=(0, 1, 2, 3))

    def step(
        state: TrainingState, batch: Batch, is_padding_example: Any, frozen: Any = None
    ) -> tuple[TrainingState, StepInfo]:
        if not isinstance(state, TrainingState):
            raise TypeError(f"state must be the TrainingState of init or of the last step, got {type(state).__name__}.")
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state.ledger)):
            raise TypeError(
                "step keeps the ledger on the host and is compiled already: call it outside jax.jit and lax.scan."
            )
        state.ledger.check_budget(plan)
        mask = check_batch(plan, batch, is_padding_example)
        arrays, info = compiled(
            state.params, state.opt_state, state.clip_norms, state.noise_key, np.uint32(state.step), batch, mask, frozen
        )
        return TrainingState(*arrays, ledger=state.ledger.record(plan)), info

    step.compiled = compiled  # type: ignore[attr-defined]
    return init, step
