"""What a contender is given, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import xla_memory
from benchmarks.models import Batch, Model, Params


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

    def params(self) -> Params:
        return self.model.init(np.random.default_rng([self.seed, 0]))

    def batch(self) -> Batch:
        return self.model.draw_batch(np.random.default_rng([self.seed, 1]), self.rows)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of DP-SGD: flat clipping, Gaussian noise on the sum, division by the rows of the batch, SGD."""

    l2_clip_norm: float
    noise_multiplier: float
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A contender at work.

    Attributes:
        step: Runs one step and returns when it has finished.
        params: Copies the parameters to the host.
        xla_memory: What XLA reserves for a step; None outside JAX.
    """

    step: Callable[[], None]
    params: Callable[[], Params]
    xla_memory: Callable[[], dict[str, Any]] | None


def to_host(params: Any) -> Params:
    return {name: np.array(leaf) for name, leaf in params.items()}  # a copy: the next step donates its input


def jax_trainer(update: Callable[..., Any], carry: tuple[Any, ...], *inputs: Any) -> Trainer:
    """Makes a trainer of `update(carry, *inputs) -> carry`, with the parameters first in the carry, which is donated."""
    compiled = jax.jit(update, donate_argnums=0)
    carry = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry)
    inputs = jax.device_put(inputs)

    def step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(compiled(carry, *inputs))

    return Trainer(step, lambda: to_host(carry[0]), lambda: xla_memory(compiled.lower(carry, *inputs).compile()))
