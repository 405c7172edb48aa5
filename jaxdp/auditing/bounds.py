"""Correct guesses of one run -> what the run cannot be: two bounds on the chance of guessing so well, each with its proof.

The game: m coins, fair and independent, each decide whether one canary takes part in the whole run. From what the run releases,
r coins are guessed, always the same number r, and v guesses are right. A private run permits only so many right guesses, although
one run is all there is: the coins are the repetitions.

**Of a pair** (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, corollary 5.4). If the run is (epsilon, delta)-DP in each coin,

    P[V >= v]  <=  F(v) + 2 m delta max_{i = 1..v} (F(v - i) - F(v)) / i,        F(v) = P[Bin(r, e^eps / (1 + e^eps)) >= v]

for V, the number of right guesses.

**Of a curve** (Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235). Let g(x) = 1 - f(x) be the largest true positive rate of
any test of one coin at the false positive rate x; g is concave. With p_t = P[V = t],

    R_c = sum_{t >= c} p_t t / m,        H_c = sum_{t >= c} p_t (r - t) / m

*Constraint.* Fix all coins but number i, and the event "guess i is right, V >= c". With coin i turned over the same outputs
make guess i wrong, and V >= c - 1. So P[i right, V >= c] <= g(P[i wrong, V >= c - 1]); the mean over the coins and over i of
both sides, by Jensen's inequality, is R_c <= g(H_{c-1}).

*The least mass.* Suppose P[V >= v] = tau. Going down from c = v, the constraint asks H_{c-1} >= max(H_c, g^-1(R_c)), and an
increase of H by dH comes with one of R by dH (c - 1) / (r - c + 1). Taking the equality at each step gives the smallest H and R
of all: R_{c-1} is a sum of the H_t, t < v, with coefficients >= 0, since t / (r - t) grows with t, and of a term of the tail.
The tail itself weighs least with all its mass at v, R_v = tau v / m and H_v = tau (r - v) / m: mass further up has more R and
less H, and if then g^-1(R_v) < H_v nothing is asked for and the answer below is "possible", which is the cautious one. But all
mass is R_0 + H_0 = r / m. If the least mass is more, then P[V >= v] = tau is impossible, and so is any larger tau, because the
constraints are convex in p and allow V = 0 always. Hence P[V >= v] < tau.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from scipy import stats

from jaxdp import _validate

#: g^-1: the true positive rate of a test -> the least false positive rate that a mechanism permits it. Convex, increasing.
Curve: TypeAlias = Callable[[float], float]

# The masses are sums of at most `num_guesses` float64 terms: never reject by their rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Guesses:
    """What was guessed, and how well.

    Attributes:
        num_canaries: m, the fair coins.
        num_guesses: r, fixed before the run.
        num_correct: v.
    """

    num_canaries: int
    num_guesses: int
    num_correct: int

    def __post_init__(self) -> None:
        _validate.positive_integer("num_canaries", self.num_canaries)
        _validate.positive_integer("num_guesses", self.num_guesses)
        _validate.nonnegative_integer("num_correct", self.num_correct)
        if not self.num_correct <= self.num_guesses <= self.num_canaries:
            raise ValueError(
                f"num_correct={self.num_correct} of num_guesses={self.num_guesses} with num_canaries={self.num_canaries} is "
                "impossible; at most every canary is guessed, and every guess right."
            )


def guess(scores: np.ndarray, is_included: np.ndarray, num_guesses: int) -> Guesses:
    """Guesses "took part" for the highest scores and "did not" for the lowest, half of the guesses each, and counts.

    Args:
        scores: `[m]`, larger for canaries that seem to have taken part; computed from released and public values alone.
        is_included: Bool `[m]`, the coins.
        num_guesses: r; the canaries between are not guessed.
    """
    num_high = num_guesses - num_guesses // 2
    order = np.argsort(scores, kind="stable")
    low, high = order[: num_guesses // 2], order[len(order) - num_high :]
    return Guesses(len(scores), num_guesses, int(np.sum(~is_included[low]) + np.sum(is_included[high])))


def p_value_of_pair(guesses: Guesses, epsilon: float, delta: float) -> float:
    """A bound on the probability of guessing so well against an (epsilon, delta)-DP run; see the head of this file."""
    m, r, v = guesses.num_canaries, guesses.num_guesses, guesses.num_correct
    accuracy = 1 / (1 + math.exp(-epsilon))
    tails = stats.binom.sf(np.arange(v, -1, -1) - 1, r, accuracy)  # F(v), F(v - 1), ..., F(0)
    slope = 0.0 if v == 0 else float(np.max((tails[1:] - tails[0]) / np.arange(1, v + 1)))
    return min(1.0, float(tails[0]) + 2 * m * delta * slope)


def epsilon_lower_bound(guesses: Guesses, *, delta: float, significance: float) -> float:
    """The largest epsilon, to 1e-6, such that no (epsilon, delta)-DP run is guessed so well with probability `significance`.

    **Guarantee**: against any run that is (epsilon, delta)-DP in each coin, the result exceeds epsilon with probability at most
    `significance`, over the coins and the run.

    >>> print(f"{epsilon_lower_bound(Guesses(1000, 100, 75), delta=1e-4, significance=0.05):.3f}")
    0.673
    """

    def rejected(epsilon: float) -> bool:
        return p_value_of_pair(guesses, epsilon, delta) < significance

    return largest_rejected(rejected, 0.0, 50.0, 1e-6)


def is_rejected(guesses: Guesses, curve: Curve, *, significance: float) -> bool:
    """Whether guessing so well has a probability below `significance` in every run whose tests obey `curve`.

    **Guarantee**: against any run that permits no test of one coin, given the others, a smaller false positive rate than
    `curve(true positive rate)`, the answer is True with probability at most `significance`.
    """
    m, r, v = guesses.num_canaries, guesses.num_guesses, guesses.num_correct
    if v == 0:
        return False
    right, wrong = significance * v / m, significance * (r - v) / m
    for t in range(v - 1, -1, -1):
        asked = max(wrong, curve(min(1.0, right)))
        right += t / (r - t) * (asked - wrong)
        wrong = asked
        if right + wrong > r / m * (1 + _ROUNDING):
            return True
    return False


def fewest_rejected(num_canaries: int, num_guesses: int, curve: Curve, *, significance: float) -> int:
    """The least number of right guesses that `is_rejected`; num_guesses + 1 if none is."""

    def rejected(num_correct: int) -> bool:
        return is_rejected(Guesses(num_canaries, num_guesses, num_correct), curve, significance=significance)

    low, high = 0, num_guesses + 1  # low is not rejected: no guess is right
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def largest_rejected(rejected: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """By bisection, a point below the end of the rejected part [low, end) of [low, high], by `tolerance` at most; else `low`."""
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low
