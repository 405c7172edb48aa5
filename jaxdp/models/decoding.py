"""Text, one token after the other, by whoever can tell the logits of the next token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.models.causal_lm import CausalLM

#: `next_logits(tokens [L], start, row) -> [V]`: the logits after `tokens[row]`, for tokens at positions `start`, `start + 1`, ...;
#: what it keeps of the positions before is its own affair.
NextLogits = Callable[[np.ndarray, jax.Array, jax.Array], jax.Array]


def continued(
    model: CausalLM,
    start: Callable[[int], NextLogits],
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    key: Key | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_tokens: Iterable[int] = (),
) -> list[int]:
    """`jaxdp.models.generate` around the logits of anybody.

    Args:
        model: For its vocabulary and its context.
        start: Gets the number of positions to keep room for, a power of two within the context; called when all is checked.
        prompt_tokens: As in `generate`, with all that follows.
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
    next_logits = start(_rounded(model, prompt.size + max_new_tokens))

    # Padding after the prompt fills slots that no earlier position sees, and that later ones overwrite before they look.
    padded = np.zeros(_rounded(model, prompt.size), np.int32)
    padded[: prompt.size] = prompt
    logits = next_logits(padded, jnp.int32(0), jnp.int32(prompt.size - 1))
    tokens: list[int] = []
    for step in range(max_new_tokens):
        choice_key = None if key is None else jax.random.fold_in(key, step)
        token = int(_choose(logits, choice_key, temperature=temperature, top_k=top_k))
        if token in stops:
            break
        tokens.append(token)
        if len(tokens) < max_new_tokens:
            logits = next_logits(np.array([token], np.int32), jnp.int32(prompt.size + step), jnp.int32(0))
    return tokens


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
