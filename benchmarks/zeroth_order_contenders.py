"""The steps that `benchmarks.zeroth_order` times: zeroth-order ones, what they are made of, and plain forward passes.

Each is a function that runs one step and returns when it has finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zeroth_order_problems import Problem
from jaxdp.block_model import BlockParams, loss_fn
from jaxdp.mechanism import PrivacyPlan
from jaxdp.zeroth_order import Placement, Rademacher, Scalars, Sgd, State, Steps, TwoSided, make_step, split_block
from jaxdp.zeroth_order.streaming import on_device, pass_through


class Run:
    """A zeroth-order run that goes on with every call of `step`: SPSA, Rademacher directions, SGD; private under a plan.

    With `is_split` a block passes in stages.
    """

    def __init__(
        self,
        problem: Problem,
        num_directions: int,
        placement: Placement,
        *,
        plan: PrivacyPlan | None = None,
        is_split: bool = False,
    ) -> None:
        self._placement = placement
        batch = problem.draw_batch()
        example = jax.tree.map(lambda leaf: leaf[0], batch)
        self._steps: Steps = make_step(
            problem.blocks,
            Sgd(1e-6),
            plan=plan,
            estimator=TwoSided(num_directions),
            law=Rademacher(),
            placement=placement,
            stages=split_block(problem.blocks, problem.params, example) if is_split else None,
        )
        self._batch = on_device(batch)
        state = self._steps.init(problem.params, direction_key=jax.random.key(0))
        # As after a step: the first step has an update to apply, and runs the programs of all others.
        nothing = Scalars(jnp.zeros(num_directions, jnp.float32), jnp.float32(0.0))
        self._state: Any = self._steps.replay(state, nothing)

    def step(self) -> None:
        """One step, with the update of the one before."""
        self._state, info = self._steps.step(self._state, self._batch)
        jax.block_until_ready((info, self._state.waiting.blocks))

    def transfers(self) -> None:
        """Every block to the device and back, as in a step, and nothing else."""
        waiting: State = self._state.waiting
        blocks = list(waiting.blocks)
        pass_through(
            lambda arrived, carry, index: (arrived[0], carry, index),
            [(blocks, self._placement)],
            None,
            is_written=True,
        )
        jax.block_until_ready(blocks)
        self._state = dataclasses.replace(self._state, waiting=dataclasses.replace(waiting, blocks=tuple(blocks)))

    def forward_by_blocks(self) -> None:
        """The losses of the batch without perturbation or update, by the programs of single blocks."""
        self._state = self._steps.flush(self._state) if not isinstance(self._state, State) else self._state
        jax.block_until_ready(self._steps.losses(self._state, self._batch))


@dataclasses.dataclass(frozen=True)
class OneBlock(Placement):
    """All blocks are one, which stays on the device: a step's computation without its transfers, in the memory of one block."""

    prefetch: int = 0
    held: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False)

    def store(self, block: Any) -> Any:
        """Keeps the block in the place of all others."""
        self.held["block"] = block if isinstance(next(iter(block.values())), jax.Array) else on_device(block)
        return np.int32(0)

    def fetch(self, block: Any) -> Any:
        """The block as the last visit left it."""
        return self.held["block"]


def computation(problem: Problem, num_directions: int) -> Callable[[], None]:
    """A streamed step without transfers. Each block waits for the one before, so it may be a little too slow."""
    return Run(problem, num_directions, OneBlock(is_streamed=True)).step


def plain_forward(problem: Problem) -> Callable[[], None]:
    """The loss of the batch: one compiled program that scans over blocks on the device."""
    params, batch = on_device((BlockParams(*jax.tree.map(np.asarray, tuple(problem.params))), problem.draw_batch()))
    forward = jax.jit(
        lambda params, batch: jnp.mean(jax.vmap(lambda example: loss_fn(problem.blocks, params, example))(batch))
    )
    return lambda: jax.block_until_ready(forward(params, batch)) and None


def link(num_bytes: int) -> dict[str, Callable[[], None]]:
    """Transfers of one array of so many bytes: to the device, to the host, and both at once."""
    host, device = Placement(is_streamed=True), Placement()
    waiting = host.store({"bytes": np.zeros(num_bytes // 4, np.float32)})
    present = device.store({"bytes": np.zeros(num_bytes // 4, np.float32)})

    def to_device() -> None:
        jax.block_until_ready(host.fetch(waiting))

    def to_host() -> None:
        jax.block_until_ready(host.store(present))

    def both() -> None:
        jax.block_until_ready((host.fetch(waiting), host.store(present)))

    return {"to_device": to_device, "to_host": to_host, "duplex": both}
