"""Packed int8, int6 and int4 weights: the frozen base of a streamed model, as it lies on the host and crosses the link.

A matrix [.., m, p] is cut into groups of g input rows; each group and output column has one scale, and

    s = absmax / qmax,  code = clip(round(w / s), -qmax, qmax),  value = code * s,  qmax = 2^(bits - 1) - 1

with s rounded to bfloat16 before the codes are computed, and rounding half to even. A group of zeros has s = 1.

**Guarantee**: |w - value| <= s/2 for every weight, before `value` is rounded to the dtype asked for (and up to the rounding
of w / s in float32, 2^-15 of the bound). Rounding the scale moves s by at most a relative 2^-8, hence
|w - value| <= absmax / (2 qmax) * (1 + 2^-8). A scale rounded down clips nothing by more than that: qmax / (1 - 2^-8) still
rounds to qmax. Relative RMS error on Gaussian weights in groups of 128: int8 0.0065, int6 0.0265, int4 0.117.

The scale is bfloat16 rather than float16 for its range: float16 overflows at 65504, loses bits below 6e-5, which the groups
of small int8 weights reach, and is 0 below 3e-8. The 8 bits of bfloat16 suffice, as the bound shows, and make code * s exact
in float32. Scales below 2^-126 are raised to it, so that no value is a subnormal, which devices flush to zero.

Packing is our own, because the sub-byte types of ml_dtypes take a byte each. Consecutive rows of a column share a byte, the
first in its lowest bits: whole groups are whole bytes, and unpacking moves no columns. int8 is one plane of bytes in two's
complement. int4 is one plane of nibbles, code + 8. int6 is a plane of nibbles hi4 and a plane of pairs of bits lo2, where
code + 32 = (hi4 << 2) | lo2: exactly 0.75 bytes per weight. The two planes are the idea of FP6-LLM (Xia et al.,
arXiv 2401.14112), without its layout for tensor cores.

Scales come from public weights alone, never from an activation, so they couple no records (S3).
"""

from jaxdp.quantization.layout import (
    DEFAULT_GROUP_SIZES as DEFAULT_GROUP_SIZES,
    FormatName as FormatName,
    Packed as Packed,
    PackedArrays as PackedArrays,
    PackedSpec as PackedSpec,
    bytes_per_parameter as bytes_per_parameter,
    from_bytes as from_bytes,
    num_bytes as num_bytes,
    to_bytes as to_bytes,
)
from jaxdp.quantization.packing import (
    quantize as quantize,
    quantize_matrices as quantize_matrices,
    quantized_shapes as quantized_shapes,
)
from jaxdp.quantization.unpacking import dequantize as dequantize
