"""How a step looks at the loss along its directions: K projected gradients from forward passes alone.

An estimator carries *streams* through the model: for each direction, what the parts of a perturbed model compute. It lifts
each part, a function `f(params, x) -> y`, to a function of streams; the model is then lifted part by part, and a part is all
that must be in memory.

Axes: K directions, B examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.zeroth_order.directions import rounded

#: `direction(k) -> z`, a float32 pytree like the parameters of the part.
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
    """

    num_directions: int = 1
    perturbation_scale: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any) -> Any:
        """`(plus, minus)`, each `[K, ...]`; None for the first part."""

        def both(k: jax.Array, streams: Any) -> Any:
            plus = part(shifted(params, direction(k), self.perturbation_scale), None if streams is None else streams[0])
            # One perturbed copy at a time: the other direction is drawn again, when the first passes are over.
            plus, k = lax.optimization_barrier((plus, k))
            minus = part(
                shifted(params, direction(k), -self.perturbation_scale), None if streams is None else streams[1]
            )
            return plus, minus

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
    """

    num_directions: int = 8
    perturbation_scale: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any) -> Any:
        """`(center, plus)`, `[...]` and `[K, ...]`; None for the first part."""
        center, plus = (None, None) if streams is None else streams

        def one(k: jax.Array, stream: Any) -> Any:
            return part(shifted(params, direction(k), self.perturbation_scale), stream)

        return part(params, center), _for_each(one, self.num_directions, plus)

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

    def lift(self, part: Part, params: Params, direction: Direction, streams: Any) -> Any:
        """`(primal, tangents)`, `[...]` and `[K, ...]`; None for the first part."""

        def tangent(z: Params) -> Params:
            return jax.tree.map(lambda leaf, entry: entry.astype(leaf.dtype), params, z)

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


def _for_each(fun: Callable[[jax.Array, Any], Any], num_directions: int, streams: Any) -> Any:
    """`fun(k, streams[k])` for one k after the other, stacked: one program, and the memory of one direction."""
    indices = jnp.arange(num_directions, dtype=jnp.uint32)
    if num_directions == 1:
        first = None if streams is None else jax.tree.map(lambda stream: stream[0], streams)
        return jax.tree.map(lambda result: result[None], fun(indices[0], first))
    return lax.map(lambda item: fun(*item), (indices, streams))


def _check(estimator: TwoSided | OneSided) -> None:
    _validate.positive_integer("num_directions", estimator.num_directions)
    _validate.positive("perturbation_scale", estimator.perturbation_scale)
