"""A model as three functions: what enters the first block, one block, and the loss behind the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class BlockModel:
    """A loss in parts, each a pure function of one example; batches come from `jax.vmap` outside.

        loss_fn(params, example) = loss(resident, block(blocks[N-1], ... block(blocks[0], embed(resident, example), example)))

    All blocks are one function with parameters of one shape. Whoever streams them need not know what they compute.

    Attributes:
        embed: `embed(resident, example) -> hidden`, any pytree of arrays.
        block: `block(block_params, hidden, example) -> hidden`, of the same shapes and dtypes.
        loss: `loss(resident, hidden, example) -> scalar`.
    """

    embed: Callable[[Any, Any], Any]
    block: Callable[[Any, Any, Any], Any]
    loss: Callable[[Any, Any, Any], jax.Array]


class BlockParams(NamedTuple):
    """The parameters of a `BlockModel`, or a part of them, or their shapes.

    Attributes:
        resident: What `embed` and `loss` read, in one pytree, so that what both read is one leaf (a tied embedding).
        blocks: Pytree of arrays stacked `[N, ...]`.
    """

    resident: Any
    blocks: Any


def loss_fn(model: BlockModel, params: BlockParams, example: Any) -> jax.Array:
    """The loss of one example with everything in memory: the definition of what is streamed.

    >>> import jax.numpy as jnp
    >>> double = BlockModel(lambda r, x: r * x, lambda w, h, x: w * h, lambda r, h, x: h)
    >>> float(loss_fn(double, BlockParams(jnp.float32(3.0), jnp.array([2.0, 5.0])), jnp.float32(1.0)))
    30.0
    """
    hidden, _ = jax.lax.scan(
        lambda hidden, block: (model.block(block, hidden, example), None),
        model.embed(params.resident, example),
        params.blocks,
    )
    return model.loss(params.resident, hidden, example)
