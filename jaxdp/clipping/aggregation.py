"""Per-example vectors -> their clipped sum: the one place where examples meet."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp._materialize import materialize, zero_rows
from jaxdp.clipping.policies import ClippingPolicy, Groups, LeafGroup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """What a step sums over its examples, before any noise: private.

    Attributes:
        value: sum_i c_i g_i, a pytree in float32 or wider.
        centered_count: sum_i (1[n_ik <= C_k] - 1/2) over the examples that count, `[K]` float32. Only adaptive clipping
            releases it, with noise.
    """

    value: Any
    centered_count: jax.Array


def accumulator(*dtypes: Any) -> Any:
    """The dtype in which values of these dtypes are squared and summed: float32, or float64 if one of them is."""
    return jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32


@jax.named_scope("jaxdp_norm")
def squared_norms(rows: jax.Array, *, by_layer: bool = False) -> jax.Array:
    """||g_i||^2 of the rows of `[B, *shape]`, `[B]`; of each slice along the first axis of `shape`, `[B, L]`."""
    wide = rows.astype(accumulator(rows.dtype))
    return jnp.sum(jnp.square(wide), axis=tuple(range(2 if by_layer else 1, rows.ndim)))


@jax.named_scope("jaxdp_sum")
def sum_rows(rows: jax.Array, factors: jax.Array, keep: jax.Array) -> jax.Array:
    """sum_i c_i g_i over the rows of `[B, *shape]` to keep.

    Args:
        rows: `[B, *shape]`.
        factors: c, `[B]`; or `[B, L]`, a factor for each slice along the first axis of `shape`.
        keep: Bool, as `factors`.
    """
    dtype = accumulator(rows.dtype)
    values = rows.astype(dtype).reshape(factors.size, -1)
    values = zero_rows(values, keep.reshape(-1))  # S9: zero before the product, since 0 * inf is NaN
    values, factors = values.reshape(*factors.shape, -1), factors.astype(dtype)
    if factors.ndim == 1 or factors.shape[1] == 1:  # the matrix product that XLA does best
        total = jnp.matmul(
            factors.reshape(-1), values.reshape(len(values), -1), precision=lax.Precision.HIGHEST
        )  # S4(a)
    else:
        total = jnp.einsum("bl,bln->ln", factors, values, precision=lax.Precision.HIGHEST)
    return total.reshape(rows.shape[1:])


def per_example_norms(per_example: Any, groups: Groups) -> jax.Array:
    """L2 norm of each example's vector in each group: `[B, K]`, squared and summed in float32 or wider.

    Args:
        per_example: Pytree of arrays `[B, *shape]`.
        groups: The partition of its leaves.
    """
    squares: list[list[jax.Array]] = [[] for _ in groups.names]
    for leaf, group in zip(jax.tree.leaves(per_example), groups.leaf_groups, strict=True):
        if isinstance(group, tuple):
            parts = squared_norms(leaf, by_layer=True)
            for layer, index in enumerate(group):
                squares[index].append(parts[:, layer])
        else:
            squares[group].append(squared_norms(leaf))
    widest = max((part.dtype for parts in squares for part in parts), key=lambda dtype: dtype.itemsize)
    return jnp.sqrt(jnp.stack([sum(part.astype(widest) for part in parts) for parts in squares], axis=1))


@jax.named_scope("jaxdp_factors")
def clipping_factors(
    norms: jax.Array, policy: ClippingPolicy, clip_norms: jax.Array, *, counts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the norms of each example to what it is multiplied by.

        c_ik = keep_ik * factor(n_ik, C_k),        keep_ik = counts_i and n_ik is finite

    Args:
        norms: n_ik, `[B, K]`.
        policy: How one example is bounded.
        clip_norms: C_k, `[K]`.
        counts: Bool `[B]`; False for padding and for examples already known to be non-finite.

    Returns:
        c, `[B, K]`; keep, bool `[B, K]`; and the centered count of `ClippedSum`, `[K]`.
    """
    keep = counts[:, None] & jnp.isfinite(norms)  # S9
    bounds = clip_norms.astype(norms.dtype)[None, :]  # [1, K]
    factors = jnp.where(keep, policy.factors(norms, bounds), 0.0)
    unclipped = (norms <= bounds).astype(jnp.float32)
    centered_count = jnp.sum(jnp.where(keep, unclipped - 0.5, 0.0), axis=0)  # padding adds 0, not -1/2
    return factors, keep, centered_count


def clip_and_sum(
    per_example: Any,
    policy: ClippingPolicy,
    groups: Groups,
    clip_norms: jax.Array,
    *,
    counts: jax.Array,
) -> tuple[ClippedSum, jax.Array, jax.Array]:
    """Clips each example's vector by the policy and sums over the examples.

        n_ik = ||g_ik||;   c_ik = keep_ik * factor(n_ik, C_k);   S_k = sum_i c_ik g_ik

    **Guarantee**: adding or removing one example moves `value` by at most sqrt(sum_k C_k^2) in L2 norm, and
    `centered_count` by at most 1/2 in each entry. Where an example has a non-finite entry in a group, or its squared norm
    overflows float32, it contributes zero to that group, and nothing is raised (S9).

    Args:
        per_example: Pytree of arrays `[B, *shape]`.
        policy: How one example is bounded.
        groups: The partition of the leaves, `policy.groups(...)`.
        clip_norms: C_k, `[K]`.
        counts: Bool `[B]`; False for padding and for examples already known to be non-finite.

    Returns:
        The clipped sum, the per-example norms `[B, K]`, and keep, bool `[B, K]`: who was summed where. The last two are
        private.
    """
    per_example = materialize(per_example)  # S4e: the norm is of the very tensor that is summed
    norms = per_example_norms(per_example, groups)
    factors, keep, centered_count = clipping_factors(norms, policy, clip_norms, counts=counts)

    def weighted_sum(leaf: jax.Array, group: LeafGroup) -> jax.Array:
        columns = np.asarray(group)  # of the leaf, or of each of its layers
        return sum_rows(leaf, factors[:, columns], keep[:, columns])

    leaves, treedef = jax.tree.flatten(per_example)
    value = treedef.unflatten([weighted_sum(*pair) for pair in zip(leaves, groups.leaf_groups, strict=True)])
    return ClippedSum(value, centered_count), norms, keep
