"""All keys of the noise: one table of derivations, and what binds a draw to the sum that it noises (S8).

**Derivations.** Every key below the user's is one block of the cipher, at a counter of two words, a domain and an index:

    key             under           domain                             index
    run key         user's key      DP_STEP, AGGREGATE,                number of the run of one transformation; 0 where a
                                    ZEROTH_ORDER, RESIDENT             run has a key of its own
    step key        run key         STEP                               index of the step
    stream key      step key        STREAM                             GRADIENT, COUNT, POSITIONS or DIGEST
    bound key       stream key      both words are the digest of what the draw belongs to; GRADIENT and COUNT only
    leaf key        bound key       LEAF                               position of the leaf in the pytree; GRADIENT only

Always all levels, run 0 included. `privatize` takes a run key; a user's own key serves too, since a step key below it has
another domain than a run key. What draws is a leaf key, the bound keys of a count and of a Laplace draw, and the streams of the
digest; none of them has keys below it. No domain is 0, which is that of `jax.random.fold_in` and `split`, nor a number that the
upper word of the counter of a draw can reach: so no two keys of the table are equal unless the cipher collides, and none is one
that `jax.random` derives from any of them (a bound key could be, if its digest began with 32 zeros: what is above it does not
draw). Keys of other generators than threefry are folded in twice, the domain and then the index.

**Binding.** One (key, step) must never noise two different sums: the difference of the releases would be the difference of the
sums, in the clear. That would take a checkpoint resumed with other batches, one optimizer state stepped with two gradients, or
a copied state; and no counter can tell, since whoever goes back in time takes the counter along. So noise is keyed by (key,
step, digest), where the digest is of what decides the sum: work that is repeated repeats its release to the bit, and any other
work at that step draws noise of its own. A nonce of the process would be as sound, and a resumed run would no longer be exact;
comparing the sampler's entropy would catch one of the three. What is digested, and what that cannot see, is said where it is
chosen: in `privatize` and in `make_dp_step`. Sound as it is, a second release at a step is one more release, which no ledger
counts.

**The digest** is secret, since who could compute it could prepare two inputs of one digest: all its constants come from the
step key. Each entry, as its bits w at the flat index i of array l, becomes two words, and both are summed mod 2^32,

    x = mix(w + a_l + i b_l);    y = mix'(x + c_l + sum_axis i_axis d_l,axis);    digest = sum_l E(sum_i (x, y) + p_l)

with b odd, mix a bijection (two multiplications between three shifted xors), and E the cipher. Sums of integers do not depend
on order, microbatches, devices or fusion, so every program that holds the same bits finds the same digest. **Collisions.**
Entries at two places of an array have different a + i b, so a value that moves is another x. An input that differs in one entry
has another x sum, always. In two or more it collides if their changes of x cancel, and those of y as well. A plain linear sum
would fail here: the two sign flips 2^31 a + 2^31 a' of odd multiples cancel always. Over a random a, the commonest change of x
by any flip of one bit of a float has a probability below 2^-16, two independent ones cancel with 2^-24 or less (measured on
2^24 keys; 2^-31 for y), so both sums by accident with about 2^-55, at 64 bits of length. It is one comparison a repeated step,
not a birthday problem: digests of other steps have other keys.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core
from jax.core import Tracer
from jax.extend.random import threefry_2x32

Key = jax.Array

_TAG = 0x6A646B00  # above the upper word of the counter of any entry that fits a memory


class Domain(enum.IntEnum):
    """First word of the counter of a derivation: what the new key is for."""

    DP_STEP = _TAG + 1
    AGGREGATE = _TAG + 2
    ZEROTH_ORDER = _TAG + 3
    RESIDENT = _TAG + 4
    STEP = _TAG + 16
    STREAM = _TAG + 17
    LEAF = _TAG + 18


#: Domains of the runs of `make_dp_step`, `dp_aggregate`, and zeroth order in blocks and resident.
PIPELINES = (Domain.DP_STEP, Domain.AGGREGATE, Domain.ZEROTH_ORDER, Domain.RESIDENT)


class Stream(enum.IntEnum):
    """Index of a stream within a step: the two draws of a release, and the constants and the cipher of the digest."""

    GRADIENT = 0
    COUNT = 1
    POSITIONS = 2
    DIGEST = 3


def run_key(key: Key, pipeline: Domain, run: int = 0) -> Key:
    """Key of a run, from the user's.

    Args:
        key: The user's secret key.
        pipeline: One of `PIPELINES`.
        run: Number of the run among those that share `key` and must not share noise.
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"{pipeline!r} is not the domain of a pipeline; give one of {PIPELINES}.")
    return _derived(key, pipeline, [run])[0]


def step_key(key: Key, step: Any) -> Key:
    """Key of a step, from that of its run; `step` is an integer below 2^32, traced or not."""
    return _derived(key, Domain.STEP, [step])[0]


def stream_keys(key: Key) -> dict[Stream, Key]:
    """Keys of all streams of a step, from its key; in one go."""
    return dict(zip(Stream, _derived(key, Domain.STREAM, list(Stream)), strict=True))


def bound_key(key: Key, digest: jax.Array) -> Key:
    """Key of the draws of a stream for what has the digest `digest`, uint32 `[2]`."""
    if not _is_threefry(key):
        return jax.random.fold_in(jax.random.fold_in(key, digest[0]), digest[1])
    return jax.random.wrap_key_data(threefry_2x32(jax.random.key_data(key), digest), impl="threefry2x32")


def leaf_keys(key: Key, count: int) -> list[Key]:
    """Keys of the leaves 0 to `count - 1` of a draw, from its bound key; in one go, since JAX's threefry is a loop for each."""
    return _derived(key, Domain.LEAF, list(range(count)))


def refuse_tracers(name: str, *trees: Any) -> None:
    """Refuses to start a run inside a JAX transformation.

    There the key would be a constant of the compiled program: every call, or every mapped run, would get the same noise.

    Args:
        name: What is called.
        trees: Its arguments.

    Raises:
        TypeError: an argument is traced, or the call itself is.
    """
    # The state of tracing is private to JAX, and shows what no argument does: a `vmap` that maps other arguments.
    if not core.trace_state_clean() or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise TypeError(
            f"{name} was called inside a JAX transformation (jit, vmap, scan or eval_shape), where its noise key would be one "
            "constant, and every call or mapped run would get the same noise. Call it outside; then replicate or shard the state "
            "with jax.device_put, make one state for each of several runs, or take the shapes of its result."
        )


def digest(arrays: Any, *, streams: dict[Stream, Key], facts: str) -> jax.Array:
    """Keyed digest of the bits of `arrays`, uint32 `[2]`; the module says which accidents it tells apart.

    It reads each array once, where it lies; it neither copies nor gathers it. Of a sharded one, two words a device are
    exchanged. On a CPU it takes 3% to 4% of the time of drawing as many normals.

    Args:
        arrays: Pytree of arrays of any dtype and shape: typed keys, empty ones and scalars too. Their order, shapes and dtypes
            count, the names of the leaves do not. 0.0 and -0.0 differ.
        streams: Those of the step.
        facts: Static values that count too.
    """
    shapes = [(np.shape(leaf), str(jnp.result_type(leaf))) for leaf in jax.tree.leaves(arrays)]
    known = np.frombuffer(hashlib.sha256(repr((shapes, facts)).encode()).digest()[:16], "<u4").astype(np.uint32)
    return _digest([*jax.tree.leaves(arrays), known], streams[Stream.POSITIONS], streams[Stream.DIGEST])


@functools.partial(jax.jit, inline=True)  # one program where nothing else is compiled
def _digest(arrays: list[Any], positions: Key, cipher: Key) -> jax.Array:
    words = [part for array in arrays for part in _words(jnp.asarray(array))]
    lengths = [7 + part.ndim for part in words]
    first = list(itertools.accumulate(lengths, initial=0))
    constants = threefry_2x32(_key_words(positions), jnp.arange(2 * -(-first[-1] // 2), dtype=jnp.uint32))
    sums, pads = [], []
    for part, start in zip(words, first[:-1], strict=True):
        pads.append(constants[start : start + 2])
        sums.append(_sums(part, constants[start + 2 : start + 7 + part.ndim]))
    high, low = (jnp.stack(sums) + jnp.stack(pads)).T
    return jnp.sum(
        threefry_2x32(_key_words(cipher), jnp.concatenate([high, low])).reshape(2, -1), axis=1, dtype=jnp.uint32
    )


def _sums(words: jax.Array, constants: jax.Array) -> jax.Array:
    """Both sums over the entries of an array of words, uint32 `[2]`, under 5 + ndim random words."""
    shape, axes = words.shape, range(words.ndim)
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in axes]
    a, b, c = constants[0], constants[1] | jnp.uint32(1), constants[2]
    indices = [lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in axes]

    # Constants times indices of the final shape, as `counter_normal.bits`: under `jit` they are sharded as the array is.
    def place(start: jax.Array, multipliers: Sequence[jax.Array]) -> jax.Array:
        return sum((i * m for i, m in zip(indices, multipliers, strict=True)), start)

    x = words + place(a, [b * jnp.uint32(stride) for stride in strides])
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x21F0AAAD)
    x = x ^ (x >> jnp.uint32(15))
    x = x * jnp.uint32(0x735A2D97)
    x = x ^ (x >> jnp.uint32(15))  # constants of C. Wellons, "Hash function prospector", lowbias32
    y = (x + place(c, [constants[5 + axis] for axis in axes])) * (constants[3] | jnp.uint32(1))
    y = y ^ (y >> jnp.uint32(16))
    zero = jnp.uint32(0)
    # One pass for both: on a CPU two reductions would take ten times as long.
    return jnp.stack(lax.reduce((x, y), (zero, zero), lambda s, t: (s[0] + t[0], s[1] + t[1]), tuple(axes)))


def _words(array: jax.Array) -> list[jax.Array]:
    """The bits of an array as arrays of uint32 words of its shape."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return [jax.random.key_data(array)]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return [*_words(array.real), *_words(array.imag)]
    if dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    is_floating = jnp.issubdtype(dtype, jnp.floating)
    size = (jnp.finfo if is_floating else jnp.iinfo)(dtype).bits
    if size < 8:
        return _words(array.astype(jnp.float32 if is_floating else jnp.int32))  # exact
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{size}"))
    if size == 64:
        return [bits.astype(jnp.uint32), (bits >> jnp.uint64(32)).astype(jnp.uint32)]
    return [bits.astype(jnp.uint32)]


def _derived(key: Key, domain: Domain, indices: Sequence[Any]) -> list[Key]:
    if not _is_threefry(key):
        own = jax.random.fold_in(key, int(domain))
        return [jax.random.fold_in(own, index) for index in indices]
    counters = jnp.stack([jnp.full(len(indices), int(domain), jnp.uint32), _uint32(indices)]).reshape(-1)
    words = threefry_2x32(jax.random.key_data(key), counters).reshape(2, -1).T
    return list(jax.random.wrap_key_data(words, impl="threefry2x32"))


def _uint32(indices: Sequence[Any]) -> jax.Array:
    if any(isinstance(index, jax.Array) for index in indices):
        return jnp.stack([jnp.asarray(index).astype(jnp.uint32) for index in indices])
    return jnp.asarray(np.asarray([int(index) for index in indices], np.uint32))


def _is_threefry(key: Key) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _key_words(key: Key) -> jax.Array:
    return jax.random.key_data(key) if _is_threefry(key) else jax.random.bits(key, (2,), jnp.uint32)
