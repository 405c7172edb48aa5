"""Factors: the per-example gradient of a weight as a product that is never formed.

The gradient of example b with respect to a weight that meets the example in a matrix product is

    M_b = L_b^T R_b,        L_b [T, I], R_b [T, J]

with one row for each token: L are the inputs, R the cotangents of the outputs. For an embedding L is one-hot, and only the
token ids are kept; for a convolution L are the patches. H independent products (a batched weight) stand side by side.
A `Factoring` reads L and R off the operand and the cotangent of one equation, and knows which axes of the weight the
indices H, I and J are. Two factorings of one weight compose by stacking their tokens.

Source: ghost norms, arXiv 2110.05679; book-keeping, arXiv 2210.00038.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.gradients import jaxprs

#: `{"left": [B, H, T, I] or ids [B, T] as floats, "right": [B, H, T, J]}`, or `{"gradient": [B, ...]}`.
Payload: TypeAlias = dict[str, jax.Array]
# Ids travel as float32 numbers, which are exact up to here: a cotangent cannot be an integer.
_LARGEST_VOCABULARY = 2**24


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


def _as_int32(ids: jax.Array) -> jax.Array:
    """Ids in a dtype that every vocabulary fits: the number of rows itself may overflow the dtype of a user's ids."""
    bounds = jnp.iinfo(ids.dtype)
    lowest, highest = max(int(bounds.min), -(2**31)), min(int(bounds.max), 2**31 - 1)
    return jnp.clip(ids, lowest, highest).astype(jnp.int32)


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
        ids = _as_int32(ids).reshape(ids.shape[0], tokens)
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
        return {"left": jnp.clip(_as_int32(ids), 0, num_rows - 1).astype(jnp.float32)[:, None], "right": right}

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
