"""Packed codes to weights, on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.quantization.layout import OFFSETS, PLANE_BITS, PackedArrays, PackedSpec, check_arrays, scales_shape


def dequantize(arrays: PackedArrays, spec: PackedSpec, dtype: Any = jnp.bfloat16) -> jax.Array:
    """value = float32(code) * float32(scale), an exact product, rounded once to `dtype`; pure, for use inside `jit`.

    **Guarantee**: the bits are those of the same formula in NumPy, whatever XLA fuses it with. A value beyond the range of
    `dtype` becomes infinite, which can happen to float16 within 2^-8 of its largest number.

    Args:
        arrays: From `quantize` or `from_bytes`, on the host or the device.
        spec: The spec of the weights.
        dtype: Floating dtype of the result.

    Returns:
        `[.., m, p]` in `dtype`.

    Raises:
        ValueError: an array does not have the shape and dtype that the spec gives it, or `dtype` is not floating.

    >>> import numpy as np
    >>> from jaxdp.quantization import quantize
    >>> packed = quantize(np.array([[7.0, 3.5], [-2.0, 1.2], [0.6, -0.3]]), "int4")
    >>> dequantize(packed.arrays, packed.spec).tolist()
    [[7.0, 3.5], [-2.0, 1.0], [1.0, -0.5]]
    """
    check_arrays(arrays, spec)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating, such as jnp.bfloat16, got {dtype}.")
    *matrices, m, p = spec.shape
    code = _codes(arrays.planes, spec)[..., :m, :]
    num_groups, group_rows = scales_shape(spec)[-2], min(spec.group_size, m)
    scale = jnp.broadcast_to(jnp.asarray(arrays.scales)[..., None, :], (*matrices, num_groups, group_rows, p))
    scale = scale.reshape(*matrices, num_groups * group_rows, p)[..., :m, :]
    value = code.astype(jnp.float32) * scale.astype(jnp.float32)
    if dtype == jnp.bfloat16:
        # XLA is free to drop a cast to bfloat16 that a cast back follows; this rounding it must keep.
        value = lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return value.astype(dtype)


def _codes(planes: tuple[Any, ...], spec: PackedSpec) -> jax.Array:
    """int8 `[.., m padded, p]`."""
    bits_of_planes = PLANE_BITS[spec.format]
    fields = [_split_rows(jnp.asarray(plane), bits) for plane, bits in zip(planes, bits_of_planes, strict=True)]
    stored = fields[0]
    for field, bits in zip(fields[1:], bits_of_planes[1:], strict=True):
        stored = (stored << jnp.uint8(bits)) | field
    return lax.bitcast_convert_type(stored, jnp.int8) - jnp.int8(OFFSETS[spec.format])


def _split_rows(plane: jax.Array, bits: int) -> jax.Array:
    """uint8 `[.., r, p]` -> `[.., r * 8 / bits, p]`: the inverse of joining rows, with one shift per row and no gather."""
    *matrices, rows, p = plane.shape
    shifts = jnp.arange(0, 8, bits, jnp.uint8).reshape((1,) * len(matrices) + (1, -1, 1))
    fields = (plane[..., None, :] >> shifts) & jnp.uint8(2**bits - 1)
    return fields.reshape(*matrices, rows * (8 // bits), p)
