"""Laws of the clipped sum with noise: S4c, S7, S9, and noise that depends on the key and the position alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import blocks, counter_normal

SHAPES = [(2, 1, 64, 65), (3, 42, 7, 9), (2, 77, 129, 257)]  # B, T, D, P


def random(shape, seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_the_definition_in_float64(shape, implementation, operands, key_data):
    x, g, gradients = operands(*shape)
    factors, accumulator = jnp.abs(random(shape[:1])), random(shape[2:])
    result = pallas_kernels.clip_noise_dense(
        x, g, factors, accumulator=accumulator, noise_stddev=3.0, key_data=key_data, implementation=implementation
    )
    assert result.dtype == jnp.float32
    z = np.asarray(counter_normal.standard_normal(key_data, shape[2:]), np.float64)
    expected = np.asarray(accumulator, np.float64) + np.einsum("b,bdp->dp", np.float64(factors), gradients) + 3.0 * z
    np.testing.assert_allclose(result, expected, atol=2e-6 * np.abs(gradients).max() * shape[0] + 2e-5)


def test_accumulation_alone_adds_no_noise(implementation, operands):
    x, g, gradients = operands(2, 10, 20, 30)
    result = pallas_kernels.clip_noise_dense(x, g, jnp.asarray([0.5, 2.0]), implementation=implementation)
    np.testing.assert_allclose(result, 0.5 * gradients[0] + 2 * gradients[1], atol=1e-5)


def test_microbatches_with_noise_at_the_end_are_one_batch_with_noise(implementation, operands, key_data):
    """S7: one draw for one logical step, however it is cut."""
    x, g, gradients = operands(4, 20, 70, 40)
    factors = jnp.abs(random((4,)))
    noise = {"noise_stddev": 2.0, "key_data": key_data, "implementation": implementation}
    whole = pallas_kernels.clip_noise_dense(x, g, factors, **noise)
    half = pallas_kernels.clip_noise_dense(x[:2], g[:2], factors[:2], implementation=implementation)
    cut = pallas_kernels.clip_noise_dense(x[2:], g[2:], factors[2:], accumulator=half, **noise)
    np.testing.assert_allclose(cut, whole, atol=2e-6 * np.abs(gradients).max() * 4)


# The interpreter multiplies in NumPy, which warns of the infinities that the law is about.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_a_factor_of_zero_leaves_the_example_out_whatever_it_holds(implementation, operands):
    """S9: exactly, so the others' sum has the same bits as without it."""
    x, g, _ = operands(3, 70, 20, 30)
    factors = jnp.asarray([0.5, 0.0, 2.0])
    clean = pallas_kernels.clip_noise_dense(x, g, factors, implementation=implementation)
    x, g = x.at[1].set(jnp.nan), g.at[1, 3].set(jnp.inf)
    poisoned = pallas_kernels.clip_noise_dense(x, g, factors, implementation=implementation)
    assert np.all(np.isfinite(clean))
    assert np.array_equal(clean, poisoned)


def test_all_examples_left_out_give_the_noise_alone(implementation, operands, key_data):
    x, g, _ = operands(2, 5, 20, 30)
    result = pallas_kernels.clip_noise_dense(
        x, g, jnp.zeros(2), noise_stddev=1.0, key_data=key_data, implementation=implementation
    )
    np.testing.assert_allclose(result, counter_normal.standard_normal(key_data, (20, 30)), rtol=2e-6)


def test_a_clipped_example_that_cancels_stays_within_its_bound(implementation):
    """S4c: rounding c G would release a multiple of the bound; a factor on the float32 gradient does not."""
    rng = np.random.default_rng(0)
    num_tokens, width, out = 512, 64, 64
    x = jnp.asarray(np.repeat(rng.normal(size=(1, num_tokens // 2, width)), 2, axis=1), jnp.bfloat16)
    pairs = rng.normal(size=(1, num_tokens // 2, out))
    g = np.asarray(jnp.asarray(np.repeat(pairs, 2, axis=1), jnp.bfloat16), np.float64)
    g[:, 1::2] *= -1  # every token is taken back by the next, up to one unit in the last place
    g[:, ::16] *= 1 + 2.0**-7
    g = jnp.asarray(g, jnp.bfloat16)
    exact = np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64))
    factor = 0.37 / np.linalg.norm(exact)
    result = pallas_kernels.clip_noise_dense(x, g, jnp.asarray([factor], jnp.float32), implementation=implementation)
    assert np.linalg.norm(np.asarray(result, np.float64)) == pytest.approx(0.37, rel=1e-5)
    scaled = np.asarray((factor * g.astype(jnp.float32)).astype(jnp.bfloat16), np.float64)
    rounded = np.einsum("btd,btp->dp", np.asarray(x, np.float64), scaled)
    assert abs(np.linalg.norm(rounded) - 0.37) > 1e-3  # the trap is there


def test_the_random_bits_of_a_kernel_are_those_of_xla(implementation, key_data, monkeypatch):
    """Bit for bit: 12 bits of each word pass through float32 unchanged."""

    def exact(high, low):
        bits = (high >> jnp.uint32(20)) * jnp.uint32(4096) + (low >> jnp.uint32(20))
        return bits.astype(jnp.int32).astype(jnp.float32)

    monkeypatch.setattr(counter_normal, "normal_of_bits", exact)
    zeros = jnp.zeros((1, 3, 130), jnp.bfloat16), jnp.zeros((1, 3, 77), jnp.bfloat16)
    result = pallas_kernels.clip_noise_dense(
        *zeros, jnp.ones(1), noise_stddev=1.0, key_data=key_data, implementation=implementation
    )
    assert np.array_equal(result, exact(*counter_normal.bits(key_data, (130, 77))))


def test_block_sizes_change_neither_noise_nor_sum(implementation, operands, key_data, monkeypatch):
    if implementation == "xla":
        pytest.skip("XLA has no block sizes")
    x, g, gradients = operands(2, 40, 100, 200)
    call = {"noise_stddev": 1.0, "key_data": key_data, "implementation": implementation}
    before = pallas_kernels.clip_noise_dense(x, g, jnp.ones(2), **call)
    other = dataclasses.replace(blocks.SAFE["clip_noise_dense"], columns=64, depth=128, stages=2)
    monkeypatch.setattr(blocks, "SAFE", blocks.SAFE | {"clip_noise_dense": other})
    after = pallas_kernels.clip_noise_dense(x, g, jnp.ones(2), **call)
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(gradients).max())


def test_kernels_have_no_data_races(implementation, operands, key_data, monkeypatch):
    """The interpreter's vector clocks watch every access to shared memory."""
    if implementation != "mosaic_gpu_interpret":
        pytest.skip("only the interpreter can tell")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "InterpretGPUParams", functools.partial(plgpu.InterpretGPUParams, detect_races=True))
    x, g, gradients = operands(1, 130, 65, 70)
    norms = np.sum(gradients**2, axis=(1, 2))
    noise = {"accumulator": jnp.zeros((65, 70)), "noise_stddev": 1.0, "key_data": key_data}
    kernels = {
        "gram": lambda: pallas_kernels.gram_norms(x, g, implementation=implementation),
        "wgrad": lambda: pallas_kernels.wgrad_norms(x, g, store=True, implementation=implementation)[0],
        "sum": lambda: pallas_kernels.clip_noise_dense(x, g, jnp.ones(1), **noise, implementation=implementation),
    }
    for name, kernel in kernels.items():
        result = jax.block_until_ready(kernel())
        assert not gpu_callbacks.get_races().races_found, name
        if name != "sum":
            np.testing.assert_allclose(result, norms, rtol=3e-6)


def test_an_empty_batch_is_a_normal_step(key_data):
    result = pallas_kernels.clip_noise_dense(
        jnp.zeros((0, 3, 4)), jnp.zeros((0, 3, 5)), jnp.zeros(0), noise_stddev=2.0, key_data=key_data
    )
    np.testing.assert_allclose(result, 2.0 * counter_normal.standard_normal(key_data, (4, 5)), rtol=1e-6)


def test_the_stddev_may_be_traced(implementation, operands, key_data):
    x, g, _ = operands(1, 5, 20, 30)

    @jax.jit
    def noised(stddev):
        return pallas_kernels.clip_noise_dense(
            x, g, jnp.zeros(1), noise_stddev=stddev, key_data=key_data, implementation=implementation
        )

    np.testing.assert_allclose(noised(jnp.float32(2)), 2 * noised(jnp.float32(1)), rtol=2e-6)
