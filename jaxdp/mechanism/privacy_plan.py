"""The plan: every privacy number of a run, written once (S20)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import warnings
from typing import TYPE_CHECKING, Any

import dp_accounting
from dp_accounting import NeighboringRelation

from jaxdp import _validate, accounting
from jaxdp.accounting import AccountantName, SampledGaussian
from jaxdp.clipping import ClippingPolicy, Quantile, check_policy

if TYPE_CHECKING:
    from jaxdp.mechanism.ledger import Ledger

_RELATION_IN_WORDS = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: "one record added or removed",
    NeighboringRelation.REPLACE_ONE: "one record replaced by another",
    NeighboringRelation.REPLACE_SPECIAL: "one record replaced by one that contributes nothing, as padding does",
}


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
    """Every privacy number of a run; made by `jaxdp.plan`, read by the sampler, the clipper, the noise and the accountant.

    Attributes:
        num_examples: N, the size of the training set: public.
        sampling_prob: q, the probability of each example to enter a batch.
        num_steps: T, the number of steps that may be released.
        clipping: How one example's contribution is bounded.
        noise_multiplier: sigma, the accounted noise std over the L2 clip norm, for all that one step releases.
        padded_batch_size: The fixed number of rows of a batch; larger draws are truncated at random, smaller ones padded.
        neighboring_relation: Which data sets are neighbors.
        accountant: `"pld"` or `"rdp"`.
        target_epsilon: The goal that the noise was calibrated for; None if the noise multiplier was given.
        target_delta: The delta at which `epsilon()` answers; None if it was not given.
    """

    num_examples: int
    sampling_prob: float
    num_steps: int
    clipping: ClippingPolicy
    noise_multiplier: float
    padded_batch_size: int
    neighboring_relation: NeighboringRelation
    accountant: AccountantName
    target_epsilon: float | None
    target_delta: float | None

    @property
    def expected_batch_size(self) -> float:
        """q * N, the public constant that every sum is divided by (S2)."""
        return self.sampling_prob * self.num_examples

    @property
    def count_stddev(self) -> float:
        """Noise std of the count that quantile clipping releases, in examples; zero under the other policies."""
        if not isinstance(self.clipping, Quantile):
            return 0.0
        return self.clipping.count_stddev or self.expected_batch_size / 20

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise multiplier of the gradient alone; above `noise_multiplier` if the step also releases a count."""
        if not isinstance(self.clipping, Quantile) or self.noise_multiplier == 0:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_stddev) ** -2) ** -0.5

    def release(self, num_steps: int) -> SampledGaussian:
        """`num_steps` steps of this plan, as the accountant sees them."""
        return SampledGaussian(
            self.num_examples, self.sampling_prob, self.padded_batch_size, self.noise_multiplier, num_steps
        )

    def dp_event(self, num_steps: int | None = None) -> dp_accounting.DpEvent:
        """The `DpEvent` of `num_steps` steps, by default of the whole plan.

        Give it to an accountant built with this plan's `neighboring_relation`. Truncated Poisson sampling has an event of its
        own, which PLD takes and RDP refuses; `epsilon()` charges for truncation under RDP as well.
        """
        return self.release(self._steps(num_steps)).dp_event()

    def epsilon(self, *, num_steps: int | None = None, delta: float | None = None) -> float:
        """The epsilon spent by `num_steps` steps (default: the whole plan) at `delta` (default: `target_delta`)."""
        return accounting.epsilon(
            [self.release(self._steps(num_steps))],
            self._delta(delta),
            neighboring_relation=self.neighboring_relation,
            accountant=self.accountant,
        )

    def epsilon_so_far(self, ledger: Ledger, *, delta: float | None = None) -> float:
        """The epsilon of all that a run has released, from its ledger, under this plan's relation and accountant.

        Right after an early stop, a resumed run and a changed plan; see `Ledger.epsilon` for what a change may depend on.
        """
        return ledger.epsilon(
            delta=self._delta(delta), neighboring_relation=self.neighboring_relation, accountant=self.accountant
        )

    def replace(self, *, num_steps: int) -> PrivacyPlan:
        """The same mechanism for another number of steps: same noise, so more steps cost more epsilon."""
        return dataclasses.replace(
            self, num_steps=_validate.positive_integer("num_steps", num_steps), target_epsilon=None
        )

    def describe(self) -> str:
        """A paragraph for a report: what is guaranteed, under which assumptions, and what is not covered."""
        if self.sampling_prob == 1:
            sampler = f"each on all {self.num_examples} examples"
        else:
            sampler = (
                f"each on a Poisson sample with probability {self.sampling_prob:.6g} (expected batch size "
                f"{self.expected_batch_size:.6g})"
            )
            if self.padded_batch_size < self.num_examples:
                sampler += f", truncated at random to {self.padded_batch_size} examples, which is charged for"
        return (
            f"{self._claim()}. Mechanism: {self.num_steps} steps, {sampler}; {self.clipping}; Gaussian noise of multiplier "
            f"{self.noise_multiplier:g}, added once a step to the sum, which is divided by the expected batch size. "
            f"Accountant: {self.accountant.upper()} (dp_accounting {importlib.metadata.version('dp-accounting')}). "
            "Not covered: anything else computed from the same data (metrics, losses and counts of the training set, the "
            "choice of hyper-parameters by looking at it, the values of num_examples and of this plan itself); correlated "
            "records, such as several from one person; whoever sees the noise key or which examples were sampled; and the gap "
            "between real-valued Gaussian noise and floating-point draws from a pseudo-random generator."
        )

    def _claim(self) -> str:
        if self.noise_multiplier == 0:
            return "This run is NOT differentially private: no noise is added"
        if self.target_delta is None:
            return (
                f"The run is a Gaussian mechanism of noise multiplier {self.noise_multiplier:g}; epsilon needs a delta"
            )
        if math.isinf(self.epsilon()):
            return f"This run has NO guarantee at delta={self.target_delta:g}: its epsilon is infinite"
        return (
            f"The released model is ({accounting.format_epsilon(self.epsilon())}, {self.target_delta:g})-differentially private "
            f"with respect to {_RELATION_IN_WORDS[self.neighboring_relation]} ({self.neighboring_relation.name}) in a training "
            f"set of {self.num_examples} examples"
        )

    def _delta(self, delta: float | None) -> float:
        delta = self.target_delta if delta is None else delta
        if delta is None:
            raise ValueError("delta is not set: pass delta=... here, or target_delta=... to jaxdp.plan.")
        return _validate.probability("delta", delta, allow_one=False)

    def _steps(self, num_steps: int | None) -> int:
        return self.num_steps if num_steps is None else _validate.nonnegative_integer("num_steps", num_steps)


def plan(
    *,
    num_examples: int,
    num_steps: int,
    clipping: ClippingPolicy,
    expected_batch_size: float | None = None,
    sampling_prob: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    noise_multiplier: float | None = None,
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    padded_batch_size: int | None = None,
    accountant: AccountantName = "pld",
) -> PrivacyPlan:
    """Plans a private run: give a privacy goal, and get the noise; or give the noise, and ask for its epsilon.

    **Guarantee**: `num_steps` steps of `jaxdp.make_dp_step`, or updates of `jaxdp.dp_aggregate`, on batches from
    `jaxdp.poisson_batches`, all with this plan, are (epsilon, delta)-differentially private for `plan.epsilon(delta=delta)`
    under `neighboring_relation`. `plan.describe()` states it with its limits.

    Args:
        num_examples: N, the size of the training set (of the split trained on); public.
        num_steps: T.
        clipping: `jaxdp.flat(C)`, `per_layer(...)`, `automatic(...)` or `quantile(...)`.
        expected_batch_size: q * N, in examples; give this or `sampling_prob`.
        sampling_prob: q, in (0, 1]; 1 uses every example in every step.
        target_epsilon: The goal, with `target_delta`; give it or `noise_multiplier`.
        target_delta: In (0, 1), well below 1 / num_examples.
        noise_multiplier: sigma, the noise std over the L2 clip norm; 0 for a run without privacy.
        neighboring_relation: Add-or-remove-one by default; replace-one doubles the sensitivity (S1).
        padded_batch_size: Rows of a padded batch. None for the smallest multiple of 8 that a draw exceeds with negligible
            probability. Truncation is charged for (S10, arXiv 2508.15089).
        accountant: `"pld"`, tight, or `"rdp"`, an upper bound that older papers report.

    Raises:
        ValueError: a number is out of range, numbers contradict each other, or the goal cannot be reached.

    >>> from jaxdp.clipping import flat
    >>> p = plan(num_examples=60_000, expected_batch_size=256, num_steps=1_000, clipping=flat(1.0),
    ...          target_epsilon=3.0, target_delta=1e-5)
    >>> p.epsilon() <= 3.0
    True
    """
    num_examples = _validate.positive_integer("num_examples", num_examples)
    num_steps = _validate.positive_integer("num_steps", num_steps)
    clipping = check_policy(clipping)
    sampling_prob = _sampling_prob(num_examples, expected_batch_size, sampling_prob)
    if not isinstance(neighboring_relation, NeighboringRelation):
        raise TypeError(
            "neighboring_relation must be a jaxdp.NeighboringRelation, such as ADD_OR_REMOVE_ONE; got "
            f"{neighboring_relation!r}."
        )
    _validate.one_of("accountant", accountant, ("pld", "rdp"))
    # Asks for the epsilon of nothing: the accountant refuses a relation that it cannot answer for.
    accounting.epsilon([], 0.5, neighboring_relation=neighboring_relation, accountant=accountant)
    if target_delta is not None:
        target_delta = _validate.probability("target_delta", target_delta, allow_one=False)
        if target_delta > 1 / num_examples:
            warnings.warn(
                f"target_delta={target_delta:g} exceeds 1/num_examples={1 / num_examples:g}: releasing one record in the clear "
                "would satisfy it. Use a smaller delta.",
                stacklevel=2,
            )
    target_epsilon, noise_multiplier = _check_goal(target_epsilon, target_delta, noise_multiplier)
    if padded_batch_size is None:
        padded_batch_size = num_examples
        if sampling_prob < 1:
            log_overflow = _negligible_log_overflow(
                num_examples, sampling_prob, num_steps, accountant, target_epsilon, target_delta, noise_multiplier
            )
            padded_batch_size = accounting.smallest_padded_batch_size(num_examples, sampling_prob, log_overflow)
    padded_batch_size = _validate.positive_integer("padded_batch_size", padded_batch_size)
    if padded_batch_size > num_examples:
        raise ValueError(
            f"padded_batch_size={padded_batch_size} exceeds num_examples={num_examples}; no draw can be that large: leave it out."
        )
    if padded_batch_size < sampling_prob * num_examples * (1 - 1e-9):
        raise ValueError(
            f"padded_batch_size={padded_batch_size} is below the expected batch size "
            f"{sampling_prob * num_examples:g}: most draws would be truncated. Raise it or "
            "leave it out; to save memory use microbatch_size."
        )
    if noise_multiplier is None:
        assert target_epsilon is not None
        assert target_delta is not None
        noise_multiplier = accounting.calibrate_noise_multiplier(
            target_epsilon,
            target_delta,
            num_examples=num_examples,
            sampling_prob=sampling_prob,
            padded_batch_size=padded_batch_size,
            num_steps=num_steps,
            neighboring_relation=neighboring_relation,
            accountant=accountant,
        )
    result = PrivacyPlan(
        num_examples=num_examples,
        sampling_prob=sampling_prob,
        num_steps=num_steps,
        clipping=clipping,
        noise_multiplier=noise_multiplier,
        padded_batch_size=padded_batch_size,
        neighboring_relation=neighboring_relation,
        accountant=accountant,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
    )
    _check_noise(result)
    return result


def _sampling_prob(num_examples: int, expected_batch_size: Any, sampling_prob: Any) -> float:
    if (expected_batch_size is None) == (sampling_prob is None):
        raise ValueError(
            f"give exactly one of expected_batch_size and sampling_prob; got {expected_batch_size!r} and {sampling_prob!r}."
        )
    if sampling_prob is not None:
        return _validate.probability("sampling_prob", sampling_prob)
    size = _validate.positive("expected_batch_size", expected_batch_size)
    if size > num_examples:
        raise ValueError(f"expected_batch_size={size:g} exceeds num_examples={num_examples}; use at most num_examples.")
    return size / num_examples


def _check_goal(target_epsilon: Any, target_delta: Any, noise_multiplier: Any) -> tuple[float | None, float | None]:
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            "give exactly one of target_epsilon (with target_delta) and noise_multiplier; got "
            f"{target_epsilon!r} and {noise_multiplier!r}."
        )
    if noise_multiplier is not None:
        noise_multiplier = _validate.nonnegative("noise_multiplier", noise_multiplier)
        if 0 < noise_multiplier < 1e-3:
            raise ValueError(
                f"noise_multiplier={noise_multiplier:g} is next to no noise (epsilon above 500,000); use at least 1e-3, or 0 "
                "for a run without privacy."
            )
        return None, noise_multiplier
    if target_delta is None:
        raise ValueError("target_epsilon needs target_delta, a probability well below 1 / num_examples, such as 1e-5.")
    return _validate.positive("target_epsilon", target_epsilon), None


def _negligible_log_overflow(
    num_examples: int,
    sampling_prob: float,
    num_steps: int,
    accountant: AccountantName,
    target_epsilon: float | None,
    target_delta: float | None,
    noise_multiplier: float | None,
) -> float:
    """log of an overflow probability a step that costs nothing visible (S10).

    PLD charges for truncation by its own event; RDP adds num_steps * (1 + e^epsilon) times the probability to delta.
    """
    delta = 1e-5 if target_delta is None else target_delta
    share = math.log(1e-3 * delta / num_steps)
    if accountant == "pld":
        return min(math.log(1e-8), share)
    budget = target_epsilon
    if budget is None:
        assert noise_multiplier is not None
        untruncated = SampledGaussian(num_examples, sampling_prob, num_examples, noise_multiplier, num_steps)
        budget = accounting.epsilon(
            [untruncated], delta, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE, accountant="rdp"
        )
    return min(math.log(1e-12), share - (0.0 if math.isinf(budget) else budget))


def _check_noise(result: PrivacyPlan) -> None:
    if result.noise_multiplier > 0 and math.isinf(result.clipping.total_l2_clip_norm):
        raise ValueError(
            "an infinite l2_clip_norm needs infinite noise; give a finite one, or noise_multiplier=0 for no privacy."
        )
    if isinstance(result.clipping, Quantile) and result.noise_multiplier >= 2 * result.count_stddev:
        raise ValueError(
            "quantile clipping spends more than the whole budget on its count: "
            f"noise_multiplier={result.noise_multiplier:g} needs a count_stddev above {result.noise_multiplier / 2:g}, it is "
            f"{result.count_stddev:g}; set count_stddev to about {2 * result.noise_multiplier:g} examples, or raise "
            "expected_batch_size."
        )
