"""jaxdp: `jaxdp.make_dp_step`, called as a user calls it, ledger and all."""

from __future__ import annotations

import jax
import numpy as np
import optax

import jaxdp
from benchmarks.harness import xla_memory
from benchmarks.peers.trainer import Problem, Settings, Trainer, to_host


def make(problem: Problem, settings: Settings) -> Trainer:
    rows = problem.rows
    plan = jaxdp.plan(
        num_examples=1024 * rows,  # a power of two, so that sampling_prob * num_examples is `rows` without rounding
        num_steps=1_000_000,
        clipping=jaxdp.flat(settings.l2_clip_norm),
        expected_batch_size=rows,
        padded_batch_size=rows,
        noise_multiplier=settings.noise_multiplier,
    )
    init, dp_step = jaxdp.make_dp_step(problem.model.loss, optax.sgd(settings.learning_rate), plan)
    state = init(problem.params())
    batch, is_padding_example = jax.device_put((problem.batch(), np.zeros(rows, bool)))

    def step() -> None:
        nonlocal state
        state, _ = dp_step(state, batch, is_padding_example)
        jax.block_until_ready(state.params)

    def memory() -> dict[str, object]:
        arrays = (state.params, state.opt_state, state.clip_norms, state.noise_key)
        lowered = dp_step.compiled.lower(*arrays, np.uint32(state.step), batch, is_padding_example)  # type: ignore[attr-defined]
        return xla_memory(lowered.compile())

    return Trainer(step, lambda: to_host(state.params), memory)
