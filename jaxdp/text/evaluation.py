"""Perplexity and accuracy over an evaluation set, batch by batch in one compiled shape.

The results are computed without noise: *not private* for the records that they are computed from (S15). Evaluate on records
that need no protection, and feed nothing back into the training of a private model (S12).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.text import losses

#: `logits_fn(params, tokens [L]) -> [L, V]`, such as `model.logits`.
ModelLogits: TypeAlias = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LanguageModelScore:
    """How well a model predicts a set of texts. *Not private.*

    Attributes:
        loss: Mean negative log-likelihood of a token over the whole set, in nats.
        num_tokens: Tokens predicted.
    """

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return (
            math.exp(self.loss) if self.loss < 700 else self.loss * math.inf
        )  # beyond the range of a float; NaN stays


@dataclasses.dataclass(frozen=True)
class ChoiceScore:
    """How often a model's highest-scored candidate is the label. *Not private.*

    Attributes:
        loss: Mean cross-entropy over the candidates, in nats.
        num_correct: Texts whose best candidate is their label.
        num_examples: Texts scored.
    """

    loss: float
    num_correct: int
    num_examples: int

    @property
    def accuracy(self) -> float:
        """`num_correct / num_examples`."""
        return self.num_correct / self.num_examples


def evaluate_language_model(
    logits_fn: ModelLogits, params: Params, data: Mapping[str, np.ndarray], *, batch_rows: int = 8
) -> LanguageModelScore:
    """Scores a model on the output of `encode_texts` or `encode_completions`; every counted token weighs the same.

    To count every token of long texts, encode them with `max_sequences=None, on_long="split"`.

    Args:
        logits_fn: `logits_fn(params, tokens [L]) -> [L, V]`. Pass the same function again, rather than a new lambda, and it
            is compiled once.
        params: Its parameters; moved to the device once.
        data: `tokens [n, S, L]` and `weights [n, S, L]`.
        batch_rows: Sequences at once: bounds memory, changes nothing else.

    Raises:
        ValueError: no token is counted, or the data are of another kind.
    """
    check_names(data, ("tokens", "weights"), "encode_texts or encode_completions")
    length = data["tokens"].shape[-1]
    is_counted = data["weights"].any(-1)
    rows = {name: data[name][is_counted][:, None] for name in ("tokens", "weights")}  # [R, 1, L]
    num_tokens = int(rows["weights"].sum(dtype=np.float64))
    if num_tokens == 0:
        raise ValueError(f"no token of the evaluation set is counted (sequences of {length}); give it longer texts.")
    params = jax.device_put(params)
    total = sum(
        float(np.asarray(_log_likelihoods(logits_fn, params, batch), np.float64).sum())
        for batch in batches(rows, batch_rows)
    )
    return LanguageModelScore(-total / num_tokens, num_tokens)


def evaluate_choices(
    logits_fn: ModelLogits, params: Params, data: Mapping[str, np.ndarray], *, batch_rows: int = 8
) -> ChoiceScore:
    """Scores a model on the output of `encode_choices`.

    Args:
        logits_fn: `logits_fn(params, tokens [L]) -> [L, V]`, as in `evaluate_language_model`.
        params: Its parameters; moved to the device once.
        data: In either form; each text counts once, whosever it is.
        batch_rows: Texts at once: bounds memory, changes nothing else.

    Raises:
        ValueError: the data are of another kind.
    """
    check_names(data, ("tokens", "label", "is_example"), "encode_choices")
    rows = {name: values[data["is_example"]][:, None] for name, values in data.items()}  # [R, 1, ...]
    num_examples = len(rows["label"])
    params = jax.device_put(params)
    loss, num_correct = 0.0, 0
    for batch in batches(rows, batch_rows):
        batch_losses, is_correct = _choices(logits_fn, params, batch)
        is_example = batch["is_example"][:, 0]
        loss += float(np.asarray(batch_losses, np.float64)[is_example].sum())
        num_correct += int(np.asarray(is_correct)[is_example].sum())
    return ChoiceScore(loss / num_examples, num_correct, num_examples)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(logits_fn: ModelLogits, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Sum over the counted tokens of each row, `[B]`."""

    def row(tokens, weights):
        return losses.weighted_sum(losses.token_log_likelihoods(logits_fn(params, tokens), tokens), weights)

    return jax.vmap(row)(batch["tokens"][:, 0], batch["weights"][:, 0])


@functools.partial(jax.jit, static_argnums=0)
def _choices(logits_fn: ModelLogits, params: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Loss and correctness of each row, `[B]`."""

    def row(example):
        scores = losses.choice_scores(lambda tokens: logits_fn(params, tokens), example)[0]  # [C]
        label = example["label"][0]
        return -jax.nn.log_softmax(scores)[label], jnp.argmax(scores) == label

    return jax.vmap(row)(batch)


def batches(rows: Mapping[str, np.ndarray], batch_rows: int) -> Iterator[dict[str, Any]]:
    """Blocks of `batch_rows` rows; the last is filled up with rows of zeros, which count nowhere."""
    batch_rows = _validate.positive_integer("batch_rows", batch_rows)
    num_rows = len(rows["tokens"])
    for start in range(0, num_rows, batch_rows):
        batch = {name: values[start : start + batch_rows] for name, values in rows.items()}
        missing = batch_rows - len(batch["tokens"])
        yield {name: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for name, v in batch.items()}


def check_names(data: Mapping[str, np.ndarray], names: tuple[str, ...], maker: str) -> None:
    if not set(names) <= set(data) or (maker != "encode_choices" and "label" in data):
        raise ValueError(f"data has {', '.join(map(repr, data)) or 'nothing'}; expected the output of {maker}.")
