"""Scores of an evaluation set by a model that streams: the numbers of `jaxdp.text.evaluation`, one block at a time.

A block model whose last part gives sums and counts, where that of `jaxdp.text.blocks` gives a loss. Whoever runs block models,
such as `losses` of `jaxdp.zeroth_order.make_step`, gives back these sums for every row; here they are added up, in float64.

The results are *not private* for the records that they are computed from (S15).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.block_model import BlockModel
from jaxdp.text import losses
from jaxdp.text.blocks import SequenceModel, body, choice_scores, log_likelihoods
from jaxdp.text.evaluation import ChoiceScore, LanguageModelScore, batches, check_names


class TokenSums(NamedTuple):
    """Of one row of `encode_texts` or `encode_completions`.

    Attributes:
        loss: Sum of the negative log-likelihoods of the counted tokens, in nats.
        num_tokens: How many are counted, as a float.
    """

    loss: Any
    num_tokens: Any


class ChoiceSums(NamedTuple):
    """Of one row of `encode_choices`.

    Attributes:
        loss: Sum over its texts of the cross-entropy over the candidates, in nats.
        num_correct: Texts whose best candidate is their label, as a float.
        num_examples: Texts, as a float.
    """

    loss: Any
    num_correct: Any
    num_examples: Any


def language_model_score_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """A block model whose "loss" is `TokenSums`; arguments as in `language_model_blocks`."""
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)

    def sums(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> Any:
        found = log_likelihoods(model, resident, hidden, example["tokens"], head_tokens)
        return TokenSums(-losses.weighted_sum(found, example["weights"]), jnp.sum(example["weights"]))

    return BlockModel(*body(model), sums)


def choice_score_blocks(model: SequenceModel, *, head_tokens: int = 256) -> BlockModel:
    """A block model whose "loss" is `ChoiceSums`; arguments as in `choice_blocks`."""
    head_tokens = _validate.positive_integer("head_tokens", head_tokens)

    def sums(resident: Params, hidden: jax.Array, example: Mapping[str, jax.Array]) -> Any:
        scores = choice_scores(model, resident, hidden, example, head_tokens)
        is_example = example["is_example"].astype(jnp.float32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), example["label"][:, None], axis=-1)[:, 0]
        is_correct = (jnp.argmax(scores, axis=-1) == example["label"]).astype(jnp.float32)
        return ChoiceSums(
            -losses.weighted_sum(chosen, is_example), losses.weighted_sum(is_correct, is_example), jnp.sum(is_example)
        )

    return BlockModel(*body(model), sums)


def evaluate_language_model_sums(
    sums_of: Callable[[dict[str, np.ndarray]], TokenSums], data: Mapping[str, np.ndarray], *, batch_rows: int = 8
) -> LanguageModelScore:
    """`evaluate_language_model` where the model is run by somebody else.

        steps = zeroth_order.make_step(language_model_score_blocks(model), sgd, placement=placement)
        score = evaluate_language_model_sums(lambda batch: steps.losses(state, batch), data)

    Args:
        sums_of: The sums of every row of a batch, `TokenSums` of arrays `[B]`.
        data: `tokens [n, S, L]` and `weights [n, S, L]`.
        batch_rows: Sequences at once: bounds memory, changes nothing else. Each batch passes the model once.

    Raises:
        ValueError: no token is counted, or the data are of another kind.
    """
    check_names(data, ("tokens", "weights"), "encode_texts or encode_completions")
    is_counted = data["weights"].any(-1)
    rows = {name: data[name][is_counted][:, None] for name in ("tokens", "weights")}  # [R, 1, L]
    if not is_counted.any():
        length = data["tokens"].shape[-1]
        raise ValueError(f"no token of the evaluation set is counted (sequences of {length}); give it longer texts.")
    loss, num_tokens = _totals(sums_of, rows, batch_rows)
    return LanguageModelScore(loss / num_tokens, int(num_tokens))


def evaluate_choices_sums(
    sums_of: Callable[[dict[str, np.ndarray]], ChoiceSums], data: Mapping[str, np.ndarray], *, batch_rows: int = 8
) -> ChoiceScore:
    """`evaluate_choices` where the model is run by somebody else, as above with `choice_score_blocks`.

    Args:
        sums_of: The sums of every row of a batch, `ChoiceSums` of arrays `[B]`.
        data: In either form; each text counts once, whosever it is.
        batch_rows: Texts at once: bounds memory, changes nothing else. Each batch passes the model once.

    Raises:
        ValueError: the data are of another kind.
    """
    check_names(data, ("tokens", "label", "is_example"), "encode_choices")
    rows = {name: values[data["is_example"]][:, None] for name, values in data.items()}  # [R, 1, ...]
    loss, num_correct, num_examples = _totals(sums_of, rows, batch_rows)
    return ChoiceScore(loss / num_examples, int(num_correct), int(num_examples))


def _totals(sums_of: Callable[..., Any], rows: Mapping[str, np.ndarray], batch_rows: int) -> np.ndarray:
    """The sums over all rows; those that fill up the last batch count nothing."""
    parts = [
        np.stack([np.asarray(part, np.float64).sum() for part in sums_of(batch)]) for batch in batches(rows, batch_rows)
    ]
    return np.sum(parts, axis=0)
