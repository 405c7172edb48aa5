"""How a step looks at the loss along its directions: K projected gradients from forward passes alone.

An estimator carries *streams* through the model: for each direction, what the parts of a perturbed model compute. It lifts
each part, a function `f(params, x) -> y`, to a function of streams; the model is then lifted part by part, and a part is all
that must be in memory.

Axes: K directions, B examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.zeroth_order import side_path
from jaxdp.zeroth_order.directions import Factors, rounded

#: `direction(k) -> z`, a float32 pytree like the parameters of the part, in which matrices may be `Factors`.
Direction: TypeAlias = Callable[[jax.Array], Params]
#: `f(params, x) -> y`, one part of the model on a batch; `x` is None for the first part.
Part: TypeAlias = Callable[[Params, Any], Any]


def shifted(params: Params, direction: Params, scale: float) -> Params:
    """params + scale * direction, in float32 and then in the dtype of each leaf; out of place (S18)."""
    return jax.tree.map(
        lambda leaf, z: (leaf.astype(jnp.float32) + rounded(jnp.float32(scale) * z)).astype(leaf.dtype),
        params,
        direction,
    )


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """SPSA: g_k = (L(w + μ z_k) - L(w - μ z_k)) / 2μ, as in MeZO (arXiv 2305.17333). Two forward passes a direction.

    Attributes:
        num_directions: K.
        perturbation_scale: μ.
        num_at_once: How many low-rank directions pass at once, so that they share every product with a matrix; the memory of
            their activations adds up. Other directions pass one by one, since each needs a perturbed copy of the matrices.
    """

    num_directions: int = 1
    perturbation_scale: float = 1e-3
    num_at_once: int = 1

    def __post_init__(self) -> None:
        _check(self)

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any, *, is_factored: bool = False) -> Any:
        """`(plus, minus)`, each `[K, ...]`; `streams` is None for the first part. `is_factored` says what `direction` gives."""

        def at_once(k: jax.Array, streams: Any) -> Any:
            z, scales = direction(k), self.perturbation_scale * jnp.array([1.0, -1.0], jnp.float32)
            if streams is None:
                found = jax.vmap(lambda scale: side_path.apply_along(part, params, z, scale, None))(scales)
            else:
                signs = jax.tree.map(lambda *pair: jnp.stack(pair), *streams)
                along = functools.partial(side_path.apply_along, part, params, z)
                found = jax.vmap(along)(scales, signs)
            return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in (0, 1))

        def both(k: jax.Array, streams: Any) -> Any:
            plus = part(shifted(params, direction(k), self.perturbation_scale), None if streams is None else streams[0])
            # One perturbed copy at a time: the other direction is drawn again, when the first passes are over.
            plus, k = lax.optimization_barrier((plus, k))
            minus = part(
                shifted(params, direction(k), -self.perturbation_scale), None if streams is None else streams[1]
            )
            return plus, minus

        if is_factored:
            return _for_each(at_once, self.num_directions, streams, self.num_at_once)
        return _for_each(both, self.num_directions, streams)

    def results(self, losses: Any) -> tuple[jax.Array, jax.Array]:
        """Projected gradients `[K, B]` and the mean of the perturbed losses `[B]`, from the lifted losses."""
        plus, minus = losses
        return (plus - minus) / (2 * self.perturbation_scale), jnp.mean(0.5 * (plus + minus), axis=0)


@dataclasses.dataclass(frozen=True)
class OneSided:
    """g_k = (L(w + μ z_k) - L(w)) / μ, as in FZOO (arXiv 2506.09034). K + 1 forward passes, and a bias of order μ.

    Attributes:
        num_directions: K.
        perturbation_scale: μ.
        num_at_once: As of `TwoSided`.
    """

    num_directions: int = 8
    perturbation_scale: float = 1e-3
    num_at_once: int = 1

    def __post_init__(self) -> None:
        _check(self)

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any, *, is_factored: bool = False) -> Any:
        """`(center, plus)`, `[...]` and `[K, ...]`; arguments as of `TwoSided`."""
        center, plus = (None, None) if streams is None else streams

        def one(k: jax.Array, stream: Any) -> Any:
            if is_factored:
                return side_path.apply_along(part, params, direction(k), jnp.float32(self.perturbation_scale), stream)
            return part(shifted(params, direction(k), self.perturbation_scale), stream)

        at_once = self.num_at_once if is_factored else 1
        return part(params, center), _for_each(one, self.num_directions, plus, at_once)

    def results(self, losses: Any) -> tuple[jax.Array, jax.Array]:
        """Projected gradients `[K, B]` and the loss `[B]`."""
        center, plus = losses
        return (plus - center[None]) / self.perturbation_scale, center


@dataclasses.dataclass(frozen=True)
class ForwardMode:
    """g_k = <grad L(w), z_k>, the directional derivative itself, by forward-mode differentiation (arXiv 2202.08587).

    No difference is taken, so nothing cancels: it is exact in bfloat16, where two perturbed losses may be equal. The primal pass
    is shared by all directions. Functions with a custom reverse-mode derivative alone cannot be differentiated so.

    Attributes:
        num_directions: K.
    """

    num_directions: int = 1

    def __post_init__(self) -> None:
        _validate.positive_integer("num_directions", self.num_directions)

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any, *, is_factored: bool = False) -> Any:
        """`(primal, tangents)`, `[...]` and `[K, ...]`; arguments as of `TwoSided`."""

        def tangent(z: Params) -> Params:
            dense = jax.tree.map(_dense, z, is_leaf=_is_factors) if is_factored else z
            return jax.tree.map(lambda leaf, entry: entry.astype(leaf.dtype), params, dense)

        if streams is None:
            value, linear = jax.linearize(lambda params: part(params, None), params)
            return value, _for_each(lambda k, _: linear(tangent(direction(k))), self.num_directions, None)
        primal, tangents = streams
        value, linear = jax.linearize(part, params, primal)
        return value, _for_each(lambda k, stream: linear(tangent(direction(k)), stream), self.num_directions, tangents)

    def results(self, losses: Any) -> tuple[jax.Array, jax.Array]:
        """Projected gradients `[K, B]` and the loss `[B]`."""
        primal, tangents = losses
        return tangents, primal


Estimator: TypeAlias = TwoSided | OneSided | ForwardMode


def _for_each(fun: Callable[[jax.Array, Any], Any], num_directions: int, streams: Any, num_at_once: int = 1) -> Any:
    """`fun(k, streams[k])` stacked, for so many k at once: one program, and the memory of so many directions."""
    indices = jnp.arange(num_directions, dtype=jnp.uint32)
    if num_directions == 1:
        first = None if streams is None else jax.tree.map(lambda stream: stream[0], streams)
        return jax.tree.map(lambda result: result[None], fun(indices[0], first))
    return lax.map(lambda item: fun(*item), (indices, streams), batch_size=None if num_at_once == 1 else num_at_once)


def _is_factors(leaf: Any) -> bool:
    return isinstance(leaf, Factors)


def _dense(leaf: Any) -> jax.Array:
    return leaf.dense() if _is_factors(leaf) else leaf


def _check(estimator: TwoSided | OneSided) -> None:
    _validate.positive_integer("num_directions", estimator.num_directions)
    _validate.positive("perturbation_scale", estimator.perturbation_scale)
    _validate.positive_integer("num_at_once", estimator.num_at_once)
