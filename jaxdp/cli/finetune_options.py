"""The options of `jaxdp finetune`, by section."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from jaxdp.accounting import AccountantName
from jaxdp.cli import options
from jaxdp.cli.optimizers import ScheduleName
from jaxdp.cli.options import Flag, hint
from jaxdp.clipping.policies import NoiseAllocation

TuneName: TypeAlias = Literal["full", "lora", "ffa-lora", "bitfit", "last-k"]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model, and which part of it is trained."""

    model: Path
    """Hugging Face folder of a GPT-2, OPT, Llama, Mistral or Qwen3 model: config.json, safetensors, tokenizer."""
    tune: TuneName = "full"
    """full: everything. lora: low-rank adapters. ffa-lora: adapters whose A stays as drawn. bitfit: the biases. last-k: the last
    blocks."""
    lora_rank: Annotated[int | None, hint("default: 8")] = None
    """Rank of the adapters."""
    lora_alpha: Annotated[float | None, hint("default: twice the rank")] = None
    """Adapters are scaled by alpha / rank."""
    lora_targets: Annotated[tuple[str, ...], hint("default: all-linear", "NAME [NAME ...]")] = ()
    """Which layers get adapters: names such as q and v, paths such as 'blocks/attention/*', or all-linear."""
    adapter: Annotated[Path | None, hint("default: new adapters", "DIR")] = None
    """PEFT adapter folder to start from."""
    last_k: Annotated[int | None, hint("default: 1")] = None
    """How many blocks to train under last-k."""
    from_scratch: Flag[bool] = False
    """Draw the parameters of config.json at random; needs no weights. For small experiments."""
    init_seed: int = 0
    """Seed of parameters drawn at random, which are public. Noise and sampling take theirs from the operating system."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The private records, and the records to evaluate on."""

    data: Path
    """File of records: JSON lines, CSV or TSV with a header, or plain text."""
    eval: Annotated[Path | None, hint("default: no evaluation", "FILE")] = None
    """Records to evaluate on before and after, read as --data is. They get no privacy: keep them apart from --data."""
    format: Annotated[Literal["jsonl", "csv", "tsv", "text"] | None, hint("default: by extension")] = None
    """Format of both files."""
    record: Annotated[Literal["paragraph", "line", "file"] | None, hint("default: paragraph")] = None
    """What one record of plain text is."""
    text_field: Annotated[str | None, hint("default: text")] = None
    """Field of the text, or several in braces: '{title}: {body}'."""
    prompt_field: Annotated[str | None, hint("default: none")] = None
    """Field of a prompt, which the loss does not count; with --completion-field."""
    completion_field: Annotated[str | None, hint("default: none")] = None
    """Field of what the model shall write."""
    label_field: Annotated[str | None, hint("default: none")] = None
    """Field of a class: the model is trained to choose its word; with --verbalizers."""
    verbalizers: Annotated[str | None, hint("default: none", "LABEL=WORD,LABEL=WORD")] = None
    """The word of each class: '0=terrible,1=great'."""
    template: Annotated[str | None, hint("default: '{text} It was'")] = None
    """What stands before the word of a class."""
    unit_field: Annotated[str | None, hint("default: one record is one unit", "FIELD")] = None
    """Whom privacy protects: all records with one value of this field, such as user_id, are one unit."""
    max_sequences: Annotated[int, tyro.conf.arg(metavar="S")] = 1
    """Sequences that one unit may fill; the rest of its text is left out."""
    max_length: Annotated[int | None, hint("default: the model's context, at most 512", "TOKENS")] = None
    """Tokens of one sequence."""
    on_long: Literal["error", "truncate", "split"] = "error"
    """What to do with a text longer than --max-length."""


@dataclasses.dataclass(frozen=True)
class PrivacyOptions:
    """The guarantee."""

    method: Literal["dpsgd"] = "dpsgd"
    """How the model is trained."""
    target_epsilon: Annotated[float | None, hint("default: 3, unless --noise-multiplier is given")] = None
    """The privacy goal."""
    target_delta: Annotated[float | None, hint("default: 1 / n^1.1 for n units")] = None
    """The delta of the goal; well below 1 / number of units."""
    noise_multiplier: Annotated[float | None, hint("default: calibrated to the goal")] = None
    """Noise std over clip norm, instead of a goal."""
    no_privacy: Flag[bool] = False
    """The baseline: the same run without clipping and noise."""
    expected_batch_size: Annotated[float | None, hint("default: 64")] = None
    """Mean number of units of the Poisson batches."""
    sampling_prob: Annotated[float | None, hint("default: from --expected-batch-size")] = None
    """Probability of each unit to enter a batch, instead of its mean size."""
    num_steps: Annotated[int | None, hint("default: from --epochs")] = None
    """Number of steps."""
    epochs: Annotated[float | None, hint("default: 3")] = None
    """Expected passes over the data, rounded up to whole steps."""
    clipping: options.ClippingName = "flat"
    """How each per-unit gradient is bounded; per-layer takes every block's layers apart."""
    l2_clip_norm: float = 1.0
    """Clip norm; the first one under quantile."""
    noise_allocation: NoiseAllocation = "global"
    """How per-layer clipping divides its noise."""
    neighboring_relation: options.RelationName = "add-or-remove-one"
    """Which data sets the guarantee makes hard to tell apart."""
    padded_batch_size: Annotated[int | None, hint("default: chosen so that truncation costs nothing")] = None
    """Rows of a padded batch; larger draws are truncated, and charged for."""
    accountant: AccountantName = "pld"
    """pld is tight; rdp is what older papers report."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """What is done with the noisy mean gradient, and in which precision."""

    optimizer: str = "adam"
    """Any optimizer of optax that works from gradients alone: adam, adamw, sgd, lion, lamb, adafactor, ..."""
    learning_rate: Annotated[float | None, hint("default: 5e-4 for full and last-k, 2e-3 for the others")] = None
    """Its (highest) learning rate."""
    schedule: ScheduleName = "constant"
    """How the learning rate goes on after the warmup: linear and cosine end near zero."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its full value."""
    weight_decay: Annotated[float | None, hint("default: the optimizer's")] = None
    """Of matrices and tables, for optimizers that take it."""
    optimizer_options: Annotated[tuple[str, ...], hint("default: the optimizer's", "NAME=VALUE [NAME=VALUE ...]")] = ()
    """Further arguments of the optimizer, such as momentum=0.9."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; trained parameters and optimizer states stay in float32."""
    microbatch_size: int = 16
    """Units differentiated at once: bounds memory, changes nothing else."""
    remat: Flag[bool] = False
    """Compute the activations of a block again when its gradient is taken: less memory, a third more work."""
