"""The pieces compose to the mechanism's clipped sum, on a dense layer."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
import pallas_kernels


@pytest.mark.parametrize(("batch", "length", "width", "out"), [(4, 1, 3, 2), (5, 42, 7, 9), (3, 64, 16, 33)])
@pytest.mark.parametrize("l2_clip_norm", [0.5, 1e4])
def test_norms_factors_and_sum_are_clipped_grad_of_a_dense_layer(batch, length, width, out, l2_clip_norm):
    rng = np.random.default_rng(length)
    x, g = (jnp.asarray(rng.normal(size=(batch, length, d)), jnp.float32) for d in (width, out))
    x = x.at[0, 0, 0].set(jnp.nan)
    is_padding = jnp.arange(batch) == batch - 1

    def loss(w, example):  # the cotangent of x @ w is g
        return jnp.sum((example[0] @ w) * example[1])

    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(l2_clip_norm))
    expected, not_private = grad_fn(jnp.zeros((width, out)), (x, g), is_padding_example=is_padding)

    norms = jnp.sqrt(pallas_kernels.gram_norms(x, g))
    chex.assert_trees_all_close(norms, jnp.sqrt(pallas_kernels.wgrad_norms(x, g)), rtol=1e-5)
    keep = ~is_padding & jnp.isfinite(norms)
    factors = jnp.where(keep, jnp.minimum(1.0, l2_clip_norm / norms), 0.0)
    total = pallas_kernels.clip_noise_dense(x, g, factors)
    chex.assert_trees_all_close(total, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))
    chex.assert_trees_all_close(norms[1:-1], not_private.l2_norms[1:-1, 0], rtol=1e-5)
