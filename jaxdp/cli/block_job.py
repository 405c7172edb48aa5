"""A fine-tuning job for models in blocks: the parameters taken apart, the loss between them, and scores block by block."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp import quantization, text
from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.cli import tuning_job
from jaxdp.cli.tuning_job import Records, Tuning
from jaxdp.models import CausalLM
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.lora import is_adapter
from jaxdp.models.saving import MAX_SHARD_BYTES
from jaxdp.quantization import DEFAULT_GROUP_SIZES
from jaxdp.text import block_scores

#: What `jaxdp.quantization.quantize` takes beyond its result.
_QUANTIZING = 20 * 2**20


def check_parts(tuning: Tuning) -> None:
    """Refuses trained parameters that not every block has."""
    if not jax.tree.leaves(tuning.trainable.get("blocks", {})):
        names = ", ".join(sorted(tuning.trainable))
        raise ValueError(
            f"only {names} would be trained, and no block; give --lora-targets that every block has, such as all-linear."
        )


def parts_of(tuning: Tuning, base_format: str | None) -> tuple[BlockParams, BlockParams | None]:
    """The trained and the frozen parameters, on the host.

    Frozen matrices are in the dtype that they are computed in, if that is narrower; those of blocks in `base_format`. Frozen
    blocks become that one by one, when they are asked for.
    """
    if not tuning.frozen:
        return _in_blocks(tuning.trainable), None
    given = _in_blocks(tuning.frozen)
    given = given._replace(blocks=jax.tree.map(_one_by_one, given.blocks))
    frozen = jax.tree.map(
        lambda leaf, shape: leaf.astype(shape.dtype, copy=False), given, _in_blocks(_narrowed(tuning, base_format))
    )
    if base_format in DEFAULT_GROUP_SIZES:
        frozen = frozen._replace(blocks=quantization.quantize_matrices(frozen.blocks, base_format, but=is_adapter))
    return _in_blocks(tuning.trainable), frozen


def shapes_of(tuning: Tuning, base_format: str | None) -> tuple[BlockParams, BlockParams | None]:
    """The shapes of `parts_of`."""
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tuning.trainable)
    if not tuning.frozen:
        return _in_blocks(trained), None
    frozen = _in_blocks(_narrowed(tuning, base_format))
    if base_format in DEFAULT_GROUP_SIZES:
        frozen = frozen._replace(blocks=quantization.quantized_shapes(frozen.blocks, base_format, but=is_adapter))
    return _in_blocks(trained), frozen


def whole(params: BlockParams) -> dict[str, Any]:
    """The nested dicts that were taken apart."""
    return {**params.resident, "blocks": params.blocks}


@functools.cache  # one object for one loss: programs are compiled for it
def loss(model: CausalLM, *, is_choice: bool, head_tokens: int) -> BlockModel:
    """The loss of one privacy unit."""
    make = text.choice_blocks if is_choice else text.language_model_blocks
    return make(model, head_tokens=head_tokens)


@functools.cache
def score(model: CausalLM, *, is_choice: bool, head_tokens: int) -> BlockModel:
    """The sums that make up the score of an evaluation record, in the place of a loss."""
    make = block_scores.choice_score_blocks if is_choice else block_scores.language_model_score_blocks
    return make(model, head_tokens=head_tokens)


def evaluate(sums_of: Callable[[Any], Any], records: Records, *, batch_rows: int, when: str) -> dict[str, Any] | None:
    """Perplexity, or accuracy, of the evaluation records from the sums of batches; None without records."""
    if records.evaluation is None:
        return None
    of = block_scores.evaluate_choices_sums if records.is_choice else block_scores.evaluate_language_model_sums
    return tuning_job.scores_of(of(sums_of, records.evaluation, batch_rows=batch_rows), when=when)


def passing_bytes(tuning: Tuning, base_format: str | None, *, merge: bool) -> int:
    """The most that passes through the host's memory at once, beside the parameters that stay there.

    On its way to where it waits, a block becomes a bucket from its leaves, which are there beside it, and so is the matrix that is
    being packed, as it was read and as it is computed in. Frozen parameters outside the blocks are there twice if they are cast.
    In the end, a shard of a model is put together before it is written.
    """
    (trained, frozen), cast = shapes_of(tuning, base_format), 0
    buckets_of = 2 * _num_bytes(trained.blocks) // _num_blocks(trained.blocks)
    written = _num_bytes(tuning.trainable) + (_num_bytes(tuning.frozen) if merge else 0)
    if frozen is not None:
        before = _in_blocks(tuning.frozen)
        pairs = zip(jax.tree.leaves(before.resident), jax.tree.leaves(frozen.resident), strict=True)
        cast = sum(_num_bytes(after) for leaf, after in pairs if leaf.dtype != after.dtype)
        if stacks := jax.tree.leaves(before.blocks):
            largest = max(_num_bytes(leaf) // leaf.shape[0] for leaf in stacks)
            packing = 2 * largest + (_QUANTIZING if base_format in DEFAULT_GROUP_SIZES else 0)
            buckets_of = max(buckets_of, 2 * _num_bytes(frozen.blocks) // _num_blocks(before.blocks) + packing)
    return max(buckets_of + cast, min(written, MAX_SHARD_BYTES))


def _num_blocks(stacks: Any) -> int:
    return jax.tree.leaves(stacks)[0].shape[0]


def _num_bytes(params: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def _narrowed(tuning: Tuning, base_format: str | None) -> Any:
    model = tuning.model
    if base_format == "bf16":
        model = dataclasses.replace(model, dtype=jnp.bfloat16)
    return tuning_job.narrowed(tuning.frozen, model)


def _in_blocks(tree: dict[str, Any]) -> BlockParams:
    return BlockParams({name: branch for name, branch in tree.items() if name != "blocks"}, tree.get("blocks", {}))


def _one_by_one(leaf: Any) -> LazyStack:
    return leaf if isinstance(leaf, LazyStack) else LazyStack(leaf.shape, leaf.dtype, leaf.__getitem__)
