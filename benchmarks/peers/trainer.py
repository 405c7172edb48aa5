"""What a contender is given, and what it gives back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import xla_memory
from benchmarks.models import Model, Params


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its initial parameters and one batch: equal for all contenders, and in every process.

    Attributes:
        model: The model.
        rows: Examples in the batch; all rows are real.
        seed: Of the parameters and the batch.
    """

    model: Model
    rows: int
    seed: int

    def params(self) -> dict[str, Any]:
        return self.model.init(np.random.default_rng([self.seed, 0]))

    def batch(self) -> Any:
        return self.model.draw_batch(np.random.default_rng([self.seed, 1]), self.rows)

    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.eval_shape(self.params).values())


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of DP-SGD: clip norm, Gaussian noise on the sum, division by the rows of the batch, SGD."""

    l2_clip_norm: float
    noise_multiplier: float
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A contender at work. A JAX contender has no arrays before its first step or copy of the parameters.

    Attributes:
        step: Runs one step and returns when it has finished.
        params: Copies the parameters to the host.
        xla_memory: Compiles the step, and says what XLA reserves for it; None outside JAX. It needs no arrays, and the
            steps reuse what it compiled.
    """

    step: Callable[[], None]
    params: Callable[[], Params]
    xla_memory: Callable[[], dict[str, Any]] | None


def to_host(params: Any) -> Params:
    return {name: np.array(leaf) for name, leaf in params.items()}  # a copy: the next step donates its input


def microbatches(batch: Any, microbatch_size: int) -> Any:
    """Splits the rows of a batch, `[B, ...]` to `[B / microbatch_size, microbatch_size, ...]`."""
    return jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)


def jax_trainer(problem: Problem, init: Callable[[Any], Any], update: Callable[..., Any], *more: Any) -> Trainer:
    """Makes a trainer of `init(params) -> carry` and `update(carry, batch, *more) -> carry`.

    The parameters are the first of the carry, which is donated.
    """
    compiled = jax.jit(update, donate_argnums=0)
    carry: Any = None

    def start() -> Any:
        return init(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), problem.params()))

    @functools.cache
    def inputs() -> Any:
        return jax.device_put((problem.batch(), *more))

    def step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(compiled(start() if carry is None else carry, *inputs()))

    def params() -> Params:
        nonlocal carry
        carry = start() if carry is None else carry
        return to_host(carry[0])

    def memory() -> dict[str, Any]:
        shapes = jax.eval_shape(lambda: (start(), problem.batch(), *more))
        return xla_memory(compiled.lower(*shapes).compile())

    return Trainer(step, params, memory)
