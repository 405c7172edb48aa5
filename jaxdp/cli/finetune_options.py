"""The options of `jaxdp finetune`, by section."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from jaxdp.accounting import AccountantName, NoiseName
from jaxdp.cli import options
from jaxdp.cli.optimizers import ScheduleName
from jaxdp.cli.options import Flag, hint
from jaxdp.clipping.policies import NoiseAllocation

TuneName: TypeAlias = Literal["full", "lora", "ffa-lora", "bitfit", "last-k"]
MethodName: TypeAlias = Literal["dpsgd", "mezo", "lozo", "fzoo", "dpzero", "dp-aggzo"]
EstimatorName: TypeAlias = Literal["two-sided", "one-sided", "forward"]
BaseFormat: TypeAlias = Literal["bf16", "int8", "int6", "int4"]


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
    """Seed of what is public: parameters and directions drawn at random. Noise and sampling take theirs from the operating
    system."""


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

    method: MethodName = "dpsgd"
    """dpsgd: clipped gradients. dpzero, dp-aggzo: differences of losses along random directions, of which 1 and 16 a step are
    clipped together. mezo, lozo, fzoo: such differences without privacy, with --no-privacy."""
    target_epsilon: Annotated[float | None, hint("default: 3, unless --noise-multiplier is given")] = None
    """The privacy goal."""
    target_delta: Annotated[float | None, hint("default: 1 / n^1.1 for n units")] = None
    """The delta of the goal; well below 1 / number of units. 0 is a pure epsilon, with --noise laplace."""
    noise_multiplier: Annotated[float | None, hint("default: calibrated to the goal")] = None
    """Noise std over clip norm, instead of a goal; with --noise laplace its scale over clip norm."""
    noise: NoiseName = "gaussian"
    """The law of the noise. laplace: of dpzero with one direction a step (DP-ZO, arXiv 2401.04343); its epsilon may be pure."""
    no_privacy: Flag[bool] = False
    """The baseline: the same run without clipping and noise."""
    expected_batch_size: Annotated[float | None, hint("default: 64")] = None
    """Mean number of units of the Poisson batches."""
    sampling_prob: Annotated[float | None, hint("default: from --expected-batch-size")] = None
    """Probability of each unit to enter a batch, instead of its mean size."""
    num_steps: Annotated[int | None, hint("default: from --epochs; 1000 for zeroth-order methods")] = None
    """Number of steps."""
    epochs: Annotated[float | None, hint("default: 3")] = None
    """Expected passes over the data, rounded up to whole steps."""
    clipping: options.ClippingName = "flat"
    """How each per-unit gradient is bounded; per-layer takes every block's layers apart."""
    l2_clip_norm: Annotated[float | None, hint("default: 1; 200 / sqrt(K) for dpzero and dp-aggzo")] = None
    """Clip norm; the first one under quantile. Zeroth-order methods clip a unit's K projected gradients over K."""
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

    optimizer: Annotated[str | None, hint("default: adam; sgd for zeroth-order methods, which have no other")] = None
    """Any optimizer of optax that works from gradients alone: adam, adamw, sgd, lion, lamb, adafactor, ..."""
    learning_rate: Annotated[
        float | None,
        hint(
            "default: 5e-4 for full and last-k, 2e-3 for others; 1e-6 and 5e-5 for zeroth-order, 5e-5 and 5e-4 for fzoo"
        ),
    ] = None
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
    """Units differentiated at once: bounds memory, changes nothing else. dpsgd only, as is --remat."""
    remat: Flag[bool] = False
    """Compute the activations of a block again when its gradient is taken: less memory, a third more work."""


@dataclasses.dataclass(frozen=True)
class ZerothOrderOptions:
    """Forward passes alone: mezo, lozo, fzoo, dpzero and dp-aggzo."""

    num_directions: Annotated[int | None, hint("default: 1; 8 for fzoo, 16 for dp-aggzo", "K")] = None
    """Directions of a step. All of them share one arrival of each streamed block."""
    estimator: Annotated[EstimatorName | None, hint("default: two-sided; one-sided for fzoo")] = None
    """two-sided: 2K forward passes. one-sided: K + 1, and a bias. forward: derivatives along the directions by forward-mode
    differentiation, exact in bfloat16."""
    perturbation_scale: Annotated[float | None, hint("default: 1e-3; 1e-2 for adapters")] = None
    """How far along a direction the loss is evaluated."""
    directions: Annotated[Literal["rademacher", "gaussian"] | None, hint("default: rademacher; low-rank for lozo")] = (
        None
    )
    """What each entry of a direction is drawn from."""
    low_rank: Annotated[int | None, hint("default: 2 for lozo", "RANK")] = None
    """Directions of matrices are products of this rank."""
    refresh_every: Annotated[int | None, hint("default: 50 with low rank", "STEPS")] = None
    """Steps that share a subspace of low-rank directions."""
    momentum: float = 0.0
    """Of the last steps' directions, which are drawn again: no memory, more time."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What parameters are kept in under --tune full. bfloat16 halves memory and transfers, and loses small updates."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of bfloat16 parameters. Stochastic rounding keeps small updates on average."""
    write_every: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 1
    """Steps between two write-backs of a streamed block; those between are applied anew at every visit."""
    stream: Flag[bool] = False
    """Keep the blocks in host memory, and bring them to the device one by one. The results are the same bits."""
    base_format: Annotated[BaseFormat | None, hint("default: --dtype, or what the file has if that is narrower")] = None
    """Format of the frozen weights below adapters."""
    max_device_memory: Annotated[str | None, hint("default: what the device has", "6GB")] = None
    """What the run may allocate on the device; it chooses how far to prefetch and how to cut the head accordingly."""
