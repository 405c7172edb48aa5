"""Text to token ids and back, through the `tokenizers` library, from the files of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxdp.models.causal_lm import CausalLM
from jaxdp.models.folders import existing_folder, file_names, read_json

#: Names under which byte-level BPE comes as two files: Hugging Face's, OpenAI's, and metaseq's (OPT).
_VOCABULARIES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("gpt2-vocab.json", "gpt2-merges.txt"),
)
_REMEDY = "give the folder of a Hugging Face model, with tokenizer.json, or vocab.json and merges.txt."


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids that the model was trained with.

    Attributes:
        eos_id: Ends a text; None if the folder names none.
        bos_id: Begins a text; None if the folder names none.
        pad_id: Fills up a batch; None if the folder names none.
        vocab_size: One more than the largest id.
    """

    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    vocab_size: int
    _plain: tokenizers.Tokenizer

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._plain.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special_tokens: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text. Where it spells a special token, `</s>` say, the letters are encoded, so that a record cannot end
                another or speak for the system.
            add_special_tokens: Add what the tokenizer's template puts around a text: BOS, for most models.
            allow_special_tokens: Take special tokens that the text spells for what they are: for prompts of one's own,
                never for records.
        """
        tokenizer = self._with_special if allow_special_tokens else self._plain
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; special tokens leave no trace unless `skip_special_tokens=False`."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads `tokenizer.json`, or the vocabulary and merges of a byte-level BPE (GPT-2, OPT), and the special tokens.

    EOS, BOS and padding are named by `tokenizer_config.json`, else `special_tokens_map.json`, else `config.json`. A
    vocabulary with merges that no file says this of has GPT-2's, `<|endoftext|>` for EOS and BOS, or OPT's, `</s>` for both.
    OPT puts BOS before a text, unless `add_bos_token` is false.

    Raises:
        FileNotFoundError: no folder, or no tokenizer in it.
        ValueError: a file is broken, or a special token is not in the vocabulary.
    """
    folder = existing_folder(folder, what="tokenizer", remedy=_REMEDY)
    settings, special_tokens_map, config = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    )
    file = folder / "tokenizer.json"
    tokenizer = _from_file(file) if file.exists() else _byte_level_bpe(folder)
    is_opt = config.get("model_type", "opt" if _is_fairseq(tokenizer) else None) == "opt"
    # A file may ask for padding or a cut to the length of the model it was made for; the caller decides on both.
    tokenizer.no_padding()
    tokenizer.no_truncation()

    tokens = {}
    for role in ("eos", "bos", "pad", "unk"):
        token = _content(settings.get(f"{role}_token")) or _content(special_tokens_map.get(f"{role}_token"))
        tokens[role] = _id_of(tokenizer, role, token, folder) if token else _id_in(config, role)
    if not file.exists():
        for role, usual in _usual_tokens(is_opt).items():
            if tokens[role] is None:
                tokens[role] = tokenizer.token_to_id(usual)
    special = [tokenizer.id_to_token(i) for i in tokens.values() if i is not None]
    # Whatever ends or begins a text is special, also where the vocabulary lists it as a word like others.
    tokenizer.add_special_tokens([token for token in special if token is not None])
    if not file.exists() and settings.get("add_bos_token", is_opt) and tokens["bos"] is not None:
        bos = tokenizer.id_to_token(tokens["bos"])
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{bos}:0 $A:0", pair=None, special_tokens=[(bos, tokens["bos"])]),
            ]
        )

    tokenizer.encode_special_tokens = True
    return Tokenizer(
        eos_id=tokens["eos"],
        bos_id=tokens["bos"],
        pad_id=tokens["pad"],
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        _plain=tokenizer,
    )


def check_matches(tokenizer: Tokenizer, model: CausalLM) -> None:
    """Refuses a tokenizer with ids beyond the model's embedding: the logits would be NaN.

    Raises:
        ValueError: with both sizes.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding {model.config.vocab_size} rows; "
            "take the tokenizer from the folder of the model."
        )


def _from_file(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file} is no tokenizer ({error}); copy it again from where the model came.") from error


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    for vocabulary, merges in _VOCABULARIES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            try:
                bpe = models.BPE.from_file(str(folder / vocabulary), str(folder / merges))
            except Exception as error:  # the library raises bare Exceptions
                raise ValueError(
                    f"{folder / vocabulary} and {merges} are no byte-level BPE ({error}); copy both again."
                ) from error
            tokenizer = tokenizers.Tokenizer(bpe)
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return tokenizer
    hint = " Convert tokenizer.model to tokenizer.json first." if (folder / "tokenizer.model").exists() else ""
    raise FileNotFoundError(f"no tokenizer in {folder}, which holds {file_names(folder)}; {_REMEDY}{hint}")


def _is_fairseq(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the vocabulary begins as OPT's does; GPT-2's knows neither of these."""
    return [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>")] == [0, 1, 2]


def _usual_tokens(is_opt: bool) -> dict[str, str]:
    if is_opt:
        return {"eos": "</s>", "bos": "</s>", "pad": "<pad>", "unk": "</s>"}
    return dict.fromkeys(("eos", "bos", "unk"), "<|endoftext|>")


def _content(token: Any) -> str | None:
    """A special token is a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _id_of(tokenizer: tokenizers.Tokenizer, role: str, token: str, folder: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"{folder} names {token!r} as {role}_token, which its vocabulary lacks; the files belong to different models: take "
            "all of them from one."
        )
    return found


def _id_in(config: dict[str, Any], role: str) -> int | None:
    """`eos_token_id` of a config.json; the first where several end a text."""
    value = config.get(f"{role}_token_id")
    return value[0] if isinstance(value, list) and value else value if isinstance(value, int) else None
