"""The losses of `jaxdp.text` as block models: what enters the first block, one block, and the loss behind the last.

The losses are those of `jaxdp.text.losses`. The head runs on a stretch of tokens at a time, so that the logits of a whole
sequence never exist together, and for candidates of one token on the one position that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.block_model import BlockModel
from jaxdp.text import losses


class SequenceModel(Protocol):
    """A model of one sequence in three functions, such as `jaxdp.models.CausalLM`."""

    def embed(self, embed_params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens `[L]` at positions `[L]` to `[L, D]`."""
        ...

    def block(self, block_params: Params, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        """`[L, D]` to `[L, D]`, and something unused."""
        ...

    def head(self, head_params: Params, embed_params: Params, hidden: jax.Array) -> jax.Array:
        """`[T, D]` to logits `[T, V]`, each row by itself."""
        ...


def language_model_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """`losses.language_model_loss` in parts, for rows of `encode_texts` and `encode_completions`.

    Args:
        model: Its parameters are `BlockParams({"embed": ..., "head": ...}, blocks)`.
        head_tokens: Tokens of a sequence whose logits exist at once: bounds memory, changes nothing else.
    """
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)

    def loss(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
        found = log_likelihoods(model, resident, hidden, example["tokens"], head_tokens)
        return -losses.weighted_mean(found, example["weights"])

    return BlockModel(*body(model), loss)


def choice_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """`losses.choice_loss` in parts, for rows of `encode_choices`; arguments as above."""
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)

    def loss(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
        return losses.loss_of_scores(choice_scores(model, resident, hidden, example, head_tokens), example)

    return BlockModel(*body(model), loss)


def body(model: SequenceModel) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The first two parts of any loss of sequences: what enters the first block, and one block."""

    def embed(resident: Params, example: Mapping[str, jax.Array]) -> jax.Array:
        tokens = example["tokens"]
        positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        return _over_sequences(lambda t: model.embed(resident["embed"], t, positions), 1)(tokens)

    def block(params: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
        positions = jnp.arange(example["tokens"].shape[-1], dtype=jnp.int32)
        return _over_sequences(lambda h: model.block(params, h, positions)[0], 2)(hidden)

    return embed, block


def _over_sequences(fun: Callable[[jax.Array], jax.Array], rank: int) -> Callable[[jax.Array], jax.Array]:
    """`fun` of one sequence, an array of `rank` axes, over all axes in front."""

    def mapped(array: jax.Array) -> jax.Array:
        if array.ndim == rank:
            return fun(array)
        flat = jax.vmap(fun)(array.reshape(-1, *array.shape[-rank:]))
        return flat.reshape(*array.shape[:-rank], *flat.shape[1:])

    return mapped


def _head(model: SequenceModel, resident: Params) -> Callable[[jax.Array], jax.Array]:
    # A tied head without a norm has no parameters, and whoever split the tree may have dropped the empty branch.
    return lambda hidden: model.head(resident.get("head", {}), resident["embed"], hidden)


def choice_scores(
    model: SequenceModel, resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array], head_tokens: int
) -> jax.Array:
    """`losses.choice_scores` behind the last block, `[S, C]`."""
    if "choices" not in example:
        found = log_likelihoods(model, resident, hidden, example["tokens"], head_tokens)  # [S, C, L]
        return jax.vmap(jax.vmap(losses.weighted_mean))(found, example["weights"])
    last = jax.vmap(lambda h, position: h[position])(hidden, example["position"])  # [S, D]
    logits = _head(model, resident)(last).astype(jnp.float32)
    scores = jnp.take_along_axis(logits, example["choices"], axis=-1)
    return scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def log_likelihoods(
    model: SequenceModel, resident: Params, hidden: jax.Array, tokens: jax.Array, head_tokens: int
) -> jax.Array:
    """`losses.token_log_likelihoods` of every sequence, `[..., L]`, from `[..., L, D]`."""
    head, L = _head(model, resident), tokens.shape[-1]

    def predicted(hidden: jax.Array, following: jax.Array) -> jax.Array:
        return losses.log_likelihoods_of(head(hidden), following)

    def sequence(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        following = jnp.concatenate([tokens[1:], tokens[:1]])
        if head_tokens >= L:
            found = predicted(hidden, following)
        else:
            missing = -L % head_tokens
            hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, head_tokens, hidden.shape[-1])
            following = jnp.pad(following, (0, missing)).reshape(-1, head_tokens)
            found = lax.map(lambda stretch: predicted(*stretch), (hidden, following)).reshape(-1)[:L]
        return jnp.concatenate([jnp.zeros(1, jnp.float32), found[:-1]])

    flat = jax.vmap(sequence)(hidden.reshape(-1, *hidden.shape[-2:]), tokens.reshape(-1, L))
    return flat.reshape(tokens.shape)
