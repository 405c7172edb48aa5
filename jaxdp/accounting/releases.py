"""What was released, as `dp_accounting` sees it, and how large a batch must be padded so that truncation is free."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import dp_accounting
from dp_accounting import NeighboringRelation
from scipy import stats

NoiseName: TypeAlias = Literal["gaussian", "laplace"]


@dataclasses.dataclass(frozen=True)
class SampledRelease:
    """Some identical steps of the one mechanism: truncated Poisson sampling, then noise on the sum.

    All numbers are those of the mechanism, and so the same for a neighbor, whatever its size: with a record more than
    `num_examples`, a batch of `padded_batch_size` rows still is one. Only full batches (q = 1, padded to N) are of all records
    by definition, however many there are, and never truncate.

    Attributes:
        noise: The law of the noise. Laplace noise is on one number, whose L1 and L2 sensitivity are the same.
        num_examples: N, the size of the data set.
        sampling_prob: q, the probability of each example to enter a batch, independently.
        padded_batch_size: Larger draws are truncated to a uniformly random subset of this size; N + 1 for no truncation, on the
            data set or on a neighbor.
        noise_multiplier: The noise std sigma of a Gaussian, the scale b of a Laplace law, over the clip norm.
        num_steps: How many steps.
    """

    noise: NoiseName
    num_examples: int
    sampling_prob: float
    padded_batch_size: int
    noise_multiplier: float
    num_steps: int

    @property
    def truncates(self) -> bool:
        """Whether a draw from the data set, or from one with a record more, may exceed a batch."""
        is_full = self.sampling_prob == 1 and self.padded_batch_size >= self.num_examples
        return self.padded_batch_size <= self.num_examples and not is_full

    def without_truncation(self) -> SampledRelease:
        """The same steps with batches that hold any draw."""
        return dataclasses.replace(self, padded_batch_size=self.num_examples + 1)

    def most_records(self, relation: NeighboringRelation) -> int:
        """Size of the largest data set among the neighbors: N + 1 where a record may be added, N where one replaces another."""
        return self.num_examples + (relation == NeighboringRelation.ADD_OR_REMOVE_ONE)

    def dp_event(
        self, relation: NeighboringRelation, *, num_records: int | None = None
    ) -> dp_accounting.SelfComposedDpEvent:
        """The event under PLD; it charges for truncation (arXiv 2508.15089).

        Args:
            relation: Which data sets are neighbors.
            num_records: Size of the larger one of two neighbors; None for `most_records`.

        Raises:
            ValueError: batches are truncated and the noise is Laplace, for which `dp_accounting` has no event.
        """
        if not self.truncates:
            return self.untruncated_dp_event()
        if self.noise == "laplace":
            raise ValueError(
                "dp_accounting has no event for truncated sampling with Laplace noise, and one without truncation would charge too "
                f"little; ask epsilon(), which charges for it, or plan with padded_batch_size={self.num_examples + 1}."
            )
        # The event counts the record that differs among its `dataset_size`: it is the size of the larger neighbor.
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            num_records or self.most_records(relation),
            self.sampling_prob,
            self.padded_batch_size,
            self.noise_multiplier,
        )
        return dp_accounting.SelfComposedDpEvent(event, self.num_steps)

    def untruncated_dp_event(self) -> dp_accounting.SelfComposedDpEvent:
        """The event of plain Poisson sampling."""
        kind = dp_accounting.GaussianDpEvent if self.noise == "gaussian" else dp_accounting.LaplaceDpEvent
        event = kind(self.noise_multiplier)
        if self.sampling_prob < 1:
            event = dp_accounting.PoissonSampledDpEvent(self.sampling_prob, event)
        return dp_accounting.SelfComposedDpEvent(event, self.num_steps)

    def log_overflow_prob(self) -> float:
        """log of a bound on the probability that any of the steps truncates, on the data set or a neighbor of it."""
        if not self.truncates or self.num_steps == 0:
            return -math.inf
        one_step = float(stats.binom.logsf(self.padded_batch_size, self.num_examples + 1, self.sampling_prob))
        return one_step + math.log(self.num_steps)


def smallest_padded_batch_size(num_records: int, sampling_prob: float, log_overflow_prob: float) -> int:
    """The smallest multiple of 8 that a Poisson draw exceeds with at most the given probability, and at most `num_records`.

    Args:
        num_records: n, the size of the largest data set that is drawn from, a neighbor included.
        sampling_prob: q.
        log_overflow_prob: Natural log of the largest P[Bin(n, q) > size]; a log, since RDP needs less than 1e-300.
    """
    # By bisection on the log of the tail: `isf` answers N for a probability that 1 - p rounds away.
    low, high = 0, num_records
    while low < high:
        middle = (low + high) // 2
        if stats.binom.logsf(middle, num_records, sampling_prob) <= log_overflow_prob:
            high = middle
        else:
            low = middle + 1
    return min(num_records, -(-max(low, 1) // 8) * 8)
