"""Records to arrays of tokens of one fixed shape, one row per privacy unit.

Axes: `n` privacy units, `S` sequences of one unit, `L` tokens of one sequence. `weights[i, s, t]` is 1 where the loss counts
the prediction of token `t` from those before it, else 0: padding and prompts are not counted, nor is the first token.

**Guarantee**: row `i` is a function of unit `i`, of the tokenizer and of the options alone: no sequence holds tokens of two
units (S3). `S` and `L` are options, hence public. Errors come before any work starts and are the owner's; the report that
is returned beside the arrays is computed from the records without noise: it is *not private* (S15).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np

from jaxdp import _validate
from jaxdp.text.records import Record

Data: TypeAlias = dict[str, np.ndarray]
OnLong: TypeAlias = Literal["error", "truncate", "split"]


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer, such as that of `jaxdp.models.load_tokenizer`."""

    @property
    def eos_id(self) -> int | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class EncodingReport:
    """What encoding kept and left out. *Not private*: counts of the records themselves (S15).

    Attributes:
        num_records: Records that were read.
        num_units: Privacy units, `n`: what `num_examples` of the plan must be.
        num_sequences: Sequences kept; all candidates of a classified text count as one.
        num_tokens: Tokens in them, without padding.
        num_targets: Tokens whose prediction the loss counts.
        longest: Tokens of the longest record before any cut; `max_length` above it is padding.
        num_truncated: Records cut to `max_length`.
        num_split: Records spread over several sequences.
        num_capped_units: Units with more sequences than `max_sequences`.
        num_dropped_sequences: The sequences that these lost.
        num_dropped_tokens: Tokens lost to either cut.
        num_units_without_targets: Units in which nothing is counted: their loss is 0, and they teach nothing.
        num_merged: Prompts whose last token merged with the first of what follows, as "It was" and "hing": the loss counts
            the merged token, which generation from that prompt cannot produce. End prompts at a word.
    """

    num_records: int
    num_units: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    longest: int
    num_truncated: int = 0
    num_split: int = 0
    num_capped_units: int = 0
    num_dropped_sequences: int = 0
    num_dropped_tokens: int = 0
    num_units_without_targets: int = 0
    num_merged: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.num_records} records of {self.num_units} privacy units: {self.num_sequences} sequences, {self.num_targets} "
            f"tokens to predict; the longest record has {self.longest} tokens"
        ]
        for count, what in (
            (self.num_truncated, "records cut at the end of the context"),
            (self.num_split, "records split over several sequences"),
            (self.num_capped_units, f"units lost {self.num_dropped_sequences} sequences beyond max_sequences"),
            (self.num_dropped_tokens, "tokens left out"),
            (self.num_units_without_targets, "units with nothing to predict"),
            (self.num_merged, "prompts merged with what follows them"),
        ):
            parts += [f"{count} {what}"] if count else []
        return "; ".join(parts) + " (not private)"


def encode_texts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_sequences: int | None = 1,
    on_long: OnLong = "error",
    append_eos: bool = True,
) -> tuple[Data, EncodingReport]:
    """Texts for language modeling: every token is predicted from those before it, once.

    Each text begins as the tokenizer's convention has it (BOS for OPT and Llama, nothing for GPT-2) and ends with EOS. The
    texts of one unit are joined in the order of the file and cut into windows; a window begins with the last token of the
    one before it, so that nothing goes unpredicted. BOS is never a target.

    Args:
        records: Of `read_records`, without prompts and labels.
        tokenizer: The model's.
        max_length: `L`, at most the model's context.
        max_sequences: `S`; what a unit has beyond it is left out and reported. None takes what the largest unit needs,
            which makes the shape depend on the data: for evaluation sets, never for private ones.
        on_long: What to do with a text of more than `max_length` tokens: an "error"; "truncate" keeps its beginning (and no
            EOS: it does not end there); "split" goes on in the next window.
        append_eos: Whether a text ends with EOS, where the tokenizer has one. Without it the model does not learn to stop.

    Returns:
        `{"tokens": int32 [n, S, L], "weights": float32 [n, S, L]}`, and the report.

    Raises:
        ValueError: an option is out of range, the records are of another kind, or a text is too long under "error".
    """
    check_options(max_length, max_sequences, on_long)
    if any(record.prompt or record.label is not None for record in records):
        raise ValueError("these records have prompts or labels; use encode_completions or encode_choices.")
    leading, trailing = leading_tokens(tokenizer), trailing_tokens(tokenizer, append_eos)
    counts, units = Counter(), []
    for unit in units_of(records):
        if len(unit) > 1 and not leading + trailing:
            raise ValueError(
                f"{unit[1].place}: unit {unit[1].unit!r} has several texts, and nothing separates them: the tokenizer has "
                "neither BOS nor EOS to add. Leave append_eos on, give the tokenizer an EOS, or make each record a unit."
            )
        stream, is_target, is_cut = [], [], False
        for record in unit:
            if is_cut:  # what was cut does not end there, and yet something must stand before the next text
                stream += trailing
                is_target += [False] * len(trailing)
            tokens = [*leading, *tokenizer.encode(record.completion, add_special_tokens=False), *trailing]
            counts["longest"] = max(counts["longest"], len(tokens))
            is_long = len(tokens) > max_length
            is_cut = is_long and on_long == "truncate"
            if is_long:
                if on_long == "error":
                    raise too_long(record, len(tokens), max_length, "'truncate' or 'split'")
                counts["num_truncated" if is_cut else "num_split"] += 1
                if is_cut:
                    counts["num_dropped_tokens"] += len(tokens) - max_length
                    tokens = tokens[:max_length]
            stream += tokens
            is_target += [position >= len(leading) for position in range(len(tokens))]
        starts = range(0, max(len(stream) - 1, 1), max_length - 1)
        units.append([(stream[s : s + max_length], is_target[s : s + max_length]) for s in starts])
    return pack(units, tokenizer, max_length, max_sequences, len(records), counts, overlap=1)


def units_of(records: Sequence[Record]) -> list[list[Record]]:
    """Groups records by privacy unit, in order of first appearance; a record without a unit is one by itself."""
    units: dict[str | int, list[Record]] = {}
    for index, record in enumerate(records):
        units.setdefault(index if record.unit is None else record.unit, []).append(record)
    if not units:
        raise ValueError("there are no records to encode; give at least one.")
    return list(units.values())


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's convention puts before a text: BOS for OPT and Llama, nothing for GPT-2."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = [s for s in range(len(full) - len(plain) + 1) if full[s : s + len(plain)] == plain]
    return list(full[: starts[0]]) if starts else []


def trailing_tokens(tokenizer: Tokenizer, append_eos: bool) -> list[int]:
    return [tokenizer.eos_id] if append_eos and tokenizer.eos_id is not None else []


def split_prompt(
    tokenizer: Tokenizer, record: Record, prompt: str, endings: Sequence[str], counts: Counter[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens of `prompt` that all of `prompt + ending` begin with, and what follows them in each."""
    alone = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    joined = [tokenizer.encode(prompt + ending, add_special_tokens=False) for ending in endings]
    shared = min(_common_prefix(alone, tokens) for tokens in joined)
    counts["num_merged"] += shared < len(alone)
    for ending, tokens in zip(endings, joined, strict=True):
        if len(tokens) == shared:
            what = "the completion" if len(endings) == 1 else repr(ending)
            raise ValueError(f"{record.place}: {what} has no token of its own behind the prompt; write a longer one.")
    return list(joined[0][:shared]), [list(tokens[shared:]) for tokens in joined]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    if second[: len(first)] == first:
        return len(first)
    return next(
        (t for t, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def check_options(max_length: int, max_sequences: int | None, on_long: str, *, may_split: bool = True) -> None:
    if _validate.positive_integer("max_length", max_length) < 2:
        raise ValueError(f"max_length must be at least 2, a token and the one that it predicts; got {max_length}.")
    if max_sequences is not None:
        _validate.positive_integer("max_sequences", max_sequences)
    _validate.one_of("on_long", on_long, ("error", "truncate", "split"))
    if on_long == "split" and not may_split:
        raise ValueError("on_long='split' would part an answer from its prompt; use on_long='truncate'.")
    if on_long == "split" and max_sequences == 1:
        raise ValueError(
            "on_long='split' with max_sequences=1 has no second sequence to go on in; raise max_sequences, or say "
            "on_long='truncate'."
        )


def room_after(leading: Sequence[int], max_length: int) -> int:
    """Tokens of a sequence behind those that begin every text."""
    if max_length < len(leading) + 2:
        raise ValueError(
            f"max_length={max_length} has no room for a prompt and an answer behind the {len(leading)} tokens that begin "
            f"every text; it must be at least {len(leading) + 2}."
        )
    return max_length - len(leading)


def too_long(record: Record, length: int, max_length: int, ways: str, *, prompt: int = 0) -> ValueError:
    what = f"{length} tokens, and max_length is {max_length}"
    if prompt >= max_length:
        what = f"{prompt} tokens of prompt leave no room for the completion in max_length={max_length}"
    return ValueError(f"{record.place}: {what}; raise max_length, shorten it, or choose on_long={ways}.")


def pack(
    units: Sequence[Sequence[tuple[list[int], list[bool]]]],
    tokenizer: Tokenizer,
    max_length: int,
    max_sequences: int | None,
    num_records: int,
    counts: Counter[str],
    *,
    overlap: int,
) -> tuple[Data, EncodingReport]:
    """Sequences of each unit to arrays; `overlap` tokens of a sequence are in the one before it."""
    kept = max(map(len, units)) if max_sequences is None else max_sequences
    shape = (len(units), kept, max_length)
    tokens = np.full(shape, 0 if tokenizer.pad_id is None else tokenizer.pad_id, np.int32)
    weights = np.zeros(shape, np.float32)
    for i, sequences in enumerate(units):
        for s, (ids, is_target) in enumerate(sequences[:kept]):
            tokens[i, s, : len(ids)] = ids
            weights[i, s, : len(ids)] = is_target
            counts["num_sequences"] += 1
            counts["num_tokens"] += len(ids)
        for ids, _ in sequences[kept:]:
            counts["num_dropped_sequences"] += 1
            counts["num_dropped_tokens"] += len(ids) - overlap
        counts["num_capped_units"] += len(sequences) > kept
    weights[:, :, 0] = 0.0  # nothing comes before it
    counts["num_targets"] = int(weights.sum(dtype=np.int64))
    counts["num_units_without_targets"] = int((~weights.any((1, 2))).sum())
    return {"tokens": tokens, "weights": weights}, report_of(num_records, len(units), counts)


def report_of(num_records: int, num_units: int, counts: Counter[str]) -> EncodingReport:
    return EncodingReport(
        num_records=num_records,
        num_units=num_units,
        **{field.name: counts[field.name] for field in dataclasses.fields(EncodingReport)[2:]},
    )


def fingerprint(data: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of encoded records: a resumed run must see the same data (S8). It identifies them: not private."""
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(repr((name, data[name].shape, data[name].dtype.str)).encode())
        digest.update(np.ascontiguousarray(data[name]).data)
    return digest.hexdigest()
