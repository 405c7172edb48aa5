"""Text, one token after the other, with a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Key, Params
from jaxdp.models.attention import Cache
from jaxdp.models.causal_lm import CausalLM, segments


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
    max_new_tokens = _validate.positive_integer("max_new_tokens", max_new_tokens)
    temperature = _validate.nonnegative("temperature", temperature)
    if top_k is not None:
        top_k = min(_validate.positive_integer("top_k", top_k), model.config.vocab_size)
    if temperature > 0:
        if key is None:
            raise ValueError(
                f"temperature {temperature} samples at random and needs a key; pass key=jax.random.key(...)."
            )
        key = _validate.typed_key("key", key)
    prompt = _checked_prompt(model, prompt_tokens, max_new_tokens)
    stops = {int(token) for token in stop_tokens}
    params = jax.tree.map(jnp.asarray, params)  # once, instead of at every step
    cache = model.init_cache(_rounded(model, prompt.size + max_new_tokens))

    # Padding after the prompt fills slots that no earlier position sees, and that later ones overwrite before they look.
    padded = np.zeros(_rounded(model, prompt.size), np.int32)
    padded[: prompt.size] = prompt
    logits, cache = _next_logits(model, params, padded, jnp.int32(0), jnp.int32(prompt.size - 1), cache)
    tokens: list[int] = []
    for step in range(max_new_tokens):
        choice_key = None if key is None else jax.random.fold_in(key, step)
        token = int(_choose(logits, choice_key, temperature=temperature, top_k=top_k))
        if token in stops:
            break
        tokens.append(token)
        if len(tokens) < max_new_tokens:
            position = jnp.int32(prompt.size + step)
            logits, cache = _next_logits(model, params, np.array([token], np.int32), position, jnp.int32(0), cache)
    return tokens


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


@functools.partial(jax.jit, static_argnames="top_k")
def _choose(logits: jax.Array, key: Key | None, *, temperature: Any, top_k: int | None) -> jax.Array:
    greedy = jnp.argmax(logits)
    if key is None:
        return greedy
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][-1]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    sampled = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, sampled, greedy)


def _checked_prompt(model: CausalLM, prompt_tokens: Sequence[int], max_new_tokens: int) -> np.ndarray:
    prompt, config = np.asarray(prompt_tokens), model.config
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError("prompt_tokens must hold at least one token; begin with the beginning-of-text token.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"prompt_tokens must be integers, got dtype {prompt.dtype}; encode the text first.")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ValueError(
            f"prompt_tokens hold ids from {prompt.min()} to {prompt.max()}, outside the vocabulary [0, {config.vocab_size}); "
            "use the tokenizer of this model."
        )
    if prompt.size + max_new_tokens > config.max_length:
        raise ValueError(
            f"{prompt.size} prompt tokens and max_new_tokens = {max_new_tokens} exceed the model's context of "
            f"{config.max_length}; shorten one of them."
        )
    return prompt


def _rounded(model: CausalLM, length: int) -> int:
    """The next power of two, within the context: few sizes to compile for."""
    return min(1 << (length - 1).bit_length(), model.config.max_length)
