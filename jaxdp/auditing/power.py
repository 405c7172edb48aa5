"""The smallest fault that an audit would have seen: what a pass can be worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxdp.auditing import bounds, dp_sgd, zeroth_order
from jaxdp.auditing.curves import plan_curve
from jaxdp.auditing.one_run import default_num_guesses
from jaxdp.mechanism import PrivacyPlan

_NUM_RUNS = 100
# Of the simulated runs: a fault that is seen in less than 90% of runs would be seen in so many of 100 with probability 6%.
_SEEN = 95
_TOLERANCE = 0.01

#: From a fraction of the noise to the coins and scores of simulated runs, `[m, runs]`.
Simulate = Callable[[float], tuple[np.ndarray, np.ndarray]]


def refuted_noise(plan: PrivacyPlan, simulate: Simulate, *, significance: float) -> float:
    """The largest fraction of the plan's noise multiplier, to 0.01, that an audit refutes with probability 0.9 or more.

    Judged by simulated runs of the claim's mechanism with less noise: their scores are those of the attack, and of its scores only
    "steps". 0 if not even a run without noise is refuted so often.

    Args:
        plan: The claim.
        simulate: `dp_sgd_runs` or `zeroth_order_runs` of the plan.
        significance: That of the scores "steps", a share of the audit's.
    """
    m, r = plan.num_examples, default_num_guesses(plan)
    fewest = bounds.fewest_rejected(m, r, plan_curve(plan), significance=significance)

    def is_seen(fraction: float) -> bool:
        coins, scores = simulate(fraction)
        right = [bounds.guess(scores[:, run], coins[:, run], r).num_correct for run in range(coins.shape[1])]
        return bool(np.mean(np.asarray(right) >= fewest) >= _SEEN / _NUM_RUNS)

    if not is_seen(0.0):
        return 0.0
    return bounds.largest_rejected(is_seen, 0.0, 1.0, _TOLERANCE)


def dp_sgd_runs(plan: PrivacyPlan, rng: np.random.Generator) -> Simulate:
    """Simulated runs of `dp_sgd_run`: scores drawn from a store of 4,000 of canaries that take part, and of others."""

    def simulate(fraction: float) -> tuple[np.ndarray, np.ndarray]:
        inside, outside = dp_sgd.simulated_scores(plan, fraction, 4000, rng)
        shape = (plan.num_examples, _NUM_RUNS)
        coins = rng.random(shape) < 0.5
        return coins, np.where(coins, rng.choice(inside, shape), rng.choice(outside, shape))

    return simulate


def zeroth_order_runs(plan: PrivacyPlan, num_directions: int, rng: np.random.Generator) -> Simulate:
    """Simulated runs of `zeroth_order_run`."""
    return zeroth_order.simulated_scores(plan, num_directions, rng, _NUM_RUNS)
