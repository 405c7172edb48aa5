"""An audit: toss the coins, run the mechanism once, guess the coins from what it released, and compare with the plan's claim."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from dp_accounting import NeighboringRelation

from jaxdp import _validate
from jaxdp.auditing import bounds
from jaxdp.auditing.bounds import Curve, Guesses
from jaxdp.auditing.curves import gaussian_epsilon, plan_curve, with_noise
from jaxdp.mechanism import PrivacyPlan, check_plan

#: `run(is_included [m]) -> scores [m]`, or several by name: one whole run in which the canaries of True take part like any record.
#: Scores are computed from what the run released and from public values alone, and are larger for canaries that seem to have
#: taken part.
Run: TypeAlias = Callable[[np.ndarray], "np.ndarray | Mapping[str, np.ndarray]"]

FEWEST_CANARIES = 1000
# Guessing every canary would drown the sure guesses in doubtful ones; a few, even if all are right, cannot refute a large epsilon.
# With 1,000 canaries this many refute half the noise of a claim of epsilon 2 to 8 in more than 9 runs of 10.
_GUESSED_FRACTION = 0.3
# Steps and end of the search for the noise that a bound stands for, in its logarithm.
_STRIDE, _LEAST = 0.25, -5.0


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """What one kind of scores showed.

    Attributes:
        name: Name of the scores.
        guesses: Number of coins guessed, and of those guessed rightly.
        epsilon_lower_bound: As in `AuditReport`, of these scores.
        pair_lower_bound: As in `AuditReport`, of these scores.
        epsilon_estimate: As in `AuditReport`, of these scores.
    """

    name: str
    guesses: Guesses
    epsilon_lower_bound: float
    pair_lower_bound: float
    epsilon_estimate: float


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What one run showed about its privacy.

    Attributes:
        claimed_epsilon: What the plan claims, at `delta`.
        delta: The delta of every epsilon here.
        significance: The probability, at most, that any bound of its kind is wrong; `significances` divides it.
        scores: One entry for each kind of scores.
    """

    claimed_epsilon: float
    delta: float
    significance: float
    scores: tuple[ScoreReport, ...]

    @property
    def worst(self) -> ScoreReport:
        """The scores whose lower bound is the largest."""
        return max(self.scores, key=lambda score: (score.epsilon_lower_bound, score.epsilon_estimate))

    @property
    def guesses(self) -> Guesses:
        """Guesses by the worst scores: how many coins, and how many rightly."""
        return self.worst.guesses

    @property
    def epsilon_lower_bound(self) -> float:
        """Lower bound by the whole trade-off curve of the plan (arXiv 2410.22235), from the worst scores.

        The run is not as private as the plan's mechanism would be with more noise, up to the noise at which its epsilon is this.
        It decides `passed`.
        """
        return self.worst.epsilon_lower_bound

    @property
    def pair_lower_bound(self) -> float:
        """Lower bound by the pair alone (arXiv 2305.08846): the run is not (epsilon, delta)-DP for any epsilon below this.

        It presumes nothing about the mechanism, and so it is lower.
        """
        return max(score.pair_lower_bound for score in self.scores)

    @property
    def epsilon_estimate(self) -> float:
        """An estimate and not a bound, from the worst scores: epsilon if they were normal, by their separation.

        It is infinite at delta = 0, where a normal law has none.
        """
        return self.worst.epsilon_estimate

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
    `significance` over the coins, the sampling and the noise: `significances` divides it between the kinds of scores. Failing is
    evidence; passing says that this attack found nothing.

    Args:
        plan: The claim, with a `target_delta`. Its `num_examples` is the number of canaries, at least 1,000.
        run: One run of the mechanism, such as `dp_sgd_run(plan)`. How many kinds of scores it returns must not depend on it.
        rng: Draws the coins.
        num_guesses: r, the number of canaries guessed, fixed before the run; three in ten by default.
        significance: The probability of a false alarm, at most.

    Raises:
        ValueError: the plan claims nothing that could be audited, or a number is out of range; before the run.
    """
    check_claim(plan)
    m = plan.num_examples
    r = default_num_guesses(plan) if num_guesses is None else _validate.positive_integer("num_guesses", num_guesses)
    if r > m:
        raise ValueError(f"num_guesses={r} exceeds the {m} canaries; guess at most each of them once.")
    significance = _validate.probability("significance", significance, allow_one=False)
    is_included = rng.random(m) < 0.5
    found = run(is_included)
    named = dict(found) if isinstance(found, Mapping) else {"scores": found}
    if not named:
        raise ValueError("run returned no scores; it must return an array [m], or arrays [m] by name.")
    for name, scores in named.items():
        if np.shape(scores) != (m,):
            raise ValueError(
                f"run returned {name} of shape {np.shape(scores)}; it must return one for each canary, ({m},)."
            )
    arrays = {name: np.asarray(scores) for name, scores in named.items()}
    return report(plan, arrays, is_included, num_guesses=r, significance=significance)


def default_num_guesses(plan: PrivacyPlan) -> int:
    """r of an audit that is not told another."""
    return round(_GUESSED_FRACTION * plan.num_examples)


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
    plan: PrivacyPlan,
    scores: Mapping[str, np.ndarray],
    is_included: np.ndarray,
    *,
    num_guesses: int,
    significance: float,
) -> AuditReport:
    """The report of scores and coins."""
    delta = plan.target_delta
    assert delta is not None
    shares = significances(significance, len(scores))

    @functools.cache
    def curve_at(noise_multiplier: float) -> Curve:
        return plan_curve(with_noise(plan, noise_multiplier))

    def of(name: str, found: np.ndarray, share: float) -> ScoreReport:
        guesses = bounds.guess(found, is_included, num_guesses)
        return ScoreReport(
            name=name,
            guesses=guesses,
            epsilon_lower_bound=curve_lower_bound(plan, guesses, significance=share, curve_at=curve_at),
            pair_lower_bound=bounds.epsilon_lower_bound(guesses, delta=delta, significance=share),
            epsilon_estimate=gaussian_epsilon(separation(found, is_included), delta),
        )

    return AuditReport(
        plan.epsilon(),
        delta,
        significance,
        tuple(of(*pair, share) for pair, share in zip(scores.items(), shares, strict=True)),
    )


def significances(significance: float, num_kinds: int) -> list[float]:
    """That of each kind of scores: a union bound, of which the first kind has four fifths.

    The others look for noise that cancels. Where it does, every guess is right, and any significance is enough.
    """
    others = num_kinds - 1
    return [0.8 * significance] + [0.2 * significance / others] * others if others else [significance]


def curve_lower_bound(
    plan: PrivacyPlan, guesses: Guesses, *, significance: float, curve_at: Callable[[float], Curve] | None = None
) -> float:
    """The epsilon of the plan at the least noise, to 1%, with which guessing so well is still too improbable; 0 for none.

    The claim itself is among the noises tried, so the bound reaches the plan's epsilon if, and only if, the plan is rejected.

    Args:
        plan: The claim.
        guesses: What was guessed.
        significance: The probability that the bound is wrong, at most.
        curve_at: The curve of the plan at a noise multiplier, if it is at hand.
    """
    curve_of = curve_at or (lambda noise_multiplier: plan_curve(with_noise(plan, noise_multiplier)))

    def rejected(log_ratio: float) -> bool:
        curve = curve_of(plan.noise_multiplier * math.exp(-log_ratio))
        return bounds.is_rejected(guesses, curve, significance=significance)

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
