"""The yardstick of the JAX contenders: SGD on the gradient of the mean loss, in one piece or accumulated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.trainer import Problem, Settings, Trainer, jax_trainer, microbatches


def make(problem: Problem, settings: Settings, *, microbatch_size: int | None = None) -> Trainer:
    tx = optax.sgd(settings.learning_rate)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(problem.model.loss, in_axes=(None, 0))(params, batch))

    def gradient(params: Any, batch: Any) -> Any:
        if microbatch_size is None:
            return jax.grad(mean_loss)(params, batch)
        fraction = microbatch_size / problem.rows

        def add(total: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(mean_loss)(params, rows)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), microbatches(batch, microbatch_size))
        return jax.tree.map(lambda leaf: leaf * fraction, total)

    def update(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax_trainer(problem, lambda params: (params, tx.init(params)), update)
