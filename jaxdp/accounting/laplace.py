"""Pure epsilon of Laplace noise on one clipped number, truncated Poisson sampling included; and its privacy loss.

One step draws a batch, releases y = sum of c_j over the batch + Lap(b C), |c_j| <= C. With s = 1/b and t = e^s, densities of y for
two batches are within t of each other where they differ by one record, and within t^2 where one record takes another's place.

**Without truncation**, a record x added to a data set D of n records turns the density P_D of y into (1 - q) P_D + q G, where
P_D / t <= G <= t P_D. So the step is log(1 + q (t - 1))-DP, and without sampling s-DP, T steps T s-DP; both are exact.

**With truncation** to `cap` records G is another. Let pi_a = P[Bin(n, q) = a], and U_a(y) the mean density over uniformly random
batches of a records of D, so that P_D = sum_{a < cap} pi_a U_a + pi_{>= cap} U_cap. If a < cap others are drawn, x joins them: U_a
turns into U_a(y - c_x), within t of U_a. If a >= cap are drawn, x stays out or takes the place of a uniformly random one: a density
within t^2 of U_cap. Hence

    G / P_D  <=  u = (1 - w) t + w t^2,        G / P_D  >=  v = (1 - w) / t + w / t^2,        w >= pi_{>= cap} U_cap(y) / P_D(y)

And since U_cap <= t^(cap - a) U_a, the share of full batches at any y is at most that of a binomial law tilted by t^a,

    w  =  P[Bin(n, q') >= cap],        q' = q t / (1 - q + q t)

which grows with n. Those n records are the ones that both data sets have: at most `num_examples` of them where a record may be
added, one less where one takes the place of another. So the step is log(1 - q + q u)-DP. Removing x costs no more, since
(1 - q + q u)(1 - q + q v) >= 1 by Jensen's inequality. Nor does putting a record in its place that contributes nothing, whose G_0
is within t of G and at most h P_D, h = 1 - w + w t = u / t: both ratios of (1 - q) P_D + q G and (1 - q) P_D + q G_0 are largest
for the largest G or G_0, and at most 1 - q + q t h. Putting any other record in its place costs
log((1 - q + q u) / (1 - q + q v)), which without truncation is exact.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf, privacy_loss_distribution as losses
from scipy import special, stats

from jaxdp.accounting.releases import SampledRelease, smallest_padded_batch_size

# Beyond this 1/b a step shows the record whenever it is drawn, and all but e^-50 of the loss is that of the two-point law.
_LOUDEST = 50.0
# How much of the epsilon of a step truncation may cost, at most.
_NEGLIGIBLE = 1e-4


def pure_epsilon(release: SampledRelease, relation: NeighboringRelation) -> float:
    """The epsilon of all steps of a Laplace release at delta = 0; infinite without noise."""
    return release.num_steps * pure_epsilon_of_one_step(release, relation)


def pure_epsilon_of_one_step(release: SampledRelease, relation: NeighboringRelation) -> float:
    """The same of one step: log(1 - q + q u), and under REPLACE_ONE log((1 - q + q u) / (1 - q + q v))."""
    assert release.noise == "laplace"
    if release.noise_multiplier == 0:
        return math.inf
    q, s = release.sampling_prob, 1 / release.noise_multiplier
    w = 0.0
    if release.truncates:
        others = release.most_records(relation) - 1
        w = float(stats.binom.sf(release.padded_batch_size - 1, others, _tilted(q, s)))
    added = _log_mean(q, s + _log_mean(w, s))
    if relation != NeighboringRelation.REPLACE_ONE:
        return added
    return added - _log_mean(q, -s + _log_mean(w, -s))


def noise_multiplier_for(target_epsilon: float, *, sampling_prob: float, num_steps: int) -> float:
    """b of the pure goal when one record is added or removed, without truncation: 1 / log(1 + (e^(epsilon / T) - 1) / q)."""
    return 1 / _scale_free(target_epsilon / num_steps, sampling_prob)


def padded_batch_size_for(s: float, *, num_examples: int, sampling_prob: float) -> int:
    """The padded batch size at which truncation costs a pure epsilon nothing visible: w t below 1e-4, for s = 1/b."""
    return smallest_padded_batch_size(num_examples + 1, _tilted(sampling_prob, s), math.log(_NEGLIGIBLE) - s)


def loss_of_one_step(
    release: SampledRelease, grid: float, relation: NeighboringRelation
) -> losses.PrivacyLossDistribution:
    """The privacy loss of a step without truncation, discretized upward.

    Of Laplace noise itself where one record is added or removed. Under REPLACE_ONE with sampling, for which `dp_accounting` has
    none, and for the loudest steps, that of the law on two points which dominates every pure DP step of its epsilon (Kairouz, Oh,
    Viswanath, arXiv 1311.0776, theorem 3.2).
    """
    is_replaced = relation == NeighboringRelation.REPLACE_ONE
    s = (2 if is_replaced else 1) / release.noise_multiplier
    if s > _LOUDEST or (is_replaced and release.sampling_prob < 1):
        return _two_point_loss(pure_epsilon_of_one_step(release.without_truncation(), relation), grid)
    return losses.from_laplace_mechanism(1 / s, value_discretization_interval=grid, sampling_prob=release.sampling_prob)


def spread_of_loss(release: SampledRelease) -> tuple[float, float]:
    """About the standard deviation of the privacy loss of one step, q sqrt(2/3 e^s + 1/3 e^-2s - 1), and its range."""
    s = 1 / release.noise_multiplier
    variance = 2 / 3 * math.expm1(min(s, 700.0)) + 1 / 3 * math.expm1(-2 * s)
    return release.sampling_prob * math.sqrt(variance), 2 * s


def _two_point_loss(epsilon: float, grid: float) -> losses.PrivacyLossDistribution:
    """Of e^epsilon : 1 against 1 : e^epsilon, with the two losses spread over their neighbors on the grid (arXiv 2207.04380)."""
    points = np.unique([rounded(side / grid) for side in (-epsilon, epsilon) for rounded in (math.floor, math.ceil)])
    at = points * grid
    # Of the outcome that is likelier, and of both.
    deltas = np.maximum(-special.expit(epsilon) * np.expm1(at - epsilon), -np.expm1(np.minimum(at, 0.0)))
    with np.errstate(over="ignore"):  # a quotient by e^(distance of the points) that is zero, and comes out as zero
        mass = pld_pmf.create_pmf_pessimistic_connect_dots(grid, points, np.maximum(deltas, 0.0))
    return losses.PrivacyLossDistribution(mass)


def _scale_free(epsilon: float, q: float) -> float:
    """s such that log(1 + q (e^s - 1)) = epsilon."""
    if epsilon > 700:
        return epsilon - math.log(q)
    return math.log1p(math.expm1(epsilon) / q)


def _tilted(q: float, s: float) -> float:
    """q e^s / (1 - q + q e^s)."""
    return 1.0 if q == 1 else float(special.expit(special.logit(q) + s))


def _log_mean(p: float, x: float) -> float:
    """log(1 - p + p e^x)."""
    if p in (0.0, 1.0):
        return p * x
    if x < 30:
        return math.log1p(p * math.expm1(x))
    return float(np.logaddexp(math.log1p(-p), math.log(p) + x))
