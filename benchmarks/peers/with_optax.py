"""optax: `optax.contrib.differentially_private_aggregate` on gradients from `vmap(grad)`."""

from __future__ import annotations

from typing import Any

import jax
import optax

from benchmarks.peers.trainer import Problem, Settings, Trainer, jax_trainer


def make(problem: Problem, settings: Settings) -> Trainer:
    tx = optax.chain(
        optax.contrib.differentially_private_aggregate(
            settings.l2_clip_norm, settings.noise_multiplier, jax.random.key(problem.seed)
        ),
        optax.sgd(settings.learning_rate),
    )

    def update(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        grads = jax.vmap(jax.grad(problem.model.loss), in_axes=(None, 0))(params, batch)  # [B, *param]
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax_trainer(problem, lambda params: (params, tx.init(params)), update)
