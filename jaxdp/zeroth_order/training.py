"""Zeroth-order training: `init`, `step` and `flush` over a model whose blocks pass through the device one by one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _replicas, _validate
from jaxdp._typing import Batch, Key, Params
from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.mechanism import Ledger, PrivacyPlan
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.noise_keys import Domain
from jaxdp.zeroth_order import buckets, directions, programs, updates
from jaxdp.zeroth_order.aggregation import NotPrivate, check_examples, check_zeroth_order_plan, unrelated_noise_key
from jaxdp.zeroth_order.buckets import Layout, Part
from jaxdp.zeroth_order.directions import Law, LowRank, Rademacher
from jaxdp.zeroth_order.estimators import Estimator, OneSided, TwoSided
from jaxdp.zeroth_order.programs import Context, Spec, staged
from jaxdp.zeroth_order.stages import Stages
from jaxdp.zeroth_order.streaming import Placement, on_device, pass_through
from jaxdp.zeroth_order.updates import Pending, Rounding, Scalars, Sgd


@dataclasses.dataclass(frozen=True)
class State:
    """A run whose parameters are what they should be: every update has been applied.

    Under a plan it holds the noise key, so it is secret: publish `params()` and the scalars only.

    Attributes:
        resident: Leaves on the device that belong to no block.
        blocks: A bucket for each block, where the blocks wait; or one for each stage of each block, block by block.
        pending: Without entries. It carries the momentum.
        direction_words: Of the direction key. Public.
        step: Index of the next step.
        layout: Of the blocks.
        parts: What each bucket of a block holds; empty if a block is one bucket.
        frozen: What is read and never changed, if anything.
        ledger: Under a plan, how many steps were released at which noise.
        noise_key: Under a plan, the secret noise key; it has nothing to do with the direction key (S8).
    """

    resident: Params
    blocks: tuple[Any, ...] = dataclasses.field(repr=False)
    pending: Pending = dataclasses.field(repr=False)
    direction_words: jax.Array
    step: int
    layout: Layout = dataclasses.field(repr=False)
    parts: tuple[Part, ...] = dataclasses.field(repr=False, default=())
    frozen: Frozen | None = dataclasses.field(repr=False, default=None)
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    noise_key: Key | None = dataclasses.field(repr=False, default=None)

    def params(self) -> BlockParams:
        """The trained parameters, as NumPy arrays: `resident`, and `blocks` stacked `[N, ...]`."""
        return BlockParams(jax.device_get(self.resident), buckets.stacked_again(self.layout, self.blocks, self.parts))

    def params_in_place(self) -> BlockParams:
        """The same, but that the blocks stay where they wait until they are asked for: leaves of blocks are `LazyStack`s.

        They are those of this state, and gone when it is stepped.
        """
        layout, parts, blocks = self.layout, self.parts, self.blocks  # and not what is frozen

        @functools.lru_cache(maxsize=1)
        def leaves_of(index: int) -> list[np.ndarray]:
            return jax.tree.leaves(buckets.block_at(layout, blocks, parts, index))

        stacks = [
            LazyStack(
                (buckets.num_blocks_in(blocks, parts), *shape),
                jnp.dtype(dtype),
                lambda i, number=number: leaves_of(i)[number],
            )
            for number, (shape, dtype) in enumerate(zip(layout.shapes, layout.dtypes, strict=True))
        ]
        return BlockParams(jax.device_get(self.resident), layout.treedef.unflatten(stacks))


@dataclasses.dataclass(frozen=True)
class DeferredState:
    """A run between two steps: its last updates wait for the next visit of each block (S16).

    It has no parameters to give: they are those of `flush(state)`.
    """

    waiting: State
    num_pending: int

    @property
    def step(self) -> int:
        """Index of the next step."""
        return self.waiting.step

    @property
    def ledger(self) -> Ledger:
        """Under a plan, how many steps were released at which noise."""
        return self.waiting.ledger


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that are read and never changed, such as the weights below adapters."""

    resident: Params
    blocks: tuple[Any, ...]
    layout: Layout | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a step reports.

    Attributes:
        scalars: What it adds to the trajectory. Under a plan, that is what the step releases.
        not_private: Per-example losses and projected gradients. Not covered by a guarantee (S15).
    """

    scalars: Scalars
    not_private: NotPrivate


class Steps(NamedTuple):
    """The functions of a run; `make_step` describes them."""

    init: Callable[..., State]
    step: Callable[..., tuple[DeferredState, StepInfo]]
    flush: Callable[[State | DeferredState], State]
    losses: Callable[[State, Batch], jax.Array]
    replay: Callable[[State | DeferredState, Scalars], DeferredState]
    recipe: dict[str, Any]
    plan: PrivacyPlan | None


def make_step(
    model: BlockModel,
    sgd: Sgd,
    *,
    plan: PrivacyPlan | None = None,
    estimator: Estimator | None = None,
    law: Law | None = None,
    placement: Placement | None = None,
    stages: Stages | None = None,
    write_every: int = 1,
    rounding: Rounding = "nearest",
) -> Steps:
    """Makes the functions of a zeroth-order run: MeZO (arXiv 2305.17333), streamed as in ZO2 (arXiv 2503.12668).

        g_k = mean_i projected gradient of example i along z_k;    w <- w - lr sum_k g_k z_k / K

    Each visit of a block applies the updates that wait for it, then runs the perturbed passes of all K directions: one arrival
    serves everything. The update of a step is applied at the next step's visit, with the numbers of its own step.

    **Guarantee**: with one set of options, streamed and resident runs, and the replay of their scalars, have the same parameters
    bit for bit, whatever the prefetch depth.

    **Guarantee** under a plan: the sequence of scalars of `plan.num_steps` steps, on batches drawn by `jaxdp.poisson_batches` with
    this plan, is (plan.epsilon(), delta)-differentially private, and so is all that follows from it: the parameters, and the
    trajectory with its direction key. Each example is one clipped vector of K projected gradients; `aggregation` has the equation.
    A step past `num_steps` is refused before it runs.

    Args:
        model: The loss of one example, in parts.
        sgd: How scalars become an update.
        plan: The privacy numbers, from `jaxdp.plan`, with flat or automatic clipping, and Laplace noise for one direction only;
            None for a run without privacy.
        estimator: How the model is probed; `TwoSided()` by default.
        law: What directions are drawn from; `Rademacher()` by default.
        placement: Where blocks wait; on the device by default.
        stages: Of `split_block`, for blocks of which two or three do not fit the device: the leaves of a stage travel together, and
            a stage is what computes while others travel. Each stage has programs of its own. None: a block is one stage.
        write_every: Visits between two write-backs of a block. The updates between are applied afresh at every visit, at the price
            of drawing their directions again; narrow dtypes are then rounded that much less often.
        rounding: Of parameters narrower than float32 when they are written, "nearest" or "stochastic". Nearest loses updates
            below half a unit in the last place (S19).

    Returns:
        `init(params, *, direction_key, frozen=None, noise_key=None) -> State`. `params` are `BlockParams` of arrays, on the host
        if they are large; each block is copied to its place. `frozen` are further `BlockParams`, nested dicts that the model's
        functions get joined with the trained ones; the trained blocks then stay on the device, and frozen ones travel one way.
        Frozen blocks may be quantized, `jaxdp.quantization.quantize_matrices`: they travel as they are and become weights there.
        Under a plan the noise key is drawn from the operating system's entropy unless it is given; in a group of processes it
        must be given, and processes that differ in it, the plan or the direction key raise a ValueError.

        `step(state, batch, is_padding_example=None) -> (DeferredState, StepInfo)` takes either kind of state and consumes it:
        its arrays are changed in place or deleted. An interrupted step leaves no state; replay the trajectory. Under a plan the
        mask is that of `jaxdp.poisson_batches`.

        `flush(state) -> State` applies what waits, and consumes a `DeferredState`. A `State` is returned as it is.

        `losses(state, batch) -> [B]`, without perturbation. It takes a `State` only.

        `replay(state, scalars) -> DeferredState` does what the step that reported `scalars` did to the parameters and the ledger.

        `recipe` is a dict for JSON: all that, with base parameters, direction key and scalars, decides the parameters.

        `plan` is the argument.
    """
    estimator = TwoSided() if estimator is None else estimator
    law = Rademacher() if law is None else law
    placement = Placement() if placement is None else placement
    placement.check()
    if plan is not None:
        check_zeroth_order_plan(plan, num_directions=estimator.num_directions)
    updates.check_spread(sgd, estimator.num_directions)
    if isinstance(estimator, TwoSided | OneSided) and estimator.num_at_once > 1 and not isinstance(law, LowRank):
        raise ValueError(
            f"num_at_once={estimator.num_at_once} needs low-rank directions: each of the others would need a copy of every matrix."
        )
    write_every = _validate.positive_integer("write_every", write_every)
    _validate.one_of("rounding", rounding, ("nearest", "stochastic"))

    def spec_of(state: State) -> Spec:
        frozen_layout = None if state.frozen is None else state.frozen.layout
        return Spec(model, estimator, law, rounding, state.layout, frozen_layout)

    def visits_of(state: State) -> Iterator[Spec]:
        """Of one bucket after the other."""
        return itertools.cycle(staged(spec_of(state), state.parts))

    def recorded(state: State) -> Ledger:
        return state.ledger if plan is None else state.ledger.record(plan)

    def stores(state: State) -> tuple[list[Any], list[tuple[list[Any], Placement]]]:
        blocks = list(state.blocks)
        if state.frozen is None or state.frozen.layout is None:
            return blocks, [(blocks, placement), ([None] * len(blocks), Placement(False, placement.prefetch))]
        return blocks, [(blocks, Placement(False, placement.prefetch)), (list(state.frozen.blocks), placement)]

    def init(
        params: BlockParams, *, direction_key: Key, frozen: BlockParams | None = None, noise_key: Key | None = None
    ) -> State:
        resident, stacked = params
        if jax.tree.leaves(resident):
            _validate.floating_params(resident, name="resident")
        layout, num_blocks = buckets.layout_of(stacked)
        if any(layout.specs):
            raise ValueError(
                "blocks holds quantized leaves, and only frozen ones can be: an update would be lost in them."
            )
        if stages is not None and frozen is not None and jax.tree.leaves(frozen.blocks):
            raise ValueError(
                "stages are for blocks without frozen leaves; leave stages out, and the blocks travel whole."
            )
        parts = () if stages is None else buckets.parts_of(layout, stages.groups)
        waits = placement if frozen is None or not jax.tree.leaves(frozen.blocks) else Placement(False)
        kept = None
        if frozen is not None:
            kept = _frozen(frozen, num_blocks, placement)
        if plan is not None:
            _replicas.check_noise_key(noise_key, plan=plan, direction_key=direction_key)
        own_key = None if plan is None else unrelated_noise_key(noise_key, direction_key, Domain.ZEROTH_ORDER, params)
        return State(
            resident=on_device(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), resident)),
            blocks=tuple(
                waits.store(bucket)
                for i in range(num_blocks)
                for bucket in buckets.all_packed(layout, parts, stacked, i)
            ),
            pending=on_device(updates.nothing_pending(sgd, estimator.num_directions, write_every)),
            direction_words=on_device(jnp.array(directions.words_of(direction_key), copy=True)),
            step=0,
            layout=layout,
            parts=parts,
            frozen=kept,
            noise_key=None if own_key is None else on_device(own_key),
        )

    def step(
        state: State | DeferredState, batch: Batch, is_padding_example: Any = None
    ) -> tuple[DeferredState, StepInfo]:
        state, num_pending = _opened(state)
        directions.check_step(state.step)
        mask = check_examples(plan, state.ledger, state.noise_key, batch, is_padding_example)
        batch = on_device(batch)
        index, spec, turns = np.uint32(state.step), spec_of(state), visits_of(state)
        frozen = None if state.frozen is None else state.frozen.resident
        context = Context(state.pending, state.direction_words, index, batch, frozen)
        # Where every visit writes, so does the first, though it has nothing to write: one set of programs, and no second copy.
        is_written = num_pending == write_every or write_every == 1
        start = programs.start_and_write if is_written else programs.start_and_keep
        visit = programs.visit_of(is_written=is_written, is_stage=bool(state.parts))
        resident, streams = start(spec, state.resident, context)
        blocks, stored = stores(state)
        streams = pass_through(
            lambda arrived, streams, i: visit(next(turns), arrived[0], streams, i, arrived[1], context),
            stored,
            streams,
            is_written=is_written,
        )
        new, not_private = programs.finish(spec, sgd, plan, resident, streams, context, mask, state.noise_key)
        pending = updates.cleared(state.pending) if is_written else state.pending
        pending = programs.append(sgd, pending, new, index)
        waiting = dataclasses.replace(
            state,
            resident=resident if is_written else state.resident,
            blocks=tuple(blocks),
            pending=pending,
            step=state.step + 1,
            ledger=recorded(state),
        )
        return DeferredState(waiting, 1 if is_written else num_pending + 1), StepInfo(new, not_private)

    def flush(state: State | DeferredState) -> State:
        if isinstance(state, State):
            return state
        state, num_pending = _opened(state)
        assert num_pending > 0  # a step leaves its own update
        pending, root = state.pending, state.direction_words

        turns = visits_of(state)

        def settle(arrived: tuple[Any, ...], carry: None, index: Any) -> tuple[Any, None, Any]:
            visit = next(turns)
            bucket, following = programs.settle(
                law, rounding, visit.layout, visit.part, arrived[0], index, pending, root
            )
            return bucket, None, following

        blocks, stored = stores(state)
        pass_through(settle, stored[:1], None, is_written=True)
        return dataclasses.replace(
            state,
            resident=programs.settle_resident(law, rounding, state.resident, pending, root),
            blocks=tuple(blocks),
            pending=updates.cleared(pending),
        )

    def replay(state: State | DeferredState, scalars: Scalars) -> DeferredState:
        state, num_pending = _opened(state)
        if num_pending == write_every:
            state, num_pending = flush(DeferredState(state, num_pending)), 0
        pending = programs.append(sgd, state.pending, on_device(scalars), np.uint32(state.step))
        state = dataclasses.replace(state, pending=pending, step=state.step + 1, ledger=recorded(state))
        return DeferredState(state, num_pending + 1)

    def losses(state: State, batch: Batch) -> jax.Array:
        if not isinstance(state, State):
            raise TypeError(
                f"losses needs a State, got {type(state).__name__}: its last update has not reached the blocks; call flush first."
            )
        batch = on_device(batch)
        turns, frozen = visits_of(state), None if state.frozen is None else state.frozen.resident
        advance = programs.advance_stage if state.parts else programs.advance
        hidden = pass_through(
            lambda arrived, hidden, i: advance(next(turns), arrived[0], hidden, i, arrived[1], batch),
            stores(state)[1],
            programs.enter(model, state.resident, frozen, batch),
            is_written=False,
        )
        return programs.leave(model, state.resident, frozen, hidden, batch)

    recipe = {
        "law": {"name": type(law).__name__, **dataclasses.asdict(law)},
        "num_directions": estimator.num_directions,
        "weight_decay": sgd.weight_decay,
        "momentum": sgd.momentum,
        "momentum_window": sgd.num_terms,
        "write_every": write_every,
        "rounding": rounding,
    }
    return Steps(init, step, flush, losses, replay, recipe, plan)


def _opened(state: Any) -> tuple[State, int]:
    if isinstance(state, State):
        return state, 0
    if isinstance(state, DeferredState):
        return state.waiting, state.num_pending
    raise TypeError(f"state must be the State of init or flush, or that of the last step; got {type(state).__name__}.")


def _frozen(frozen: BlockParams, num_blocks: int, placement: Placement) -> Frozen:
    resident = on_device(frozen.resident)
    if not jax.tree.leaves(frozen.blocks):
        return Frozen(resident, (), None)
    layout, found = buckets.layout_of(frozen.blocks)
    if found != num_blocks:
        raise ValueError(f"frozen has {found} blocks and params {num_blocks}; stack the leaves of all blocks in both.")
    blocks = tuple(placement.store(buckets.packed(layout, frozen.blocks, i)) for i in range(num_blocks))
    return Frozen(resident, blocks, layout)
