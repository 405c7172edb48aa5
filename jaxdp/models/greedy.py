"""Greedy generation as one pure function, for use inside a compiled one: of a fixed number of tokens, over rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.causal_lm import CausalLM, segments


def greedy_tokens(
    model: CausalLM,
    params: Params,
    tokens: jax.Array,
    prompt_length: jax.Array,
    *,
    max_new_tokens: int,
    stop_tokens: Iterable[int] = (),
) -> jax.Array:
    """The likeliest continuation of the first tokens of a row, as `generate` gives it at temperature 0.

    Args:
        model: The model.
        params: Its parameters.
        tokens: int32 `[L]`, at most the context; what stands behind the prompt is not looked at.
        prompt_length: int32, from 1 to L; may be traced.
        max_new_tokens: Tokens that are computed, whatever comes out. The text ends before them at a stop token, and where the
            row of L tokens would.
        stop_tokens: As in `generate`.

    Returns:
        int32 `[max_new_tokens]`; -1 from the end of the text on.
    """
    max_new_tokens = _validate.positive_integer("max_new_tokens", max_new_tokens)
    stops = jnp.asarray(sorted({int(token) for token in stop_tokens}), jnp.int32)
    L = tokens.shape[0]
    whole = segments(model, params["blocks"])

    def next_token(
        tokens: jax.Array, start: jax.Array, row: jax.Array, caches: list[Any]
    ) -> tuple[jax.Array, list[Any]]:
        positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, updated = model.embed(params["embed"], tokens, positions), []
        for segment, cache in zip(whole, caches, strict=True):
            hidden, cache = lax.scan(
                lambda h, layer: model.block(layer[0], h, positions, layer[1]), hidden, (segment, cache)
            )
            updated.append(cache)
        logits = model.head(params.get("head", {}), params["embed"], lax.dynamic_slice_in_dim(hidden, row, 1))
        return jnp.argmax(logits[0]).astype(jnp.int32), updated

    empty, first, caches = model.init_cache(L), 0, []
    for segment in whole:
        last = first + jax.tree.leaves(segment)[0].shape[0]
        caches.append(jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], empty))
        first = last
    # The rest of the row fills slots that no earlier position sees, and that later ones overwrite before they look.
    start = jnp.asarray(prompt_length, jnp.int32)
    chosen, caches = next_token(tokens, jnp.int32(0), start - 1, caches)

    def one(carry: Any, position: jax.Array) -> Any:
        chosen, has_ended, caches = carry
        has_ended = has_ended | (position >= L) | jnp.any(chosen == stops)
        # Behind the end the last slot is written again and again, and nothing of it comes out.
        following, caches = next_token(chosen[None], jnp.minimum(position, L - 1), jnp.int32(0), caches)
        return (following, has_ended, caches), jnp.where(has_ended, -1, chosen)

    positions = start + jnp.arange(max_new_tokens, dtype=jnp.int32)
    _, found = lax.scan(one, (chosen, jnp.zeros((), bool), caches), positions)
    return found
