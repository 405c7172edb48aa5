"""Zeroth-order training of a resident model with any optax optimizer: the projected gradients of any loss, and a step.

For models that fit the device together with the state of their optimizer. What is larger streams (`make_step`), with updates
that are linear in the scalars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp import _replicas, _validate
from jaxdp._typing import Batch, Key, Params
from jaxdp.gradients.couplings import over_batch
from jaxdp.mechanism import Ledger, PrivacyPlan
from jaxdp.noise_keys import Domain
from jaxdp.zeroth_order import aggregation, directions, updates
from jaxdp.zeroth_order.aggregation import NotPrivate, unrelated_noise_key
from jaxdp.zeroth_order.directions import Law, Rademacher
from jaxdp.zeroth_order.estimators import Estimator, ForwardMode, TwoSided
from jaxdp.zeroth_order.transform import direction, expanded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentState:
    """What a run carries from step to step. Under a plan it holds the noise key, so it is secret: publish `params` only.

    Attributes:
        params: The model. Under a plan: released.
        opt_state: The optimizer's state, computed from the estimates only.
        direction_words: Of the direction key, uint32 `[2]`. Public.
        step: Index of the next step, uint32.
        noise_key: Under a plan, the secret noise key, which has nothing to do with the direction key (S8).
        ledger: Under a plan, how many steps were released at which noise.
    """

    params: Params
    opt_state: Any
    direction_words: jax.Array
    step: np.ndarray
    noise_key: Key | None = dataclasses.field(repr=False, default=None)
    ledger: Ledger = dataclasses.field(default_factory=Ledger)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentInfo:
    """What a step reports.

    Attributes:
        projected_gradients: g `[K]`, after noise and normalization: what its directions were multiplied by. Under a plan, that is
            what the step releases.
        not_private: Per-example losses and projected gradients. Not covered by a guarantee (S15).
    """

    projected_gradients: jax.Array
    not_private: NotPrivate


def projected_gradients(
    loss_fn: Callable[..., jax.Array], *, estimator: Estimator | None = None, law: Law | None = None
) -> Callable[..., NotPrivate]:
    """The projected gradients of any loss, for each example and direction.

    The whole model is perturbed at once: the device holds one direction in float32 and one perturbed copy beside the parameters,
    whatever K. A loss need not have a derivative under `TwoSided` and `OneSided`; under `ForwardMode` one that is piecewise
    constant, such as an accuracy, has the derivative zero.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`; one example, no batch axis. With `frozen` arrays,
            `loss_fn(params, example, frozen)`.
        estimator: How the loss is probed; `TwoSided()` by default.
        law: What directions are drawn from; `Rademacher()` by default.

    Returns:
        `found(params, batch, *, direction_key, step, is_padding_example=None, frozen=None) -> NotPrivate`, pure and for
        `jax.jit`: losses `[B]`, projected gradients `[B, K]`, and who contributes: not padding, nor an example with a non-finite
        loss or projected gradient (S9).
    """
    estimator = TwoSided() if estimator is None else estimator
    law = Rademacher() if law is None else law

    def found(
        params: Params,
        batch: Batch,
        *,
        direction_key: Key,
        step: Any,
        is_padding_example: Any = None,
        frozen: Any = None,
    ) -> NotPrivate:
        mask = _validate.padding_mask(is_padding_example, _validate.batch_axis(batch))
        root = directions.words_of(direction_key)
        return _probed(loss_fn, estimator, law, params, batch, mask, frozen, root, jnp.asarray(step, jnp.uint32))

    return found


def make_resident_step(
    loss_fn: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    *,
    estimator: Estimator | None = None,
    law: Law | None = None,
    plan: PrivacyPlan | None = None,
    is_normalized: bool = False,
) -> tuple[Callable[..., ResidentState], Callable[..., tuple[ResidentState, ResidentInfo]]]:
    """Makes the two functions of a zeroth-order run around any optax optimizer.

        g_k = mean_i projected gradient of example i along z_k;    G = sum_k g_k z_k / K;    params = tx(G)

    With `optax.sgd` and `BlockParams` it is the run of `make_step` with the same key, but for rounding.

    **Guarantee** under a plan: the sequence of g, and so of parameters, of `plan.num_steps` steps on batches drawn by
    `jaxdp.poisson_batches` with this plan is (plan.epsilon(), delta)-differentially private. Each example is one clipped vector of
    its K projected gradients, noised once a step (`aggregation.private_mean`); the optimizer is post-processing (S14). A step past
    `num_steps` is refused before it runs.

    Args:
        loss_fn: As in `projected_gradients`.
        tx: Any optax optimizer; it sees G in the dtype of each parameter. Keep parameters in float32: a narrower one loses updates
            below half a unit in its last place (S19).
        estimator: How the loss is probed; `TwoSided()` by default.
        law: What directions are drawn from; `Rademacher()` by default.
        plan: The privacy numbers, from `jaxdp.plan`, with flat or automatic clipping, and Laplace noise for one direction only;
            None for a run without privacy.
        is_normalized: Divide g by its spread over the K directions (FZOO, arXiv 2506.09034), after the noise; a step without
            spread gives zero.

    Returns:
        `init(params, *, direction_key, noise_key=None) -> ResidentState` copies `params`. Under a plan the noise key is drawn from
        the operating system's entropy unless it is given; in a group of processes it must be given, and processes that differ
        in it, the plan or the direction key raise a ValueError.

        `step(state, batch, is_padding_example=None, frozen=None) -> (ResidentState, ResidentInfo)` is compiled once and donates
        the parameters and the optimizer's state: use the state it returns. Under a plan the mask is that of
        `jaxdp.poisson_batches`. `frozen` is what `loss_fn` takes as its third argument: public, and never changed.
    """
    estimator = TwoSided() if estimator is None else estimator
    law = Rademacher() if law is None else law
    if plan is not None:
        aggregation.check_zeroth_order_plan(plan, num_directions=estimator.num_directions)
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx must be an optax.GradientTransformation, such as optax.adam(1e-3); got {tx!r}.")
    sgd = updates.Sgd(1.0, is_normalized=is_normalized)  # the learning rate is the optimizer's
    updates.check_spread(sgd, estimator.num_directions)

    def init(params: Params, *, direction_key: Key, noise_key: Key | None = None) -> ResidentState:
        _validate.floating_params(params)
        if plan is not None:
            _replicas.check_noise_key(noise_key, plan=plan, direction_key=direction_key)
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)  # the step donates its input
        return ResidentState(
            params,
            tx.init(params),
            jnp.array(directions.words_of(direction_key), copy=True),
            np.zeros((), np.uint32),
            None if plan is None else unrelated_noise_key(noise_key, direction_key, Domain.RESIDENT, params),
        )

    def moved(
        params: Params,
        opt_state: Any,
        root: jax.Array,
        step: jax.Array,
        noise_key: Key | None,
        batch: Batch,
        mask: jax.Array,
        frozen: Any,
    ) -> tuple[Params, Any, ResidentInfo]:
        found = _probed(loss_fn, estimator, law, params, batch, mask, frozen, root, step)
        g = aggregation.released(found, plan, key=noise_key, step=step)
        g = updates.scalars(sgd, g, step).projected_gradients
        estimate = expanded(law, g, params, root=root, step=step)
        estimate = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), estimate, params)
        changes, opt_state = tx.update(estimate, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, ResidentInfo(g, found)

    compiled = jax.jit(moved, donate_argnums=(0, 1))

    def step(
        state: ResidentState, batch: Batch, is_padding_example: Any = None, frozen: Any = None
    ) -> tuple[ResidentState, ResidentInfo]:
        if not isinstance(state, ResidentState):
            raise TypeError(f"state must be the ResidentState of init or of the last step, got {type(state).__name__}.")
        directions.check_step(int(state.step))
        mask = aggregation.check_examples(plan, state.ledger, state.noise_key, batch, is_padding_example)
        params, opt_state, info = compiled(
            state.params,
            state.opt_state,
            state.direction_words,
            np.uint32(state.step),
            state.noise_key,
            batch,
            mask,
            frozen,
        )
        ledger = state.ledger if plan is None else state.ledger.record(plan)
        following = np.asarray(int(state.step) + 1, np.uint32)
        return ResidentState(params, opt_state, state.direction_words, following, state.noise_key, ledger), info

    step.compiled = compiled  # type: ignore[attr-defined]
    return init, step


def _probed(
    loss_fn: Callable[..., jax.Array],
    estimator: Estimator,
    law: Law,
    params: Params,
    batch: Batch,
    mask: jax.Array,
    frozen: Any,
    root: jax.Array,
    step: jax.Array,
) -> NotPrivate:
    """The whole model as one part of an estimator."""

    def part(params: Params, streams: Any) -> jax.Array:
        del streams
        further = () if frozen is None else (frozen,)
        derivative = "forward" if isinstance(estimator, ForwardMode) else None
        return over_batch(lambda example: loss_fn(params, example, *further), batch, derivative=derivative)

    lifted = estimator.lift(part, params, lambda k: direction(law, params, root=root, step=step, k=k), None)
    projected, losses = estimator.results(lifted)  # [K, B], [B]
    if projected.ndim != 2:
        raise ValueError(f"loss_fn must return a scalar for one example, got shape {losses.shape[1:]}.")
    return aggregation.examples_of(projected, losses, mask)
