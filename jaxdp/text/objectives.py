"""What a task is scored by, as losses: errors that forward passes alone can train on, since they have no useful derivative.

    def loss_fn(params, example):
        return choice_error(lambda tokens: model.logits(params, tokens), example)

An error is one minus an accuracy, so that less is better. It is piecewise constant: estimate with `TwoSided` or `OneSided`, at a
perturbation scale that changes some predictions. `ForwardMode`, and `jax.grad`, are refused while they are traced.

The errors are those of *greedy* decoding, a distribution that puts everything on the likeliest token: its log-likelihood of
that token is 0, and that of every other one -inf. A completion is therefore what greedy generation writes if and only if its
greedy log-likelihood is 0, which one pass decides for all of its tokens; nothing need be generated.

**Guarantee**: as for `jaxdp.text.losses`, an error is a function of the example's own tokens (S3). Where a log-likelihood that
counts is not a number, the error is NaN, and the example contributes nothing (S9). A row of zeros, as padding is, gives 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.block_model import BlockModel
from jaxdp.text import losses
from jaxdp.text.blocks import SequenceModel, body, choice_scores, log_likelihoods
from jaxdp.text.losses import LogitsFn


@jax.custom_jvp
def without_derivative(x: jax.Array) -> jax.Array:
    """`x`; whoever differentiates it is told that what follows is piecewise constant."""
    return x


@without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "this objective is piecewise constant, and its derivative zero wherever it has one: estimate with TwoSided or OneSided, "
        "not with ForwardMode or jax.grad."
    )


def greedy_log_probs(logits: jax.Array) -> jax.Array:
    """The log-probabilities of greedy decoding: 0 for the likeliest token, the first of equals, and -inf for others.

    Args:
        logits: `[..., V]`. Rows with a NaN become NaN.
    """
    logits = without_derivative(logits.astype(jnp.float32))
    is_likeliest = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1]).reshape(
        (1,) * (logits.ndim - 1) + (-1,)
    )
    is_bad = jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
    return jnp.where(is_bad, jnp.nan, jnp.where(is_likeliest, 0.0, -jnp.inf))


def token_error(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """The fraction of the counted tokens of one privacy unit that are not the likeliest ones.

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_texts` or `encode_completions`.
    """
    return losses.weighted_mean(_is_wrong(_greedy(logits_fn, example)), example["weights"])


def exact_match_error(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """The fraction of the completions of one privacy unit that greedy generation from their prompts would not write.

    A completion counts with its EOS, if it is encoded: generation must then also stop where it does.

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_completions`.
    """
    return _exact_match_error(_greedy(logits_fn, example), example["weights"])


def choice_error(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """The fraction of the texts of one privacy unit whose best candidate is not their label.

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_choices`, in either of its forms.
    """
    scores = losses.choice_scores(lambda tokens: without_derivative(logits_fn(tokens)), example)
    return _error_of_scores(scores, example)


def exact_match_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """`exact_match_error` in parts, for a model that streams; arguments as in `language_model_blocks`."""
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)
    greedy = _GreedyModel(model)

    def error(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
        found = log_likelihoods(greedy, resident, hidden, example["tokens"], head_tokens)
        return _exact_match_error(found, example["weights"])

    return BlockModel(*body(model), error)


def choice_error_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """`choice_error` in parts, for a model that streams; arguments as in `choice_blocks`."""
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)

    def error(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
        scores = choice_scores(model, resident, without_derivative(hidden), example, head_tokens)
        return _error_of_scores(scores, example)

    return BlockModel(*body(model), error)


@dataclasses.dataclass(frozen=True)
class _GreedyModel:
    """A model that says what it would write, and nothing of what else it might."""

    model: SequenceModel

    def embed(self, embed_params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.model.embed(embed_params, tokens, positions)

    def block(self, block_params: Params, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        return self.model.block(block_params, hidden, positions)

    def head(self, head_params: Params, embed_params: Params, hidden: jax.Array) -> jax.Array:
        return greedy_log_probs(self.model.head(head_params, embed_params, hidden))


def _greedy(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """The greedy log-likelihoods of all tokens, `[S, L]`."""

    def sequence(tokens: jax.Array) -> jax.Array:
        return losses.token_log_likelihoods(greedy_log_probs(logits_fn(tokens)), tokens)

    return jax.vmap(sequence)(example["tokens"])


def _is_wrong(log_likelihoods: jax.Array) -> jax.Array:
    """1 for -inf, 0 for 0, NaN for NaN."""
    return jnp.where(jnp.isnan(log_likelihoods), log_likelihoods, (log_likelihoods < 0).astype(jnp.float32))


def _exact_match_error(log_likelihoods: jax.Array, weights: jax.Array) -> jax.Array:
    total = jax.vmap(losses.weighted_sum)(log_likelihoods, weights)  # [S]: 0 if every counted token is the likeliest
    return losses.weighted_mean(_is_wrong(total), jnp.any(weights > 0, axis=-1).astype(jnp.float32))


def _error_of_scores(scores: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
    is_wrong = (jnp.argmax(scores, axis=-1) != example["label"]).astype(jnp.float32)  # [S]
    is_wrong = jnp.where(jnp.any(jnp.isnan(scores), axis=-1), jnp.nan, is_wrong)
    return losses.weighted_mean(is_wrong, example["is_example"].astype(jnp.float32))
