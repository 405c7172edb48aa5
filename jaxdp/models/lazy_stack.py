"""A leaf of stacked blocks that are read, or made, when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import numpy as np


class LazyStack:
    """Blocks of one shape and dtype, `[N, ...]`, none of which is in memory until it is asked for.

    It is a leaf of a pytree where a stacked array would be: `leaf[i]` is block i as a NumPy array, made anew at each call,
    `leaf[a:b]` a stack of some, and iteration gives one after the other. `np.asarray(leaf)` makes all of them, and so do
    `jax.device_get` and `jnp.asarray`, at the price of their memory. Compiled functions refuse it.

    Args:
        shape: `[N, ...]`.
        dtype: Of the blocks.
        block: Block i, an array `shape[1:]` of that dtype, from an index in 0 .. N - 1.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, block: Callable[[int], np.ndarray]) -> None:
        self.shape, self.dtype, self._block = tuple(shape), np.dtype(dtype), block

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all blocks, in memory or not."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> LazyStack: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | LazyStack:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return LazyStack((len(chosen), *self.shape[1:]), self.dtype, lambda i: self._block(chosen[i]))
        return self._block(range(len(self))[index])  # which counts from the end, and complains, as an array does

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._block, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self!r} is not in memory; an array of it is a copy.")
        whole = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, block in enumerate(self):
            whole[i] = block
        return whole

    def derived(self, shape: tuple[int, ...], dtype: Any, block: Callable[[int], np.ndarray]) -> LazyStack:
        """Another leaf, for what can be made of the blocks of this one."""
        return LazyStack(shape, dtype, block)

    def astype(self, dtype: Any, *, copy: bool = True) -> LazyStack:
        """The blocks in another dtype, each cast when it is asked for."""
        del copy  # as of an array, for which it decides whether the same dtype is the same array
        if np.dtype(dtype) == self.dtype:
            return self
        return self.derived(self.shape, dtype, lambda i: self._block(i).astype(dtype))

    def __repr__(self) -> str:
        return f"LazyStack({list(self.shape)}, {self.dtype})"
