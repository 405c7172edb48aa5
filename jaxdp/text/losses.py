"""Losses of one example of `jaxdp.text`, for any model: `logits_fn(tokens [L]) -> [L, V]`.

    def loss_fn(params, example):
        return language_model_loss(lambda tokens: model.logits(params, tokens), example)

**Guarantee**: a loss is a function of the example's own tokens, divided by its own count (S3, S2: a constant of the record,
not of the batch). A row of zeros, as padding is, gives a finite loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

LogitsFn: TypeAlias = Callable[[jax.Array], jax.Array]


def token_log_likelihoods(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(tokens[t] | tokens[:t]) in nats for every t, float32 `[L]`; 0 for the first token, which nothing predicts.

    Args:
        logits: `[L, V]`, of any float dtype; those at `t` predict token `t + 1`. The sum over `V` is in float32.
        tokens: int32 `[L]`.
    """
    if logits.ndim != 2 or tokens.ndim != 1 or logits.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"logits_fn gave logits of shape {logits.shape} for tokens of shape {tokens.shape}; it must take one sequence [L] and "
            "return [L, V]: the losses bring their own vmap."
        )
    following = jnp.concatenate([tokens[1:], tokens[:1]])
    return jnp.concatenate([jnp.zeros(1, jnp.float32), log_likelihoods_of(logits, following)[:-1]])


def log_likelihoods_of(logits: jax.Array, chosen: jax.Array) -> jax.Array:
    """The log-likelihood, in nats, of one token for each row of logits: `[T, V]` and `[T]` to float32 `[T]`."""
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def language_model_loss(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """Mean negative log-likelihood, in nats, of the counted tokens of one privacy unit; 0 if none is counted.

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_texts` or `encode_completions`: `tokens [S, L]` and `weights [S, L]`.
    """
    log_likelihoods = jax.vmap(lambda tokens: token_log_likelihoods(logits_fn(tokens), tokens))(example["tokens"])
    return -weighted_mean(log_likelihoods, example["weights"])


def choice_scores(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """The mean log-likelihood, in nats, of each candidate's tokens behind each text of a unit: `[S, C]`.

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_choices`, in either of its forms.
    """
    if "choices" not in example:

        def score(tokens, weights):
            return weighted_mean(token_log_likelihoods(logits_fn(tokens), tokens), weights)

        return jax.vmap(jax.vmap(score))(example["tokens"], example["weights"])

    def scores(tokens, position, choices):  # one token each: all candidates from one distribution
        logits = logits_fn(tokens)[position].astype(jnp.float32)  # [V]
        return logits[choices] - jax.nn.logsumexp(logits)

    return jax.vmap(scores)(example["tokens"], example["position"], example["choices"])


def choice_loss(logits_fn: LogitsFn, example: Mapping[str, jax.Array]) -> jax.Array:
    """Cross-entropy over the candidates' scores, in nats, meaned over the texts of one unit (MeZO, arXiv 2305.17333).

    Args:
        logits_fn: `tokens [L] -> [L, V]`, causal.
        example: One row of `encode_choices`, in either of its forms.
    """
    return loss_of_scores(choice_scores(logits_fn, example), example)


def loss_of_scores(scores: jax.Array, example: Mapping[str, jax.Array]) -> jax.Array:
    """`choice_loss` from the scores `[S, C]`."""
    log_probs = jax.nn.log_softmax(scores, axis=-1)  # [S, C]
    chosen = jnp.take_along_axis(log_probs, example["label"][:, None], axis=-1)[:, 0]  # [S]
    return -weighted_mean(chosen, example["is_example"].astype(jnp.float32))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`weighted_sum` over the sum of the weights, which are 0 or 1; 0 without weights."""
    return weighted_sum(values, weights) / jnp.maximum(jnp.sum(weights), 1.0)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of the values that have a weight; an infinite one without is not 0 * inf."""
    return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)
