"""A privacy goal -> the smallest noise multiplier that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_accounting import NeighboringRelation
from scipy import optimize, stats

from jaxdp.accounting import laplace
from jaxdp.accounting.accountants import AccountantName, epsilon
from jaxdp.accounting.releases import NoiseName, SampledRelease

_SMALLEST, _LARGEST = math.log(1e-2), math.log(1e6)


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    *,
    noise: NoiseName,
    num_examples: int,
    sampling_prob: float,
    padded_batch_size: int,
    num_steps: int,
    neighboring_relation: NeighboringRelation,
    accountant: AccountantName,
) -> float:
    """Returns the smallest noise multiplier, to 5 digits, whose `num_steps` cost at most `target_epsilon` at `target_delta`.

    A `target_delta` of 0 is a pure goal, for Laplace noise.

    Raises:
        ValueError: no noise multiplier in [1e-2, 1e6] reaches the target, or truncation alone exceeds it.
    """

    def excess_with(padded: int) -> Callable[[float], float]:
        def excess(log_sigma: float) -> float:
            release = SampledRelease(noise, num_examples, sampling_prob, padded, math.exp(log_sigma), num_steps)
            value = epsilon([release], target_delta, neighboring_relation=neighboring_relation, accountant=accountant)
            return min(value, 1e6) - target_epsilon

        return excess

    # The truncated event takes several times longer and is close to the untruncated one: solve that first.
    if target_delta == 0:
        b = laplace.noise_multiplier_for(target_epsilon, sampling_prob=sampling_prob, num_steps=num_steps)
        guess = math.log(b)
    elif num_steps * sampling_prob < target_delta:
        guess = _SMALLEST  # the differing record enters no batch but with a probability that delta covers: any noise will do
    else:
        guess = _clt_log_noise_multiplier(target_epsilon, target_delta, sampling_prob, num_steps)
    log_sigma = _solve(excess_with(num_examples if sampling_prob == 1 else num_examples + 1), guess)
    excess = excess_with(padded_batch_size)
    if log_sigma is None or excess(log_sigma) > 1e-4 * target_epsilon:
        log_sigma = _solve(excess, guess if log_sigma is None else log_sigma)
    if log_sigma is None:
        raise ValueError(
            f"no noise multiplier in [1e-2, 1e6] gives epsilon={target_epsilon:g} at delta={target_delta:g} with "
            f"sampling_prob={sampling_prob:g}, num_steps={num_steps}, padded_batch_size={padded_batch_size}; choose a larger "
            "target, or a larger padded_batch_size if truncation is what costs."
        )
    # Round up to 5 significant digits and on to where the target truly holds: the root lies on either side.
    sigma = _round_up(math.exp(log_sigma))
    while excess(math.log(sigma)) > 0:
        sigma = _round_up(sigma * (1 + 5e-5))
    return sigma


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 4)
    return float(f"{math.ceil(value / unit) * unit:.5g}")


def _solve(excess: Callable[[float], float], start: float) -> float | None:
    """The root of the decreasing function `excess`: walks outward from `start` until its sign changes, then bisects.

    Returns the smallest noise of all if even that meets the goal, and None if not even the largest does.
    """
    position, stride = min(max(start, _SMALLEST), _LARGEST), 0.05
    upward = excess(position) > 0
    end = _LARGEST if upward else _SMALLEST
    while position != end:
        step = min(position + stride, end) if upward else max(position - stride, end)
        if (excess(step) > 0) != upward:
            low, high = min(position, step), max(position, step)
            return float(optimize.brentq(excess, low, high, xtol=2e-5))  # type: ignore[arg-type]
        position, stride = step, 2 * stride
    return None if upward else _SMALLEST


def _clt_log_noise_multiplier(
    target_epsilon: float, target_delta: float, sampling_prob: float, num_steps: int
) -> float:
    """A first guess: subsampled Gaussians compose to a Gaussian of mu = q sqrt(T (exp(1/sigma^2) - 1)) (arXiv 1911.11607)."""

    def log_delta_excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        first = float(stats.norm.logcdf(-target_epsilon / mu + mu / 2))
        second = target_epsilon + float(stats.norm.logcdf(-target_epsilon / mu - mu / 2))
        return first + math.log1p(-math.exp(min(second - first, -1e-15))) - math.log(target_delta)

    low, high = math.log(1e-6), math.log(1e3)
    if log_delta_excess(low) > 0 or log_delta_excess(high) < 0:  # an extreme goal: any guess will do
        return 0.0
    mu = math.exp(float(optimize.brentq(log_delta_excess, low, high, xtol=1e-6)))  # type: ignore[arg-type]
    if sampling_prob == 1:
        return math.log(math.sqrt(num_steps) / mu)
    return -0.5 * math.log(math.log1p((mu / sampling_prob) ** 2 / num_steps))
