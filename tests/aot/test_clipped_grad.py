"""Clipped sums by kernels compile for an H200, through scan, checkpoint and a second backward pass."""

import jax
import jax.numpy as jnp
import pytest

import jaxdp
from jaxdp.gradients import plan
from tests.aot import h200

BATCH, LENGTH, WIDTH, LAYERS = 4, 128, 256, 2


def unrolled(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def scanned(params, x):
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params)
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("loss", "method", "route", "norm_tile"),
    [(unrolled, "book_keeping", "gram", "gram_tile"), (scanned, "two_pass", "direct", "wgrad_tile")],
)
def test_a_clipped_sum_by_kernels_compiles(loss, method, route, norm_tile, monkeypatch):
    monkeypatch.setattr(plan, "norm_route", lambda uses, rows: (route, False))  # the choice is for the CPU's rates
    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    params = (w,) * LAYERS if loss is unrolled else jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    batch = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.bfloat16)
    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0), method=method, implementation="mosaic_gpu")
    compiled = h200.compile_for_h200(lambda params, batch: grad_fn(params, batch)[0], params, batch)
    names = {kernel.name.partition("_mosaic")[0] for kernel in compiled.kernels}
    assert names == {"clip_noise_tile", norm_tile}
    assert all(kernel.spill_store_bytes == 0 for kernel in compiled.kernels)
