"""One flat array for all leaves of a block: what travels between host and device in one transfer.

A transfer has a price of its own, and two small ones do not overlap with as much computation as one large one. Leaves of one
dtype share a bucket; a block of one dtype is one array.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params

#: A flat array for each dtype, by its name.
Bucket: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each leaf of a block lies: hashable, the same for all blocks.

    Attributes:
        treedef: Of the block.
        shapes: Of its leaves, without the axis of the blocks.
        dtypes: Names of their dtypes.
        offsets: First entry of each in the bucket of its dtype.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    offsets: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_bytes(self) -> int:
        """Of one block, in all its buckets."""
        return sum(size * jnp.dtype(dtype).itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))

    def block(self) -> Params:
        """The block as `jax.ShapeDtypeStruct`s."""
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        )


def layout_of(stacked: Params) -> tuple[Layout, int]:
    """The layout of one block of a stacked pytree, `[N, ...]` in every leaf, and N.

    Raises:
        ValueError: the leaves are not stacked with one N.
        TypeError: a leaf is not floating-point.
    """
    _validate.floating_params(stacked, name="blocks")
    lengths = {name: np.shape(leaf)[:1] for name, leaf in _validate.named_leaves(stacked)}
    if len(set(lengths.values())) != 1 or () in lengths.values() or (0,) in lengths.values():
        raise ValueError(
            f"the leaves of blocks are not stacked [N, ...] with one N of at least 1: {lengths or 'no leaf'}."
        )
    leaves, treedef = jax.tree.flatten(stacked)
    filled: dict[str, int] = {}
    offsets = []
    for leaf in leaves:
        name = jnp.dtype(leaf.dtype).name
        offsets.append(filled.get(name, 0))
        filled[name] = offsets[-1] + math.prod(leaf.shape[1:])
    shapes = tuple(tuple(leaf.shape[1:]) for leaf in leaves)
    dtypes = tuple(jnp.dtype(leaf.dtype).name for leaf in leaves)
    return Layout(treedef, shapes, dtypes, tuple(offsets)), len(leaves[0])


def packed(layout: Layout, stacked: Params, index: int) -> Bucket:
    """Block `index` of a stacked pytree as a bucket, on the host, without a copy of any other block."""
    parts: dict[str, list[np.ndarray]] = {}
    for leaf, dtype in zip(jax.tree.leaves(stacked), layout.dtypes, strict=True):
        parts.setdefault(dtype, []).append(np.asarray(leaf[index]).reshape(-1))
    return {dtype: np.concatenate(flat) for dtype, flat in parts.items()}


def unpacked(layout: Layout, bucket: Bucket) -> Params:
    """The leaves of a bucket; NumPy gives views."""
    return layout.treedef.unflatten([leaf(layout, bucket, i) for i in range(len(layout.shapes))])


def leaf(layout: Layout, bucket: Bucket, number: int) -> Any:
    """One leaf of a bucket."""
    begin = layout.offsets[number]
    flat = bucket[layout.dtypes[number]]
    return flat[begin : begin + layout.sizes[number]].reshape(layout.shapes[number])


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


def stacked_again(layout: Layout, buckets: list[Bucket]) -> Params:
    """The stacked pytree of all blocks, as NumPy arrays, filled block by block."""
    leaves = [
        np.empty((len(buckets), *shape), jnp.dtype(dtype))
        for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
    ]
    for index, bucket in enumerate(buckets):
        block = unpacked(layout, {dtype: np.asarray(flat) for dtype, flat in bucket.items()})
        for leaf, value in zip(leaves, jax.tree.leaves(block), strict=True):
            leaf[index] = value
    return layout.treedef.unflatten(leaves)
