"""Clipping policies: small frozen values that say how one example's contribution is bounded.

A policy partitions the leaves into K groups, gives each group a clip norm C_k, and turns the per-example norms `[B, K]`
into factors `[B, K]`. Whatever the policy, the contribution of one example to group k has L2 norm at most C_k, and to all
groups together at most sqrt(sum_k C_k^2).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params

NoiseAllocation: TypeAlias = Literal["global", "equal_budget", "least_energy"]

# S4: norms, factors and products are rounded to float32. Clipping to C(1 - 2^-20) keeps an example that is clipped at or
# below C after rounding; an example below C keeps its factor of exactly 1.
_ROUNDING_GUARD = 1.0 - 2.0**-20


#: The clipping group of a leaf; a tuple has one for each slice along its leading axis.
LeafGroup: TypeAlias = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which leaves are clipped together.

    Attributes:
        names: One name for each of the K groups.
        leaf_groups: The group index of each leaf, in pytree order; for a leaf of stacked layers, the index of each slice
            along its leading axis.
        sizes: The number of parameters d_k of each group.
    """

    names: tuple[str, ...]
    leaf_groups: tuple[LeafGroup, ...]
    sizes: tuple[int, ...]


def _one_group(params: Params) -> Groups:
    leaves = jax.tree.leaves(params)
    return Groups(("all",), (0,) * len(leaves), (sum(math.prod(leaf.shape) for leaf in leaves),))


def _hard_factors(norms: jax.Array, clip_norms: jax.Array) -> jax.Array:
    # S4(f): min(1, C / max(n, tiny)), with no additive constant that could raise the factor.
    target = jnp.where(jnp.isinf(clip_norms), clip_norms, clip_norms * _ROUNDING_GUARD)
    tiny = jnp.finfo(norms.dtype).tiny
    # `n <= C` and not the quotient decides: an infinite C would give inf/inf for an infinite norm.
    return jnp.where(norms <= target, jnp.ones_like(norms), target / jnp.maximum(norms, tiny))


@dataclasses.dataclass(frozen=True)
class Flat:
    """See `flat`."""

    l2_clip_norm: float

    def groups(self, params: Params) -> Groups:
        return _one_group(params)

    def clip_norms(self, groups: Groups) -> np.ndarray:  # [1]
        return np.array([self.l2_clip_norm], np.float32)

    def factors(self, norms: jax.Array, clip_norms: jax.Array) -> jax.Array:  # [B, K], [1, K] -> [B, K]
        return _hard_factors(norms, clip_norms)

    @property
    def total_l2_clip_norm(self) -> float:
        return self.l2_clip_norm

    @property
    def noise_allocation(self) -> NoiseAllocation:
        return "global"

    def __str__(self) -> str:
        return f"flat clipping of each per-example gradient to L2 norm {self.l2_clip_norm:g}"


@dataclasses.dataclass(frozen=True)
class Automatic:
    """See `automatic`."""

    l2_clip_norm: float
    gamma: float

    def groups(self, params: Params) -> Groups:
        return _one_group(params)

    def clip_norms(self, groups: Groups) -> np.ndarray:  # [1]
        return np.array([self.l2_clip_norm], np.float32)

    def factors(self, norms: jax.Array, clip_norms: jax.Array) -> jax.Array:  # [B, K], [1, K] -> [B, K]
        return clip_norms * _ROUNDING_GUARD / (norms + self.gamma)

    @property
    def total_l2_clip_norm(self) -> float:
        return self.l2_clip_norm

    @property
    def noise_allocation(self) -> NoiseAllocation:
        return "global"

    def __str__(self) -> str:
        return f"automatic clipping (AUTO-S, gamma={self.gamma:g}) of each per-example gradient below L2 norm {self.l2_clip_norm:g}"


GroupBy: TypeAlias = Literal["module", "leaf"] | Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """See `per_layer`."""

    l2_clip_norm: float | tuple[tuple[str, float], ...]
    noise_allocation: NoiseAllocation
    group_by: GroupBy
    split: Literal["uniform", "dimension"]
    stacked: tuple[str, ...] = ()

    def groups(self, params: Params) -> Groups:
        named = _validate.named_leaves(params)
        self._check_stacked([leaf for leaf, _ in named])
        sizes: dict[str, int] = {}
        leaf_names: list[str | list[str]] = []
        for leaf, value in named:
            name, size = self._group_of(leaf), math.prod(value.shape)
            if any(_matches(leaf, pattern) for pattern in self.stacked):
                if not value.shape or not value.shape[0]:
                    raise ValueError(f"stacked leaf {leaf!r} has shape {value.shape}, without an axis of layers.")
                layers = [f"{name}[{layer}]" for layer in range(value.shape[0])]
                leaf_names.append(layers)
                sizes |= {layer: sizes.get(layer, 0) + size // len(layers) for layer in layers}
            else:
                leaf_names.append(name)
                sizes[name] = sizes.get(name, 0) + size
        index = {name: position for position, name in enumerate(sizes)}
        leaf_groups = tuple(
            index[names] if isinstance(names, str) else tuple(index[name] for name in names) for names in leaf_names
        )
        return Groups(tuple(sizes), leaf_groups, tuple(sizes.values()))

    def _check_stacked(self, leaves: list[str]) -> None:
        for pattern in self.stacked:
            if not any(_matches(leaf, pattern) for leaf in leaves):
                shown = ", ".join(leaves[:8]) + (", ..." if len(leaves) > 8 else "")
                raise ValueError(f"stacked={pattern!r} matches no parameter; the leaves are {shown}.")

    def _group_of(self, leaf: str) -> str:
        if callable(self.group_by):
            name = self.group_by(leaf)
            if not isinstance(name, str):
                raise TypeError(f"group_by must return a layer name, it returned {name!r} for leaf {leaf!r}.")
            return name
        if self.group_by == "leaf":
            return leaf
        parts = leaf.removesuffix("/value").split("/")  # an nnx.Variable adds `/value` to the path of its array
        return "/".join(parts[:-1]) if len(parts) > 1 else leaf

    def clip_norms(self, groups: Groups) -> np.ndarray:  # [K]
        if isinstance(self.l2_clip_norm, tuple):
            given = dict(self.l2_clip_norm)
            if set(given) != set(groups.names):
                missing, unknown = sorted(set(groups.names) - set(given)), sorted(set(given) - set(groups.names))
                raise ValueError(
                    f"per_layer clip norms do not match the layers of params: missing {missing}, unknown {unknown}; give "
                    "one clip norm for each layer, or one number for all layers together."
                )
            return np.array([given[name] for name in groups.names], np.float32)
        sizes = np.asarray(groups.sizes, np.float64)
        weights = np.ones_like(sizes) if self.split == "uniform" else sizes
        return (self.l2_clip_norm * np.sqrt(weights / weights.sum())).astype(np.float32)

    def factors(self, norms: jax.Array, clip_norms: jax.Array) -> jax.Array:  # [B, K], [1, K] -> [B, K]
        return _hard_factors(norms, clip_norms)

    @property
    def total_l2_clip_norm(self) -> float:
        if isinstance(self.l2_clip_norm, tuple):
            return math.sqrt(sum(c * c for _, c in self.l2_clip_norm))
        return self.l2_clip_norm

    def __repr__(self) -> str:
        # A function is named, not shown with its address: a plan must be recognized in another process.
        by = repr(self.group_by)
        if callable(self.group_by):
            by = f"{self.group_by.__module__}.{self.group_by.__qualname__}"
        return (
            f"PerLayer(l2_clip_norm={self.l2_clip_norm!r}, noise_allocation={self.noise_allocation!r}, group_by={by}, "
            f"split={self.split!r}, stacked={self.stacked!r})"
        )

    def __str__(self) -> str:
        return (
            f"per-layer clipping of each per-example gradient to a joint L2 norm of {self.total_l2_clip_norm:g}, "
            f"noise allocated by the {self.noise_allocation.replace('_', ' ')} rule"
        )


def _matches(leaf: str, pattern: str) -> bool:
    return f"{leaf}/".startswith(f"{pattern}/") or fnmatch.fnmatchcase(leaf, pattern)


@dataclasses.dataclass(frozen=True)
class Quantile:
    """See `quantile`."""

    initial_l2_clip_norm: float
    target_quantile: float
    learning_rate: float
    count_stddev: float | None

    def groups(self, params: Params) -> Groups:
        return _one_group(params)

    def clip_norms(self, groups: Groups) -> np.ndarray:  # [1]
        return np.array([self.initial_l2_clip_norm], np.float32)

    def factors(self, norms: jax.Array, clip_norms: jax.Array) -> jax.Array:  # [B, K], [1, K] -> [B, K]
        return _hard_factors(norms, clip_norms)

    @property
    def total_l2_clip_norm(self) -> float:
        """The *initial* bound; the current one is in the training state."""
        return self.initial_l2_clip_norm

    @property
    def noise_allocation(self) -> NoiseAllocation:
        return "global"

    def __str__(self) -> str:
        return (
            f"adaptive flat clipping that follows the {self.target_quantile:g} quantile of the per-example gradient norms "
            f"from {self.initial_l2_clip_norm:g}, by a count whose noise is part of the stated guarantee"
        )


ClippingPolicy: TypeAlias = Flat | Automatic | PerLayer | Quantile


def check_policy(clipping: Any) -> ClippingPolicy:
    if not isinstance(clipping, Flat | Automatic | PerLayer | Quantile):
        raise TypeError(
            f"clipping must be a clipping policy, got {clipping!r} of type {type(clipping).__name__}; use "
            "jaxdp.flat(l2_clip_norm), jaxdp.per_layer(...), jaxdp.automatic() or jaxdp.quantile(...)."
        )
    return clipping


def flat(l2_clip_norm: float) -> Flat:
    """Clips the whole per-example gradient g_i to C: g_i * min(1, C / ||g_i||).

    **Guarantee**: one example contributes a vector of L2 norm at most C to the sum. A zero gradient stays zero; an
    infinite C clips nothing and needs `noise_multiplier=0`.

    Args:
        l2_clip_norm: C > 0, in units of the per-example gradient.

    Raises:
        ValueError: C is not positive, or outside the range where float32 norms are exact enough.

    Source: DP-SGD, arXiv 1607.00133.

    >>> flat(1.0)
    Flat(l2_clip_norm=1.0)
    """
    return Flat(_validate.clip_norm("l2_clip_norm", l2_clip_norm))


def automatic(l2_clip_norm: float = 1.0, *, gamma: float = 0.01) -> Automatic:
    """Normalizes every per-example gradient (AUTO-S): g_i * C / (||g_i|| + gamma).

    There is no threshold to tune: C only scales the update, and the learning rate absorbs it.

    **Guarantee**: one example contributes a vector of L2 norm below C.

    Args:
        l2_clip_norm: C > 0 and finite.
        gamma: Stability constant, at least 1e-9, in units of the per-example gradient; small gradients shrink towards zero.

    Source: arXiv 2206.07136.
    """
    bound = _validate.clip_norm("l2_clip_norm", l2_clip_norm, allow_infinite=False)
    # A norm below 1e-13 may flush to zero in float32: gamma must stay far above it, or the factor C / gamma has no bound.
    return Automatic(bound, _validate.clip_norm("gamma", gamma, allow_infinite=False))


def per_layer(
    l2_clip_norm: float | Mapping[str, float],
    *,
    noise_allocation: NoiseAllocation = "global",
    group_by: GroupBy = "module",
    split: Literal["uniform", "dimension"] = "uniform",
    stacked: str | Sequence[str] = (),
) -> PerLayer:
    """Clips the gradient of each layer k by itself to C_k.

    **Guarantee**: one example contributes at most C_k to layer k, so at most sqrt(sum_k C_k^2) in all, and the noise of
    every allocation below satisfies sum_k C_k^2 / s_k^2 = 1 / sigma^2 (S5): the release costs what one Gaussian mechanism
    of noise multiplier sigma costs, however many layers there are.

    Args:
        l2_clip_norm: The joint bound C = sqrt(sum_k C_k^2), divided over the layers by `split`; or a mapping from layer name
            to C_k.
        noise_allocation: `"global"`, s_k = sigma * C, the same in every layer; `"equal_budget"`, s_k = sigma * sqrt(K) * C_k;
            `"least_energy"`, s_k^2 = sigma^2 * C_k / sqrt(d_k) * sum_j C_j sqrt(d_j), the least total noise sum_k d_k s_k^2.
        group_by: What a layer is. `"module"`: the leaves under one parent path (a kernel and its bias); `"leaf"`; or a
            function from a leaf's path, as in `dense/kernel`, to a layer name.
        split: `"uniform"`, C_k = C / sqrt(K); `"dimension"`, C_k = C * sqrt(d_k / sum_j d_j).
        stacked: Which leaves hold the layers of a `lax.scan` along their leading axis, by path (`"blocks"` is every leaf below
            it) or shell pattern (`"blocks.*"`): each slice is a layer of its own, called `blocks/dense[3]`. Otherwise a
            stacked leaf is one layer.

    Source: arXiv 2212.01539.
    """
    if isinstance(l2_clip_norm, Mapping):
        if not l2_clip_norm:
            raise ValueError("l2_clip_norm is an empty mapping; give one clip norm for each layer.")
        norms: float | tuple[tuple[str, float], ...] = tuple(
            (str(name), _validate.clip_norm(f"l2_clip_norm[{name!r}]", value, allow_infinite=False))
            for name, value in l2_clip_norm.items()
        )
    else:
        norms = _validate.clip_norm("l2_clip_norm", l2_clip_norm)
    _validate.one_of("noise_allocation", noise_allocation, ("global", "equal_budget", "least_energy"))
    _validate.one_of("split", split, ("uniform", "dimension"))
    if not callable(group_by):
        _validate.one_of("group_by", group_by, ("module", "leaf"))
    prefixes = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    for prefix in prefixes:
        if not isinstance(prefix, str) or not prefix.strip("/"):
            raise TypeError(f"stacked must name parameters by path or pattern, as in 'blocks'; got {prefix!r}.")
    return PerLayer(norms, noise_allocation, group_by, split, tuple(prefix.strip("/") for prefix in prefixes))


def quantile(
    initial_l2_clip_norm: float = 0.1,
    *,
    target_quantile: float = 0.5,
    learning_rate: float = 0.2,
    count_stddev: float | None = None,
) -> Quantile:
    """Flat clipping whose clip norm C follows a quantile of the per-example norms.

    With m the expected batch size and s_b the noise of the count, each step releases, beside the gradient,

        b = 1/2 + (sum_i (1[n_i <= C] - 1/2) + N(0, s_b^2)) / m,        C <- C * exp(-learning_rate * (b - target_quantile))

    **Guarantee**: under add-or-remove-one the shifted count has sensitivity 1/2 (1 if a record is replaced, as the gradient's
    doubles too), and the gradient is noised with the multiplier
    z_grad = (z^-2 - (2 s_b)^-2)^(-1/2), so that gradient and count together are one Gaussian mechanism of the plan's
    noise multiplier z. C depends on earlier noisy outputs only (S12).

    Args:
        initial_l2_clip_norm: C of the first step; finite.
        target_quantile: The fraction of examples to leave unclipped, in (0, 1).
        learning_rate: Step size of the update of log C.
        count_stddev: s_b, in examples; None for m / 20. It must exceed half the noise multiplier.

    Source: arXiv 1905.03871.
    """
    return Quantile(
        _validate.clip_norm("initial_l2_clip_norm", initial_l2_clip_norm, allow_infinite=False),
        _validate.probability("target_quantile", target_quantile, allow_one=False),
        _validate.positive("learning_rate", learning_rate),
        None if count_stddev is None else _validate.positive("count_stddev", count_stddev),
    )
