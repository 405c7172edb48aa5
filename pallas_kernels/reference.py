"""Definitions in plain JAX of what the dense-layer kernels compute: the law that every kernel is tested against.

A dense layer y = x @ w sees, for example b, inputs X_b `[T, D]` and output cotangents G_b `[T, P]`; its per-example gradient
is M_b = X_b^T G_b `[D, P]`. The definitions form M_b for every example; a kernel must not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def _per_example_gradients(x: jax.Array, g: jax.Array) -> jax.Array:  # [B, T, D], [B, T, P] -> [B, D, P]
    wide = x.astype(jnp.float32), g.astype(jnp.float32)
    return jnp.einsum("btd,btp->bdp", *wide, precision=lax.Precision.HIGHEST)


def dense_norms(x: jax.Array, g: jax.Array) -> jax.Array:
    """||X_b^T G_b||_F for each example, `[B]` float32.

    Args:
        x: Inputs of the layer, `[B, T, D]`.
        g: Cotangents of its output, `[B, T, P]`.
    """
    return jnp.sqrt(jnp.sum(jnp.square(_per_example_gradients(x, g)), axis=(1, 2)))


def dense_clip_and_sum(x: jax.Array, g: jax.Array, *, l2_clip_norm: float, is_padding_example: jax.Array) -> jax.Array:
    """sum_b min(1, C / ||M_b||_F) M_b over the examples that are not padding, `[D, P]` float32, without noise.

    Noise is added once a logical step, after microbatches and devices have been summed (S7), so it is no part of this.
    An example with a non-finite entry contributes zero (S9).

    Args:
        x: Inputs of the layer, `[B, T, D]`.
        g: Cotangents of its output, `[B, T, P]`.
        l2_clip_norm: C > 0.
        is_padding_example: Bool `[B]`.
    """
    gradients = _per_example_gradients(x, g)
    norms = jnp.sqrt(jnp.sum(jnp.square(gradients), axis=(1, 2)))
    keep = ~is_padding_example & jnp.isfinite(norms)
    factors = jnp.where(keep, jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)), 0.0)
    kept = jnp.where(keep[:, None, None], gradients, 0.0)
    return jnp.einsum("b,bdp->dp", factors, kept, precision=lax.Precision.HIGHEST)
