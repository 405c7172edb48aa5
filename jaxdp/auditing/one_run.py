"""An audit: toss the coins, run the mechanism once, guess the coins from what it released, and compare with the plan's claim."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from dp_accounting import NeighboringRelation

from jaxdp import _validate
from jaxdp.auditing import bounds
from jaxdp.auditing.bounds import Guesses
from jaxdp.auditing.curves import gaussian_epsilon, plan_curve, with_noise
from jaxdp.mechanism import PrivacyPlan, check_plan

#: `run(is_included [m]) -> scores [m]`: one whole run in which the canaries of True take part like any record. The scores are
#: computed from what the run released and from public values alone, and are larger for canaries that seem to have taken part.
Run: TypeAlias = Callable[[np.ndarray], np.ndarray]

FEWEST_CANARIES = 1000
# Guessing every canary would drown the sure guesses in doubtful ones; a few, even if all are right, cannot refute a large epsilon.
# With 1,000 canaries this many refute half the noise of a claim of epsilon 2 to 8 in more than 9 runs of 10.
_GUESSED_FRACTION = 0.3
# Steps and end of the search for the noise that a bound stands for, in its logarithm.
_STRIDE, _LEAST = 0.25, -5.0


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What one run showed about its privacy.

    Attributes:
        claimed_epsilon: What the plan claims, at `delta`.
        delta: The delta of every epsilon here.
        significance: Of each bound on its own: the probability, at most, that it is wrong.
        guesses: How many coins were guessed, and how many rightly.
        epsilon_lower_bound: By the whole trade-off curve of the plan (arXiv 2410.22235): the run is not as private as the plan's
            mechanism would be with more noise, up to the noise at which its epsilon is this. It decides `passed`.
        pair_lower_bound: By the pair alone (arXiv 2305.08846): the run is not (epsilon, delta)-DP for any epsilon below this. It
            presumes nothing about the mechanism, and so it is lower.
        epsilon_estimate: An estimate and not a bound: epsilon if the scores were normal, by their separation; infinite at delta
            = 0, where a normal law has none.
    """

    claimed_epsilon: float
    delta: float
    significance: float
    guesses: Guesses
    epsilon_lower_bound: float
    pair_lower_bound: float
    epsilon_estimate: float

    @property
    def passed(self) -> bool:
        """Whether the lower bound leaves the claim standing. It is no proof of privacy, only the lack of one against it."""
        return self.epsilon_lower_bound < self.claimed_epsilon


def audit(
    plan: PrivacyPlan,
    run: Run,
    *,
    rng: np.random.Generator,
    num_guesses: int | None = None,
    significance: float = 0.05,
) -> AuditReport:
    """Audits one run against the claim of its plan, with every record a canary.

        coins_i ~ Bernoulli(1/2);   scores = run(coins);   guess the coins of the highest and the lowest scores

    **Guarantee**: if the run keeps the plan's trade-off curve for each record, `passed` is False with probability at most
    `significance` over the coins, the sampling and the noise. Failing is evidence; passing says that this attack found nothing.

    Args:
        plan: The claim, with a `target_delta`. Its `num_examples` is the number of canaries, at least 1,000.
        run: One run of the mechanism, such as `dp_sgd_run(plan)`.
        rng: Draws the coins.
        num_guesses: r, the number of canaries guessed, fixed before the run; three in ten by default.
        significance: The probability of a false alarm, at most.

    Raises:
        ValueError: the plan claims nothing that could be audited, or a number is out of range; before the run.
    """
    check_claim(plan)
    m = plan.num_examples
    r = _validate.positive_integer("num_guesses", round(_GUESSED_FRACTION * m) if num_guesses is None else num_guesses)
    if r > m:
        raise ValueError(f"num_guesses={r} exceeds the {m} canaries; guess at most each of them once.")
    significance = _validate.probability("significance", significance, allow_one=False)
    is_included = rng.random(m) < 0.5
    scores = np.asarray(run(is_included))
    if scores.shape != (m,):
        raise ValueError(f"run returned scores of shape {scores.shape}; it must return one for each canary, ({m},).")
    return report(plan, scores, is_included, num_guesses=r, significance=significance)


def check_claim(plan: PrivacyPlan) -> None:
    """Refuses a plan that claims nothing that coins could refute."""
    check_plan(plan)
    if plan.num_examples < FEWEST_CANARIES:
        raise ValueError(
            f"num_examples={plan.num_examples} is too few canaries to refute anything; use at least {FEWEST_CANARIES}."
        )
    if plan.target_delta is None:
        raise ValueError("the plan has no target_delta, and so no epsilon to audit; pass target_delta to jaxdp.plan.")
    if plan.neighboring_relation == NeighboringRelation.REPLACE_ONE:
        raise ValueError(
            "the plan's neighboring_relation is REPLACE_ONE, and the coins of an audit add or remove a record; audit the same "
            "noise under ADD_OR_REMOVE_ONE."
        )
    if plan.noise_multiplier == 0 or math.isinf(plan.epsilon()):
        raise ValueError("the plan claims an infinite epsilon, which no run can refute; give it noise.")


def report(
    plan: PrivacyPlan, scores: np.ndarray, is_included: np.ndarray, *, num_guesses: int, significance: float
) -> AuditReport:
    """The report of scores and coins."""
    delta = plan.target_delta
    assert delta is not None
    guesses = bounds.guess(scores, is_included, num_guesses)
    return AuditReport(
        claimed_epsilon=plan.epsilon(),
        delta=delta,
        significance=significance,
        guesses=guesses,
        epsilon_lower_bound=curve_lower_bound(plan, guesses, significance=significance),
        pair_lower_bound=bounds.epsilon_lower_bound(guesses, delta=delta, significance=significance),
        epsilon_estimate=gaussian_epsilon(separation(scores, is_included), delta),
    )


def curve_lower_bound(plan: PrivacyPlan, guesses: Guesses, *, significance: float) -> float:
    """The epsilon of the plan at the least noise, to 1%, with which guessing so well is still too improbable; 0 for none.

    The claim itself is among the noises tried, so the bound reaches the plan's epsilon if, and only if, the plan is rejected.
    """

    def rejected(log_ratio: float) -> bool:
        other = with_noise(plan, plan.noise_multiplier * math.exp(-log_ratio))
        return bounds.is_rejected(guesses, plan_curve(other), significance=significance)

    low = 0.0
    if rejected(low):
        while rejected(low + _STRIDE):
            low += _STRIDE
    else:
        low -= _STRIDE
        while not rejected(low):
            low -= _STRIDE
            if low < _LEAST:
                return 0.0
    found = bounds.largest_rejected(rejected, low, low + _STRIDE, 0.01)
    return with_noise(plan, plan.noise_multiplier * math.exp(-found)).epsilon()


def separation(scores: np.ndarray, is_included: np.ndarray) -> float:
    """mu: the distance between the mean scores of those in and those out, over the standard deviation around them."""
    inside, outside = scores[is_included], scores[~is_included]
    squares = np.sum((inside - inside.mean()) ** 2) + np.sum((outside - outside.mean()) ** 2)
    spread, gap = math.sqrt(squares / (len(scores) - 2)), max(0.0, float(inside.mean() - outside.mean()))
    if spread == 0:
        return math.inf if gap > 0 else 0.0
    return gap / spread
