"""Norms and clipped sums from factors: the arithmetic that must not let an example past its clip norm (S4).

The norm is to be that of the very tensor that is summed. From factors it is not: norm and sum are computed in different
orders, and both round. Let P = ||L||_F ||R||_F, the scale at which the tokens of an example can cancel, and u the unit
roundoff of the accumulation. A sum of n terms is off by at most n u P, so a record made of canceling tokens could have a
norm of zero and a sum that is all rounding. `squared_norm` therefore returns an upper bound of the norm of what
`weighted_sum` adds, by the *worst case* of both. Measured errors are no substitute: equal terms round the same way, and an
adversary may choose them. For T tokens that do not cancel the bound exceeds the norm by about n u sqrt(T), 2e-4 at T = 128, and
where Gram matrices are behind it by n u T / 2: 1e-3 at T = 32, 5e-3 at T = 128, less for layers narrower than a block.

Chains are kept short to keep the bound close: Gram matrices are summed in blocks, and a stored gradient or an embedding is
summed from the very rows whose norm was taken, at no charge. A kernel (`kernels.py`) sums in an order of its own, and is
charged for that one; the one that sums scales in float32 and stores nothing in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.clipping import accumulator, squared_norms, sum_rows
from jaxdp.gradients import kernels as pallas
from jaxdp.gradients.factors import Factoring, Payload
from jaxdp.gradients.kernels import XLA, Kernels

NormRoute: TypeAlias = Literal["gram", "direct"]

# The unit roundoff of a float32 or float64 sum; one of narrow operands may be accumulated by truncation, at twice that.
_UNIT_ROUNDOFF = {jnp.dtype(jnp.float64): 2.0**-53, jnp.dtype(jnp.float32): 2.0**-24}
_TRUNCATED_ROUNDOFF = 2.0**-23
# Half a unit in the last place of a bfloat16 operand that was multiplied by its clipping factor and stored (S4c). A float16
# one could underflow besides, so its products run in float32.
_STORED_ROUNDOFF = {jnp.dtype(jnp.bfloat16): 2.0**-8}
# Gram matrices of more than this are taken one example at a time.
_GRAM_BYTES = 2**26
_SHORTEST_BLOCK = 512


def _roundoff(*arrays: jax.Array) -> float:
    return max(_UNIT_ROUNDOFF.get(array.dtype, _TRUNCATED_ROUNDOFF) for array in arrays)


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    wide = accumulator(*(operand.dtype for operand in operands))
    if len({operand.dtype for operand in operands}) > 1:
        operands = tuple(operand.astype(wide) for operand in operands)
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def add(arrays: Sequence[jax.Array]) -> jax.Array:
    return sum(arrays[1:], arrays[0])


# ---- what a norm is taken of


def gradient_of(factoring: Factoring | None, payload: Payload) -> jax.Array:
    """M_b `[B, H, I, J]`, in float32 or wider."""
    if "gradient" in payload:
        return payload["gradient"]
    assert factoring is not None
    left, right = payload["left"], payload["right"]
    if factoring.has_ids:
        rows = rows_by_token(left, right)
        zeros = jnp.zeros((right.shape[0], factoring.sizes[1], right.shape[-1]), rows.dtype)
        return jax.vmap(lambda zero, ids, row: zero.at[ids].add(row))(zeros, left.astype(jnp.int32), rows)[:, None]
    return _product("bhti,bhtj->bhij", left, right)


def rows_by_token(left: jax.Array, right: jax.Array) -> jax.Array:
    """The rows of an embedding's gradient, `[B, T, J]`: each at the first token of its id, zero at the others.

    Args:
        left: Ids, `[B, T]` as floats.
        right: `[B, 1, T, J]`.
    """
    ids = left
    same = ids[:, :, None] == ids[:, None, :]
    first = jnp.argmax(same, axis=2) == jnp.arange(ids.shape[1])[None, :]  # no earlier token has this id
    rows = _product("bts,bsj->btj", same.astype(right.dtype), right[:, 0])
    return jnp.where(first[:, :, None], rows, jnp.zeros_like(rows))


def _block(length: int, tokens: int) -> int:
    """Terms summed in one go: short blocks make for small errors, long ones for products that run at full speed.

    On a CPU the Gram matrices of 32 tokens take twice the time in blocks of 32, whose charge is a fifth.
    """
    return max(math.isqrt(length), tokens, _SHORTEST_BLOCK)


def _chain(length: int, tokens: int) -> int:
    block = _block(length, tokens)
    return min(length, block + -(-length // block))


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y^T `[B, H, T, S]` of x `[B, H, T, K]` and y `[B, H, S, K]`, each entry a sum of at most `_chain` terms in turn.

    Block after block: all at once, the blocks would have to lie side by side, in a copy of each operand.
    """
    length = x.shape[-1]
    block = _block(length, max(x.shape[2], y.shape[2]))
    if block >= length:
        return _product("bhtk,bhsk->bhts", x, y)
    first = length % block or block

    def add_block(k: Any, total: jax.Array) -> jax.Array:
        parts = (lax.dynamic_slice_in_dim(z, first + k * block, block, axis=3) for z in (x, y))
        return total + _product("bhtk,bhsk->bhts", *parts)

    start = _product("bhtk,bhsk->bhts", x[..., :first], y[..., :first])
    return lax.fori_loop(0, (length - first) // block, add_block, start)


def _inner(x: Payload, y: Payload) -> jax.Array:
    """<M_x, M_y> for each example by Gram matrices of tokens, `[B]`."""
    right = _gram(x["right"], y["right"])
    ids_x, ids_y = x["left"].ndim == 2, y["left"].ndim == 2
    if ids_x and ids_y:
        left = (x["left"][:, None, :, None] == y["left"][:, None, None, :]).astype(right.dtype)
    elif ids_x or ids_y:
        ids, rows = (x["left"], y["left"]) if ids_x else (y["left"], x["left"])
        picked = jax.vmap(lambda i, row: row[:, :, i])(ids.astype(jnp.int32), rows)  # [B, H, S, T]
        left = (jnp.swapaxes(picked, 2, 3) if ids_x else picked).astype(right.dtype)
    else:
        left = _gram(x["left"], y["left"])
    return _sum_by_axes(left * right)


def _sum_by_axes(terms: jax.Array) -> jax.Array:
    """The sum of `[B, ...]` over all axes but the first, one after the other: a chain as long as their sum.

    XLA merges sums of sums to one over all axes, whose chain may be as long as their product; not through a barrier.
    """
    while terms.ndim > 2:
        terms = lax.optimization_barrier(jnp.sum(terms, axis=-1))
    return jnp.sum(terms, axis=1)


def _square_by_grams(payloads: Sequence[Payload]) -> jax.Array:
    """||sum_k M_k||^2 with its cross terms, `[B]`."""

    def square(payloads: Sequence[Payload]) -> jax.Array:
        parts = [_inner(payload, payload) for payload in payloads]
        for k, payload in enumerate(payloads):
            parts += [2.0 * _inner(other, payload) for other in payloads[:k]]
        return add(parts)

    rights = [payload["right"] for payload in payloads]
    rows, heads = rights[0].shape[:2]
    if 4 * rows * heads * max(right.shape[2] for right in rights) ** 2 <= _GRAM_BYTES:
        return square(payloads)
    one_by_one = jax.tree.map(lambda x: x[:, None], list(payloads))
    return lax.map(square, one_by_one)[:, 0]


def _gram_chain(payloads: Sequence[Payload]) -> int:
    """The roundings behind `_square_by_grams`, one after the other: of both Gram entries, of their product, of the sums."""
    tokens = max(payload["right"].shape[2] for payload in payloads)
    left = max(0 if p["left"].ndim == 2 else _chain(p["left"].shape[3], tokens) for p in payloads)
    right = _chain(payloads[0]["right"].shape[3], tokens)
    heads, pairs = payloads[0]["right"].shape[1], len(payloads) * (len(payloads) + 1) // 2
    return left + right + 1 + 2 * tokens + (heads - 1) + (pairs - 1)


# ---- norms


@jax.named_scope("jaxdp_norm")
def squared_norm(
    factorings: Sequence[Factoring | None], payloads: Sequence[Payload], route: NormRoute, kernels: Kernels = XLA
) -> jax.Array:
    """An upper bound of ||sum_k M_k||^2 for each example, `[B]`, for the uses k of one weight.

    **Guarantee**: with a factor of C over the root of it, what `weighted_sum` adds has L2 norm at most C up to the rounding
    guard of the clipping policies, whatever the operands (S4).

    Args:
        factorings: How each payload was read; None for a gradient.
        payloads: Factors, or a gradient, of B examples; of an embedding alone its `rows_by_token`. `weighted_sum` must be given
            the same buffers (S4e).
        route: By Gram matrices of tokens, or directly from the gradients.
        kernels: What takes the norm, and what will take the sum; XLA for more than one use.
    """
    if len(payloads) == 1 and "gradient" in payloads[0]:
        return squared_norms(payloads[0]["gradient"])
    pairs = [(factoring, payload) for factoring, payload in zip(factorings, payloads, strict=True) if factoring]
    scales, lost = zip(*(_scale_and_underflow(payload) for payload in payloads), strict=True)
    total, tokens = add(scales), sum(payload["right"].shape[2] for payload in payloads)
    roundoff = max(_roundoff(*payload.values()) for payload in payloads)
    if len(pairs) == 1 and pairs[0][0].has_ids:
        return squared_norms(payloads[0]["right"])  # `weighted_sum` adds these very rows
    # The sum rounds, and so does by itself the gradient that is formed for a norm.
    if kernels.sum == "xla":
        charge = (tokens + 2) * roundoff + max(_stored_roundoff(payload) for payload in payloads)
    else:
        charge = pallas.sum_roundings(payloads[0]) * roundoff
    if len(pairs) == 1 and tokens == 1:
        norm = total if pairs[0][0].sizes[0] == 1 else _norm_of_one_token(payloads[0])
    else:
        square, chain = _square(pairs, payloads, route, kernels)
        if route == "direct":
            norm = jnp.sqrt(square)
            charge += chain * roundoff
        else:
            norm = jnp.sqrt(jnp.maximum(square, 0.0) + chain * roundoff * jnp.square(total))
    return jnp.square(norm + charge * total + add(lost))


def _square(
    pairs: Sequence[tuple[Factoring, Payload]], payloads: Sequence[Payload], route: NormRoute, kernels: Kernels
) -> tuple[jax.Array, int]:
    """||sum_k M_k||^2, `[B]`, and the roundings behind it: of the square by Grams, else of the gradient that is formed."""
    if kernels.norm != "xla":
        return pallas.squared_norm(payloads[0], route, kernels)
    if route == "direct":
        tokens = sum(payload["right"].shape[2] for payload in payloads)
        return squared_norms(add([gradient_of(*pair) for pair in pairs])), tokens + 2
    return _square_by_grams(payloads), _gram_chain(payloads)


def _stored_roundoff(payload: Payload) -> float:
    left, right = payload["left"], payload["right"]
    return _STORED_ROUNDOFF.get(right.dtype, 0.0) if left.dtype == right.dtype else 0.0


def _norm_of_one_token(payload: Payload) -> jax.Array:
    left, right = (payload[side].astype(accumulator(payload[side].dtype)) for side in ("left", "right"))
    squares = jnp.sum(jnp.square(left), axis=(2, 3)) * jnp.sum(jnp.square(right), axis=(2, 3))
    return jnp.sqrt(jnp.sum(squares, axis=1))


def _scale_and_underflow(payload: Payload) -> tuple[jax.Array, jax.Array]:
    """P = ||L||_F ||R||_F of each example, and how much of the norm squares that underflowed may hide; `[B]` each.

    The norm of L^T R may be large where that of R is too small to square in float32, if L is huge: every square that may
    have been flushed to zero is counted at the smallest normal number.
    """
    right = squared_norms(payload["right"])
    tiny = float(jnp.finfo(right.dtype).tiny)
    flushed_right = math.prod(payload["right"].shape[1:]) * tiny
    if payload["left"].ndim == 2:  # one-hot
        left, flushed_left = jnp.full_like(right, payload["right"].shape[2]), 0.0
    else:
        left = squared_norms(payload["left"]).astype(right.dtype)
        flushed_left = math.prod(payload["left"].shape[1:]) * tiny
    lost = jnp.sqrt(left) * math.sqrt(flushed_right) + jnp.sqrt(right) * math.sqrt(flushed_left)
    return jnp.sqrt(left) * jnp.sqrt(right), lost


# ---- sums


@jax.named_scope("jaxdp_sum")
def weighted_sum(
    factoring: Factoring | None,
    payload: Payload,
    factors: jax.Array,
    keep: jax.Array,
    *,
    kernels: Kernels = XLA,
) -> jax.Array:
    """sum_b factors_b M_b over the examples to keep, `[H, I, J]` in float32 or wider.

    Args:
        factoring: How the payload was read; None if it is a gradient.
        payload: What the norm was taken of, the same buffers.
        factors: `[B]`; or `[B, L]` for a stored gradient of L layers along its leading axis.
        keep: Bool, as `factors`; the others are zeroed before any product, since 0 * inf is NaN (S9).
        kernels: What takes the sum, the same as for the norm.
    """
    if "gradient" in payload:
        return sum_rows(payload["gradient"], factors, keep)
    if kernels.sum != "xla":
        return pallas.weighted_sum(payload, factors, keep, kernels)
    assert factoring is not None
    left, right = _zeroed(payload["left"], keep), _zeroed(payload["right"], keep)
    wide = accumulator(right.dtype)
    if factoring.has_ids:
        rows = right[:, 0].astype(wide) * factors.astype(wide)[:, None, None]
        zeros = jnp.zeros((factoring.sizes[1], rows.shape[-1]), wide)
        return zeros.at[left.reshape(-1).astype(jnp.int32)].add(rows.reshape(-1, rows.shape[-1]))[None]
    # The product runs in the dtype of its operands; what storing the scaled one loses was charged to the norm (S4c).
    scaled = right.astype(wide) * factors.astype(wide)[:, None, None, None]
    narrow = left.dtype == right.dtype and right.dtype in _STORED_ROUNDOFF
    dtype = right.dtype if narrow else wide
    return _product("bhti,bhtj->hij", left.astype(dtype), scaled.astype(dtype))


def _zeroed(x: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, jnp.zeros_like(x))
