"""Noise multiplier <-> (epsilon, delta), by way of a `DpEvent`. Runs on the host.

Two accountants of `dp_accounting` answer: `"pld"` (privacy loss distributions, tight, the default) and `"rdp"` (Renyi,
looser). They differ in how truncated sampling is charged: PLD has an event for it (arXiv 2508.15089); RDP has none, so the
total variation distance to untruncated sampling is charged to delta.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import dp_accounting
from dp_accounting import NeighboringRelation, pld, rdp
from scipy import optimize, stats

AccountantName: TypeAlias = Literal["pld", "rdp"]

# S11(iv): at this grid a calibration takes seconds; epsilon is 1.8289 instead of 1.8282 on the reference run, and always
# rounded up.
_PLD_GRID = 1e-3

# Default price of truncation (S10): invisible under PLD, where the event charges for it exactly; under RDP, small enough
# that its charge on delta, num_steps * (1 + e^epsilon) times this, disappears.
_OVERFLOW_PROB = {"pld": 1e-8, "rdp": 1e-18}


class SampledGaussian(NamedTuple):
    """Some identical steps of the one mechanism: truncated Poisson sampling, then a Gaussian.

    Attributes:
        num_examples: N, the size of the data set.
        sampling_prob: q, the probability of each example to enter a batch, independently.
        padded_batch_size: Larger draws are truncated to a uniformly random subset of this size.
        noise_multiplier: sigma, the noise std over the L2 clip norm.
        num_steps: How many steps.
    """

    num_examples: int
    sampling_prob: float
    padded_batch_size: int
    noise_multiplier: float
    num_steps: int

    @property
    def truncates(self) -> bool:
        return self.padded_batch_size < self.num_examples

    def dp_event(self) -> dp_accounting.DpEvent:
        """The event under PLD; it charges for truncation."""
        if self.truncates:
            event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                self.num_examples, self.sampling_prob, self.padded_batch_size, self.noise_multiplier
            )
        else:
            event = self._untruncated_event()
        return dp_accounting.SelfComposedDpEvent(event, self.num_steps)

    def untruncated_dp_event(self) -> dp_accounting.DpEvent:
        """The event of plain Poisson sampling, the only one that RDP takes."""
        return dp_accounting.SelfComposedDpEvent(self._untruncated_event(), self.num_steps)

    def _untruncated_event(self) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_prob == 1:
            return gaussian
        return dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)

    def log_overflow_prob(self) -> float:
        """log of a bound on the probability that any of the steps truncates, on the data set or a neighbor of it."""
        if not self.truncates:
            return -math.inf
        one_step = float(stats.binom.logsf(self.padded_batch_size, self.num_examples + 1, self.sampling_prob))
        return one_step + math.log(max(self.num_steps, 1))


def smallest_padded_batch_size(num_examples: int, sampling_prob: float, accountant: AccountantName) -> int:
    """The smallest multiple of 8 that a Poisson draw exceeds with negligible probability, at most `num_examples`.

    The probability is 1e-8 a step under PLD and 1e-18 under RDP; either way the accountant charges for it (S10).
    """
    # By bisection on the log of the tail: `isf` answers num_examples for a probability that 1 - p rounds away.
    low, high = 0, num_examples
    while low < high:
        middle = (low + high) // 2
        if stats.binom.logsf(middle, num_examples, sampling_prob) <= math.log(_OVERFLOW_PROB[accountant]):
            high = middle
        else:
            low = middle + 1
    return min(num_examples, -(-max(low, 1) // 8) * 8)


def epsilon(
    releases: Sequence[SampledGaussian],
    delta: float,
    *,
    neighboring_relation: NeighboringRelation,
    accountant: AccountantName,
) -> float:
    """Returns the epsilon at `delta` of all `releases` together; infinite if any of them is un-noised.

    Raises:
        ValueError: RDP was asked for a relation that it does not support with Poisson sampling (S11).
    """
    kept = tuple(release for release in releases if release.num_steps > 0)
    if not kept:
        return 0.0
    if any(release.noise_multiplier == 0 for release in kept):
        return math.inf
    return (_epsilon_pld if accountant == "pld" else _epsilon_rdp)(kept, delta, neighboring_relation)


@functools.lru_cache(maxsize=4096)
def _epsilon_pld(releases: tuple[SampledGaussian, ...], delta: float, relation: NeighboringRelation) -> float:
    ledger = pld.PLDAccountant(relation, _PLD_GRID)
    for release in releases:
        ledger.compose(release.dp_event())
    return float(ledger.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def _epsilon_rdp(releases: tuple[SampledGaussian, ...], delta: float, relation: NeighboringRelation) -> float:
    ledger = rdp.RdpAccountant(neighboring_relation=relation)
    for release in releases:
        event = release.untruncated_dp_event()
        if not ledger.supports(event):
            raise ValueError(
                f"the RDP accountant does not support Poisson sampling under {relation.name}; use accountant='pld', or "
                "neighboring_relation=ADD_OR_REMOVE_ONE."
            )
        ledger.compose(event)
    # Truncated and untruncated runs differ with probability at most eta on each of two neighbors, so
    # P[M(D) in S] <= e^eps (P[M(D') in S] + eta) + delta' + eta: (eps, delta' + (1 + e^eps) eta)-DP.
    eta = sum(math.exp(release.log_overflow_prob()) for release in releases)
    guess = float(ledger.get_epsilon(delta))
    for _ in range(50):
        charge = (1 + math.exp(min(guess, 700.0))) * eta
        if charge >= delta:
            return math.inf
        exact = float(ledger.get_epsilon(delta - charge))
        if exact <= guess:
            return guess
        guess = exact * (1 + 1e-9)
    return math.inf


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    *,
    num_examples: int,
    sampling_prob: float,
    padded_batch_size: int,
    num_steps: int,
    neighboring_relation: NeighboringRelation,
    accountant: AccountantName,
) -> float:
    """Returns the smallest noise multiplier, to 5 digits, whose `num_steps` cost at most `target_epsilon` at `target_delta`.

    Raises:
        ValueError: no noise multiplier up to 10^6 reaches the target, or truncation alone exceeds it.
    """

    def excess(log_sigma: float) -> float:
        release = SampledGaussian(num_examples, sampling_prob, padded_batch_size, math.exp(log_sigma), num_steps)
        value = epsilon([release], target_delta, neighboring_relation=neighboring_relation, accountant=accountant)
        return min(value, 1e6) - target_epsilon

    low, high = _bracket(
        excess, math.log(_clt_noise_multiplier(target_epsilon, target_delta, sampling_prob, num_steps))
    )
    if low is None or high is None:
        raise ValueError(
            f"no noise multiplier in [1e-2, 1e6] gives epsilon={target_epsilon:g} at delta={target_delta:g} with "
            f"sampling_prob={sampling_prob:g}, num_steps={num_steps}, padded_batch_size={padded_batch_size}; choose a larger "
            "target, or a larger padded_batch_size if truncation is what costs."
        )
    root = _root(excess, low, high)
    # Round up to 5 significant digits and then to where the target truly holds: brentq stops on either side of the root.
    sigma = _round_up(math.exp(root))
    while excess(math.log(sigma)) > 0:
        sigma = _round_up(sigma * (1 + 5e-5))
    return sigma


def format_epsilon(value: float) -> str:
    """Four significant digits, rounded up: a printed epsilon never understates."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.4g}"


def _root(fun: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(fun, low, high, xtol=2e-5))  # type: ignore[arg-type]


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 4)
    return float(f"{math.ceil(value / unit) * unit:.5g}")


def _clt_noise_multiplier(target_epsilon: float, target_delta: float, sampling_prob: float, num_steps: int) -> float:
    """A first guess: subsampled Gaussians compose to a Gaussian of mu = q sqrt(T (exp(1/sigma^2) - 1)) (arXiv 1911.11607)."""

    def log_delta(mu: float) -> float:
        first = float(stats.norm.logcdf(-target_epsilon / mu + mu / 2))
        second = target_epsilon + float(stats.norm.logcdf(-target_epsilon / mu - mu / 2))
        return first + math.log1p(-math.exp(min(second - first, -1e-15)))

    mu = math.exp(_root(lambda x: log_delta(math.exp(x)) - math.log(target_delta), math.log(1e-6), math.log(1e3)))
    if sampling_prob == 1:
        return math.sqrt(num_steps) / mu
    return math.log1p((mu / sampling_prob) ** 2 / num_steps) ** -0.5


def _bracket(excess: Callable[[float], float], start: float) -> tuple[float | None, float | None]:
    """Walks outward from `start` until the sign of the decreasing function `excess` changes."""
    low: float | None = None
    high: float | None = None
    position, stride = min(max(start, math.log(1e-2)), math.log(1e6)), 0.05
    while math.log(1e-2) <= position <= math.log(1e6) and (low is None or high is None):
        if excess(position) > 0:
            low, step = position, stride
        else:
            high, step = position, -stride
        position += step
        stride *= 2
        if low is not None and high is not None:
            break
    return low, high
