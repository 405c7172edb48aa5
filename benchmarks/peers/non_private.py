"""The yardstick of the JAX contenders: SGD on the gradient of the mean loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.trainer import Problem, Settings, Trainer, jax_trainer


def make(problem: Problem, settings: Settings) -> Trainer:
    tx = optax.sgd(settings.learning_rate)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(problem.model.loss, in_axes=(None, 0))(params, batch))

    def update(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        _, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = problem.params()
    return jax_trainer(update, (params, tx.init(params)), problem.batch())
