"""Weights to packed codes, on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.quantization.layout import (
    DEFAULT_GROUP_SIZES,
    OFFSETS,
    PLANE_BITS,
    FormatName,
    Packed,
    PackedArrays,
    PackedSpec,
    padded_rows,
    plane_shapes,
    scales_shape,
)

_SMALLEST_SCALE = 2.0**-126
_LARGEST_WEIGHT = 2.0**127  # qmax times a scale that was rounded up stays finite in float32
_TILE_SIZE = 2**20  # weights held in float32 at a time; twice as fast as 2^22, which leaves the cache


def quantize(w: np.ndarray, format: FormatName, group_size: int | None = None) -> Packed:
    """Packs weights by rounding to nearest, with a scale per group of input rows and output column.

    **Guarantee**: |w - value| <= s/2, as `jaxdp.quantization` states it. Weights of the form code * s, for a bfloat16
    s >= 2^-126 and with a code of +-qmax in every group that is not zero, come back exactly. Beyond its result the call takes
    10 to 20 MiB, or 10 bytes per row of a group longer than a million rows.

    Args:
        w: `[.., m, p]` of any floating dtype, bfloat16 included; a view or a memory map is read tile by tile.
        format: "int8", "int6" or "int4".
        group_size: Rows per scale; by default 128 for int8 and int6, 64 for int4.

    Raises:
        ValueError: the format is unknown, the weights are not floating-point matrices, one of them is not finite (or above
            2^127 in magnitude), or the group size is not a positive multiple of the rows that share a byte.

    >>> packed = quantize(np.array([[7.0, 0.0], [-2.0, 0.0], [0.6, 0.0]]), "int4")
    >>> packed.arrays.scales.tolist()
    [[1.0, 1.0]]
    >>> [[f"{byte:#04x}" for byte in row] for row in packed.arrays.planes[0]]
    [['0x6f', '0x88'], ['0x89', '0x88']]
    """
    w = np.asarray(w)
    _validate.one_of("format", format, get_args(FormatName))
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has dtype {w.dtype}; only floating-point weights are quantized, keep this array as it is.")
    spec = PackedSpec(w.shape, format, DEFAULT_GROUP_SIZES[format] if group_size is None else group_size)
    planes = tuple(np.empty(shape, np.uint8) for shape in plane_shapes(spec))
    scales = np.empty(scales_shape(spec), ml_dtypes.bfloat16)
    for matrix in np.ndindex(w.shape[:-2]):
        for groups, rows, columns in _tiles(spec):
            tile = _read_tile(w, matrix, rows, columns).reshape(
                groups.stop - groups.start, -1, columns.stop - columns.start
            )
            codes, scales[(*matrix, groups, columns)] = _codes_and_scales(tile, format)
            low = sum(PLANE_BITS[format])
            for plane, bits in zip(planes, PLANE_BITS[format], strict=True):
                low -= bits
                joined = _join_rows((codes >> low) & (2**bits - 1), bits)
                target = plane[(*matrix, slice(rows.start * bits // 8, rows.stop * bits // 8), columns)]
                target[...] = joined[: len(target)]
    return Packed(PackedArrays(planes, scales), spec, w.dtype.name)


def quantize_matrices(stacked: Params, format: FormatName, *, but: Callable[[str], bool] | None = None) -> Params:
    """The matrices of stacked blocks as `Packed`, each quantized by itself; vectors and whatever `but` names stay as they are.

    A leaf whose blocks are read when they are asked for (`jaxdp.models.weights.open_model`) becomes a `Packed` of such leaves:
    the planes and scales of a block are computed when the first of them is asked for, and kept until each of them has been.

    Args:
        stacked: Pytree of floating-point arrays `[N, ...]` on the host, one block behind the other; a matrix is `[N, .., m, p]`.
        format: "int8", "int6" or "int4".
        but: Predicate of a path such as `attention/q/kernel`.

    >>> found = quantize_matrices({"kernel": np.ones((3, 4, 2)), "bias": np.ones((3, 2))}, "int8")
    >>> found["kernel"].spec.shape, found["bias"].shape
    ((3, 4, 2), (3, 2))
    """

    def packed(leaf: Any) -> Packed:
        return _quantized_later(leaf, format) if hasattr(leaf, "derived") else quantize(np.asarray(leaf), format)

    return _on_matrices(packed, stacked, but)


def quantized_shapes(stacked: Params, format: FormatName, *, but: Callable[[str], bool] | None = None) -> Params:
    """What `quantize_matrices` would return, of arrays or `jax.ShapeDtypeStruct`s, as `jax.ShapeDtypeStruct`s."""

    shape_of = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), stacked)
    return _on_matrices(lambda leaf: _packed_shape(leaf, format), shape_of, but)


def _packed_shape(leaf: Any, format: FormatName) -> Packed:
    spec = PackedSpec(leaf.shape, format, DEFAULT_GROUP_SIZES[format])
    planes = tuple(jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in plane_shapes(spec))
    scales = jax.ShapeDtypeStruct(scales_shape(spec), jnp.bfloat16)
    return Packed(PackedArrays(planes, scales), spec, jnp.dtype(leaf.dtype).name)


def _quantized_later(leaf: Any, format: FormatName) -> Packed:
    """A leaf that is no array: its `derived` makes another of its kind."""
    shapes, treedef = jax.tree.flatten(_packed_shape(leaf, format))
    waiting: dict[tuple[int, int], np.ndarray] = {}  # what was computed with an array that was asked for

    def array_of(index: int, number: int) -> np.ndarray:
        if (index, number) not in waiting:
            waiting.clear()
            try:
                arrays = jax.tree.leaves(quantize(leaf[index], format))
            except ValueError as error:
                raise ValueError(f"block {index}: {error}") from None
            waiting.update(((index, other), array) for other, array in enumerate(arrays))
        return waiting.pop((index, number))

    arrays = [
        leaf.derived(shape.shape, shape.dtype, functools.partial(array_of, number=number))
        for number, shape in enumerate(shapes)
    ]
    return treedef.unflatten(arrays)


def _on_matrices(fun: Callable[[Any], Packed], stacked: Params, but: Callable[[str], bool] | None) -> Params:
    def mapped(path: Any, leaf: Any) -> Any:
        is_kept = len(leaf.shape) < 3 or (but is not None and but(_validate.leaf_name(path)))
        return leaf if is_kept else fun(leaf)

    return jax.tree_util.tree_map_with_path(mapped, stacked)


def _tiles(spec: PackedSpec) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts a matrix into tiles of whole groups: (groups, rows, columns), where the rows of the last may exceed the matrix."""
    num_groups, p = scales_shape(spec)[-2:]
    group_rows = min(spec.group_size, padded_rows(spec))
    num_columns = min(p, max(1, _TILE_SIZE // group_rows))
    groups_per_tile = max(1, _TILE_SIZE // (group_rows * num_columns))
    for first in range(0, num_groups, groups_per_tile):
        last = min(first + groups_per_tile, num_groups)
        for column in range(0, p, num_columns):
            columns = slice(column, min(column + num_columns, p))
            yield slice(first, last), slice(first * group_rows, last * group_rows), columns


def _read_tile(w: np.ndarray, matrix: tuple[int, ...], rows: slice, columns: slice) -> np.ndarray:
    """float32 `[rows, columns]`, zero beyond the matrix; raises at a weight that has no finite code and scale."""
    source = w[(*matrix, rows, columns)]
    tile = np.zeros((rows.stop - rows.start, source.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite, and named below
        tile[: len(source)] = source
    if not max(tile.max(), -tile.min()) <= _LARGEST_WEIGHT:  # NaN is not
        row, column = np.argwhere(~(np.abs(tile) <= _LARGEST_WEIGHT))[0].tolist()
        place: tuple[Any, ...] = (*matrix, rows.start + row, columns.start + column)
        raise ValueError(
            f"w[{', '.join(map(str, place))}] is {w[place]}; quantization needs finite weights of magnitude at most 2^127. "
            "Repair the checkpoint, or keep this array in its own dtype."
        )
    return tile


def _codes_and_scales(tile: np.ndarray, format: FormatName) -> tuple[np.ndarray, np.ndarray]:
    """From float32 `[groups, rows of each, columns]`, overwritten: stored codes `[rows, columns]`, scales `[groups, columns]`."""
    largest_code = 2 ** (sum(PLANE_BITS[format]) - 1) - 1
    absmax = np.maximum(tile.max(axis=1), -tile.min(axis=1))
    scales = np.maximum(absmax / np.float32(largest_code), np.float32(_SMALLEST_SCALE))
    scales = np.where(absmax == 0, np.float32(1), scales).astype(ml_dtypes.bfloat16)
    tile /= scales.astype(np.float32)[:, None, :]
    np.rint(tile, out=tile)
    np.clip(tile, -largest_code, largest_code, out=tile)
    codes = tile.astype(np.int8) + np.int8(OFFSETS[format])
    return codes.view(np.uint8).reshape(-1, tile.shape[2]), scales


def _join_rows(fields: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[r, p]` below 2^bits -> `[r * bits / 8, p]`, the first of the rows of a byte in its lowest bits."""
    parts = fields.reshape(-1, 8 // bits, fields.shape[1])
    joined = parts[:, 0].copy()
    for i in range(1, 8 // bits):
        joined |= parts[:, i] << (i * bits)
    return joined
