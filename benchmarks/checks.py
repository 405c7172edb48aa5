"""What must hold before contenders are timed against each other: equal updates, and noise of the right size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.models import Params
from benchmarks.peers import Contender, Problem, Settings, Trainer, jaxdp_contender
from benchmarks.peers.trainer import to_host

# The definition: one gradient per example, clipped and summed.
REFERENCE = "jaxdp, method vmap"

# Float32 implementations of one sum differ by rounding, some 1e-7, and Opacus adds 1e-6 to every norm. jaxdp charges the worst
# case of rounding to a norm, so that no example can exceed the clip norm: 1e-4 of it at a hundred tokens.
TOLERANCE = 1e-3

# The check reads the update off the parameters, so a step must move them far enough for rounding not to matter.
CHECK_LEARNING_RATE = 1024.0


def gradient_norms(problem: Problem) -> np.ndarray:
    """The gradient norm of each example at the initial parameters, `[B]`."""
    params = problem.params()

    @jax.jit
    def norms(batch: Any) -> jax.Array:
        return jax.lax.map(lambda example: optax.tree.norm(jax.grad(problem.model.loss)(params, example)), batch)

    return np.asarray(norms(problem.batch()))


def _gradient(trainer: Trainer, before: Params, learning_rate: float) -> np.ndarray:
    """What one step of SGD subtracted, over the learning rate, as one vector."""
    trainer.step()
    after = trainer.params()
    assert after.keys() == before.keys()
    return np.concatenate(
        [
            (before[name].astype(np.float64) - after[name].astype(np.float64)).ravel() / learning_rate
            for name in sorted(before)
        ]
    )


def update_differences(
    contenders: Sequence[Contender], problem: Problem, settings: Settings
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Compares the noiseless update of every contender with the definition.

    That is jaxdp with one gradient per example and the contender's own policy, at the clip norm of `settings`; for
    contenders that do not clip, at an infinite one.

    Returns:
        Name -> the relative L2 difference; and policy -> the noiseless gradient by the definition.
    """
    before = to_host(problem.params())
    quiet = dataclasses.replace(settings, noise_multiplier=0.0, learning_rate=CHECK_LEARNING_RATE)
    unclipped = dataclasses.replace(quiet, l2_clip_norm=math.inf)

    def gradient(contender: Contender, settings: Settings) -> np.ndarray:
        return _gradient(contender.make(problem, settings), before, CHECK_LEARNING_RATE)

    references: dict[str, np.ndarray] = {}
    differences: dict[str, float] = {}
    for contender in contenders:
        policy = contender.policy
        if policy not in references:
            references[policy] = (
                gradient(jaxdp_contender("vmap"), unclipped)
                if policy == "none"
                else gradient(jaxdp_contender("vmap", policy=policy), quiet)
            )
        reference = references[policy]
        difference = np.linalg.norm(gradient(contender, quiet) - reference) / np.linalg.norm(reference)
        differences[contender.name] = float(difference)
    return differences, references


def check_updates(
    contenders: Sequence[Contender], problem: Problem, settings: Settings, *, tolerance: float = TOLERANCE
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """As `update_differences`.

    Raises:
        RuntimeError: a contender computes something else.
    """
    differences, references = update_differences(contenders, problem, settings)
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name} does not compute the update of {REFERENCE}: without noise they differ by {difference:.2g} "
                f"(relative L2, tolerance {tolerance:g}); timing them against each other would mean nothing."
            )
    return differences, references


def check_noise(
    contenders: Sequence[Contender],
    trainers: Mapping[str, Trainer],
    problem: Problem,
    settings: Settings,
    references: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Compares the standard deviation of the noise with sigma C / B; runs one step of each contender that adds noise.

    Raises:
        RuntimeError: a contender adds another amount of noise.
    """
    before = to_host(problem.params())
    expected = settings.noise_multiplier * settings.l2_clip_norm / problem.rows
    size = sum(leaf.size for leaf in before.values())
    tolerance = 6 / math.sqrt(2 * size) + 1e-3  # six standard errors
    measured: dict[str, float] = {}
    for contender in contenders:
        if not contender.adds_noise:
            continue
        noise = _gradient(trainers[contender.name], before, settings.learning_rate) - references[contender.policy]
        name, stddev = contender.name, float(np.sqrt(np.mean(np.square(noise))))
        measured[name] = stddev
        if not abs(stddev / expected - 1) <= tolerance:
            raise RuntimeError(f"{name} adds noise of standard deviation {stddev:.6g}, expected {expected:.6g}.")
    return {"expected": expected, "relative_tolerance": tolerance, "measured": measured}
