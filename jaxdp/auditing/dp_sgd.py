"""Canaries in a DP-SGD run: the step, the clipping, the noise and the sampler of every other run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.auditing.one_run import Run
from jaxdp.gradients import Method
from jaxdp.mechanism import PrivacyPlan
from jaxdp.sampling import poisson_batches
from jaxdp.training import make_dp_step


def dp_sgd_run(
    plan: PrivacyPlan,
    *,
    canary_norm: float,
    rng: np.random.Generator,
    noise_key: Key | None = None,
    method: Method = "auto",
) -> Run:
    """A run of `make_dp_step` over batches of `poisson_batches` whose records are canaries, and nothing else.

        loss(params, canary i) = a_i params[i],        a_i = canary_norm if i takes part, else 0

    The gradient of canary i is a_i times the unit vector e_i, a direction that no other record has, so the score of a canary, the
    inner product of e_i with all released noisy sums, meets no other canary. A canary that does not take part stays in the data
    as a record that contributes nothing.

    Args:
        plan: What the run does. It may differ from the plan that is audited: that is how an audit is tried out.
        canary_norm: Gradient norm of a canary. Far above the clip norm it also audits the clipping.
        rng: Draws the batches.
        noise_key: Of the noise; fresh entropy by default.
        method: Of `clipped_grad`.
    """
    norm = _validate.positive("canary_norm", canary_norm)

    def run(is_included: np.ndarray) -> np.ndarray:
        m = len(is_included)
        source = {"index": np.arange(m, dtype=np.int32), "norm": np.where(is_included, norm, 0).astype(np.float32)}
        init, step = make_dp_step(_loss, _sum_of_releases(), plan, method=method)
        state = init(jnp.zeros(m), noise_key=noise_key)
        for batch, is_padding_example in poisson_batches(source, plan, rng):
            state, _ = step(state, batch, is_padding_example)
        return plan.expected_batch_size * np.asarray(state.opt_state, np.float64)

    return run


def _loss(params: jax.Array, canary: dict[str, jax.Array]) -> jax.Array:
    return canary["norm"] * params[canary["index"]]


def _sum_of_releases() -> optax.GradientTransformation:
    """An "optimizer" whose state is the sum of all that the mechanism released, and which moves nothing."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), jax.tree.map(jnp.add, state, updates)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
