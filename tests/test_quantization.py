"""Laws of the packed formats: error, exactness, sizes, the same bits on host and device, bounded memory."""

import functools
import math
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdp import quantization
from jaxdp.quantization import Packed, PackedArrays, PackedSpec, dequantize, from_bytes, num_bytes, quantize, to_bytes

BITS = {"int8": 8, "int6": 6, "int4": 4}
ROWS_PER_BYTE = {"int8": 1, "int6": 4, "int4": 2}
FORMATS = list(BITS)
BFLOAT16 = ml_dtypes.bfloat16

unpack = jax.jit(dequantize, static_argnums=(1, 2))
TARGETS = (np.float32, BFLOAT16, np.float16)


@functools.partial(jax.jit, static_argnums=1)
def from_bytes_to_values(flat, spec):
    arrays = from_bytes(flat, spec)
    return arrays, [dequantize(arrays, spec, target) for target in TARGETS]


def gaussian(shape, dtype=np.float32, stddev=0.02) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(0, stddev, shape).astype(dtype)


def numpy_codes(packed: Packed) -> np.ndarray:
    """The signed codes `[.., m, p]`, one byte and one row at a time: the definition of the planes."""
    *matrices, m, p = packed.spec.shape
    codes = np.zeros((*matrices, m, p), np.int32)
    planes = [plane.astype(np.int32) for plane in packed.arrays.planes]
    for row in range(m):
        if packed.spec.format == "int8":
            codes[..., row, :] = packed.arrays.planes[0].view(np.int8)[..., row, :]
            continue
        nibble = (planes[0][..., row // 2, :] >> 4 * (row % 2)) & 15
        if packed.spec.format == "int4":
            codes[..., row, :] = nibble - 8
        else:
            low = (planes[1][..., row // 4, :] >> 2 * (row % 4)) & 3
            codes[..., row, :] = (nibble << 2 | low) - 32
    return codes


def numpy_scales(packed: Packed) -> np.ndarray:
    """float32 `[.., m, p]`: the scale of each weight."""
    rows = np.arange(packed.spec.shape[-2]) // packed.spec.group_size
    return packed.arrays.scales.astype(np.float32)[..., rows, :]


def numpy_dequantize(packed: Packed, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (numpy_codes(packed).astype(np.float32) * numpy_scales(packed)).astype(dtype)


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@st.composite
def layouts(draw):
    format = draw(st.sampled_from(FORMATS))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 41)), draw(st.integers(1, 9)))
    return PackedSpec(shape, format, ROWS_PER_BYTE[format] * draw(st.integers(1, 12)))


# algorithms.md section 4.6: groups of 256, 128 and 32.
RMS_ERRORS = {"int8": (0.0069, 0.0064, 0.0053), "int6": (0.028, 0.026, 0.022), "int4": (0.127, 0.118, 0.098)}


@pytest.mark.parametrize("format", FORMATS)
def test_relative_rms_error_on_gaussian_weights_is_that_of_the_table(format):
    w = gaussian((4096, 256))
    for group_size, expected in zip((256, 128, 32), RMS_ERRORS[format], strict=True):
        packed = quantize(w, format, group_size)
        error = np.asarray(unpack(packed.arrays, packed.spec, np.float32)) - w
        assert np.sqrt(np.mean(error**2) / np.mean(w**2)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_is_within_half_a_scale(format, dtype):
    """And within absmax / (2 qmax) (1 + 2^-8): what rounding the scale to bfloat16 adds."""
    w = gaussian((2, 300, 40), dtype, stddev=1.0)
    packed = quantize(w, format, 60)
    error = np.abs(numpy_dequantize(packed, np.float64) - w.astype(np.float64))
    assert np.all(error <= numpy_scales(packed) / 2 * (1 + 2.0**-15))
    absmax = np.abs(w.astype(np.float64)).reshape(2, 5, 60, 40).max(axis=2, keepdims=True)
    bound = absmax / (2 * (2 ** (BITS[format] - 1) - 1)) * (1 + 2.0**-8) * (1 + 2.0**-15)
    assert np.all(error.reshape(2, 5, 60, 40) <= bound)


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_rounded_down_clips_no_weight_by_more_than_half_a_scale(format):
    """Every significand of float32 that ends a group, in a single column each."""
    largest_code = 2 ** (BITS[format] - 1) - 1
    w = np.stack([np.linspace(1, 2, 20_001, dtype=np.float32) * sign * largest_code for sign in (1, -1, 1, -1)])
    packed = quantize(w, format, 4)
    error = np.abs(numpy_dequantize(packed, np.float64) - w)
    assert np.all(error <= numpy_scales(packed) / 2 * (1 + 2.0**-15))
    assert np.abs(numpy_codes(packed)).min() == largest_code


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-127, 2.0**-126, 1e-30, 1e-7, 1.0, 1e7, 2.0**119])
@pytest.mark.parametrize("format", FORMATS)
def test_the_error_bound_holds_over_the_range_of_float32(format, scale):
    """float16 scales would overflow or vanish here. No value is a subnormal, which a device would flush."""
    w = gaussian((64, 16), np.float64, stddev=20.0) * scale
    packed = quantize(w, format, 32)
    value = numpy_dequantize(packed, np.float32)
    assert np.all(np.abs(value - w) <= numpy_scales(packed) / 2 * (1 + 2.0**-15))
    assert np.all((value == 0) | (np.abs(value) >= 2.0**-126))
    assert_same_bits(unpack(packed.arrays, packed.spec, np.float32), value)


@hypothesis.given(layouts(), st.integers(0, 2**32 - 1))
def test_representable_weights_come_back_exactly(spec, seed):
    rng = np.random.default_rng(seed)
    largest_code = 2 ** (BITS[spec.format] - 1) - 1
    codes = rng.integers(-largest_code, largest_code + 1, spec.shape)
    codes[..., :: spec.group_size, :] = largest_code * rng.choice([-1, 1], codes[..., :: spec.group_size, :].shape)
    groups = np.arange(spec.shape[-2]) // spec.group_size
    scales = np.exp(rng.normal(0, 8, (*spec.shape[:-2], groups[-1] + 1, spec.shape[-1]))).astype(BFLOAT16)
    w = codes.astype(np.float32) * scales.astype(np.float32)[..., groups, :]
    packed = quantize(w, spec.format, spec.group_size)
    assert_same_bits(packed.arrays.scales, scales)
    np.testing.assert_array_equal(numpy_codes(packed), codes)
    np.testing.assert_array_equal(numpy_dequantize(packed, np.float32), w)


@hypothesis.settings(max_examples=25)  # each compiles
@hypothesis.given(layouts(), st.sampled_from([np.float32, np.float16, BFLOAT16]), st.integers(0, 2**32 - 1))
def test_host_and_device_agree_bit_for_bit_whatever_the_shape(spec, dtype, seed):
    """NumPy's own formula, and `jit` from the bytes on; the arrays survive their flat bytes, whose number is as stated."""
    packed = quantize(
        np.random.default_rng(seed).normal(0, 0.02, spec.shape).astype(dtype), spec.format, spec.group_size
    )
    assert packed.spec == spec
    flat = to_bytes(packed)
    assert flat.dtype == np.uint8
    assert flat.shape == (num_bytes(spec),)
    arrays, values = from_bytes_to_values(flat, spec)
    assert isinstance(arrays, PackedArrays)
    for found, expected in zip(jax.tree.leaves(arrays), jax.tree.leaves(packed.arrays), strict=True):
        assert_same_bits(found, expected)
    for value, target in zip(values, TARGETS, strict=True):
        assert_same_bits(value, numpy_dequantize(packed, target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_dequantization_is_the_same_without_jit(format, target):
    packed = quantize(gaussian((2, 131, 5)), format)
    assert_same_bits(dequantize(packed.arrays, packed.spec, target), numpy_dequantize(packed, target))
    assert_same_bits(unpack(packed.arrays, packed.spec, target), numpy_dequantize(packed, target))


@pytest.mark.parametrize("format", FORMATS)
def test_a_group_of_zeros_has_scale_one(format):
    w = gaussian((256, 3))
    w[128:, 1] = 0
    packed = quantize(w, format, 128)
    assert packed.arrays.scales[1, 1] == 1
    assert np.all(np.asarray(unpack(packed.arrays, packed.spec, np.float32))[128:, 1] == 0)


def test_codes_round_half_to_even():
    w = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5], [-2.5]])
    assert numpy_codes(quantize(w, "int8")).ravel().tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_all_64_codes_of_int6():
    """value = ((hi4 << 2 | lo2) - 32) * scale, the code -32 included, which `quantize` never makes."""
    stored = np.arange(64, dtype=np.uint8)
    high, low = (stored >> 2).reshape(32, 2), (stored & 3).reshape(16, 4)
    planes = (
        (high[:, 0] | high[:, 1] << 4)[:, None],
        (low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6)[:, None],
    )
    arrays = PackedArrays(planes, np.full((1, 1), 0.25, BFLOAT16))
    value = unpack(arrays, PackedSpec((64, 1), "int6", 64), np.float32)
    assert np.asarray(value).ravel().tolist() == [(code - 32) * 0.25 for code in range(64)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_that_quantize_makes_survives(format):
    largest_code = 2 ** (BITS[format] - 1) - 1
    w = np.tile(np.arange(-largest_code, largest_code + 1, dtype=np.float32)[:, None], (1, 2))
    packed = quantize(w, format, 256)
    np.testing.assert_array_equal(unpack(packed.arrays, packed.spec, np.float32), w)


def test_packed_sizes_are_those_of_the_table():
    """algorithms.md section 4.6: int8 1.016, int6 0.766, int4 0.531 bytes per weight, scales included."""
    for format, expected in {"int8": 1 + 2 / 128, "int6": 0.75 + 2 / 128, "int4": 0.5 + 2 / 64}.items():
        packed = quantize(gaussian((2, 256, 24), BFLOAT16), format)
        assert sum(plane.nbytes for plane in packed.arrays.planes) == 2 * 256 * 24 * BITS[format] / 8
        assert quantization.bytes_per_parameter(packed.spec) == expected
        assert len(to_bytes(packed)) == num_bytes(packed.spec) == 2 * 256 * 24 * expected


def test_rows_that_fill_no_byte_are_padded_and_the_last_group_is_shorter():
    w = gaussian((2, 131, 5))
    for format, planes in {"int8": [131], "int6": [66, 33], "int4": [66]}.items():
        packed = quantize(w, format, 64)
        assert [plane.shape for plane in packed.arrays.planes] == [(2, rows, 5) for rows in planes]
        assert packed.arrays.scales.shape == (2, 3, 5)
        assert num_bytes(packed.spec) == 2 * 5 * (sum(planes) + 2 * 3)


def test_a_block_travels_as_one_bucket(key):
    """Leaves of several formats at odd offsets of one uint8 array, unpacked in one compiled function and used there."""
    leaves = {"up": quantize(gaussian((5, 7)), "int4"), "down": quantize(gaussian((7, 5)), "int6", 4)}
    leaves["head"] = quantize(gaussian((5, 3)), "int8")
    bucket = np.concatenate([to_bytes(leaf) for leaf in leaves.values()])
    specs = tuple((name, leaf.spec) for name, leaf in leaves.items())
    assert num_bytes(leaves["up"].spec) % 2  # so that the bfloat16 scales of the next are not aligned

    @functools.partial(jax.jit, static_argnums=1)
    def apply(bucket, specs, x):
        weights, start = {}, 0
        for name, spec in specs:
            weights[name] = dequantize(from_bytes(bucket[start : start + num_bytes(spec)], spec), spec, jnp.float32)
            start += num_bytes(spec)
        return weights, x @ weights["up"] @ weights["down"] @ weights["head"]

    weights, output = apply(bucket, specs, jax.random.normal(key, (2, 5)))
    assert output.shape == (2, 3)
    for name, leaf in leaves.items():
        assert_same_bits(weights[name], numpy_dequantize(leaf, np.float32))


def test_packed_is_a_pytree_whose_spec_is_static():
    packed = quantize(gaussian((2, 12, 5)), "int6")
    assert [leaf.dtype.name for leaf in jax.tree.leaves(packed)] == ["uint8", "uint8", "bfloat16"]
    moved = jax.device_put(packed)
    assert hash(moved.spec) == hash(packed.spec)
    assert_same_bits(to_bytes(moved), to_bytes(packed))
    value = jax.jit(lambda packed: dequantize(packed.arrays, packed.spec))(moved)
    assert_same_bits(value, numpy_dequantize(packed, BFLOAT16))


@pytest.mark.parametrize("format", FORMATS)
def test_a_consumer_that_casts_up_sees_the_rounded_value(format):
    """XLA must not drop the rounding to bfloat16: a weight kept and a weight fused into its use are then the same."""
    packed = quantize(gaussian((96, 8)), format)
    wide = jax.jit(lambda arrays: dequantize(arrays, packed.spec).astype(jnp.float32))(packed.arrays)
    assert_same_bits(wide, numpy_dequantize(packed, BFLOAT16).astype(np.float32))


@pytest.mark.parametrize("tile_size", [1, 30, 64, 1000])
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_change_nothing(format, tile_size, monkeypatch):
    w = gaussian((2, 41, 7))
    whole = to_bytes(quantize(w, format, 8))
    monkeypatch.setattr("jaxdp.quantization.packing._TILE_SIZE", tile_size)
    assert_same_bits(to_bytes(quantize(w, format, 8)), whole)


def test_views_are_quantized_as_their_copies():
    w = gaussian((3, 50, 20))
    for view in (w.transpose(0, 2, 1), w[:, ::-2], w[1, :, ::3], np.asfortranarray(w[0])):
        assert_same_bits(to_bytes(quantize(view, "int6")), to_bytes(quantize(view.copy(), "int6")))


@pytest.mark.parametrize("shape", [(4096, 4096), (1, 2**24), (64, 2**18), (2**24, 1)])
def test_memory_beyond_the_result_is_bounded(shape):
    """In float32 these weights are 64 MiB."""
    w = np.ones(shape, BFLOAT16)
    for format in FORMATS:
        tracemalloc.start()
        packed = quantize(w, format)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak - sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) < 24 * 2**20


@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (1e39, "1e\\+39"), (-2e38, "-2e\\+38")]
)
def test_a_weight_that_is_not_finite_is_named(value, shown, monkeypatch):
    monkeypatch.setattr("jaxdp.quantization.packing._TILE_SIZE", 16)
    w = gaussian((2, 41, 7), np.float64)
    w[1, 37, 5] = value
    with pytest.raises(ValueError, match=rf"w\[1, 37, 5\] is {shown}; .* Repair the checkpoint"):
        quantize(w, "int4", 8)


def test_the_largest_weights_stay_finite():
    w = np.full((4, 1), 2.0**127)
    for format in FORMATS:
        packed = quantize(w, format)
        assert np.all(np.isfinite(np.asarray(unpack(packed.arrays, packed.spec, BFLOAT16)).astype(np.float32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((4, 4), np.int32), "int8"), "w has dtype int32; only floating"),
        ((np.ones((4, 4), np.complex64), "int8"), "w has dtype complex64; only floating"),
        ((np.ones(4), "int8"), r"shape \(4,\) .* keep vectors and scalars .* in bfloat16"),
        ((np.ones((4, 0)), "int8"), r"shape \(4, 0\) .* leave out empty arrays"),
        ((np.ones((4, 4)), "int5"), "format must be one of 'int8', 'int6', 'int4'; got 'int5'"),
        ((np.ones((4, 4)), "int8", 0), "group_size must be at least 1, got 0"),
        ((np.ones((4, 4)), "int4", -64), "group_size must be at least 1, got -64"),
        (
            (np.ones((4, 4)), "int4", 33),
            "group_size must be a multiple of 2 for int4, which packs 2 rows in a byte; got 33",
        ),
        (
            (np.ones((4, 4)), "int6", 34),
            "group_size must be a multiple of 4 for int6, which packs 4 rows in a byte; got 34",
        ),
    ],
)
def test_wrong_arguments_are_named_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)


def test_arrays_and_bytes_of_another_spec_are_refused():
    packed = quantize(gaussian((12, 5)), "int6")
    other = PackedSpec((12, 5), "int4", 64)
    with pytest.raises(
        ValueError, match=r"uint8\[6, 5\], bfloat16\[1, 5\]; got uint8\[6, 5\], uint8\[3, 5\], bfloat16"
    ):
        dequantize(packed.arrays, other)
    with pytest.raises(ValueError, match=r"flat must be uint8\[40\] for .*, got uint8\[55\]; make it with to_bytes"):
        from_bytes(to_bytes(packed), other)
    with pytest.raises(ValueError, match=r"got int8\[55\]"):
        from_bytes(to_bytes(packed).view(np.int8), packed.spec)
    with pytest.raises(ValueError, match=r"dtype must be floating, such as jnp\.bfloat16, got .*int8"):
        dequantize(packed.arrays, packed.spec, jnp.int8)


def test_a_spec_read_from_a_file_equals_its_original():
    assert hash(PackedSpec([4, 4], "int8", 128)) == hash(PackedSpec((4, 4), "int8", 128))
