"""What a user scores generated text by, as a loss: a function of tokens, or any Python function of strings.

    loss_fn = completion_objective(model, token_f1_error, max_new_tokens=16, stop_tokens=[eos])
    loss_fn = completion_objective(model, host_objective(score, tokenizer.decode), max_new_tokens=16, stop_tokens=[eos])

Every loss here writes the likeliest completion of the prompts of an `encode_completions` row, inside the compiled step, and
compares it with the row's own. They have no derivative: estimate with `TwoSided` or `OneSided`, at a perturbation scale that
changes some texts; `ForwardMode` is refused while it is traced. Errors of choices and of tokens, and exact matches, need no
generation: `jaxdp.text.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.causal_lm import CausalLM
from jaxdp.models.greedy import greedy_tokens
from jaxdp.text import losses
from jaxdp.text.objectives import without_derivative

#: `error(answer, reference) -> scalar`, of tokens `[T]` and `[L]`, int32 with -1 where there is none; less is better.
TokenObjective: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def completion_objective(
    model: CausalLM, error: TokenObjective, *, max_new_tokens: int, stop_tokens: Iterable[int] = ()
) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
    """The mean error of the completions that greedy generation writes for the prompts of one privacy unit.

    Args:
        model: The model.
        error: What is computed from a completion and the row's own, both without stop tokens.
        max_new_tokens: The longest completion; also what every row costs, in passes of one token.
        stop_tokens: What ends a completion, such as EOS.

    Returns:
        `loss_fn(params, example) -> scalar`, with a row of `encode_completions`; 0 for a row of padding. One example's loss
        depends on no other (S3).
    """
    max_new_tokens = _validate.positive_integer("max_new_tokens", max_new_tokens)
    stops = sorted({int(token) for token in stop_tokens})

    def sequence(params: Params, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        is_reference = weights > 0
        start = jnp.argmax(is_reference).astype(jnp.int32)  # of the completion
        answer = greedy_tokens(
            model, params, tokens, jnp.maximum(start, 1), max_new_tokens=max_new_tokens, stop_tokens=stops
        )
        for stop in stops:
            is_reference = is_reference & (tokens != stop)
        return error(answer, jnp.where(is_reference, tokens, -1))

    def loss_fn(params: Params, example: Mapping[str, jax.Array]) -> jax.Array:
        # Perturbed parameters are all that has a tangent.
        params = jax.tree.map(without_derivative, params)
        errors = jax.vmap(lambda tokens, weights: sequence(params, tokens, weights))(
            example["tokens"], example["weights"]
        )
        return losses.weighted_mean(errors, jnp.any(example["weights"] > 0, axis=-1).astype(jnp.float32))

    return loss_fn


def token_f1_error(answer: jax.Array, reference: jax.Array) -> jax.Array:
    """1 - F1 of the tokens of two texts as multisets; 0 where both are empty.

        F1 = 2 sum_v min(count_v(answer), count_v(reference)) / (|answer| + |reference|)

    Args:
        answer: int32 `[T]`, -1 where there is no token.
        reference: int32 `[L]`, likewise.
    """
    is_token, is_reference = answer >= 0, reference >= 0
    same = (answer[:, None] == answer[None, :]) & is_token[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)  # how often each token stood before
    available = jnp.sum((answer[:, None] == reference[None, :]) & is_reference[None, :], axis=1)
    num_shared = jnp.sum(is_token & (earlier < available)).astype(jnp.float32)
    total = (jnp.sum(is_token) + jnp.sum(is_reference)).astype(jnp.float32)
    return jnp.where(total > 0, 1.0 - 2.0 * num_shared / jnp.maximum(total, 1.0), 0.0)


def host_objective(
    fun: Callable[[str, str], float],
    decode: Callable[[Sequence[int]], str],
    *,
    probe: tuple[str, str] = ("text", "text"),
) -> TokenObjective:
    """A Python function of two strings as a `TokenObjective`, called on the host in the middle of a compiled step.

    It is called once with the strings of `probe`, here and now, so that a mistake in it shows before any work. From then on
    nothing that it does on a record shows: **an exception, or a value that is not a finite real number, is NaN**, with which
    the example counts as absent (S9), in private runs and others. An error raised for one record would tell of that record.

    **Guarantee**: `fun` sees one example at a time (S3), if it keeps nothing from one call to the next. It must be a function of
    its arguments: how often and in which order it is called is not promised, and rows of padding are passed to it too.

    Args:
        fun: `fun(answer, reference) -> float`; less is better.
        decode: Tokens to text, such as `Tokenizer.decode`. Its exceptions count as those of `fun`.
        probe: Two public strings that `fun` can score.

    Raises:
        ValueError: `fun` fails on `probe`.
    """
    try:
        found = float(fun(*probe))
    except Exception as error:
        raise ValueError(
            f"fun gave no number for {probe} ({type(error).__name__}: {error}); correct it, or give a probe that it can score."
        ) from error
    if not math.isfinite(found):
        raise ValueError(f"fun gave {found} for {probe}; it must be finite.")

    def one(answer: np.ndarray, reference: np.ndarray) -> float:
        try:
            value = float(fun(*(decode([int(token) for token in row if token >= 0]) for row in (answer, reference))))
        except Exception:
            return math.nan
        return value if math.isfinite(value) else math.nan

    def row(answer: Any, reference: Any) -> np.ndarray:
        return np.asarray(one(np.asarray(answer), np.asarray(reference)), np.float32)

    def scored(answer: jax.Array, reference: jax.Array) -> jax.Array:
        # One example a call: a callback of a whole batch could couple records, and the losses of the batch would run one by one.
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(row, shape, answer, reference, vmap_method="sequential")

    return scored
