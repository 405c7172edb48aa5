"""Canaries in a DP-SGD run: the steps, the clipping, the noise and the sampler of every other run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.auditing.one_run import Run
from jaxdp.auditing.ways import MakeStep, Way, last_release, make_step, ways_of
from jaxdp.clipping import flat
from jaxdp.gradients import clipped_grad
from jaxdp.mechanism import PrivacyPlan
from jaxdp.sampling import poisson_batches

#: The leaves that canaries live in, each by another route of `clipped_grad`: canary i in leaf number i mod 4.
LEAVES = ("dense", "embedding", "copy", "joint")
# What is taken for noise without which a combination of steps could not be told from any other: of the std of the claim.
_LEAST_NOISE = 1e-3


def dp_sgd_run(
    plan: PrivacyPlan,
    *,
    canary_norm: float,
    rng: np.random.Generator,
    noise_key: Key | None = None,
    ways: Sequence[Way] | None = None,
    make_step: MakeStep = make_step,
) -> Run:
    """A run over batches of `poisson_batches` whose records are canaries, and nothing else.

        loss(params, canary i) = h_t a_i leaf_i[row_i],    a_i = canary_norm if i takes part, else 0;    h_t = 1 or -1

    The gradient of canary i in step t is h_t a_i times the unit vector e_i, a direction that no other record has: y_ti, the inner
    product of h_t e_i with the released noisy sum, meets no other canary. The signs h_t are public coins. A canary that does not
    take part stays in the data as a record that contributes nothing. One leaf gets no gradient: its releases are noise alone.

    Scores, by name:

        "steps"         sum_t log(1 - q + q exp((2 y_ti - 1) / (2 sigma^2))), the log-likelihood ratio of the claim, in clip norms
        "differences"   (V^-1 h)^T (h y)_i,    V = covariance of the steps in the leaf without gradient + 1e-6 sigma^2

    The second is the best combination of steps under the noise as it was seen: where steps share noise, of their differences. With
    independent noise it is about the sum.

    Args:
        plan: What the run does. It may differ from the plan that is audited: that is how an audit is tried out.
        canary_norm: Gradient norm of a canary. Far above the clip norm it also audits the clipping.
        rng: Draws the batches and the signs.
        noise_key: Of the noise; fresh entropy by default.
        ways: How steps are computed, in turn; all that the plan's policy allows by default.
        make_step: Of one way; `broken_step` gives others.
    """
    norm = _validate.positive("canary_norm", canary_norm)
    chosen = ways_of(plan.clipping) if ways is None else tuple(ways)

    def run(is_included: np.ndarray) -> dict[str, np.ndarray]:
        signs = rng.choice(np.array([-1.0, 1.0], np.float32), plan.num_steps)
        released = _releases(plan, is_included, signs, norm, rng, noise_key, chosen, make_step)
        C = plan.clipping.total_l2_clip_norm
        canaries, blank = (part / C for part in (released[:, : len(is_included)], released[:, len(is_included) :]))
        return {
            "steps": log_likelihood_ratios(signs[:, None] * canaries, plan),
            "differences": _least_noise(canaries, blank, signs, plan.noise_multiplier),
        }

    return run


def log_likelihood_ratios(steps: np.ndarray, plan: PrivacyPlan) -> np.ndarray:
    """`[m]` from `[T, m]` sums along canaries, in clip norms: of "in each batch with probability q" to "in none"."""
    q, variance = plan.sampling_prob, max(plan.noise_multiplier, 1e-3) ** 2
    ratios = (2 * steps - 1) / (2 * variance)
    if q < 1:
        ratios = np.logaddexp(np.log1p(-q), np.log(q) + ratios)
    return ratios.sum(axis=0)


def simulated_scores(
    plan: PrivacyPlan, fraction: float, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scores "steps" of canaries that take part and of others, `[count]` each, under a fraction of the plan's noise."""
    T, q = plan.num_steps, plan.sampling_prob
    sigma = fraction * plan.noise_multiplier

    def scores(is_in: float) -> np.ndarray:
        found = []
        for start in range(0, count, 1000):  # rows of T numbers, a few megabytes at a time
            shape = (T, min(1000, count - start))
            sampled = rng.random(shape) < q
            found.append(log_likelihood_ratios(is_in * sampled + sigma * rng.normal(size=shape), plan))
        return np.concatenate(found)

    return scores(1.0), scores(0.0)


def _least_noise(canaries: np.ndarray, blank: np.ndarray, signs: np.ndarray, sigma: float) -> np.ndarray:
    covariance = blank @ blank.T / blank.shape[1]
    least = max(_LEAST_NOISE * sigma, 1e-6) ** 2
    weights = linalg.solve(covariance + least * np.eye(len(signs)), signs, assume_a="pos")
    return weights @ canaries


def _releases(
    plan: PrivacyPlan,
    is_included: np.ndarray,
    signs: np.ndarray,
    norm: float,
    rng: np.random.Generator,
    noise_key: Key | None,
    ways: tuple[Way, ...],
    make_step: MakeStep,
) -> np.ndarray:
    """The released sums `[T, m + blank]`: the entry of each canary, then those that none has."""
    m, num_leaves = len(is_included), len(LEAVES)
    rows = -(-m // num_leaves)
    params = {"dense": jnp.zeros((rows, 1)), "embedding": jnp.zeros((rows, 1)), "copy": jnp.zeros(rows)}
    params |= {"joint": jnp.zeros((rows, 1)), "noise": jnp.zeros(max(500, 8 * plan.num_steps))}
    index = np.arange(m, dtype=np.int32)
    source = {
        "leaf": index % num_leaves,
        "row": index // num_leaves,
        "norm": np.where(is_included, norm, 0).astype(np.float32),
    }
    makers = {way: make_step(_loss, last_release(), plan, way=way) for way in ways}
    # `dp_aggregate` has a state of its own; all methods of `make_dp_step` take turns with one.
    owners = {way: "dp_aggregate" if way == "dp_aggregate" else "make_dp_step" for way in ways}
    states: dict[str, Any] = {}
    for way, owner in owners.items():
        if owner not in states:
            states[owner] = makers[way][0](params, noise_key=noise_key)
    # [T, ...] on the host: a state is donated to the next step.
    released = []
    for t, (batch, is_padding_example) in enumerate(poisson_batches(source, plan, rng)):
        way = ways[t % len(ways)]
        state, _ = makers[way][1](states[owners[way]], batch, is_padding_example, signs[t])
        states[owners[way]] = state
        released.append(jax.device_get(state.opt_state))
    leaves = {name: np.stack([np.asarray(step[name], np.float64).ravel() for step in released]) for name in params}
    by_row = np.stack([leaves[name] for name in LEAVES], axis=2)  # [T, rows, leaves]
    return plan.expected_batch_size * np.concatenate([by_row.reshape(len(signs), -1)[:, :m], leaves["noise"]], axis=1)


def _loss(params: dict[str, jax.Array], canary: dict[str, jax.Array], sign: jax.Array) -> jax.Array:
    amplitude = sign * canary["norm"]
    dense, embedding, copy, joint = (jnp.where(canary["leaf"] == number, amplitude, 0.0) for number in range(4))
    row = canary["row"]
    one_hot = (jnp.arange(len(params["copy"])) == row).astype(jnp.float32)
    total = jnp.sum((dense * one_hot)[None, :] @ params["dense"])
    total += embedding * jnp.sum(params["embedding"][row])
    total += jnp.sum(copy * one_hot * params["copy"])
    twice = jnp.sum(params["joint"][row]) + jnp.sum(one_hot[None, :] @ params["joint"])
    return total + 0.5 * joint * twice


def routes() -> dict[str, str]:
    """The route that `clipped_grad` takes for each leaf of the canaries, as `explain` names it."""
    shapes = {"dense": (2, 1), "embedding": (2, 1), "copy": (2,), "joint": (2, 1)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    example = {"leaf": np.int32(0), "row": np.int32(0), "norm": np.float32(0)}
    loss = functools.partial(_loss, sign=jnp.float32(1))
    return {leaf.path: leaf.route for leaf in clipped_grad(loss, clipping=flat(1.0)).explain(params, example).leaves}
