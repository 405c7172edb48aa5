"""Factors: the per-example gradient of a weight as a product that is never formed.

The gradient of example b with respect to a weight that meets the example in a matrix product is

    M_b = L_b^T R_b,        L_b [T, I], R_b [T, J]

with one row for each token: L are the inputs, R the cotangents of the outputs. For an embedding L is one-hot, and only the
token ids are kept; for a convolution L are the patches. H independent products (a batched weight) stand side by side.
A `Factoring` reads L and R off the operand and the cotangent of one equation, and knows which axes of the weight the
indices H, I and J are. Two factorings of one weight compose by stacking their tokens.

The norm is of the very tensor that is summed (S4): `squared_norm` returns an upper bound that covers, beside the norm, the
rounding of the sum that `weighted_sum` computes. Source: ghost norms, arXiv 2110.05679; book-keeping, arXiv 2210.00038.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.gradients import jaxprs

#: `{"left": [B, H, T, I] or ids [B, T] as floats, "right": [B, H, T, J]}`, or `{"gradient": [B, ...]}`.
Payload: TypeAlias = dict[str, jax.Array]
NormRoute: TypeAlias = Literal["gram", "direct"]

# Ids travel as float32 numbers, which are exact up to here: a cotangent cannot be an integer.
_LARGEST_VOCABULARY = 2**24

# S4(c), S4(d). Let P = ||L||_F ||R||_F, the scale at which a product of the two can cancel. A float32 product of n terms is
# off by up to some units of 2^-24 P; the largest error in tests/gradients/test_factors.py, over random and adversarial
# operands, is 0.7 of them for a weight gradient and 1.1 for the square of a Gram norm. Four times that is charged.
_SUM_ERROR = 2.0**-22
_GRAM_ERROR = 2.0**-22
# Half a unit in the last place of a bfloat16 operand that was multiplied by its clipping factor and stored. A float16 one
# could underflow besides, so its products run in float32.
_STORED_OPERAND_ERROR = {jnp.dtype(jnp.bfloat16): 2.0**-8}


def accumulator(*dtypes: Any) -> Any:
    return jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32


@dataclasses.dataclass(frozen=True)
class Factoring:
    """How one equation factors the gradient of its weight.

    Attributes:
        kind: What the equation is.
        axes: The axes of the weight that make up H, I and J.
        weight_shape: Shape of the weight.
        num_tokens: T.
        has_ids: Whether L is one-hot.
        factor: From the batched operand and the batched cotangent of the output to L and R.
        output_groups: For a grouped convolution, into how many products the axis J of the weight is divided.
    """

    kind: Literal["dense", "embedding", "conv"]
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    weight_shape: tuple[int, ...]
    num_tokens: int
    has_ids: bool
    factor: Callable[[jax.Array, jax.Array], Payload] = dataclasses.field(compare=False)
    output_groups: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, I, J."""
        h, i, j = (math.prod(self.weight_shape[axis] for axis in axes) for axes in self.axes)
        return h * self.output_groups, i, j // self.output_groups

    def to_weight(self, product: jax.Array) -> jax.Array:
        """`[H, I, J]` to the shape of the weight."""
        if self.output_groups > 1:
            product = jnp.swapaxes(product, 0, 1).reshape(1, product.shape[1], -1)
        order = [axis for axes in self.axes for axis in axes]
        product = product.reshape([self.weight_shape[axis] for axis in order])
        return jnp.transpose(product, [order.index(axis) for axis in range(len(order))])

    def swapped(self) -> Factoring:
        """The same gradient, transposed: R^T L."""
        h, i, j = self.axes
        factor = self.factor

        def swap(x: jax.Array, g: jax.Array) -> Payload:
            payload = factor(x, g)
            return {"left": payload["right"], "right": payload["left"]}

        return dataclasses.replace(self, axes=(h, j, i), factor=swap)


def _sorted_pairs(first: Sequence[int], second: Sequence[int], key: Callable[[int], int]) -> list[tuple[int, int]]:
    return sorted(zip(first, second, strict=True), key=lambda pair: key(pair[0]))


def _free(rank: int, *taken: Sequence[int]) -> list[int]:
    used = {axis for axes in taken for axis in axes}
    return [axis for axis in range(rank) if axis not in used]


def dense(
    eqn: jaxprs.Equation, operand: int, base_axes: tuple[int, ...], base_shape: tuple[int, ...]
) -> Factoring | str:
    """The factoring of a `dot_general` with the weight as its operand 0 or 1; or why there is none.

    Args:
        eqn: The equation, of one example.
        operand: Which operand is the weight.
        base_axes: The axis of the stored weight that each axis of the operand is.
        base_shape: Shape of the stored weight.
    """
    w, x = eqn.invars[operand].aval, eqn.invars[1 - operand].aval
    if w.dtype != x.dtype or eqn.params.get("out_sharding") is not None:
        return "a product of mixed dtypes or with a sharding"
    contracted, batched = eqn.params["dimension_numbers"]
    w_contracted, x_contracted = contracted[operand], contracted[1 - operand]
    w_batched, x_batched = batched[operand], batched[1 - operand]
    groups = _sorted_pairs(w_batched, x_batched, base_axes.__getitem__)
    inputs = _sorted_pairs(w_contracted, x_contracted, base_axes.__getitem__)
    w_free, x_free = _free(w.ndim, w_contracted, w_batched), _free(x.ndim, x_contracted, x_batched)
    # The output holds the batched axes, then the free axes of operand 0, then those of operand 1.
    place = len(w_batched)
    x_start, w_start = (place + len(w_free), place) if operand == 0 else (place, place + len(x_free))
    outputs = sorted(range(len(w_free)), key=lambda k: base_axes[w_free[k]])
    x_order = [*(pair[1] for pair in groups), *x_free, *(pair[1] for pair in inputs)]
    g_order = [
        *(list(w_batched).index(pair[0]) for pair in groups),
        *range(x_start, x_start + len(x_free)),
        *(w_start + k for k in outputs),
    ]
    tokens = math.prod(x.shape[axis] for axis in x_free)
    num_groups = math.prod(w.shape[axis] for axis in w_batched)

    def factor(x: jax.Array, g: jax.Array) -> Payload:
        rows = x.shape[0], num_groups, tokens
        return {
            "left": jnp.transpose(x, [0, *(axis + 1 for axis in x_order)]).reshape(*rows, -1),
            "right": jnp.transpose(g, [0, *(axis + 1 for axis in g_order)]).reshape(*rows, -1),
        }

    axes = (
        tuple(base_axes[pair[0]] for pair in groups),
        tuple(base_axes[pair[0]] for pair in inputs),
        tuple(base_axes[w_free[k]] for k in outputs),
    )
    if 0 in (tokens, *base_shape):
        return "an empty product"
    return Factoring("dense", axes, base_shape, tokens, False, factor)


def embedding(eqn: jaxprs.Equation, base_axes: tuple[int, ...], base_shape: tuple[int, ...]) -> Factoring | str:
    """The factoring of a `gather` of whole rows of a table, operand 0; or why there is none."""
    table, ids = (var.aval for var in eqn.invars)
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"].name
    whole_rows = (
        len(numbers.start_index_map) == 1
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map)
        and not numbers.operand_batching_dims
        and all(
            size == (1 if axis in numbers.collapsed_slice_dims else table.shape[axis])
            for axis, size in enumerate(eqn.params["slice_sizes"])
        )
    )
    if not whole_rows:
        return "a gather of parts of rows"
    if mode not in ("CLIP", "FILL_OR_DROP", "PROMISE_IN_BOUNDS"):
        return f"a gather in mode {mode}"
    (axis,) = numbers.start_index_map
    num_rows = table.shape[axis]
    tokens = math.prod(ids.shape[:-1])
    if num_rows > _LARGEST_VOCABULARY:
        return f"a table of more than {_LARGEST_VOCABULARY} rows"
    if 0 in (tokens, *base_shape):
        return "an empty gather"
    columns = [k for k in range(table.ndim) if k != axis]
    column_order = sorted(range(len(columns)), key=lambda k: base_axes[columns[k]])
    token_axes = _free(eqn.outvars[0].aval.ndim, numbers.offset_dims)
    g_order = [*token_axes, *(numbers.offset_dims[k] for k in column_order)]

    def factor(ids: jax.Array, g: jax.Array) -> Payload:
        ids = ids.reshape(ids.shape[0], tokens)
        right = jnp.transpose(g, [0, *(k + 1 for k in g_order)]).reshape(g.shape[0], 1, tokens, -1)
        if mode == "CLIP":
            ids = jnp.clip(ids, 0, num_rows - 1)
        inside = (ids >= 0) & (ids < num_rows)  # the gradient of an id out of bounds is dropped
        right = jnp.where(inside[:, None, :, None], right, jnp.zeros_like(right))
        return {"left": jnp.where(inside, ids, jnp.zeros_like(ids)).astype(jnp.float32), "right": right}

    axes = ((), (base_axes[axis],), tuple(base_axes[columns[k]] for k in column_order))
    return Factoring("embedding", axes, base_shape, tokens, True, factor)


def row(eqn: jaxprs.Equation, base_axes: tuple[int, ...], base_shape: tuple[int, ...]) -> tuple[Factoring, int] | str:
    """The factoring of a `dynamic_slice` of one whole row of a table, operand 0, and its operand of the id; or why not."""
    table, out = eqn.invars[0].aval, eqn.outvars[0].aval
    sliced = [axis for axis in range(table.ndim) if out.shape[axis] != table.shape[axis]]
    if len(sliced) != 1 or out.shape[sliced[0]] != 1 or 0 in base_shape:
        return "a dynamic slice of more or less than one row"
    (axis,) = sliced
    num_rows = table.shape[axis]
    if num_rows > _LARGEST_VOCABULARY:
        return f"a table of more than {_LARGEST_VOCABULARY} rows"
    columns = sorted((k for k in range(table.ndim) if k != axis), key=base_axes.__getitem__)

    def factor(ids: jax.Array, g: jax.Array) -> Payload:
        right = jnp.transpose(g, [0, axis + 1, *(k + 1 for k in columns)]).reshape(g.shape[0], 1, 1, -1)
        return {"left": jnp.clip(ids, 0, num_rows - 1).astype(jnp.float32)[:, None], "right": right}

    axes = ((), (base_axes[axis],), tuple(base_axes[k] for k in columns))
    return Factoring("embedding", axes, base_shape, 1, True, factor), axis + 1


def conv(eqn: jaxprs.Equation, base_axes: tuple[int, ...], base_shape: tuple[int, ...]) -> Factoring | str:
    """The factoring of a `conv_general_dilated` with the weight as operand 1: dense on patches; or why there is none."""
    x, w = (var.aval for var in eqn.invars)
    params = eqn.params
    if params["batch_group_count"] != 1:
        return "a convolution in batch groups"
    if w.dtype != x.dtype:
        return "a convolution of mixed dtypes"
    numbers = params["dimension_numbers"]
    out_channels, in_channels, *spatial = numbers.rhs_spec
    out = eqn.outvars[0].aval
    g_batch, g_channels, *g_spatial = numbers.out_spec
    tokens = math.prod(out.shape[axis] for axis in (g_batch, *g_spatial))
    if 0 in (tokens, *base_shape):
        return "an empty convolution"

    def patches(x: jax.Array) -> jax.Array:  # one example -> [T, I]
        out = lax.conv_general_dilated_patches(
            x,
            filter_shape=[w.shape[axis] for axis in spatial],
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=numbers,
            precision=lax.Precision.HIGHEST,  # it copies entries: each must come out as it is
        )
        return jnp.transpose(out, (g_batch, *g_spatial, g_channels)).reshape(tokens, -1)

    groups = params["feature_group_count"]

    def grouped(rows: jax.Array) -> jax.Array:  # [B, T, channels] -> [B, H, T, channels / H]
        return jnp.swapaxes(rows.reshape(*rows.shape[:2], groups, -1), 1, 2)

    def factor(x: jax.Array, g: jax.Array) -> Payload:
        right = jnp.transpose(g, [0, *(axis + 1 for axis in (g_batch, *g_spatial, g_channels))])
        return {
            "left": grouped(jax.vmap(patches)(x)),
            "right": grouped(right.reshape(g.shape[0], tokens, -1)),
        }

    axes = ((), tuple(base_axes[axis] for axis in (in_channels, *spatial)), (base_axes[out_channels],))
    return Factoring("conv", axes, base_shape, tokens, False, factor, groups)


# ---- norms


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    wide = accumulator(*(operand.dtype for operand in operands))
    if len({operand.dtype for operand in operands}) > 1:
        operands = tuple(operand.astype(wide) for operand in operands)
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def _square_sum(x: jax.Array) -> jax.Array:  # [B, ...] -> [B]
    wide = x.astype(accumulator(x.dtype))
    return jnp.sum(jnp.square(wide), axis=tuple(range(1, x.ndim)))


def payload_of_tie(payload: Payload, ids: jax.Array) -> Payload:
    """What the joint norm of a tied embedding and head needs of the head: nothing of the size of the logits.

    With M = E + H, ||M||^2 = ||E||^2 + ||H||^2 + 2 <E, H>, and <E, H> touches only the columns of the head's left factor
    that are ids of the embedding.

    Args:
        payload: Of the head, with the vocabulary on the left: left `[B, 1, S, V]`, right `[B, 1, S, D]`.
        ids: Token ids of the embedding, `[B, T]` as floats.

    Returns:
        The square `[B]` of the head's norm, P and the underflow of `squared_norm`, left at the ids `[B, S, T]`, right.
    """
    left, right = payload["left"], payload["right"]
    grams = _product("bhti,bhsi->bhts", left, left), _product("bhtj,bhsj->bhts", right, right)
    picked = jax.vmap(lambda row, i: row[0][:, i])(left, ids.astype(jnp.int32))
    scale, lost = _scale_and_underflow(payload)
    square = jnp.sum(grams[0] * grams[1], axis=(1, 2, 3))
    return {"square": square, "scale": scale, "lost": lost, "picked": picked, "right": right}


def squared_norm_of_tie(table: Payload, head: Payload) -> jax.Array:
    """As `squared_norm`, of an embedding by its payload and its tied head by `payload_of_tie`."""
    scale, lost = _scale_and_underflow(table)
    grams = _product("bsj,btj->bst", head["right"][:, 0], table["right"][:, 0])
    cross = jnp.sum(head["picked"].astype(grams.dtype) * grams, axis=(1, 2))
    square = _square_sum(_rows_by_token(table["left"], table["right"])) + head["square"] + 2.0 * cross
    total = scale + head["scale"]
    norm = jnp.sqrt(jnp.maximum(square, 0.0) + _GRAM_ERROR * jnp.square(total))
    return jnp.square(norm + _SUM_ERROR * total + lost + head["lost"])


def gradient_of(factoring: Factoring, payload: Payload) -> jax.Array:
    """M_b `[B, H, I, J]`, in float32 or wider: formed where that is cheaper than the alternatives."""
    if "gradient" in payload:
        return payload["gradient"]
    left, right = payload["left"], payload["right"]
    if factoring.has_ids:
        wide = right[:, 0].astype(accumulator(right.dtype))
        zeros = jnp.zeros((right.shape[0], factoring.sizes[1], right.shape[-1]), wide.dtype)
        return jax.vmap(lambda zero, ids, rows: zero.at[ids].add(rows))(zeros, left.astype(jnp.int32), wide)[:, None]
    return _product("bhti,bhtj->bhij", left, right)


def _rows_by_token(ids: jax.Array, right: jax.Array) -> jax.Array:
    """`[B, T, J]`: at the first token of each id the gradient of its row, at the others zero."""
    same = ids[:, :, None] == ids[:, None, :]
    first = jnp.argmax(same, axis=2) == jnp.arange(ids.shape[1])[None, :]  # no earlier token has this id
    rows = _product("bts,bsj->btj", same.astype(right.dtype), right[:, 0])
    return jnp.where(first[:, :, None], rows, jnp.zeros_like(rows))


def _inner(a: Factoring, b: Factoring, x: Payload, y: Payload) -> jax.Array:
    """<M_a, M_b> for each example by Gram matrices of tokens, `[B]`."""
    right = _product("bhtj,bhsj->bhts", x["right"], y["right"])
    if a.has_ids and b.has_ids:
        left = (x["left"][:, None, :, None] == y["left"][:, None, None, :]).astype(right.dtype)
    elif a.has_ids or b.has_ids:
        ids, rows = (x["left"], y["left"]) if a.has_ids else (y["left"], x["left"])
        picked = jax.vmap(lambda i, row: row[:, :, i])(ids.astype(jnp.int32), rows)  # [B, H, S, T]
        left = (jnp.swapaxes(picked, 2, 3) if a.has_ids else picked).astype(right.dtype)
    else:
        left = _product("bhti,bhsi->bhts", x["left"], y["left"])
    return jnp.sum(left * right, axis=(1, 2, 3))


def squared_norm_of_layers(payload: Payload) -> jax.Array:
    """||M_b||^2 of each slice along the leading axis of a stored gradient, `[B, L]`."""
    return jax.vmap(_square_sum)(payload["gradient"])


def squared_norm(factorings: Sequence[Factoring | None], payloads: Sequence[Payload], route: NormRoute) -> jax.Array:
    """An upper bound of ||sum_k M_k||^2 for each example, `[B]`, for the uses k of one weight.

    It is the squared norm plus a charge for rounding, so that a factor of C / norm keeps what `weighted_sum` adds at or
    below C (S4); for float32 operands the charge is below 1e-6 of the norm for a hundred tokens.
    """
    if len(payloads) == 1 and "gradient" in payloads[0]:
        return _square_sum(payloads[0]["gradient"])
    pairs = [(factoring, payload) for factoring, payload in zip(factorings, payloads, strict=True) if factoring]
    scales, lost = zip(*(_scale_and_underflow(payload) for _, payload in pairs), strict=True)
    total = sum(scales[1:], scales[0])
    if len(pairs) == 1 and payloads[0]["right"].shape[2] == 1:
        norm = scales[0] if pairs[0][0].sizes[0] == 1 else _norm_of_one_token(payloads[0])
    elif len(pairs) == 1 and pairs[0][0].has_ids:
        norm = jnp.sqrt(_square_sum(_rows_by_token(payloads[0]["left"], payloads[0]["right"])))
    elif route == "direct":
        norm = jnp.sqrt(_square_sum(_sum_of_gradients(pairs)))
    else:
        square = jnp.zeros_like(total)
        for k, (factoring, payload) in enumerate(pairs):
            square += _inner(factoring, factoring, payload, payload)
            for other, rest in pairs[:k]:
                square += 2.0 * _inner(factoring, other, payload, rest)
        norm = jnp.sqrt(jnp.maximum(square, 0.0) + _GRAM_ERROR * jnp.square(total))
    charge = _SUM_ERROR + max(0.0 if f.has_ids else _STORED_OPERAND_ERROR.get(p["right"].dtype, 0.0) for f, p in pairs)
    return jnp.square(norm + charge * total + sum(lost[1:], lost[0]))


def _sum_of_gradients(pairs: Sequence[tuple[Factoring, Payload]]) -> jax.Array:
    gradients = [gradient_of(*pair) for pair in pairs]
    return sum(gradients[1:], gradients[0])


def _norm_of_one_token(payload: Payload) -> jax.Array:
    left, right = (payload[side].astype(accumulator(payload[side].dtype)) for side in ("left", "right"))
    squares = jnp.sum(jnp.square(left), axis=(2, 3)) * jnp.sum(jnp.square(right), axis=(2, 3))
    return jnp.sqrt(jnp.sum(squares, axis=1))


def _scale_and_underflow(payload: Payload) -> tuple[jax.Array, jax.Array]:
    """P = ||L||_F ||R||_F of each example, and how much of the norm squares that underflowed may hide; `[B]` each.

    The norm of L^T R may be large where that of R is too small to square in float32, if L is huge: every square that may
    have been flushed to zero is counted at the smallest normal number.
    """
    right = _square_sum(payload["right"])
    tiny = float(jnp.finfo(right.dtype).tiny)
    flushed_right = math.prod(payload["right"].shape[1:]) * tiny
    if payload["left"].ndim == 2:  # one-hot
        left, flushed_left = jnp.full_like(right, payload["right"].shape[2]), 0.0
    else:
        left = _square_sum(payload["left"]).astype(right.dtype)
        flushed_left = math.prod(payload["left"].shape[1:]) * tiny
    lost = jnp.sqrt(left) * math.sqrt(flushed_right) + jnp.sqrt(right) * math.sqrt(flushed_left)
    return jnp.sqrt(left) * jnp.sqrt(right), lost


# ---- sums


def _zeroed(x: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, jnp.zeros_like(x))


def weighted_sum(factoring: Factoring | None, payload: Payload, factors: jax.Array, keep: jax.Array) -> jax.Array:
    """sum_b factors_b M_b over the examples to keep, `[H, I, J]` in float32 or wider.

    Args:
        factoring: How the payload was read; None if it is a gradient.
        payload: Factors or gradients of B examples.
        factors: `[B]`; or `[B, L]` for a stored gradient of L layers along its leading axis.
        keep: Bool, as `factors`; the others are zeroed before any product, since 0 * inf is NaN (S9).
    """

    if "gradient" in payload:
        gradient = payload["gradient"]
        wide = accumulator(gradient.dtype)
        rows = _zeroed(gradient, keep).astype(wide).reshape(*factors.shape, -1)
        if factors.ndim == 2:
            total = _product("bl,bln->ln", factors.astype(wide), rows)
            return total.reshape(gradient.shape[1:])
        total = jnp.matmul(factors.astype(wide), rows, precision=lax.Precision.HIGHEST)
        return total.reshape(gradient.shape[1:])
    assert factoring is not None
    left, right = _zeroed(payload["left"], keep), _zeroed(payload["right"], keep)
    wide = accumulator(right.dtype)
    scaled = right.astype(wide) * factors.astype(wide)[:, None, None, None]
    if factoring.has_ids:
        rows = scaled[:, 0].reshape(-1, scaled.shape[-1])
        zeros = jnp.zeros((factoring.sizes[1], rows.shape[-1]), wide)
        return zeros.at[left.reshape(-1).astype(jnp.int32)].add(rows)[None]
    # The product runs in the dtype of its operands; what storing the scaled one loses was charged to the norm (S4c).
    narrow = left.dtype == right.dtype and right.dtype in _STORED_OPERAND_ERROR
    dtype = right.dtype if narrow else wide
    return _product("bhti,bhtj->hij", left.astype(dtype), scaled.astype(dtype))
