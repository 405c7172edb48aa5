"""What a mechanism permits the tests of one record, as curves for `bounds`; and the Gaussian mechanism of parameter mu."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution
from scipy import optimize, special

from jaxdp.auditing.bounds import Curve
from jaxdp.mechanism import PrivacyPlan

# Coarser than an accountant's, which has a delta of 1e-5 to resolve: guesses show nothing as rare as that.
_LOSS_GRID = 5e-3
_EPSILONS = np.concatenate([np.arange(0.0, 6.0, 0.1), np.arange(6.0, 20.5, 0.5)])


def gaussian_curve(mu: float) -> Curve:
    """Of mu-GDP: telling N(0, 1) from N(mu, 1), `Phi(Phi^-1(y) - mu)` (Dong, Roth, Su, arXiv 1905.02383)."""

    def curve(true_positive_rate: float) -> float:
        return float(special.ndtr(special.ndtri(true_positive_rate) - mu))

    return curve


def pair_curve(epsilons: np.ndarray, deltas: np.ndarray) -> Curve:
    """Of a mechanism that is (epsilon_j, delta_j)-DP for every j, both for adding and for removing the record.

    A true positive rate y and a false positive rate x obey y <= delta + e^epsilon x and 1 - x <= delta + e^epsilon (1 - y).
    """
    odds = np.exp(epsilons)

    def curve(true_positive_rate: float) -> float:
        y = true_positive_rate
        return float(max(0.0, np.max((y - deltas) / odds), np.max(1 - deltas - odds * (1 - y))))

    return curve


def plan_curve(plan: PrivacyPlan) -> Curve:
    """Of all steps of `plan`: that of a Gaussian without sampling; else, and of Laplace noise, of the privacy loss of its steps.

    The distribution rounds delta up, finitely many pairs permit more than the whole curve, and truncation is charged for by the
    probability that it happens at all: a rejection stays valid.
    """
    if plan.noise == "laplace":  # the same for adding a record and for replacing it by one that contributes nothing
        one_step = privacy_loss_distribution.from_laplace_mechanism(
            plan.noise_multiplier, sampling_prob=plan.sampling_prob, value_discretization_interval=_LOSS_GRID
        )
    elif plan.sampling_prob == 1:
        return gaussian_curve(math.sqrt(plan.num_steps) / plan.noise_multiplier)
    else:
        one_step = privacy_loss_distribution.from_gaussian_mechanism(
            plan.noise_multiplier,
            sampling_prob=plan.sampling_prob,
            value_discretization_interval=_LOSS_GRID,
            # A canary that does not take part stays in the data set as a record that contributes nothing.
            neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
        )
    losses = one_step.self_compose(plan.num_steps)
    overflow = math.exp(plan.release(plan.num_steps).log_overflow_prob())
    return pair_curve(_EPSILONS, losses.get_delta_for_epsilon(list(_EPSILONS)) + (1 + np.exp(_EPSILONS)) * overflow)


def with_noise(plan: PrivacyPlan, noise_multiplier: float) -> PrivacyPlan:
    """The same steps at another noise, whose epsilon is no longer a goal."""
    return dataclasses.replace(plan, noise_multiplier=noise_multiplier, target_epsilon=None)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of mu-GDP at `delta`: the root of delta = Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu).

    At delta = 0 it is infinite: a Gaussian has no pure epsilon.
    """
    if mu <= 0 or math.isinf(mu):
        return max(0.0, mu)
    if delta == 0:
        return math.inf

    def excess(epsilon: float) -> float:
        first = special.ndtr(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)) - delta)

    # Beyond this the first term alone is below delta.
    high = mu * (mu / 2 - float(special.ndtri(delta)))
    return 0.0 if excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, high))  # type: ignore[arg-type]
