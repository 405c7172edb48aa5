"""The compiled programs of a run. A model has one set of them, however many blocks it has; a block in stages one for each stage.

They are compiled for what `Spec` holds, and so shared by all runs that agree on it. Blocks come and go as buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp._typing import Batch, Key, Params
from jaxdp.block_model import BlockModel
from jaxdp.gradients.couplings import over_batch
from jaxdp.mechanism import PrivacyPlan
from jaxdp.models.trainable import join
from jaxdp.zeroth_order import aggregation, buckets, directions, updates
from jaxdp.zeroth_order.aggregation import NotPrivate
from jaxdp.zeroth_order.buckets import Bucket, Layout, Part
from jaxdp.zeroth_order.directions import Law, LowRank
from jaxdp.zeroth_order.estimators import Estimator, ForwardMode
from jaxdp.zeroth_order.stages import stage
from jaxdp.zeroth_order.updates import Pending, Rounding, Scalars, Sgd

#: Address of the leaves that belong to no block.
_RESIDENT = 0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the programs are compiled for; `make_step` describes the fields.

    Attributes:
        layout: Of the buckets of the trained blocks.
        frozen_layout: Of the frozen blocks; None without them.
        part: What the buckets hold of a block, whose stage `model.block` then is; None for all of it.
    """

    model: BlockModel
    estimator: Estimator
    law: Law
    rounding: Rounding
    layout: Layout
    frozen_layout: Layout | None
    part: Part | None = None


def staged(spec: Spec, parts: tuple[Part, ...]) -> list[Spec]:
    """What the programs of the buckets of a block are compiled for: of one, or of one for each part."""
    return [
        dataclasses.replace(spec, model=stage(spec.model, part, parts), layout=part.layout, part=part) for part in parts
    ] or [spec]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every program of one step reads.

    Attributes:
        pending: The updates that wait.
        root: Words of the direction key.
        step: Index of this step, uint32.
        batch: Examples `[B, ...]`.
        frozen: Frozen leaves that belong to no block; None without them.
    """

    pending: Pending
    root: jax.Array
    step: Any
    batch: Batch
    frozen: Params


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def start_and_write(spec: Spec, resident: Params, context: Context) -> tuple[Params, Any]:
    """The resident leaves with their updates, in place, and the streams that enter the first block."""
    return _start(spec, resident, context)


@functools.partial(jax.jit, static_argnums=0)
def start_and_keep(spec: Spec, resident: Params, context: Context) -> tuple[Params, Any]:
    """The same, beside the leaves without updates."""
    return _start(spec, resident, context)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def visit_and_write(
    spec: Spec, bucket: Bucket, streams: Any, index: jax.Array, frozen: Bucket | None, context: Context
) -> tuple[Bucket, Any, jax.Array]:
    """One block: its updates, in place, and the perturbed passes; the index of the next one."""
    return _visit(spec, bucket, streams, index, frozen, context)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def visit_and_keep(
    spec: Spec, bucket: Bucket, streams: Any, index: jax.Array, frozen: Bucket | None, context: Context
) -> tuple[None, Any, jax.Array]:
    """The same, with the updates applied for this visit only."""
    return None, *_visit(spec, bucket, streams, index, frozen, context)[1:]


# What leaves a stage of a block has other shapes than what enters, and cannot take its place.
visit_stage_and_write = jax.jit(inspect.unwrap(visit_and_write), static_argnums=0, donate_argnums=1)
visit_stage_and_keep = jax.jit(inspect.unwrap(visit_and_keep), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def finish(
    spec: Spec,
    sgd: Sgd,
    plan: PrivacyPlan | None,
    resident: Params,
    streams: Any,
    context: Context,
    mask: jax.Array,
    noise_key: Key | None,
) -> tuple[Scalars, NotPrivate]:
    """The scalars of the step, and the per-example values behind them."""
    lifted = _probed(spec, spec.model.loss, resident, streams, context.frozen, context, _RESIDENT)
    examples = aggregation.examples_of(*spec.estimator.results(lifted), mask)
    # Once a step, before any block can read it (S7).
    g = aggregation.released(examples, plan, key=noise_key, step=context.step)
    return updates.scalars(sgd, g, context.step), examples


@functools.partial(jax.jit, static_argnums=0)
def append(sgd: Sgd, pending: Pending, new: Scalars, step: Any) -> Pending:
    """The updates that wait, with the new one."""
    return updates.appended(pending, sgd, new, step)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def settle(
    law: Law,
    rounding: Rounding,
    layout: Layout,
    part: Part | None,
    bucket: Bucket,
    index: jax.Array,
    pending: Pending,
    root: jax.Array,
) -> tuple[Bucket, jax.Array]:
    """One block with its updates, in place; the index of the next one."""
    block = _address(index, part)
    bucket = updates.applied_in_place(
        pending, layout, bucket, law=law, root=root, block=block, rounding=rounding, part=part
    )
    return bucket, index + 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def settle_resident(law: Law, rounding: Rounding, resident: Params, pending: Pending, root: jax.Array) -> Params:
    """The resident leaves with their updates."""
    return updates.applied(pending, resident, law=law, root=root, block=jnp.uint32(_RESIDENT), rounding=rounding)


@functools.partial(jax.jit, static_argnums=0)
def enter(model: BlockModel, resident: Params, frozen: Params, batch: Batch) -> Any:
    """What enters the first block, unperturbed."""
    return _on_batch(model.embed, frozen, batch)(resident, None)


def visit_of(*, is_written: bool, is_stage: bool) -> Callable[..., Any]:
    """The program of a block, or of a stage of one."""
    if is_stage:
        return visit_stage_and_write if is_written else visit_stage_and_keep
    return visit_and_write if is_written else visit_and_keep


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    spec: Spec, bucket: Bucket, hidden: Any, index: jax.Array, frozen: Bucket | None, batch: Batch
) -> tuple[None, Any, jax.Array]:
    """One block, unperturbed."""
    block = _on_batch(spec.model.block, _frozen(spec, frozen), batch)
    return None, block(buckets.unpacked(spec.layout, bucket), hidden), index + 1


advance_stage = jax.jit(inspect.unwrap(advance), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def leave(model: BlockModel, resident: Params, frozen: Params, hidden: Any, batch: Batch) -> jax.Array:
    """The losses `[B]` behind the last block, unperturbed."""
    return _on_batch(model.loss, frozen, batch)(resident, hidden)


def _start(spec: Spec, resident: Params, context: Context) -> tuple[Params, Any]:
    resident = updates.applied(
        context.pending,
        resident,
        law=spec.law,
        root=context.root,
        block=jnp.uint32(_RESIDENT),
        rounding=spec.rounding,
    )
    resident = lax.optimization_barrier(resident)
    return resident, _probed(spec, spec.model.embed, resident, None, context.frozen, context, _RESIDENT)


def _visit(
    spec: Spec, bucket: Bucket, streams: Any, index: jax.Array, frozen: Bucket | None, context: Context
) -> tuple[Bucket, Any, jax.Array]:
    block = _address(index, spec.part)
    bucket = updates.applied_in_place(
        context.pending,
        spec.layout,
        bucket,
        law=spec.law,
        root=context.root,
        block=block,
        rounding=spec.rounding,
        part=spec.part,
    )
    # What is read below is the bucket as it leaves: without the barrier XLA would keep the leaves twice.
    bucket = lax.optimization_barrier(bucket)
    params = buckets.unpacked(spec.layout, bucket)
    streams = _probed(spec, spec.model.block, params, streams, _frozen(spec, frozen), context, block, part=spec.part)
    return bucket, streams, index + 1


def _probed(
    spec: Spec,
    fun: Callable[..., Any],
    params: Params,
    streams: Any,
    frozen: Params,
    context: Context,
    block: Any,
    part: Part | None = None,
) -> Any:
    is_factored = isinstance(spec.law, LowRank)

    def direction(k: jax.Array) -> Params:
        def drawn(shapes: Params, only: int | None = None) -> Params:
            address = {"step": context.step, "k": k, "block": jnp.asarray(block, jnp.uint32)}
            return directions.leaf_directions(
                spec.law, context.root, **address, shapes=shapes, only=only, is_factored=is_factored
            )

        if part is None:
            return drawn(params)
        return [drawn(part.whole.block(), number) for number in part.numbers]

    derivative = "forward" if isinstance(spec.estimator, ForwardMode) else None
    lifted = _on_batch(fun, frozen, context.batch, derivative=derivative)
    return spec.estimator.lift(lifted, params, direction, streams, is_factored=is_factored)


def _on_batch(
    fun: Callable[..., Any], frozen: Params, batch: Batch, *, derivative: Literal["forward"] | None = None
) -> Callable[[Params, Any], Any]:
    """A part of the model on a batch, with the frozen parameters joined in."""

    def on_batch(params: Params, hidden: Any) -> Any:
        whole = params if frozen is None else join(params, frozen)
        if hidden is None:
            return over_batch(lambda example: fun(whole, example), batch, derivative=derivative)
        return over_batch(lambda hidden, example: fun(whole, hidden, example), hidden, batch, derivative=derivative)

    return on_batch


def _frozen(spec: Spec, bucket: Bucket | None) -> Params:
    return None if spec.frozen_layout is None or bucket is None else buckets.unpacked(spec.frozen_layout, bucket)


def _address(index: jax.Array, part: Part | None) -> jax.Array:
    """The block of a bucket."""
    num_parts = 1 if part is None else part.num_parts
    return lax.div(index, jnp.int32(num_parts)).astype(jnp.uint32) + jnp.uint32(1)
