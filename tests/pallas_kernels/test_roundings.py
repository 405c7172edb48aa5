"""Laws of `roundings`: no result is off by more, and no chain is as long as a wide layer."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import support

UNIT = 2.0**-23
needs_mosaic = pytest.mark.skipif(support.why_not_here("mosaic_gpu_interpret") is not None, reason="needs jax 0.11")


def one_sided(num_tokens, width, out):
    """Equal terms round one way, term after term."""
    x = jnp.full((1, num_tokens, width), 1.4115597, jnp.bfloat16)
    g = jnp.full((1, num_tokens, out), 1.2936946, jnp.bfloat16)
    return x, g


@needs_mosaic
def test_no_result_is_off_by_more_than_its_roundings(implementation):
    if implementation == "xla":
        pytest.skip("the order of XLA's sums is not known")
    x, g = one_sided(120, 130, 70)
    gradient = np.einsum("btd,btp->bdp", np.float64(x), np.float64(g))[0]
    scale = np.linalg.norm(np.float64(x)) * np.linalg.norm(np.float64(g))
    norm = np.linalg.norm(gradient)

    def allowed(kernel):
        return pallas_kernels.roundings(kernel, x.shape, g.shape) * UNIT

    square = float(pallas_kernels.gram_norms(x, g, implementation=implementation)[0])
    assert abs(square - norm**2) <= allowed("gram_norms") * scale**2
    formed = math.sqrt(float(pallas_kernels.wgrad_norms(x, g, implementation=implementation)[0]))
    assert abs(formed - norm) <= allowed("wgrad_norms") * scale
    factor = jnp.float32(0.37)
    total = pallas_kernels.clip_noise_dense(x, g, factor[None], implementation=implementation)
    error = np.linalg.norm(np.float64(total) - np.float64(factor) * gradient)
    assert error <= allowed("clip_noise_dense") * float(factor) * scale


@needs_mosaic
def test_the_chains_of_a_gram_are_shorter_than_its_rows():
    """S4d: one accumulator for a row of 4096 would have to be charged 4096 roundings for each operand."""
    shape = (8, 512, 4096)
    assert pallas_kernels.roundings("gram_norms", shape, shape) < 4096 / 8
    longer = pallas_kernels.roundings("gram_norms", (8, 2048, 4096), (8, 2048, 4096))
    assert longer > pallas_kernels.roundings("gram_norms", shape, shape)  # more tiles to sum


@needs_mosaic
def test_formed_gradients_round_once_for_each_token_and_sums_once_for_each_step():
    shapes = (4, 1000, 70), (4, 1000, 90)
    assert pallas_kernels.roundings("wgrad_norms", *shapes) > 1000
    assert pallas_kernels.roundings("clip_noise_dense", *shapes) < 1000 / 8
    assert pallas_kernels.roundings("clip_noise_dense", (4, 1, 7), (4, 1, 9)) == 3


def test_roundings_of_no_kernel_are_an_error():
    with pytest.raises(ValueError, match="kernel='norms' is not one of"):
        pallas_kernels.roundings("norms", (1, 1, 1), (1, 1, 1))
