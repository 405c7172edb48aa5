"""Ways to a private step, under one signature: `make_dp_step` by each method, and `dp_aggregate` in an update of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, get_args

import jax
import numpy as np
import optax

from jaxdp._typing import Key
from jaxdp.clipping import ClippingPolicy, PerLayer
from jaxdp.mechanism import PrivacyPlan
from jaxdp.noise import secret_key
from jaxdp.training import make_dp_step
from jaxdp.transforms import dp_aggregate

Way: TypeAlias = Literal["vmap", "book_keeping", "two_pass", "per_layer", "dp_aggregate"]
WAYS: tuple[Way, ...] = get_args(Way)


def ways_of(policy: ClippingPolicy) -> tuple[Way, ...]:
    """All ways that can clip by `policy`."""
    return tuple(way for way in WAYS if way != "per_layer" or isinstance(policy, PerLayer))


class MakeStep(Protocol):
    """What `make_step` is, and a broken one: `(init, step)` of one way."""

    def __call__(
        self,
        loss_fn: Callable[..., Any],
        tx: optax.GradientTransformation,
        plan: PrivacyPlan,
        *,
        way: Way,
        microbatch_size: int | None = None,
    ) -> tuple[Callable[..., Any], Callable[..., Any]]: ...


def make_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    plan: PrivacyPlan,
    *,
    way: Way,
    microbatch_size: int | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init(params, *, noise_key=None)` and `step(state, batch, is_padding_example, frozen=None)` of `way`, as of `make_dp_step`.

    States of all methods are interchangeable; that of `dp_aggregate` is of its own kind. All have `params`, `opt_state` and
    `clip_norms`.

    Raises:
        ValueError: `dp_aggregate` was asked for microbatches, which it does not have.
    """
    if way != "dp_aggregate":
        return make_dp_step(loss_fn, tx, plan, method=way, microbatch_size=microbatch_size)
    if microbatch_size is not None:
        raise ValueError(
            f"microbatch_size={microbatch_size} with dp_aggregate, which takes whole batches; leave it out."
        )
    return _make_aggregate_step(loss_fn, tx, plan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AggregateState:
    """State of a run whose updates are `optax.chain(dp_aggregate(...), tx)`."""

    params: Any
    aggregate: Any
    opt_state: Any

    @property
    def clip_norms(self) -> jax.Array:
        return self.aggregate.clip_norms


def _make_aggregate_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, plan: PrivacyPlan
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    update = dp_aggregate(plan, secret_key()).update  # the key is that of the state
    transformations: dict[bytes, Any] = {}

    def init(params: Any, *, noise_key: Key | None = None) -> AggregateState:
        key = secret_key() if noise_key is None else noise_key
        # One transformation for each key: that its runs differ is its own promise.
        name = np.asarray(jax.random.key_data(key)).tobytes()
        transformation = transformations.setdefault(name, dp_aggregate(plan, jax.random.clone(key)))
        return AggregateState(params, transformation.init(params), tx.init(params))

    @jax.jit
    def compiled(state: AggregateState, batch: Any, mask: jax.Array, frozen: Any) -> AggregateState:
        fun = loss_fn if frozen is None else lambda params, example: loss_fn(params, example, frozen)
        gradients = jax.vmap(jax.grad(fun), (None, 0))(state.params, batch)
        updates, aggregate = update(gradients, state.aggregate, state.params, is_padding_example=mask)
        updates, opt_state = tx.update(updates, state.opt_state, state.params)
        return AggregateState(optax.apply_updates(state.params, updates), aggregate, opt_state)

    def step(
        state: AggregateState, batch: Any, is_padding_example: Any, frozen: Any = None
    ) -> tuple[AggregateState, None]:
        return compiled(state, batch, np.asarray(is_padding_example), frozen), None

    return init, step


def last_release() -> optax.GradientTransformation:
    """An "optimizer" whose state is what the mechanism released last, and which moves nothing."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return jax.tree.map(jax.numpy.zeros_like, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jax.numpy.zeros_like, params), update)
