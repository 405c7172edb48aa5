"""Random directions by position: the entry of a direction is a pure function of where it stands (S17).

    z[step, k, block, leaf, element]      k: one of the K directions of a step

One call of threefry2x32 chain-folds the address into a key for each leaf, and a counter generator draws the leaf from it. No
stream has a state, so a direction is the same in every schedule: in one program or in one program for each block, streamed or
resident, forward or replayed. Bits come from integer operations, and integers become floats by operations that round once or
not at all, so it is also the same on every backend.

Laws have mean zero and unit covariance, E[z zᵀ] = I, on which the unbiasedness of the estimators rests. Directions are public:
they are never drawn from the noise key, nor it from theirs (S8).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from pallas_kernels.counter_normal import threefry2x32

#: Streams that no step uses: indices of steps stay below them.
_LAST_STEP = 2**32 - 3
_NARROW = 128
_AT_ONCE = 2**20
_ROUNDING_STREAM, _SUBSPACE_STREAM = 2**32 - 2, 2**32 - 1

# The normal law in integers: the count of 48 fair bits and one uniform of 16 bits, in units of 2^-16.
_COIN_BITS = 48
_CENTER = _COIN_BITS // 2 * 2**16 + 2**15
_UNIT = float(np.float32(1 / math.sqrt((_COIN_BITS / 4 + 1 / 12) * 2.0**32)))


@dataclasses.dataclass(frozen=True)
class Rademacher:
    """Signs, +1 or -1 with equal probability: one random bit an entry, and ||z||² is the number of entries exactly."""


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The standard normal law, as a count of 48 fair bits and a uniform of 16 bits, centered and scaled.

    Mean 0 and variance 1; the distribution function is within 1.8e-3 of the normal one, and the excess kurtosis is -0.04. In
    return every draw is exact integer arithmetic and one rounding, which no compiler changes.
    """


@dataclasses.dataclass(frozen=True)
class LowRank:
    """z = U Vᵀ / sqrt(r) for matrices, with normal U `[m, r]` and V `[n, r]`; normal for vectors (LOZO, arXiv 2410.07698).

    U is fresh for each (step, k); V is shared by all directions and drawn anew every `refresh_every` steps, so that the updates
    between two refreshes stay in one subspace. The factor 1 / sqrt(r) gives E[z zᵀ] = I; LOZO's perturbation scale is that of
    here divided by sqrt(r).

    Attributes:
        rank: r.
        refresh_every: Steps for which V is kept.
    """

    rank: int = 2
    refresh_every: int = 50

    def __post_init__(self) -> None:
        _validate.positive_integer("rank", self.rank)
        _validate.positive_integer("refresh_every", self.refresh_every)


Law: TypeAlias = Rademacher | Gaussian | LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The direction L Rᵀ of a matrix.

    Attributes:
        left: L, float32 `[m, r]`.
        right: R, float32 `[n, r]`.
    """

    left: jax.Array
    right: jax.Array

    def dense(self) -> jax.Array:
        """The matrix, `[m, n]`."""
        return lax.dot_general(self.left, self.right, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)

    def scaled(self, scale: jax.Array | float) -> Factors:
        """The matrix times a number."""
        return Factors(self.left * scale, self.right)


def leaf_directions(
    law: Law,
    root: jax.Array,
    *,
    step: jax.Array,
    k: jax.Array,
    block: jax.Array,
    shapes: Params,
    only: int | None = None,
    is_factored: bool = False,
) -> Params:
    """The direction of one block, a float32 pytree; or of its leaf number `only`.

    Args:
        law: What is drawn.
        root: The words of the direction key, uint32 `[2]`.
        step: Index of the step that the direction belongs to, uint32.
        k: Index of the direction within its step.
        block: 0 for the leaves that belong to no block, 1 + i for block i.
        shapes: Pytree of things with a shape. Each leaf has its own stretch of the block's counter, in their order.
        is_factored: Give low-rank directions of matrices `[m, n]` as `Factors`: the same direction up to rounding.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    chosen = range(len(leaves)) if only is None else (only,)
    key = _key(root, step, k, block)
    if isinstance(law, Rademacher):
        flat = _leaf_signs(key, sizes, chosen)
    elif isinstance(law, Gaussian):
        flat = [_normals(*pair) for pair in _leaf_words(key, sizes, chosen)]
    else:
        refresh = jnp.asarray(step, jnp.uint32) // jnp.uint32(law.refresh_every)
        subspace = _key(root, jnp.uint32(_SUBSPACE_STREAM), refresh, block)
        flat = _low_rank(law.rank, key, subspace, [leaf.shape for leaf in leaves], chosen, is_factored=is_factored)
    shaped = [z if isinstance(z, Factors) else _shaped(z, leaves[i].shape) for z, i in zip(flat, chosen, strict=True)]
    return treedef.unflatten(shaped) if only is None else shaped[0]


def is_small(shapes: Params) -> bool:
    """Whether a block is so small that its leaves are best drawn together: compiling then takes longer than drawing."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) <= _AT_ONCE


def rounding_bits(root: jax.Array, *, step: jax.Array, block: jax.Array, shapes: Params, only: int) -> jax.Array:
    """16 random bits for every entry of a leaf, uint32, of a stream that no direction reads; arguments as above."""
    leaves = jax.tree.leaves(shapes)
    key = _key(root, jnp.uint32(_ROUNDING_STREAM), step, block)
    ((high, _),) = _leaf_words(key, [math.prod(leaf.shape) for leaf in leaves], (only,))
    return _shaped(high >> jnp.uint32(16), leaves[only].shape)


def check_step(step: int) -> None:
    """Refuses a step whose index would be that of another stream."""
    if not 0 <= step <= _LAST_STEP:
        raise ValueError(f"step must be between 0 and {_LAST_STEP}, got {step}.")


def rounded(product: jax.Array) -> jax.Array:
    """A float32 product, rounded before it is added to anything.

    A compiler may fuse `w + c * z` into one operation with one rounding, in one program and not in the next. The last bit given
    up here forbids that: the sum is the same bits in every program and on every backend.
    """
    return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=22)


def _key(root: jax.Array, *path: jax.Array) -> jax.Array:
    """The key below `root` at a path of indices."""
    for index in path:  # each as `jax.random.fold_in`
        root = jnp.stack(threefry2x32(root[0], root[1], jnp.uint32(0), jnp.asarray(index, jnp.uint32)))
    return root


def _leaf_words(key: jax.Array, counters: Sequence[int], chosen: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
    """Both words of the cipher at every counter of the chosen leaves: the leaves share one counter, one after the other."""
    first = list(itertools.accumulate(counters, initial=0))
    if first[-1] > _AT_ONCE:
        return [_words(key, first[i], counters[i]) for i in chosen]
    # A small block in one run of the cipher, which takes seconds less to compile than one for each leaf.
    high, low = _stored_words(key, 0, first[-1])
    return [(high[first[i] : first[i + 1]], low[first[i] : first[i + 1]]) for i in chosen]


def _words(key: jax.Array, first: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Both words at the counters `first` to `first + size - 1`, in a form that fuses with what reads them."""
    return threefry2x32(key[0], key[1], *_counters(first, size))


def _stored_words(key: jax.Array, first: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The same words by JAX's primitive, which writes them to memory: for words that are read many times."""
    words = jax.extend.random.threefry_2x32(key, jnp.concatenate(_counters(first, size)))
    return words[:size], words[size:]


def _counters(first: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower words of `size` counters of 64 bits."""
    if size > 2**32:
        raise ValueError(f"a leaf needs {size} counters, and at most 2^32 are possible; split it.")
    low = jnp.uint32(first % 2**32) + jnp.arange(size, dtype=jnp.uint32)
    high = jnp.full_like(low, first // 2**32)
    if first % 2**32 + size > 2**32:
        high = high + (low < jnp.uint32(first % 2**32)).astype(jnp.uint32)  # the carry shows as a wrap
    return high, low


def _leaf_signs(key: jax.Array, sizes: Sequence[int], chosen: Sequence[int]) -> list[jax.Array]:
    """Entry e is bit e % 32 of word e // 32; the words of a counter are neighbors."""
    counters = [-(-size // 64) for size in sizes]
    first = list(itertools.accumulate(counters, initial=0))
    if first[-1] <= _AT_ONCE:
        pairs = _leaf_words(key, counters, chosen)
    else:  # stored: each word is read 32 times
        pairs = [_stored_words(key, first[i], counters[i]) for i in chosen]
    numbers = jnp.arange(32, dtype=jnp.uint32)[None]
    signs = []
    for i, pair in zip(chosen, pairs, strict=True):
        words = jnp.stack(pair, axis=-1).reshape(-1, 1)
        bits = (words >> numbers) & jnp.uint32(1)  # [words, 32]
        signs.append((1 - 2 * bits.astype(jnp.int32)).astype(jnp.float32).reshape(-1)[: sizes[i]])
    return signs


def _normals(high: jax.Array, low: jax.Array) -> jax.Array:
    count = lax.population_count(high) + lax.population_count(low >> jnp.uint32(16))  # of 48 bits
    units = (count << jnp.uint32(16)) + (low & jnp.uint32(0xFFFF))
    # Odd, and below 2^23 in magnitude: the conversion is exact, and the product rounds once.
    return (2 * units.astype(jnp.int32) + jnp.int32(1 - 2 * _CENTER)).astype(jnp.float32) * np.float32(0.5 * _UNIT)


def _low_rank(
    rank: int,
    key: jax.Array,
    subspace: jax.Array,
    shapes: Sequence[tuple[int, ...]],
    chosen: Sequence[int],
    *,
    is_factored: bool,
) -> list[Any]:
    """U Vᵀ / sqrt(r) of matrices, flat or in factors, and normals of vectors."""
    sides = [(math.prod(shape[:-1]), shape[-1] if len(shape) > 1 else 0) for shape in shapes]
    sizes = [m * rank if n else math.prod(shape) for (m, n), shape in zip(sides, shapes, strict=True)]
    lefts = [_normals(*pair) for pair in _leaf_words(key, sizes, chosen)]
    sizes = [n * rank for _, n in sides]
    rights = [_normals(*pair) for pair in _leaf_words(subspace, sizes, chosen)]

    def product(left: jax.Array, right: jax.Array, m: int, n: int) -> jax.Array:
        u, v = left.reshape(rank, m), right.reshape(rank, n)
        total = rounded(u[0][:, None] * v[0][None, :])
        for i in range(1, rank):  # in a fixed order: a matrix product has none
            total = total + rounded(u[i][:, None] * v[i][None, :])
        return rounded(total * np.float32(rank**-0.5)).reshape(-1)

    found = []
    for left, right, i in zip(lefts, rights, chosen, strict=True):
        m, n = sides[i]
        if is_factored and len(shapes[i]) == 2:
            scaled = left.reshape(rank, m).T * np.float32(rank**-0.5)
            found.append(Factors(scaled, right.reshape(rank, n).T))
        else:
            found.append(product(left, right, m, n) if n else left)
    return found


def _shaped(flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if shape and shape[-1] < _NARROW < flat.size:
        flat = lax.optimization_barrier(flat)  # on CPU XLA would loop over the short last axis, 5 times as slow
    return flat.reshape(shape)


def words_of(key: Any) -> jax.Array:
    """The words of a typed direction key, uint32 `[2]`."""
    key = _validate.typed_key("direction_key", key)
    words = jax.random.key_data(key)
    if words.shape != (2,):
        raise ValueError(
            f"direction_key has {words.shape} words; make it with jax.random.key(seed, impl='threefry2x32'), which has two."
        )
    return words
