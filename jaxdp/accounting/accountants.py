"""Epsilon by two accountants of `dp_accounting`: `"pld"` (privacy loss distributions, tight) and `"rdp"` (Renyi, looser).

They differ in how truncated sampling is charged: PLD has an event for it with Gaussian noise (arXiv 2508.15089). RDP has none, nor
has PLD with Laplace noise: there the total variation distance to untruncated sampling is charged to delta. A run of Laplace noise
alone also has a pure epsilon, which holds at every delta: `laplace` has its proof.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import absl.logging
import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation, rdp
from dp_accounting.pld import privacy_loss_distribution as losses

from jaxdp.accounting import laplace
from jaxdp.accounting.releases import SampledRelease

AccountantName: TypeAlias = Literal["pld", "rdp"]

# S11(iv): at this grid epsilon is 1.8289 instead of 1.8282 on the reference run, and always rounded up.
_PLD_GRID = 1e-3
# Below this the PLD accountant's own cut of the tails answers infinity.
_SMALLEST_PLD_DELTA = 1e-14
_RDP_ORDERS: Any = rdp.RdpAccountant().orders


def epsilon(
    releases: Sequence[SampledRelease],
    delta: float,
    *,
    neighboring_relation: NeighboringRelation,
    accountant: AccountantName,
) -> float:
    """Returns the epsilon at `delta` of all `releases` together; infinite if any of them is un-noised.

    At delta = 0, which only Laplace noise allows, it is the sum of the pure epsilons of the steps: basic composition.

    Raises:
        ValueError: RDP was asked for REPLACE_ONE or for Laplace noise; PLD for a delta below 1e-14, or either for delta = 0, where
            there is Gaussian noise.
    """
    kept = tuple(release for release in releases if release.num_steps > 0)
    is_pure = all(release.noise == "laplace" for release in releases)
    if delta == 0 and not is_pure:
        raise ValueError(
            "delta=0 asks for pure differential privacy, which Gaussian noise never has; use a delta such as 1e-5, or "
            "noise='laplace' from the start."
        )
    if accountant == "pld" and delta < _SMALLEST_PLD_DELTA and not is_pure:
        raise ValueError(
            f"delta={delta:g} is below {_SMALLEST_PLD_DELTA:g}, the least that the PLD accountant resolves; use a larger delta, or "
            "accountant='rdp'."
        )
    if accountant == "rdp" and neighboring_relation == NeighboringRelation.REPLACE_ONE:
        # RDP refuses Poisson sampling under it; without sampling it would answer for half the sensitivity (S11).
        raise ValueError("the RDP accountant has no sound answer under REPLACE_ONE; use accountant='pld'.")
    if accountant == "rdp" and any(release.noise == "laplace" for release in kept):
        raise ValueError("the RDP accountant has no answer for sampled Laplace noise; use accountant='pld'.")
    if not kept:
        return 0.0
    if any(release.noise_multiplier == 0 for release in kept):
        return math.inf
    if accountant == "rdp":
        return _epsilon_rdp(kept, delta, neighboring_relation)
    if not is_pure:
        return _epsilon_pld_of_neighbors(kept, delta, neighboring_relation)
    pure = sum(laplace.pure_epsilon(release, neighboring_relation) for release in kept)
    return pure if delta == 0 else min(pure, _epsilon_pld(kept, delta, neighboring_relation))


def composed_by(accountant: AccountantName, delta: float | None) -> str:
    """What composed an epsilon at `delta`, by name."""
    return "basic composition" if delta == 0 else accountant.upper()


def accountant_in_words(accountant: AccountantName, delta: float | None) -> str:
    """The same in a sentence."""
    return composed_by(accountant, delta) + " accountant" * (delta != 0)


def format_epsilon(value: float) -> str:
    """Four significant digits, rounded up: a printed epsilon never understates."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.4g}"


def _epsilon_pld_of_neighbors(
    releases: tuple[SampledRelease, ...], delta: float, relation: NeighboringRelation
) -> float:
    """The larger epsilon of the two kinds of neighbors, a record more and a record less.

    They differ where batches are truncated. With a record more, truncation is likelier, and costs more, but each record is kept
    a little less often: at a delta near the probability of being kept at all, the smaller pair is the worse one. Its delta at an
    epsilon exceeds that of the larger pair by at most twice the probability of any truncation, so where that is a thousandth of
    delta or less, which no digit shows, the larger pair speaks for both.
    """
    found = _epsilon_pld(releases, delta, relation)
    overflow = sum(math.exp(release.log_overflow_prob()) for release in releases if release.noise == "gaussian")
    if relation != NeighboringRelation.ADD_OR_REMOVE_ONE or overflow <= 1e-3 * delta:
        return found
    return max(found, _epsilon_pld(releases, delta, relation, is_removed=True))


@functools.lru_cache(maxsize=4096)
def _epsilon_pld(
    releases: tuple[SampledRelease, ...], delta: float, relation: NeighboringRelation, *, is_removed: bool = False
) -> float:
    """The epsilon of the pair of the data set and one with a record more, or with `is_removed` a record less."""
    grid = min(map(_pld_grid, releases))
    total = losses.identity(value_discretization_interval=grid)
    for release in releases:
        if release.noise == "laplace":
            loss = laplace.loss_of_one_step(release, grid, relation).self_compose(release.num_steps)
        else:
            num_records = release.num_examples if is_removed else release.most_records(relation)
            loss = _pld_loss(release.dp_event(relation, num_records=num_records), grid, relation)
        total = total.compose(loss)
    uncharged = [release for release in releases if release.noise == "laplace"]
    return _with_overflow_charged(lambda d: float(total.get_epsilon_for_delta(d)), delta, uncharged)


def _pld_loss(
    event: dp_accounting.SelfComposedDpEvent, grid: float, relation: NeighboringRelation
) -> losses.PrivacyLossDistribution:
    """The privacy loss of all steps, as `pld.PLDAccountant` has it for `event`, but for its repeated work."""
    if isinstance(event.event, dp_accounting.GaussianDpEvent):  # steps of a Gaussian are one Gaussian
        one = dp_accounting.GaussianDpEvent(event.event.noise_multiplier / math.sqrt(event.count))
        return _pld_loss_of_one_step(one, grid, relation)
    return _pld_loss_of_one_step(event.event, grid, relation).self_compose(event.count)


@functools.lru_cache(maxsize=16)  # up to some megabytes each
def _pld_loss_of_one_step(
    event: dp_accounting.DpEvent, grid: float, relation: NeighboringRelation
) -> losses.PrivacyLossDistribution:
    """Most of PLD's time where batches are truncated, and the same for every point of an epsilon curve."""
    settings: Any = {"value_discretization_interval": grid, "neighboring_relation": relation}
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return losses.from_truncated_subsampled_gaussian_mechanism(
            event.dataset_size,
            event.sampling_probability,
            event.truncated_batch_size,
            event.noise_multiplier,
            **settings,
        )
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        settings["sampling_prob"], event = event.sampling_probability, event.event
    assert isinstance(event, dp_accounting.GaussianDpEvent)
    return losses.from_gaussian_mechanism(event.noise_multiplier, **settings)


def _pld_grid(release: SampledRelease) -> float:
    """The discretization of the privacy loss. Losses are rounded up, so any grid is sound; this one is also tight.

    The privacy loss of one step has a spread of about q sqrt(exp(1/sigma^2) - 1). A grid of 0.3 spreads costs less than 1% of
    epsilon, one of 1.6 spreads 20% (measured over 10^5 steps). From the other side, the loss of a very quiet noise, up to
    1 / (2 sigma^2) + 10 / sigma, is cut into 200,000 pieces at most, so that memory stays bounded.
    """
    if release.noise == "laplace":
        spread, range_of_loss = laplace.spread_of_loss(release)
        return max(min(_PLD_GRID, 0.3 * spread), range_of_loss / 200_000)
    sigma = release.noise_multiplier
    spread = release.sampling_prob * math.sqrt(math.expm1(min(sigma**-2, 700.0)))
    range_of_loss = 0.5 * sigma**-2 + 10 / sigma
    return max(min(_PLD_GRID, 0.3 * spread), range_of_loss / 200_000)


@functools.lru_cache(maxsize=4096)
def _epsilon_rdp(releases: tuple[SampledRelease, ...], delta: float, relation: NeighboringRelation) -> float:
    with _quiet():
        events = [release.untruncated_dp_event() for release in releases]
        total: Any = sum(event.count * _rdp_of_one_step(event.event, relation) for event in events)
        return _with_overflow_charged(lambda d: float(rdp.compute_epsilon(_RDP_ORDERS, total, d)[0]), delta, releases)


def _with_overflow_charged(
    epsilon_at: Callable[[float], float], delta: float, releases: Sequence[SampledRelease]
) -> float:
    """The epsilon at `delta` of runs that truncate, from `epsilon_at(delta)` of the same runs without truncation.

    Truncated and untruncated runs differ with probability at most eta on each of two neighbors, so
    P[M(D) in S] <= e^eps (P[M(D') in S] + eta) + delta' + eta: (eps, delta' + (1 + e^eps) eta)-DP.
    """
    eta = sum(math.exp(release.log_overflow_prob()) for release in releases)
    guess = epsilon_at(delta)
    if eta == 0:
        return guess
    for _ in range(50):
        if guess > 700:
            return math.inf
        charge = (1 + math.exp(guess)) * eta
        if charge >= delta:
            return math.inf
        exact = epsilon_at(delta - charge)
        if exact <= guess:
            return guess
        guess = exact * (1 + 1e-9)
    return math.inf


@functools.lru_cache(maxsize=4096)
def _rdp_of_one_step(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> np.ndarray:
    """At `_RDP_ORDERS`."""
    return rdp.RdpAccountant(neighboring_relation=relation).compose(event).rdp


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about single Renyi orders that do not converge: they are left out, which is sound."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)
