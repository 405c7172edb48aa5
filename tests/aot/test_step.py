"""Whole steps compiled for an H200: how much device memory they take, and which kernels are in them."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxdp
import pallas_kernels
from tests.aot import h200

BATCH, LENGTH, WIDTH, OUT = 16, 512, 768, 3072


def private_layer(x, g, total, key_data, *, implementation):
    """Norms, factors, and the last accumulation of one dense layer, clipped by itself."""
    norms = jnp.sqrt(pallas_kernels.gram_norms(x, g, implementation=implementation))
    factors = jnp.where(jnp.isfinite(norms), jnp.minimum(1.0, 1.0 / jnp.maximum(norms, 1e-30)), 0.0)
    return pallas_kernels.clip_noise_dense(
        x, g, factors, accumulator=total, noise_stddev=1.0, key_data=key_data, implementation=implementation
    )


@pytest.mark.usefixtures("compiler")
def test_a_private_dense_layer_takes_no_memory_beyond_its_operands():
    x, g = (jax.ShapeDtypeStruct((BATCH, LENGTH, size), jnp.bfloat16) for size in (WIDTH, OUT))
    total, key_data = jax.ShapeDtypeStruct((WIDTH, OUT), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    step = jax.jit(functools.partial(private_layer, implementation="mosaic_gpu"), donate_argnums=2)
    compiled = h200.compile_for_h200(step, x, g, total, key_data)
    assert [kernel.name.partition("_mosaic")[0] for kernel in compiled.kernels] == ["gram_tile", "clip_noise_tile"]
    assert compiled.alias_bytes == 4 * WIDTH * OUT  # the accumulator is updated in place, or copied once
    assert compiled.temp_bytes <= 4 * WIDTH * OUT + 2**20


@pytest.mark.usefixtures("compiler")
def test_the_definition_step_holds_one_gradient_per_example():
    """The measure of what ghost norms are to save: B gradients of the layer."""

    def loss(params, example):
        return jnp.sum(jnp.square(jnp.tanh(example @ params)))

    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0))
    compiled = h200.compile_for_h200(
        lambda params, batch: grad_fn(params, batch)[0],
        jax.ShapeDtypeStruct((WIDTH, OUT), jnp.float32),
        jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32),
    )
    assert compiled.temp_bytes >= 4 * BATCH * WIDTH * OUT
    assert compiled.host_temp_bytes == 0
    assert compiled.device_bytes > compiled.temp_bytes
