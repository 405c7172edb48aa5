"""Blocks pass through the device one by one, whatever is done with them there.

Resident blocks are on the device already. Streamed blocks wait in pinned host memory: while block i computes, block i + 1
arrives and block i - 1 leaves. Both run the same programs in the same order, so their results are the same bits.

An eager transfer waits for the work enqueued before it, so each arrival is enqueued before the computation that it hides
behind. While a block computes, the loop waits until the one before has left: the device holds the block that computes and
`prefetch + 1` others, and no more.

A program over all blocks, with two stacks in host memory, was compiled for an H200 beside this loop
(`benchmarks/streaming_designs`). It needs one block less on the device, because a block arrives only when the one in its stack has
left: that transfer hides behind half a block. It compiles in 4.8 times the time, needs an even number of blocks, and with
jax 0.10 leaves other bits. A scan over one stack copies the stack.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxdp import _validate

#: `visit(stored, carry, index) -> (what is stored instead, carry, index + 1)`; the last on the device.
Visit = Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]

#: Slices of host arrays compile to wrong offsets on GPUs before this version (openxla/xla#46231).
_OLDEST_JAX_ON_GPU = (0, 11, 2)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where blocks wait.

    Attributes:
        is_streamed: On the host, or on the device.
        prefetch: How many blocks, or stages of blocks (`jaxdp.zeroth_order.stages`), are under way to the device while one
            computes; each needs memory there. With 0 a block travels while nothing computes: the least memory, one block, and the
            most time.
    """

    is_streamed: bool = False
    prefetch: int = 1

    def __post_init__(self) -> None:
        _validate.nonnegative_integer("prefetch", self.prefetch)

    def check(self) -> None:
        """Refuses a JAX that would stream the wrong block.

        Raises:
            RuntimeError: on a GPU with a JAX before 0.11.2.
        """
        version = tuple(int(part) for part in jax.__version__.split(".")[:3])
        if self.is_streamed and jax.default_backend() == "gpu" and version < _OLDEST_JAX_ON_GPU:
            raise RuntimeError(
                f"streaming on a GPU needs jax 0.11.2 or newer, and this is {jax.__version__}, which reads wrong blocks from host "
                "memory; install Python 3.12 and jax[cuda13]>=0.11.2, or keep the model resident."
            )

    def store(self, block: Any) -> Any:
        """A block to where it waits; from NumPy, from the device or from the host."""
        return jax.device_put(block, _host() if self.is_streamed else _device())

    def fetch(self, block: Any) -> Any:
        """A waiting block to the device. Returns at once; a resident one is returned itself."""
        return jax.device_put(block, _device()) if self.is_streamed else block


def on_device(tree: Any) -> Any:
    """Arrays on the device, and committed to it: an argument that is not would be compiled for once more."""
    return jax.device_put(tree, _device())


def pass_through(
    visit: Visit,
    stores: Sequence[tuple[list[Any], Placement]],
    carry: Any,
    *,
    is_written: bool,
) -> Any:
    """Lets every block pass, first to last, and returns the carry.

    Args:
        visit: Gets the blocks of index i of all stores. If `is_written`, the first result takes the place of the block in the
            first store, and the block's own arrays are gone: the visit may have donated them.
        stores: The trained blocks first; then others that are only read.
        carry: What goes from visit to visit.
        is_written: Whether the first result is kept.
    """
    num_blocks = len(stores[0][0])
    depth = max(placement.prefetch for _, placement in stores)
    arriving: collections.deque[tuple[Any, ...]] = collections.deque()
    under_way: collections.deque[Any] = collections.deque()
    index = on_device(np.int32(0))

    def fetch(i: int) -> None:
        arriving.append(tuple(placement.fetch(blocks[i]) for blocks, placement in stores))

    for i in range(min(depth, num_blocks)):
        fetch(i)
    for i in range(num_blocks):
        if i + depth < num_blocks:
            fetch(i + depth)  # before the computation of block i: it will travel meanwhile
        new, carry, index = visit(arriving.popleft(), carry, index)
        if is_written:
            blocks, placement = stores[0]
            old, blocks[i] = blocks[i], placement.store(new) if placement.is_streamed else new
            _delete(old)
        under_way.append((index, stores[0][0][i] if is_written else None))
        del new
        if len(under_way) > min(depth, 1):
            jax.block_until_ready(under_way.popleft())
    return carry


def _delete(block: Any) -> None:
    for leaf in jax.tree.leaves(block):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()


def _device() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _host() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
