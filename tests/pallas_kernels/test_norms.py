"""Laws of the per-example norms, for both routes and every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

SHAPES = [(2, 1, 64, 65), (3, 42, 7, 9), (2, 200, 129, 257)]  # B, T, D, P


def scale_of(x, g):
    """|X|^T |G| by example, summed up as a norm: the size of the terms that cancel, so the scale of rounding."""
    sizes = np.einsum("btd,btp->bdp", np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(g, np.float64)))
    return np.sqrt(np.sum(sizes**2, axis=(1, 2)))


def test_the_requested_implementation_is_the_one_that_runs(implementation, operands):
    x, g, _ = operands(*SHAPES[0])
    for kernel in ("gram_norms", "wgrad_norms", "clip_noise_dense"):
        assert pallas_kernels.chosen_implementation(kernel, x, g, implementation) == implementation


@pytest.mark.parametrize("route", ["gram_norms", "wgrad_norms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_those_of_float64(route, shape, implementation, operands):
    x, g, gradients = operands(*shape)
    norms = getattr(pallas_kernels, route)(x, g, implementation=implementation)
    assert norms.shape == shape[:1]
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.sum(gradients**2, axis=(1, 2)), rtol=3e-6)


@pytest.mark.parametrize("route", ["gram_norms", "wgrad_norms"])
def test_float16_works_too(route, implementation, operands):
    x, g, gradients = operands(2, 77, 66, 67, dtype=jnp.float16)
    norms = getattr(pallas_kernels, route)(x, g, implementation=implementation)
    np.testing.assert_allclose(norms, np.sum(gradients**2, axis=(1, 2)), rtol=3e-6)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("route", ["gram_norms", "wgrad_norms"])
def test_float32_and_mixed_operands_run_on_xla(route, dtypes, operands):
    x, g, _ = operands(2, 42, 33, 20, dtype=jnp.float32)
    x, g = x.astype(dtypes[0]), g.astype(dtypes[1])
    norms = getattr(pallas_kernels, route)(x, g)
    exact = np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64))
    np.testing.assert_allclose(norms, np.sum(exact**2, axis=(1, 2)), rtol=3e-6)


def cancelling(num_tokens=200, width=70, out=90):
    """Equal inputs under cotangents of alternating sign, and a small rest: the gradient is far below its terms."""
    rng = np.random.default_rng(3)
    row, column = rng.normal(size=(2, 1, width)), rng.normal(size=(2, 1, out))
    signs = np.where(np.arange(num_tokens) % 2, 1.0, -1.0)[None, :, None]
    x = np.broadcast_to(row, (2, num_tokens, width)).copy()
    g = signs * column
    x[:, 0] += 0.01 * rng.normal(size=(2, width))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)


def test_formed_gradients_keep_their_norm_under_cancellation(implementation):
    x, g = cancelling()
    exact = np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64))
    norms = np.sqrt(np.asarray(pallas_kernels.wgrad_norms(x, g, implementation=implementation), np.float64))
    expected = np.sqrt(np.sum(exact**2, axis=(1, 2)))
    assert np.all(expected < 0.01 * scale_of(x, g))  # the example does cancel
    np.testing.assert_allclose(norms, expected, atol=1e-6 * scale_of(x, g).max())


def test_gram_norms_are_not_negative_and_err_on_the_scale_of_their_terms(implementation):
    """S4d: the error of a squared norm scales with ||X||^2 ||G||^2, whatever the norm; never below zero."""
    x, g = cancelling()
    exact = np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64))
    norms = np.asarray(pallas_kernels.gram_norms(x, g, implementation=implementation), np.float64)
    sizes = [np.sum(np.asarray(operand, np.float64) ** 2, axis=(1, 2)) for operand in (x, g)]
    np.testing.assert_array_less(np.abs(norms - np.sum(exact**2, axis=(1, 2))), 1e-6 * sizes[0] * sizes[1])
    opposite = jnp.concatenate([g[:, :1], -g[:, :1]], axis=1)  # exactly zero: x repeated, g and -g
    repeated = jnp.concatenate([x[:, 1:2], x[:, 1:2]], axis=1)
    zero = np.asarray(pallas_kernels.gram_norms(repeated, opposite, implementation=implementation))
    assert np.all(zero >= 0)
    assert np.all(zero <= 1e-6 * np.asarray(sizes[0]) * np.asarray(sizes[1]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_norm_is_the_norm_of_the_stored_gradient(dtype, implementation, operands):
    """S4b: the stored tensor is what will be summed, so its rounding belongs into the norm."""
    x, g, gradients = operands(2, 77, 100, 70)
    norms, stored = pallas_kernels.wgrad_norms(x, g, store=True, dtype=dtype, implementation=implementation)
    assert stored.dtype == dtype
    assert stored.shape == gradients.shape
    np.testing.assert_allclose(
        np.asarray(stored, np.float64), gradients, rtol=float(jnp.finfo(dtype).eps), atol=1e-6 * scale_of(x, g).max()
    )
    kept = np.sum(np.asarray(stored, np.float64) ** 2, axis=(1, 2))
    np.testing.assert_allclose(norms, kept, rtol=1e-6)
    if dtype == jnp.bfloat16:  # and the two tensors do differ
        assert np.max(np.abs(kept / np.sum(gradients**2, axis=(1, 2)) - 1)) > 1e-6


def test_a_non_finite_example_spoils_its_own_norm_only(implementation, operands):
    x, g, gradients = operands(3, 5, 9, 70)
    x = x.at[1, 2, 3].set(jnp.nan)
    for route in (pallas_kernels.gram_norms, pallas_kernels.wgrad_norms):
        norms = np.asarray(route(x, g, implementation=implementation))
        assert np.isnan(norms[1])
        np.testing.assert_allclose(norms[[0, 2]], np.sum(gradients**2, axis=(1, 2))[[0, 2]], rtol=3e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2)])
def test_an_empty_batch_and_an_empty_sequence_have_zero_norms(shape):
    x, g = jnp.zeros(shape[:3]), jnp.zeros((*shape[:2], shape[3]))
    assert pallas_kernels.gram_norms(x, g).tolist() == [0.0] * shape[0]
    assert pallas_kernels.wgrad_norms(x, g).tolist() == [0.0] * shape[0]
