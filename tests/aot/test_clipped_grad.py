"""Clipped sums compiled for an H200: by kernels, through scan, checkpoint and a second backward pass; and of one buffer."""

import jax
import jax.numpy as jnp
import pytest

import jaxdp
from jaxdp import _materialize
from jaxdp.gradients import plan
from tests.aot import h200
from tests.compiled_program import faults
from tests.gradients.test_zoo import METHODS, strictness, transformed
from tests.gradients.zoo import CASES

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


def structure(name, method):
    case = CASES[name]
    policy = jaxdp.per_layer(1.0) if method == "per_layer" else jaxdp.flat(1.0)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.params, case.batch))
    with strictness(case):
        compiled = h200.compile_for_h200(lambda *args: transformed(case, policy, method)(*args), *arguments)
    return faults(compiled.text())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("mlp_of_one_token", method) for method in ("vmap", *METHODS)),
        ("scan_over_layers_of_checkpoints", "two_pass"),
        ("embedding_used_twice", "book_keeping"),
        ("embedding_tied_to_the_head", "two_pass"),
    ],
)
def test_every_sum_reads_the_buffers_that_a_norm_was_taken_of(name, method):
    """S4e on a GPU, where an optimization barrier is the wall."""
    assert structure(name, method) == []


@pytest.mark.usefixtures("compiler")
def test_without_a_wall_gradients_are_computed_in_several_kernels(monkeypatch):
    monkeypatch.setattr(_materialize, "_materialize_all", lambda arrays: list(arrays))
    assert structure("mlp_of_one_token", "vmap") != []
