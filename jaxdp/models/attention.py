"""Causal self-attention with grouped heads, a sliding window and a cache of keys and values."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdp.models.layers import Linear, RMSNorm
from jaxdp.models.rotary import Rotary

#: Keys and values of the positions seen so far, of one block: `{"k": [S, K, P], "v": [S, K, P]}`; slot s holds position s.
Cache: TypeAlias = dict[str, jax.Array]
Implementation: TypeAlias = Literal["xla", "cudnn"] | None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    *,
    sliding_window: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, Cache | None]:
    """softmax(q k^T / sqrt(P)) v, each position over itself and those before it.

    XLA's computes in float32 whatever the dtype of its inputs: the scores and their softmax want it, and JAX cannot lower the
    gradient of its 16-bit products where implicit promotion is forbidden. cuDNN's accumulates in float32 by itself.

    Args:
        query: `[L, H, P]`; consecutive heads share a key.
        key: `[L, K, P]`.
        value: `[L, K, P]`.
        positions: Int `[L]`. Without a cache they must be consecutive; their order alone is then used.
        cache: Where to write keys and values, and what to attend to; None to attend within the sequence.
        sliding_window: Positions that each one sees, itself included; None for all.
        implementation: Of `jax.nn.dot_product_attention`, without a cache.

    Returns:
        `[L, H, P]`, and the cache with these positions in it.
    """
    window = None if sliding_window is None else (sliding_window - 1, 0)
    if cache is None and implementation == "cudnn":
        out = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=window, implementation="cudnn"
        )
        return out, None
    if cache is None:
        wide = (x.astype(jnp.float32) for x in (query, key, value))
        out = jax.nn.dot_product_attention(*wide, is_causal=True, local_window_size=window)
        return out.astype(query.dtype), None
    cache = {
        "k": cache["k"].at[positions].set(key.astype(cache["k"].dtype)),
        "v": cache["v"].at[positions].set(value.astype(cache["v"].dtype)),
    }
    slots = jnp.arange(cache["k"].shape[0], dtype=positions.dtype)
    distance = positions[:, None] - slots[None, :]  # [L, S]
    mask = distance >= 0
    if sliding_window is not None:
        mask = mask & (distance < sliding_window)
    wide = (x.astype(jnp.float32) for x in (query, cache["k"], cache["v"]))
    return jax.nn.dot_product_attention(*wide, mask=mask[None]).astype(query.dtype), cache


class Attention(nnx.Module):
    """Projections q, k, v, rotary positions where the model has them, attention, projection o.

    With `qk_norm_eps`, queries and keys pass an RMSNorm over each head before they rotate (Qwen3).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        use_bias: bool,
        stddev: float,
        dtype: Any,
        rotary: Rotary | None = None,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation = None,
    ) -> None:
        linear = functools.partial(Linear, use_bias=use_bias, stddev=stddev, dtype=dtype)
        self.q = linear(width, num_heads * head_dim)
        self.k = linear(width, num_kv_heads * head_dim)
        self.v = linear(width, num_kv_heads * head_dim)
        self.o = linear(num_heads * head_dim, width)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.head_dim = head_dim
        self.rotary = rotary
        self.sliding_window = sliding_window
        self.implementation: Implementation = implementation

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        query, key, value = (
            layer(x).reshape(x.shape[0], -1, self.head_dim) for layer in (self.q, self.k, self.v)
        )  # [L, H or K, P]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        mixed, cache = attend(
            query,
            key,
            value,
            positions,
            cache,
            sliding_window=self.sliding_window,
            implementation=self.implementation,
        )
        return self.o(mixed.reshape(x.shape[0], -1)), cache
