"""Per-example vectors -> their clipped sum: the one place where examples meet."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.clipping.policies import ClippingPolicy, Groups


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


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _round_first(leaf: jax.Array) -> jax.Array:
    # S4(a): XLA may carry a bfloat16 or float16 value at excess precision into one consumer and rounded into another. The
    # barrier makes the norm and the sum read the same stored tensor.
    return lax.optimization_barrier(leaf) if leaf.dtype.itemsize < 4 else leaf


def per_example_norms(per_example: Any, groups: Groups) -> jax.Array:
    """L2 norm of each example's vector in each group: `[B, K]`, squared and summed in float32 or wider.

    Args:
        per_example: Pytree of arrays `[B, *shape]`.
        groups: The partition of its leaves.
    """
    squares: list[list[jax.Array]] = [[] for _ in groups.names]
    for leaf, group in zip(jax.tree.leaves(per_example), groups.leaf_groups, strict=True):
        wide = leaf.astype(_accumulator(leaf.dtype))
        squares[group].append(jnp.sum(jnp.square(wide), axis=tuple(range(1, leaf.ndim))))
    widest = max((part.dtype for parts in squares for part in parts), key=lambda dtype: dtype.itemsize)
    return jnp.sqrt(jnp.stack([sum(part.astype(widest) for part in parts) for parts in squares], axis=1))


def clip_and_sum(
    per_example: Any,
    policy: ClippingPolicy,
    groups: Groups,
    clip_norms: jax.Array,
    *,
    counts: jax.Array,
) -> tuple[ClippedSum, jax.Array, jax.Array]:
    """Clips each example's vector by the policy and sums over the examples.

        n_ik = ||g_ik||;   c_ik = keep_i * factor(n_ik, C_k);   S_k = sum_i c_ik g_ik

    **Guarantee**: adding or removing one example moves `value` by at most sqrt(sum_k C_k^2) in L2 norm, and
    `centered_count` by at most 1/2 in each entry. An example with a non-finite entry, or whose squared norm overflows
    float32, contributes zero, and nothing is raised (S9).

    Args:
        per_example: Pytree of arrays `[B, *shape]`.
        policy: How one example is bounded.
        groups: The partition of the leaves, `policy.groups(...)`.
        clip_norms: C_k, `[K]`.
        counts: Bool `[B]`; False for padding and for examples already known to be non-finite.

    Returns:
        The clipped sum, the per-example norms `[B, K]`, and the bool `[B]` of the examples that were summed. The last two
        are private.
    """
    per_example = jax.tree.map(_round_first, per_example)
    norms = per_example_norms(per_example, groups)
    keep = counts & jnp.all(jnp.isfinite(norms), axis=1)
    bounds = clip_norms.astype(norms.dtype)[None, :]  # [1, K]
    factors = jnp.where(keep[:, None], policy.factors(norms, bounds), 0.0)

    def weighted_sum(leaf: jax.Array, group: int) -> jax.Array:
        dtype = _accumulator(leaf.dtype)
        rows = leaf.reshape(leaf.shape[0], -1).astype(dtype)
        rows = jnp.where(keep[:, None], rows, 0.0)  # S9: zero before the product, since 0 * inf is NaN
        total = jnp.matmul(factors[:, group].astype(dtype), rows, precision=lax.Precision.HIGHEST)  # S4(a)
        return total.reshape(leaf.shape[1:])

    leaves, treedef = jax.tree.flatten(per_example)
    value = treedef.unflatten([weighted_sum(*pair) for pair in zip(leaves, groups.leaf_groups, strict=True)])
    unclipped = (norms <= bounds).astype(jnp.float32)
    centered_count = jnp.sum(jnp.where(keep[:, None], unclipped - 0.5, 0.0), axis=0)  # padding adds 0, not -1/2
    return ClippedSum(value, centered_count), norms, keep
