"""One flat array for all leaves of a block: what travels between host and device in one transfer.

A transfer has a price of its own, and two small ones do not overlap with as much computation as one large one. Leaves of one
dtype share a bucket; a block of one dtype is one array. Quantized leaves share a bucket of bytes, and become weights when they
are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate, quantization
from jaxdp._typing import Params
from jaxdp.quantization import Packed, PackedSpec

#: A flat array for each dtype, by its name.
Bucket: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each leaf of a block lies: hashable, the same for all blocks.

    Attributes:
        treedef: Of the block.
        shapes: Of its leaves, without the axis of the blocks.
        dtypes: Names of their dtypes.
        specs: Of those that are quantized; None for the others.
        offsets: First entry of each in its bucket.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    specs: tuple[PackedSpec | None, ...]
    offsets: tuple[int, ...]

    @property
    def stored(self) -> tuple[tuple[str, int], ...]:
        """The bucket of each leaf, and how many of its entries the leaf takes."""
        return tuple(
            (dtype, math.prod(shape)) if spec is None else ("uint8", quantization.num_bytes(spec))
            for shape, dtype, spec in zip(self.shapes, self.dtypes, self.specs, strict=True)
        )

    @property
    def num_bytes(self) -> int:
        """Of one block, in all its buckets."""
        return sum(size * jnp.dtype(dtype).itemsize for dtype, size in self.stored)

    def bucket(self) -> Bucket:
        """The bucket as `jax.ShapeDtypeStruct`s."""
        sizes: dict[str, int] = {}
        for dtype, size in self.stored:
            sizes[dtype] = sizes.get(dtype, 0) + size
        return {dtype: jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)) for dtype, size in sizes.items()}

    def block(self) -> Params:
        """The block as `jax.ShapeDtypeStruct`s."""
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        )


def layout_of(stacked: Params) -> tuple[Layout, int]:
    """The layout of one block of a stacked pytree, `[N, ...]` in every leaf, and N. A leaf may be a stacked `Packed`.

    Raises:
        ValueError: the leaves are not stacked with one N.
        TypeError: a leaf is not floating-point.
    """
    named = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=_is_packed)[0]
    floats = jax.tree.map(lambda leaf: leaf.arrays.scales if _is_packed(leaf) else leaf, stacked, is_leaf=_is_packed)
    _validate.floating_params(floats, name="blocks")
    shapes = {
        _validate.leaf_name(path): leaf.spec.shape if _is_packed(leaf) else np.shape(leaf) for path, leaf in named
    }
    lengths = {name: shape[:1] for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values() or (0,) in lengths.values():
        raise ValueError(
            f"the leaves of blocks are not stacked [N, ...] with one N of at least 1: {lengths or 'no leaf'}."
        )
    leaves = [leaf for _, leaf in named]
    layout = Layout(
        treedef=jax.tree.structure(stacked, is_leaf=_is_packed),
        shapes=tuple(shape[1:] for shape in shapes.values()),
        dtypes=tuple(leaf.dtype if _is_packed(leaf) else jnp.dtype(leaf.dtype).name for leaf in leaves),
        specs=tuple(_spec_of_one(leaf) if _is_packed(leaf) else None for leaf in leaves),
        offsets=(),
    )
    return dataclasses.replace(layout, offsets=_offsets(layout)), next(iter(lengths.values()))[0]


@dataclasses.dataclass(frozen=True)
class Part:
    """Leaves of a block that have a bucket of their own, of several that make up the block.

    Attributes:
        layout: Of their bucket; its pytree is the list of them.
        numbers: Which leaves of the block they are.
        position: Which of the buckets.
        num_parts: How many there are.
        whole: The layout of the block.
    """

    layout: Layout
    numbers: tuple[int, ...]
    position: int
    num_parts: int
    whole: Layout


def parts_of(layout: Layout, groups: tuple[tuple[int, ...], ...]) -> tuple[Part, ...]:
    """A block in several buckets: `groups` are the numbers of their leaves, in which each leaf is once.

    Raises:
        ValueError: they are not.
    """
    if sorted(number for group in groups for number in group) != list(range(len(layout.shapes))):
        raise ValueError(
            f"the groups {groups} are not each of the block's {len(layout.shapes)} leaves once; they belong to another model."
        )
    return tuple(
        Part(_layout_of_leaves(layout, numbers), numbers, position, len(groups), layout)
        for position, numbers in enumerate(groups)
    )


def _layout_of_leaves(layout: Layout, numbers: tuple[int, ...]) -> Layout:
    def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[number] for number in numbers)

    treedef = jax.tree.structure([0] * len(numbers))
    found = Layout(treedef, chosen(layout.shapes), chosen(layout.dtypes), chosen(layout.specs), ())
    return dataclasses.replace(found, offsets=_offsets(found))


def _offsets(layout: Layout) -> tuple[int, ...]:
    filled: dict[str, int] = {}
    offsets = []
    for dtype, size in layout.stored:
        offsets.append(filled.get(dtype, 0))
        filled[dtype] = offsets[-1] + size
    return tuple(offsets)


def packed(layout: Layout, stacked: Params, index: int) -> Bucket:
    """Block `index` of a stacked pytree as a bucket, on the host, without a copy of any other block.

    With the layout of a `Part`, `stacked` is the list of its leaves.
    """
    parts: dict[str, list[np.ndarray]] = {}
    leaves = jax.tree.leaves(stacked, is_leaf=_is_packed)
    for leaf, spec, (dtype, _) in zip(leaves, layout.specs, layout.stored, strict=True):
        if spec is None:
            flat = np.asarray(leaf[index]).reshape(-1)
        else:
            arrays = jax.tree.map(lambda array: np.asarray(array[index]), leaf.arrays)
            flat = quantization.to_bytes(Packed(arrays, spec))
        parts.setdefault(dtype, []).append(flat)
    return {dtype: np.concatenate(flat) for dtype, flat in parts.items()}


def all_packed(layout: Layout, parts: tuple[Part, ...], stacked: Params, index: int) -> Iterator[Bucket]:
    """The buckets of block `index`: one, or one for each part."""
    if not parts:
        yield packed(layout, stacked, index)
    leaves = jax.tree.leaves(stacked, is_leaf=_is_packed)
    for part in parts:
        yield packed(part.layout, [leaves[number] for number in part.numbers], index)


def all_unpacked(layout: Layout, parts: tuple[Part, ...], found: Sequence[Bucket]) -> Params:
    """The block of buckets that are all there."""
    if not parts:
        return unpacked(layout, found[0])
    leaves = {
        number: leaf(part.layout, bucket, i)
        for part, bucket in zip(parts, found, strict=True)
        for i, number in enumerate(part.numbers)
    }
    return layout.treedef.unflatten([leaves[number] for number in range(len(layout.shapes))])


def unpacked(layout: Layout, bucket: Bucket) -> Params:
    """The leaves of a bucket; NumPy gives views."""
    return layout.treedef.unflatten([leaf(layout, bucket, i) for i in range(len(layout.shapes))])


def leaf(layout: Layout, bucket: Bucket, number: int) -> Any:
    """One leaf of a bucket; quantized ones as weights of their dtype, on the device."""
    begin, spec, (stored, size) = layout.offsets[number], layout.specs[number], layout.stored[number]
    flat = bucket[stored][begin : begin + size]
    if spec is None:
        return flat.reshape(layout.shapes[number])
    return quantization.dequantize(quantization.from_bytes(flat, spec), spec, jnp.dtype(layout.dtypes[number]))


def with_leaf(layout: Layout, bucket: Bucket, number: int, value: jax.Array) -> Bucket:
    """The bucket with another leaf; a donated bucket is changed in place."""
    dtype = layout.dtypes[number]
    flat = jax.lax.dynamic_update_slice(bucket[dtype], value.reshape(-1), (layout.offsets[number],))
    return {**bucket, dtype: flat}


def replaced(layout: Layout, bucket: Bucket, block: Params) -> Bucket:
    """The bucket with other leaves."""
    for number, value in enumerate(jax.tree.leaves(block)):
        bucket = with_leaf(layout, bucket, number, value)
    return bucket


def stacked_again(layout: Layout, buckets: Sequence[Bucket], parts: tuple[Part, ...] = ()) -> Params:
    """The stacked pytree of all blocks, as NumPy arrays, filled block by block."""
    num_blocks = num_blocks_in(buckets, parts)
    leaves = [
        np.empty((num_blocks, *shape), jnp.dtype(dtype))
        for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
    ]
    for index in range(num_blocks):
        for leaf, value in zip(leaves, jax.tree.leaves(block_at(layout, buckets, parts, index)), strict=True):
            leaf[index] = value
    return layout.treedef.unflatten(leaves)


def num_blocks_in(buckets: Sequence[Bucket], parts: tuple[Part, ...]) -> int:
    """N of the buckets of all blocks."""
    return len(buckets) // max(1, len(parts))


def block_at(layout: Layout, buckets: Sequence[Bucket], parts: tuple[Part, ...], index: int) -> Params:
    """Block `index` of the buckets of all blocks, in NumPy arrays, wherever they wait."""
    num_buckets = max(1, len(parts))  # of a block
    # Through another array of the same memory: the first would keep its copy on the host.
    found = [
        jax.tree.map(lambda flat: np.asarray(flat.addressable_data(0)), bucket)
        for bucket in buckets[index * num_buckets : (index + 1) * num_buckets]
    ]
    return all_unpacked(layout, parts, found)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)


def _spec_of_one(leaf: Packed) -> PackedSpec:
    """The spec of one block of a stack."""
    return dataclasses.replace(leaf.spec, shape=leaf.spec.shape[1:])
