"""JAX-Privacy: `jax_privacy.clipped_grad` and its Gaussian privatizer, in front of SGD."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax_privacy import clipped_grad, noise_addition  # pyright: ignore[reportMissingImports]

from benchmarks.peers.trainer import Problem, Settings, Trainer, jax_trainer


def make(problem: Problem, settings: Settings, *, microbatch_size: int | None = None) -> Trainer:
    grad_fn = clipped_grad(
        problem.model.loss,
        l2_clip_norm=settings.l2_clip_norm,
        normalize_by=problem.rows,
        keep_batch_dim=False,  # the loss takes one example
        microbatch_size=microbatch_size,
    )
    privatizer = noise_addition.gaussian_privatizer(
        stddev=grad_fn.sensitivity() * settings.noise_multiplier, prng_key=jax.random.key(problem.seed)
    )
    tx = optax.sgd(settings.learning_rate)

    def init(params: Any) -> Any:
        return params, privatizer.init(params), tx.init(params)

    def update(carry: Any, batch: Any, is_padding_example: Any) -> Any:
        params, noise_state, opt_state = carry
        mean = grad_fn(params, batch, is_padding_example=is_padding_example)
        noised, noise_state = privatizer.update(mean, noise_state)
        updates, opt_state = tx.update(noised, opt_state, params)
        return optax.apply_updates(params, updates), noise_state, opt_state

    return jax_trainer(problem, init, update, np.zeros(problem.rows, bool))
