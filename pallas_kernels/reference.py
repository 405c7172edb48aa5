"""The definitions in plain JAX of what the dense-layer kernels compute; they run on every device and every supported JAX.

A dense layer y = x @ w sees, for example b, inputs X_b `[T, D]` and output cotangents G_b `[T, P]`; its per-example gradient
is M_b = X_b^T G_b `[D, P]`. Arguments and guarantees are in `pallas_kernels.api`, which also checks them. Products are exact
or at the highest precision, sums are in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import counter_normal


def gram_norms(x: jax.Array, g: jax.Array) -> jax.Array:
    """sum_{t,s} <x_t, x_s> <g_t, g_s> by example; two arrays `[B, T, T]`."""
    gram_x = _product("btd,bsd->bts", x, x)
    gram_g = _product("btp,bsp->bts", g, g)
    return jnp.maximum(jnp.sum(gram_x * gram_g, axis=(1, 2)), 0.0)  # S4d: rounding may leave a tiny norm below zero


def wgrad_norms(x: jax.Array, g: jax.Array, *, store: bool, dtype: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
    """||X_b^T G_b||^2 by example, of the gradients as `dtype` stores them; one array `[B, D, P]`."""
    gradients = _product("btd,btp->bdp", x, g)
    if not store:
        return jnp.sum(jnp.square(gradients), axis=(1, 2))
    stored = gradients.astype(dtype)
    return jnp.sum(jnp.square(stored.astype(jnp.float32)), axis=(1, 2)), stored  # S4b: the norm of what is stored


def clip_noise_dense(
    x: jax.Array,
    g: jax.Array,
    factors: jax.Array,
    *,
    accumulator: jax.Array | None,
    noise_stddev: jax.Array | None,
    key_data: jax.Array | None,
) -> jax.Array:
    """accumulator + sum_b factors_b X_b^T G_b + noise_stddev z, one example after the other."""

    def add(total, example):
        x_b, g_b, factor = example
        scaled = factor * _product("td,tp->dp", x_b, g_b)  # S4c: the factor meets the float32 gradient, not an operand
        return jnp.where(factor != 0.0, total + scaled, total), None  # S9: 0 * inf is NaN, hence no product

    shape = (x.shape[2], g.shape[2])
    total, _ = lax.scan(add, jnp.zeros(shape, jnp.float32) if accumulator is None else accumulator, (x, g, factors))
    if noise_stddev is None or key_data is None:
        return total
    return total + noise_stddev * counter_normal.standard_normal(key_data, shape)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
