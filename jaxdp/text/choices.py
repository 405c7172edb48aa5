"""Classification by verbalizers: each class is a word, and the model scores the words behind the text (MeZO, arXiv 2305.17333).

As in `jaxdp.text.encoding`, a row is a function of its own privacy unit, errors come before any work starts, and the report
is *not private*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from jaxdp.text.encoding import (
    Data,
    EncodingReport,
    OnLong,
    Tokenizer,
    check_options,
    leading_tokens,
    report_of,
    room_after,
    split_prompt,
    units_of,
)
from jaxdp.text.records import Record

#: Tokens of the text in its template, tokens of each candidate behind them, and the index of the label.
_Example: TypeAlias = tuple[list[int], list[list[int]], int]


def encode_choices(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    template: str = "{text} It was",
    verbalizers: Mapping[str, str] | Mapping[int, str],
    max_length: int,
    max_sequences: int | None = 1,
    on_long: OnLong = "error",
) -> tuple[Data, EncodingReport]:
    """Texts with labels, for `choice_loss`: the template around the text, then each candidate word.

    Axes: `C` candidates, in the order of `verbalizers`; `n`, `S`, `L` as in `encode_texts`, with one text a sequence. White
    space around a text is dropped. Template and candidate are tokenized as one text, without a separator.

    Args:
        records: Of `read_records` with `Fields(text=..., label=...)`.
        tokenizer: The model's.
        template: What the model reads, with `{text}` in it.
        verbalizers: The word of each label, with the space before it: `{"0": " terrible", "1": " great"}`.
        max_length: `L`, at most the model's context.
        max_sequences: `S`, as in `encode_texts`; the first texts of a unit are kept.
        on_long: What to do with a text of more than `max_length` tokens with its template and candidates: an "error"; or
            "truncate", which drops the oldest tokens (after BOS), as MeZO does.

    Returns:
        Arrays and the report. If every candidate is one token, one sequence serves all of them, at a C-th of the cost:
        `{"tokens": int32 [n, S, L], "position": int32 [n, S], "choices": int32 [n, S, C], "label": int32 [n, S],
        "is_example": bool [n, S]}`, where candidates are scored at `position`, the last token of the text. Else
        `{"tokens": int32 [n, S, C, L], "weights": float32 [n, S, C, L], "label", "is_example"}`. The losses are equal, so
        that the form, though decided by all of the data, changes nothing that is released. `is_example` is False where a
        unit has fewer than `S` texts.

    Raises:
        ValueError: a label has no verbalizer, verbalizers cannot be told apart, the template lacks `{text}`, an option is
            out of range, or a text is too long under "error".
    """
    check_options(max_length, max_sequences, on_long, may_split=False)
    words = _words(verbalizers)
    if "{text}" not in template:
        raise ValueError(f"template {template!r} has no {{text}}; say where the text goes, as in '{{text}} It was'.")
    leading = leading_tokens(tokenizer)
    room = room_after(leading, max_length)
    counts: Counter[str] = Counter()
    units: list[list[_Example]] = []
    for unit in units_of(records):
        examples = []
        for record in unit:
            label = _label(record, words)
            text = template.replace("{text}", record.prompt.strip())
            prompt, endings = split_prompt(tokenizer, record, text, list(words.values()), counts)
            _check_distinct(record, list(words), endings)
            if not leading and not prompt:
                raise ValueError(
                    f"{record.place}: no token stands before the candidates {list(words.values())}; begin them with a space, or "
                    "put more into the template."
                )
            examples.append(([*leading, *_fit(record, prompt, endings, room, on_long, counts)], endings, label))
            counts["longest"] = max(counts["longest"], len(leading) + len(prompt) + max(map(len, endings)))
        units.append(examples)
    kept = max(map(len, units)) if max_sequences is None else max_sequences
    for unit in units:
        counts["num_capped_units"] += len(unit) > kept
        for prompt, endings, _ in unit[kept:]:
            counts["num_dropped_sequences"] += 1
            counts["num_dropped_tokens"] += len(prompt) + max(map(len, endings))
    data = _arrays([unit[:kept] for unit in units], kept, len(words), max_length, tokenizer.pad_id or 0, counts)
    return data, report_of(len(records), len(units), counts)


def _words(verbalizers: Mapping[str, str] | Mapping[int, str]) -> dict[str, str]:
    words = {str(label).strip(): word for label, word in verbalizers.items()}
    if len(words) < max(len(verbalizers), 2):
        raise ValueError(f"verbalizers must give at least two different labels a word each, got {dict(verbalizers)}.")
    for label, word in words.items():
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"the verbalizer of label {label!r} is {word!r}; give it a word, such as ' great'.")
    return words


def _label(record: Record, words: Mapping[str, str]) -> int:
    if record.label is None:
        raise ValueError(f"{record.place}: no label; read the records with Fields(text=..., label=...).")
    if record.label not in words:
        raise ValueError(
            f"{record.place}: label {record.label!r} has no verbalizer; there are {', '.join(map(repr, words))}. Add it to the "
            "verbalizers, or remove the record."
        )
    return list(words).index(record.label)


def _check_distinct(record: Record, labels: Sequence[str], endings: Sequence[list[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, ending in zip(labels, endings, strict=True):
        if tuple(ending) in seen:
            raise ValueError(
                f"{record.place}: the verbalizers of {seen[tuple(ending)]!r} and {label!r} have the same tokens {ending}, so that "
                "no score tells them apart; choose other words."
            )
        seen[tuple(ending)] = label


def _fit(
    record: Record, prompt: list[int], endings: Sequence[list[int]], room: int, on_long: str, counts: Counter[str]
) -> list[int]:
    """The last tokens of the prompt for which every candidate has room behind them."""
    longest = max(map(len, endings))
    if longest >= room:
        raise ValueError(
            f"{record.place}: the longest verbalizer has {longest} tokens and leaves no room for a text; raise max_length."
        )
    lost = len(prompt) + longest - room
    if lost <= 0:
        return prompt
    if on_long == "error":
        raise ValueError(
            f"{record.place}: {lost} tokens too many for max_length, with template and verbalizers; raise max_length, shorten the "
            "text, or choose on_long='truncate'."
        )
    counts["num_truncated"] += 1
    counts["num_dropped_tokens"] += lost
    return prompt[lost:]


def _arrays(
    units: Sequence[Sequence[_Example]],
    kept: int,
    num_choices: int,
    max_length: int,
    pad_id: int,
    counts: Counter[str],
) -> Data:
    n, C, L = len(units), num_choices, max_length
    is_single = all(len(ending) == 1 for unit in units for _, endings, _ in unit for ending in endings)
    shape = (n, kept, L) if is_single else (n, kept, C, L)
    tokens = np.full(shape, pad_id, np.int32)
    data = {"tokens": tokens, "label": np.zeros((n, kept), np.int32), "is_example": np.zeros((n, kept), bool)}
    if is_single:
        data |= {"position": np.zeros((n, kept), np.int32), "choices": np.zeros((n, kept, C), np.int32)}
    else:
        data |= {"weights": np.zeros(shape, np.float32)}
    for i, unit in enumerate(units):
        for s, (prompt, endings, label) in enumerate(unit):
            data["label"][i, s], data["is_example"][i, s] = label, True
            if is_single:
                tokens[i, s, : len(prompt)] = prompt
                data["position"][i, s] = len(prompt) - 1
                data["choices"][i, s] = [ending[0] for ending in endings]
            else:
                for c, ending in enumerate(endings):
                    end = len(prompt) + len(ending)
                    tokens[i, s, c, :end] = [*prompt, *ending]
                    data["weights"][i, s, c, len(prompt) : end] = 1.0
            counts["num_sequences"] += 1
            counts["num_tokens"] += len(prompt) if is_single else sum(len(prompt) + len(e) for e in endings)
            counts["num_targets"] += sum(map(len, endings))
    return data
