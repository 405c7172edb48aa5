"""Text, one token after the other, with a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp._typing import Key, Params
from jaxdp.models.attention import Cache
from jaxdp.models.causal_lm import CausalLM, segments
from jaxdp.models.decoding import NextLogits, continued


def generate(
    model: CausalLM,
    params: Params,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    key: Key | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_tokens: Iterable[int] = (),
) -> list[int]:
    """Continues a prompt, by the likeliest token at temperature 0, else by sampling from softmax(logits / temperature).

    Compiled twice for a model and a cache size, which is a power of two: once for the prompt, once for a further token.

    Args:
        model: The model.
        params: Its parameters.
        prompt_tokens: At least one token; the beginning-of-text token alone starts from nothing.
        max_new_tokens: Stop after so many.
        key: A typed JAX key, to sample.
        temperature: 0 for greedy.
        top_k: Sample among the k likeliest only; None for all.
        stop_tokens: Stop before any of these.

    Returns:
        The new tokens, without the prompt and without the stop token.

    Raises:
        ValueError: An empty prompt, tokens outside the vocabulary, more tokens than the context, or sampling without a key.
    """

    def start(length: int) -> NextLogits:
        whole = jax.tree.map(jnp.asarray, params)  # once, instead of at every step
        cache = model.init_cache(length)

        def next_logits(tokens: np.ndarray, first: jax.Array, row: jax.Array) -> jax.Array:
            nonlocal cache
            logits, cache = _next_logits(model, whole, tokens, first, row, cache)
            return logits

        return next_logits

    return continued(
        model,
        start,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop_tokens=stop_tokens,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _next_logits(
    model: CausalLM, params: Params, tokens: jax.Array, start: jax.Array, row: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits `[V]` after `tokens[row]`, for tokens `[L]` at positions `start`, `start + 1`, ...; and the cache."""
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)

    def block(hidden: jax.Array, layer: Any) -> tuple[jax.Array, Cache | None]:
        block_params, block_cache = layer
        return model.block(block_params, hidden, positions, block_cache)

    hidden = model.embed(params["embed"], tokens, positions)
    done, first = [], 0
    for segment in segments(model, params["blocks"]):
        last = first + jax.tree.leaves(segment)[0].shape[0]
        part = jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], cache)
        hidden, part = jax.lax.scan(block, hidden, (segment, part))
        done.append(part)
        first = last
    cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)
    hidden = jax.lax.dynamic_slice_in_dim(hidden, row, 1)
    return model.head(params.get("head", {}), params["embed"], hidden)[0], cache
