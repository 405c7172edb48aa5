"""jaxdp: `jaxdp.make_dp_step`, called as a user calls it, ledger and all."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import numpy as np
import optax

import jaxdp
from benchmarks.harness import xla_memory
from benchmarks.peers.trainer import Problem, Settings, Trainer, to_host
from pallas_kernels import Implementation


def layer_of(leaf: str) -> str:
    """The layer of a parameter under torch's names: `blocks.0.norm` for `blocks.0.norm.bias`."""
    return leaf.rpartition(".")[0]


def make(
    problem: Problem,
    settings: Settings,
    *,
    method: Literal["auto", "vmap", "two_pass", "book_keeping", "per_layer"] = "auto",
    policy: Literal["flat", "per_layer"] = "flat",
    microbatch_size: int | None = None,
    adds_noise: bool = True,
    implementation: Implementation | None = None,
) -> Trainer:
    rows, clip_norm = problem.rows, settings.l2_clip_norm
    plan = jaxdp.plan(
        num_examples=1024 * rows,  # a power of two, so that sampling_prob * num_examples is `rows` without rounding
        num_steps=1_000_000,
        clipping=jaxdp.flat(clip_norm) if policy == "flat" else jaxdp.per_layer(clip_norm, group_by=layer_of),
        expected_batch_size=rows,
        padded_batch_size=rows,
        noise_multiplier=settings.noise_multiplier if adds_noise else 0.0,
    )
    tx = optax.sgd(settings.learning_rate)
    init, dp_step = jaxdp.make_dp_step(
        problem.model.loss,
        tx,
        plan,
        microbatch_size=microbatch_size,
        method=method,
        implementation=implementation,
    )
    state: Any = None

    @functools.cache
    def inputs() -> Any:
        return jax.device_put((problem.batch(), np.zeros(rows, bool)))

    def step() -> None:
        nonlocal state
        state, _ = dp_step(init(problem.params()) if state is None else state, *inputs())
        jax.block_until_ready(state.params)

    def params() -> Any:
        nonlocal state
        state = init(problem.params()) if state is None else state
        return to_host(state.params)

    def memory() -> dict[str, Any]:
        params = jax.eval_shape(problem.params)  # not of `init`: it draws a key, and so refuses to be traced
        clip_norms = jax.ShapeDtypeStruct((len(plan.clipping.groups(params).names),), np.float32)
        noise_key = jax.eval_shape(jaxdp.secret_key)
        arrays = (params, jax.eval_shape(tx.init, params), clip_norms, noise_key)
        batch, is_padding_example = jax.eval_shape(lambda: (problem.batch(), np.zeros(rows, bool)))
        lowered = dp_step.compiled.lower(*arrays, np.uint32(0), batch, is_padding_example, None)  # type: ignore[attr-defined]
        return xla_memory(lowered.compile())

    return Trainer(step, params, memory)
