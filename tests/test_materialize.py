"""S4e: the wall between what computes a value and all that reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp._materialize import materialize, materialize_one, zero_rows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("first", [1.0, np.nan, -np.inf])
def test_it_returns_the_same_bits(dtype, first):
    x = jnp.asarray([first, 2.0, np.nan, -0.0, np.inf], dtype)
    tree = {"x": x, "ids": jnp.arange(3), "empty": jnp.zeros((0, 2)), "y": -x}
    found = jax.jit(materialize)(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def test_derivatives_pass_through():
    value, grad = jax.value_and_grad(lambda x: jnp.sum(materialize(x * x)))(jnp.arange(3.0))
    assert value == 5
    np.testing.assert_array_equal(grad, [0, 2, 4])
    _, tangent = jax.jvp(lambda x: jax.vmap(materialize_one)(3 * x), (jnp.ones((2, 2)),), (jnp.ones((2, 2)),))
    np.testing.assert_array_equal(tangent, np.full((2, 2), 3.0))


@pytest.mark.parametrize("rows", [8, 2**10])  # a copy, and in place
def test_rows_that_are_not_kept_become_zero(rows):
    keep = np.arange(rows) % 3 > 0
    x = np.where(keep[:, None], 1.5, np.nan).astype(np.float32) * np.ones((rows, 300), np.float32)
    np.testing.assert_array_equal(jax.jit(zero_rows)(x, keep), np.where(keep[:, None], 1.5, 0.0) * np.ones((rows, 300)))


def test_large_gradients_are_zeroed_in_place():
    """A second array of the size of all gradients would double the memory of `method="vmap"`."""
    rows, size = 16, 2**17

    def total(x, scale, keep):
        x = materialize(x * scale)
        keep &= jnp.isfinite(jnp.sum(jnp.square(x), axis=1))
        return jnp.ones(rows) @ zero_rows(x, keep)

    shapes = jax.ShapeDtypeStruct((rows, size), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(total).lower(*shapes, jax.ShapeDtypeStruct((rows,), bool)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * 4 * rows * size
