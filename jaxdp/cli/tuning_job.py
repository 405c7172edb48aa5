"""What `jaxdp finetune` trains on what: the model taken apart, the records as arrays, and the loss between them."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate, text
from jaxdp.cli.finetune_options import DataOptions, ModelOptions
from jaxdp.fingerprint import fingerprint
from jaxdp.models import CausalLM, Lora, causal_lm
from jaxdp.models.lora import add_adapters
from jaxdp.models.peft import load_adapter
from jaxdp.models.tokenizer import Tokenizer, check_matches, load_tokenizer
from jaxdp.models.trainable import join, parts
from jaxdp.models.weights import Pretrained, load_model, open_model, read_config
from jaxdp.text.records import FORMATS

ADAPTER_TUNING = ("lora", "ffa-lora")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A model taken apart.

    Attributes:
        base: The model with its adapters, if any, and all parameters before training.
        trainable: The part of them that is trained: arrays on the host, or blocks that stay in the model's files.
        frozen: The rest.
    """

    base: Pretrained
    trainable: Any
    frozen: Any

    @property
    def model(self) -> CausalLM:
        return self.base.model

    def released(self, trainable: Any) -> Pretrained:
        """The model with other trainable parameters; the frozen ones are those of the base, bit for bit."""
        return dataclasses.replace(self.base, params=join(_on_host(trainable), self.frozen))

    def without_arrays(self, *, keep_frozen: bool) -> Tuning:
        """What is still needed once the parameters have been copied to where they are trained.

        Args:
            keep_frozen: Whether the frozen ones will be written out again.
        """
        base = dataclasses.replace(self.base, params={})
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.trainable)
        return Tuning(base, shapes, self.frozen if keep_frozen else {})

    def fingerprint(self) -> str:
        """SHA-256 of all parameters before training, which are public: a resumed run must begin with the same."""
        return fingerprint(self.base.params)


@dataclasses.dataclass(frozen=True)
class Records:
    """The private records as arrays, and what is known about them.

    Attributes:
        data: One row for each privacy unit, as `jaxdp.text` encodes them.
        report: What encoding kept and left out: not private.
        evaluation: Records to evaluate on, in the same form; None for none.
        num_evaluation_records: How many those are.
        num_shared: How many of those are also among the private records.
        is_choice: Whether the records are texts with labels.
    """

    data: dict[str, np.ndarray]
    report: text.EncodingReport
    evaluation: dict[str, np.ndarray] | None
    num_evaluation_records: int
    num_shared: int
    is_choice: bool


def check_model_options(options: ModelOptions) -> None:
    """Refuses options that contradict each other, before anything is read."""
    has_adapters = options.tune in ADAPTER_TUNING
    for flag, value in (
        ("--lora-rank", options.lora_rank),
        ("--lora-alpha", options.lora_alpha),
        ("--lora-targets", options.lora_targets or None),
        ("--adapter", options.adapter),
    ):
        if value is not None and not has_adapters:
            raise ValueError(f"{flag} needs --tune lora or ffa-lora, and this is --tune {options.tune}; leave one out.")
        if value is not None and flag != "--adapter" and options.adapter is not None:
            raise ValueError(
                f"{flag} contradicts --adapter, whose adapters have rank, alpha and targets; leave one out."
            )
    if options.last_k is not None and options.tune != "last-k":
        raise ValueError(f"--last-k needs --tune last-k, and this is --tune {options.tune}; leave one out.")
    if options.from_scratch and options.adapter is not None:
        raise ValueError("--from-scratch contradicts --adapter, which belongs to trained weights; leave one out.")
    _validate.nonnegative_integer("init_seed", options.init_seed)


def load_tuning(
    options: ModelOptions,
    *,
    dtype: str,
    param_dtype: str = "float32",
    keep_float32: bool = False,
    in_memory: bool = False,
) -> tuple[Tuning, Tokenizer]:
    """Reads the model and its tokenizer, adds adapters, and takes the parameters apart.

    Trained parameters are `param_dtype`, adapters float32. Frozen ones below an adapter stay as in the file, unless
    `keep_float32`. Blocks stay in the model's files until they are asked for, unless `in_memory`.

    Raises:
        ValueError, TypeError, OSError: the folder is not what it should be, or the options do not fit the model.
    """
    key = jax.random.key(options.init_seed)
    if options.from_scratch:
        config = read_config(options.model)
        model = causal_lm(config, dtype=jnp.dtype(dtype))
        base = Pretrained(model, model.init(key, jnp.dtype(param_dtype)), config, options.model)
    else:
        as_in_file = options.tune in ADAPTER_TUNING and not keep_float32
        kept = None if as_in_file else jnp.dtype(param_dtype)
        read = load_model if in_memory else open_model
        base = read(options.model, dtype=jnp.dtype(dtype), param_dtype=kept)
    tokenizer = load_tokenizer(options.model)
    check_matches(tokenizer, base.model)
    model, params = base.model, base.params
    if options.adapter is not None:
        model, params = load_adapter(options.adapter, model, params)
    elif options.tune in ADAPTER_TUNING:
        rank = 8 if options.lora_rank is None else options.lora_rank
        alpha = 2.0 * rank if options.lora_alpha is None else options.lora_alpha
        lora = Lora(rank, alpha, options.lora_targets or ("all-linear",))
        model, params = add_adapters(jax.random.fold_in(key, 1), model, params, lora)
    params = _on_host(params)
    last_k = (1 if options.last_k is None else options.last_k) if options.tune == "last-k" else None
    trainable, frozen = parts(model, params, options.tune, last_k=last_k)
    return Tuning(dataclasses.replace(base, model=model, params=params), trainable, frozen), tokenizer


def _on_host(params: Any) -> Any:
    """What is on a device, from there; whatever is not stays where it is, a block in its file."""
    return jax.tree.map(lambda leaf: jax.device_get(leaf) if isinstance(leaf, jax.Array) else leaf, params)


def narrowed(frozen: Any, model: CausalLM) -> Any:
    """The shapes of the frozen parameters as the step takes them: matrices in the dtype that they are cast to at use."""

    def shape(path: Any, leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        is_cast_at_use = _validate.leaf_name(path).split("/")[-1] in ("kernel", "table")
        is_wider = leaf.dtype.itemsize > model.dtype.itemsize
        return jax.ShapeDtypeStruct(leaf.shape, model.dtype if is_cast_at_use and is_wider else leaf.dtype)

    return jax.tree_util.tree_map_with_path(shape, frozen)


def on_device(frozen: Any, model: CausalLM) -> Any:
    """The frozen parameters as `narrowed` says, one leaf after the other."""
    return jax.tree.map(
        lambda leaf, shape: jax.device_put(np.asarray(leaf).astype(shape.dtype)), frozen, narrowed(frozen, model)
    )


def read_records(options: DataOptions, model: CausalLM, tokenizer: Tokenizer) -> Records:
    """Reads and encodes the private records, and those to evaluate on.

    Raises:
        ValueError, OSError: a file is not what the options say; the message names file and line.
    """
    if (options.label_field is None) != (options.verbalizers is None):
        raise ValueError("--label-field and --verbalizers belong together: which field holds the class, and its words.")
    if options.template is not None and options.label_field is None:
        raise ValueError("--template is for texts with labels; give --label-field and --verbalizers, or leave it out.")
    if options.max_length is not None and options.max_length > model.config.max_length:
        raise ValueError(
            f"--max-length {options.max_length} exceeds the model's context of {model.config.max_length}; use at most that."
        )
    private = _read(options, options.data, options.unit_field)
    data, report = _encode(options, private, model, tokenizer)
    evaluation, public = None, []
    if options.eval is not None:
        public = _read(options, options.eval, None)
        evaluation, _ = _encode(options, public, model, tokenizer, is_private=False)
    shared = {_content(record) for record in private}
    num_shared = sum(_content(record) in shared for record in public)
    return Records(data, report, evaluation, len(public), num_shared, options.label_field is not None)


def _content(record: text.Record) -> tuple[str, str, str | None]:
    return record.prompt, record.completion, record.label


def max_length(options: DataOptions, model: CausalLM) -> int:
    return min(512, model.config.max_length) if options.max_length is None else options.max_length


def _read(options: DataOptions, path: Path, unit: str | None) -> list[text.Record]:
    fields = text.Fields(
        text=options.text_field or ("text" if options.label_field and not options.prompt_field else None),
        prompt=options.prompt_field,
        completion=options.completion_field,
        label=options.label_field,
        unit=unit,
    )
    return text.read_records(path, fields=fields, format=options.format, record=options.record)


def _encode(
    options: DataOptions, records: list[text.Record], model: CausalLM, tokenizer: Tokenizer, *, is_private: bool = True
) -> tuple[dict[str, np.ndarray], text.EncodingReport]:
    shape: dict[str, Any] = {"max_length": max_length(options, model), "on_long": options.on_long}
    shape["max_sequences"] = options.max_sequences if is_private else None
    if options.label_field is not None:
        template = "{text} It was" if options.template is None else options.template
        words = verbalizers(options.verbalizers or "", template)
        return text.encode_choices(records, tokenizer, template=template, verbalizers=words, **shape)
    if options.prompt_field is not None or options.completion_field is not None:
        return text.encode_completions(records, tokenizer, **shape)
    if not is_private:
        shape["on_long"] = "split"  # every token counts
    return text.encode_texts(records, tokenizer, **shape)


def verbalizers(listing: str, template: str) -> dict[str, str]:
    """`0=terrible,1=great` as `{"0": " terrible", "1": " great"}`: with the space that the template does not end with."""
    words: dict[str, str] = {}
    for item in listing.split(","):
        label, separator, word = (part.strip() for part in item.partition("="))
        if not separator or not label or not word or label in words:
            raise ValueError(
                f"--verbalizers {listing!r}: {item!r} is not LABEL=WORD for another label; write them as in '0=terrible,1=great'."
            )
        words[label] = word if template[-1:].isspace() else f" {word}"
    return words


def make_loss(model: CausalLM, *, is_choice: bool, remat: bool) -> Any:
    """`loss_fn(trainable, example, frozen)` of one privacy unit."""
    loss = text.choice_loss if is_choice else text.language_model_loss

    def loss_fn(trainable: Any, example: Any, frozen: Any) -> jax.Array:
        params = join(trainable, frozen)
        return loss(lambda tokens: model.logits(params, tokens, remat=remat), example)

    return loss_fn


def evaluate(model: CausalLM, params: Any, records: Records, *, when: str) -> dict[str, Any] | None:
    """Perplexity, or accuracy, of the evaluation records; None without them."""
    if records.evaluation is None:
        return None
    if records.is_choice:
        return scores_of(text.evaluate_choices(model.logits, params, records.evaluation), when=when)
    return scores_of(text.evaluate_language_model(model.logits, params, records.evaluation), when=when)


def scores_of(score: text.LanguageModelScore | text.ChoiceScore, *, when: str) -> dict[str, Any]:
    """A score for `report.json`, and on the screen."""
    if isinstance(score, text.ChoiceScore):
        found = {"accuracy": score.accuracy, "loss": score.loss, "num_examples": score.num_examples}
    else:
        found = {"perplexity": score.perplexity, "loss": score.loss, "num_tokens": score.num_tokens}
    found = {name: value if math.isfinite(value) else None for name, value in found.items()}
    print(f"{when}: {', '.join(f'{name} {value:.6g}' for name, value in found.items() if value)}", flush=True)
    return found


def warn(message: str) -> None:
    """Says on stderr what may be wrong and does not stop the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def unit_noun(options: DataOptions) -> str | None:
    """What a statement calls one unit of the guarantee; None where it is one record."""
    return None if options.unit_field is None else "privacy unit"


def privacy_unit(options: DataOptions) -> str:
    """What one unit of the guarantee is, in words."""
    if options.unit_field is not None:
        return (
            f"All records with the same value of the field {options.unit_field!r}, of which at most {options.max_sequences} "
            f"sequence{'s' * (options.max_sequences > 1)} are used."
        )
    kind = options.format or FORMATS.get(options.data.suffix.lower())
    if kind == "text":
        what = {"paragraph": "One paragraph", "line": "One line", "file": "The whole"}[options.record or "paragraph"]
        return f"{what} of the text file."
    return "One record of the file. Several records of one person count as several units; group them with --unit-field."
