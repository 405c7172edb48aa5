"""Standard normals by position: each entry of an array is a pure function of the key and of its flat index.

One call of threefry2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) at the 64-bit index gives
63 bits of magnitude and a sign. Nothing depends on tiles, threads, devices or backends, so the same lines run inside a
kernel and in plain XLA. They use uint32 and float32 operations alone, which Mosaic can lower.

Guarantee: the bits are those of the published cipher, equal everywhere. The normals are the inverse distribution function
at those bits within 1e-6 relative, out to 9 standard deviations: `jax.random.normal` inverts 23 bits and ends at 5.2, and
a release beyond that end would prove membership. As everywhere, a secret and unpredictable key is assumed (S21).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_NARROW = 128

# -ndtri(p) = (1 - 2p) f(w) for w = -log(4p(1-p)): f is analytic in w near the middle, and f / sqrt(w) is smooth in 1/sqrt(w)
# in the tail. Minimax polynomials of degree 8, fitted to float64 `ndtri` on [0, 5.5] and [5.5, 44.5] (p = 2^-65), with
# the variable scaled to [-1, 1]; highest power first, relative error 2.2e-7.
_TAIL_BEGINS = 5.5
_BODY_SCALE, _BODY_SHIFT = 1 / 2.75, -1.0
_TAIL_SCALE, _TAIL_SHIFT = 7.23340173297554, -2.084332812968573
_BODY = (
    6.031214434187859e-05,
    0.0005945833399891853,
    -0.0016794531838968396,
    -0.0019540819339454174,
    0.016960643231868744,
    -0.030587460845708847,
    -0.05386839434504509,
    0.9502246379852295,
    2.210118532180786,
)
_TAIL = (
    -3.943598494515754e-05,
    -0.00019599161169026047,
    -1.179560786113143e-05,
    0.0008181525045074522,
    0.0007362224860116839,
    0.0022960093338042498,
    0.003909816034138203,
    -0.03707330673933029,
    1.3470845222473145,
)


@functools.partial(jax.jit, inline=True)  # inlined where it is traced; one program where it is not
def threefry2x32(key_0: jax.Array, key_1: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 20-round threefry2x32 block at the counter words (high, low), under the key words; all uint32.

    Written out because XLA fuses it with what consumes the bits; on CPU it is 3 times as fast as JAX's own primitive,
    whose rounds are rolled up in a loop.
    """
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(_PARITY))
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))
            y = x ^ y
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def flat_index(row: jax.Array, column: jax.Array, num_columns: int, size: int) -> tuple[jax.Array, jax.Array]:
    """row * num_columns + column as the words (high, low), for an array of `size` entries; uint32 of one shape."""
    low = row * jnp.uint32(num_columns) + column
    if size <= 2**32:
        return jnp.zeros_like(low), low
    # The upper word of the product, by halves of 16 bits; the carry of the sum shows as a wrap.
    row_high, row_low = row >> jnp.uint32(16), row & jnp.uint32(0xFFFF)
    upper, lower = jnp.uint32(num_columns >> 16), jnp.uint32(num_columns & 0xFFFF)
    middle = row_high * lower + (row_low * lower >> jnp.uint32(16))
    other = row_low * upper + (middle & jnp.uint32(0xFFFF))
    high = row_high * upper + (middle >> jnp.uint32(16)) + (other >> jnp.uint32(16))
    return high + (low < column).astype(jnp.uint32), low


def bits_at(
    key_data: tuple[jax.Array, jax.Array], row: jax.Array, column: jax.Array, *, num_columns: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """The two random words of the entries (row, column) of an array with `num_columns` columns and `size` entries.

    Args:
        key_data: Both words of the key, uint32 scalars.
        row: uint32, of any shape.
        column: uint32, of the shape of `row`.
        num_columns: Columns of the whole array, below 2^32.
        size: Entries of the whole array, which decides whether the high word of the counter is needed.
    """
    return threefry2x32(*key_data, *flat_index(row, column, num_columns, size))


def normal_of_bits(high: jax.Array, low: jax.Array) -> jax.Array:
    """Inverts the normal law at 63 bits, with the last bit of `high` as the sign; uint32 to float32, any shape."""
    integer = (high >> jnp.uint32(1)).astype(jnp.int32).astype(jnp.float32)  # 31 bits: signed conversion is the faster
    fraction = (low.astype(jnp.float32) + 0.5) * 2.0**-32
    magnitude = -lower_tail_quantile((integer + fraction) * 2.0**-32)
    return jnp.where((high & jnp.uint32(1)) == jnp.uint32(1), magnitude, -magnitude)


@functools.partial(jax.jit, inline=True)
def lower_tail_quantile(p: jax.Array) -> jax.Array:
    """The standard normal quantile of p in [2^-65, 1/2], float32; within 1e-6 relative of the exact one."""
    w = -jnp.log(4.0 * p * (1.0 - p))
    in_tail = w > _TAIL_BEGINS
    root = lax.rsqrt(jnp.maximum(w, _TAIL_BEGINS))
    t = jnp.where(in_tail, root * _TAIL_SCALE + _TAIL_SHIFT, w * _BODY_SCALE + _BODY_SHIFT)
    value = jnp.where(in_tail, jnp.float32(_TAIL[0]), jnp.float32(_BODY[0]))
    for tail, body in zip(_TAIL[1:], _BODY[1:], strict=True):
        value = value * t + jnp.where(in_tail, jnp.float32(tail), jnp.float32(body))
    return (2.0 * p - 1.0) * jnp.where(in_tail, value * (w * root), value)


def normal_at(
    key_data: tuple[jax.Array, jax.Array], row: jax.Array, column: jax.Array, *, num_columns: int, size: int
) -> jax.Array:
    """N(0, 1) at the entries (row, column), float32; arguments as in `bits_at`."""
    return normal_of_bits(*bits_at(key_data, row, column, num_columns=num_columns, size=size))


def bits(key_data: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The two random words of every entry of an array of `shape`, in row-major order.

    Args:
        key_data: The key, `[2]` uint32. Secret where the draw is noise, and for this draw alone: a key that draws must
            not be folded or split as well, since `jax.random.fold_in(key, i)` is entry i of this stream (S8).
        shape: Any shape, with a last axis below 2^32.
    """
    if key_data.shape != (2,) or key_data.dtype != jnp.uint32:
        raise ValueError(f"key_data must be uint32[2], threefry2x32's; it is {key_data.dtype}{list(key_data.shape)}.")
    # Iotas of the final shape, not a reshaped flat one: under `jit` they are sharded as their consumer is.
    columns = shape[-1] if shape else 1
    row = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape) - 1)):
        row = row + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    column = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) if shape else jnp.uint32(0)
    return bits_at((key_data[0], key_data[1]), row, column, num_columns=columns, size=math.prod(shape))


def standard_normal(key_data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent draws from N(0, 1), float32 of `shape`; arguments as in `bits`."""
    size = math.prod(shape)
    if shape and shape[-1] < _NARROW and size <= 2**32:
        # On CPU XLA would loop over the short last axis: 5 times as slow. The barrier keeps it from seeing that axis.
        flat = normal_of_bits(*bits(key_data, (size,)))
        return lax.optimization_barrier(flat).reshape(shape)
    return normal_of_bits(*bits(key_data, shape))
