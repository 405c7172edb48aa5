"""What a step will need, before anything is put on a device: the memory of its compiled programs and of all else that is alive.

The peak of a device is the largest sum of what is there at once: a program's arguments, results and temporaries, arguments that
the program does not read, and the blocks that wait, arrive or leave. It leaves out what only a real device has: a context,
the slack of an allocator, the workspace of a library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxdp._typing import Batch, Params
from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.mechanism import PrivacyPlan
from jaxdp.zeroth_order import buckets, programs, updates
from jaxdp.zeroth_order.directions import Law
from jaxdp.zeroth_order.estimators import Estimator
from jaxdp.zeroth_order.stages import Stages
from jaxdp.zeroth_order.streaming import Placement
from jaxdp.zeroth_order.updates import Rounding, Sgd


class ProgramBytes(Protocol):
    """What a compiler says of one program."""

    @property
    def argument_bytes(self) -> int: ...
    @property
    def output_bytes(self) -> int: ...
    @property
    def alias_bytes(self) -> int: ...
    @property
    def temp_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The parts of a step's memory, in bytes. A program's share has all its arguments, results and temporaries.

    Attributes:
        start: The program in front of the blocks.
        visits: That of one block, with the block; or those of its stages.
        finish: That behind the blocks.
        resident: Trained leaves that belong to no block; twice where they are kept beside the updated ones.
        parts: One trained block; or what its stages have of it.
        frozen_block: One frozen block; 0 without them.
        num_blocks: N.
    """

    start: int
    visits: tuple[int, ...]
    finish: int
    resident: int
    parts: tuple[int, ...]
    frozen_block: int
    num_blocks: int

    @property
    def block(self) -> int:
        """One trained block."""
        return sum(self.parts)

    def device_peak(self, placement: Placement) -> int:
        """The most that is on the device at once."""
        waiting, traveling = self._waiting_on_device(placement), self._traveling
        depth, is_streamed = placement.prefetch, placement.is_streamed

        def some(first: int, count: int) -> int:
            """The bytes of so many consecutive buckets, of which the first follows the last."""
            return sum(traveling[i % len(traveling)] for i in range(first, first + count)) if is_streamed else 0

        def visit(i: int) -> int:
            # What computes is in `visits` already; others arrive, and one leaves.
            own = (self.parts[i] if waiting else 0) + (0 if is_streamed else self.frozen_block)
            others = some(i + 1, depth) + (some(i - 1, 1) if depth else 0)
            return self.visits[i] + self.resident + waiting - own + others

        return max(
            # While the first program runs, the blocks of the first visits arrive; behind the last visit, the last block leaves.
            self.start + waiting + some(0, depth + 1),
            *map(visit, range(len(self.visits))),
            self.finish + waiting + (some(-1, 1) if depth else 0),
        )

    def host_bytes(self, placement: Placement) -> int:
        """What waits on the host: all blocks that travel, and those under way back."""
        if not placement.is_streamed:
            return 0
        leaving = 0 if self.frozen_block else min(placement.prefetch, 1) + 1
        return self.num_blocks * sum(self._traveling) + leaving * max(self._traveling)

    def link_bytes(self, placement: Placement, *, write_every: int = 1) -> float:
        """What crosses the link in one step, in both directions together."""
        if not placement.is_streamed:
            return 0.0
        down = 0.0 if self.frozen_block else 1 / write_every
        return self.num_blocks * sum(self._traveling) * (1 + down)

    @property
    def _traveling(self) -> tuple[int, ...]:
        return (
            (self.frozen_block,) if self.frozen_block else self.parts
        )  # trained blocks above frozen ones stay on the device

    def _waiting_on_device(self, placement: Placement) -> int:
        if not placement.is_streamed:
            return self.num_blocks * (self.block + self.frozen_block)
        return self.num_blocks * self.block if self.frozen_block else 0


def step_memory(
    model: BlockModel,
    sgd: Sgd,
    params: BlockParams,
    batch: Batch,
    *,
    plan: PrivacyPlan | None,
    estimator: Estimator,
    law: Law,
    rounding: Rounding = "nearest",
    write_every: int = 1,
    stages: Stages | None = None,
    frozen: BlockParams | None = None,
    like: StepMemory | None = None,
    compiled: Callable[..., ProgramBytes] | None = None,
) -> StepMemory:
    """Compiles the programs of a step and adds up; nothing is computed or allocated.

    Args:
        model, sgd, plan, estimator, law, rounding, write_every, stages: As of `make_step`.
        params: The trained parameters, arrays or shapes.
        batch: Examples `[B, ...]`, arrays or shapes.
        frozen: The frozen parameters, arrays or shapes.
        like: Of the same step but for `model.loss`: its other programs are not compiled again.
        compiled: `compiled(jitted, *arguments) -> ProgramBytes`, for another device than that of this machine.
    """
    device = None if compiled is not None else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = _compiled if compiled is None else compiled

    def placed(leaf: Any) -> Any:  # where the run places it, which then finds what was compiled here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    params, batch = jax.tree.map(placed, params), jax.tree.map(placed, batch)
    layout, num_blocks = buckets.layout_of(params.blocks)
    frozen_layout, frozen_resident = None, None
    if frozen is not None:
        frozen_resident = jax.tree.map(placed, frozen.resident)
        if jax.tree.leaves(frozen.blocks):
            frozen_layout, _ = buckets.layout_of(frozen.blocks)
    spec = programs.Spec(model, estimator, law, rounding, layout, frozen_layout)
    K = estimator.num_directions
    context = programs.Context(
        pending=jax.tree.map(placed, jax.eval_shape(lambda: updates.nothing_pending(sgd, K, write_every))),
        root=placed(jax.ShapeDtypeStruct((2,), jnp.uint32)),
        step=jax.ShapeDtypeStruct((), jnp.uint32),
        batch=batch,
        frozen=frozen_resident,
    )
    _, streams = jax.eval_shape(lambda r, c: programs.start_and_keep(spec, r, c), params.resident, context)
    streams = jax.tree.map(placed, streams)
    index, rows = placed(jax.ShapeDtypeStruct((), jnp.int32)), jax.tree.leaves(batch)[0].shape[0]
    key = None if plan is None else placed(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
    frozen_block = None if frozen_layout is None else jax.tree.map(placed, frozen_layout.bucket())
    start = (params.resident, context)
    turns = programs.staged(spec, () if stages is None else buckets.parts_of(layout, stages.groups))

    def alive(jitted: Any, *arguments: Any, static: tuple[Any, ...] = (spec,)) -> int:
        found, given = compiled(jitted, *static, *arguments), _num_bytes(arguments)
        # What a program does not read is no argument of it, and stays where it is.
        return max(found.argument_bytes, given) + found.output_bytes - found.alias_bytes + found.temp_bytes

    is_kept = write_every > 1  # steps between two write-backs keep what they were given
    written = (True, False) if is_kept else (True,)
    starts = [programs.start_and_write if is_written else programs.start_and_keep for is_written in written]
    visits = [programs.visit_of(is_written=is_written, is_stage=stages is not None) for is_written in written]
    arguments = []  # of each visit
    for turn in turns:
        bucket = jax.tree.map(placed, turn.layout.bucket())
        arguments.append((bucket, streams, index, frozen_block, context))
        streams = jax.tree.map(placed, jax.eval_shape(functools.partial(visits[0], turn), *arguments[-1])[1])
    finish = (params.resident, streams, context, jax.ShapeDtypeStruct((rows,), jnp.bool_), key)
    behind = alive(programs.finish, *finish, static=(spec, sgd, plan)) + is_kept * _num_bytes(params.resident)
    if like is not None:
        return dataclasses.replace(like, finish=behind)
    return StepMemory(
        start=max(alive(program, *start) for program in starts),
        visits=tuple(
            max(alive(program, *given, static=(turn,)) for program in visits)
            for turn, given in zip(turns, arguments, strict=True)
        ),
        finish=behind,
        resident=(1 + is_kept) * _num_bytes(params.resident),
        parts=tuple(turn.layout.num_bytes for turn in turns),
        frozen_block=0 if frozen_layout is None else frozen_layout.num_bytes,
        num_blocks=num_blocks,
    )


@dataclasses.dataclass(frozen=True)
class _Figures:
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int


def _compiled(jitted: Any, *arguments: Any) -> _Figures:
    analysis = jitted.lower(*arguments).compile().memory_analysis()
    return _Figures(*(getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")))


def _num_bytes(tree: Params) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
