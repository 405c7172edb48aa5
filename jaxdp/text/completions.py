"""Prompts and completions to arrays of tokens of one fixed shape; the guarantee is that of `jaxdp.text.encoding`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxdp.text.encoding import (
    Data,
    EncodingReport,
    OnLong,
    Tokenizer,
    check_options,
    leading_tokens,
    pack,
    room_after,
    split_prompt,
    too_long,
    trailing_tokens,
    units_of,
)
from jaxdp.text.records import Record


def encode_completions(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_sequences: int | None = 1,
    on_long: OnLong = "error",
    append_eos: bool = True,
) -> tuple[Data, EncodingReport]:
    """Prompts and completions: the loss counts the completion, and the EOS behind it.

    Prompt and completion are tokenized as one text, as the model would meet them; the completion is what follows the tokens
    that they have in common with the prompt alone. Each record is one sequence: no record of a unit sees another.

    Args:
        records: Of `read_records` with `Fields(prompt=..., completion=...)`.
        tokenizer: The model's.
        max_length: `L`, at most the model's context.
        max_sequences: `S`, as in `encode_texts`; the first records of a unit are kept.
        on_long: What to do with a record of more than `max_length` tokens: an "error"; or "truncate", which drops the
            oldest tokens of the prompt (after BOS), and the end of the completion only where that does not do.
        append_eos: Whether a completion ends with EOS, where the tokenizer has one.

    Returns:
        `{"tokens": int32 [n, S, L], "weights": float32 [n, S, L]}`, and the report.

    Raises:
        ValueError: an option is out of range, the records are of another kind, or one is too long under "error".
    """
    check_options(max_length, max_sequences, on_long, may_split=False)
    leading, trailing = leading_tokens(tokenizer), trailing_tokens(tokenizer, append_eos)
    room = room_after(leading, max_length)
    counts, units = Counter(), []
    for unit in units_of(records):
        sequences = []
        for record in unit:
            if not record.completion:
                raise ValueError(f"{record.place}: no completion; for texts with labels use encode_choices.")
            prompt, (completion,) = split_prompt(tokenizer, record, record.prompt, [record.completion], counts)
            completion += trailing
            length = len(leading) + len(prompt) + len(completion)
            counts["longest"] = max(counts["longest"], length)
            if length > max_length:
                if on_long == "error":
                    raise too_long(record, length, max_length, "'truncate'", prompt=len(leading) + len(prompt))
                counts["num_truncated"] += 1
                counts["num_dropped_tokens"] += length - max_length
                completion = completion[: max(room - min(len(prompt), 1), 1)]
                prompt = prompt[len(prompt) - (room - len(completion)) :]
            known = len(leading) + len(prompt)
            sequences.append(([*leading, *prompt, *completion], [False] * known + [True] * len(completion)))
        units.append(sequences)
    return pack(units, tokenizer, max_length, max_sequences, len(records), counts, overlap=0)
