"""SST-2 in two parts that share no sentence: private sentences to fine-tune on, and public phrases to pretrain a model on.

SST-2's training phrases are parts of some 5,500 sentences. A private sentence is one privacy unit, and no phrase that lies in
private sentences alone is public. The model reads public phrases with a verdict in words behind them, as reviews have it;
the private task asks for other words.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

#: A text and its label, "0" or "1".
Phrase: TypeAlias = tuple[str, str]

#: What a public text says after its phrase.
VERDICTS = {"0": "it was bad .", "1": "it was good ."}
#: Words of a sentence, at least; shorter phrases that lie in no other are no sentences.
_FEWEST_WORDS = 6
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def read_phrases(*paths: Path) -> list[Phrase]:
    """The phrases of files with the columns sentence and label."""
    found = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found += [(" ".join(row["sentence"].split()), row["label"]) for row in rows]
    return found


def split(phrases: Sequence[Phrase], *, num_private: int, seed: int = 0) -> tuple[list[Phrase], list[Phrase]]:
    """Private sentences, and the public phrases: those that lie in a sentence that is not private.

    Raises:
        ValueError: there are not more than `num_private` sentences.
    """
    sentences = whole_sentences(phrases)
    if len(sentences) <= num_private:
        raise ValueError(f"num_private={num_private}, and the phrases make {len(sentences)} sentences; ask for fewer.")
    is_private = np.zeros(len(sentences), bool)
    is_private[np.random.default_rng(seed).permutation(len(sentences))[:num_private]] = True
    private = [sentence for sentence, chosen in zip(sentences, is_private, strict=True) if chosen]
    rest = "\n".join(f" {text} " for (text, _), chosen in zip(sentences, is_private, strict=True) if not chosen)
    return private, [phrase for phrase in phrases if f" {phrase[0]} " in rest]


def whole_sentences(phrases: Sequence[Phrase]) -> list[Phrase]:
    """The phrases that lie in no longer one, longest first."""
    found, text = [], ""
    for phrase in sorted(dict(phrases).items(), key=lambda phrase: (-len(phrase[0]), phrase[0])):
        if len(phrase[0].split()) >= _FEWEST_WORDS and f" {phrase[0]} " not in text:
            found.append(phrase)
            text += f" {phrase[0]} \n"
    return found


def write_records(path: Path, phrases: Sequence[Phrase]) -> Path:
    """JSON lines with a text and a label."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in phrases]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_public_text(path: Path, phrases: Sequence[Phrase]) -> Path:
    """JSON lines of texts for pretraining: each phrase with its verdict."""
    lines = [json.dumps({"text": f"{text} {VERDICTS[label]}"}) for text, label in phrases]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_untrained_model(folder: Path, phrases: Sequence[Phrase], *, vocabulary: int, **sizes: Any) -> Path:
    """A folder for `jaxdp finetune --from-scratch`: the configuration of a small Llama, and a tokenizer of the public text.

    Args:
        folder: Made if needed.
        phrases: Public.
        vocabulary: Tokens.
        sizes: Of Hugging Face's `LlamaConfig`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{text} {VERDICTS[label]}" for text, label in phrases], trainer)
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name.replace("token", "token_id"): tokenizer.token_to_id(token) for name, token in _SPECIAL.items()}
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        **ids,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(_SPECIAL), encoding="utf-8")
    return folder
