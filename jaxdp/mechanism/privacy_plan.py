"""The plan: every privacy number of a run, written once (S20)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from typing import TYPE_CHECKING

import dp_accounting
from dp_accounting import NeighboringRelation

from jaxdp import _validate, accounting
from jaxdp.accounting import AccountantName, NoiseName, SampledRelease
from jaxdp.clipping import ClippingPolicy, Quantile

if TYPE_CHECKING:
    from jaxdp.mechanism.ledger import Ledger

_RELATION_IN_WORDS = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: "one {} added or removed",
    NeighboringRelation.REPLACE_ONE: "one {} replaced by another",
    NeighboringRelation.REPLACE_SPECIAL: "one {} replaced by one that contributes nothing, as padding does",
}


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
    """Every privacy number of a run; made by `jaxdp.plan`, read by the sampler, the clipper, the noise and the accountant.

    Attributes:
        num_examples: N, the size of the training set: public.
        sampling_prob: q, the probability of each example to enter a batch.
        num_steps: T, the number of steps that may be released.
        clipping: How one example's contribution is bounded.
        noise_multiplier: The accounted noise over the clip norm, for all that one step releases: its std sigma if it is
            Gaussian, its scale b if it is Laplace.
        padded_batch_size: The fixed number of rows of a batch; larger draws, from the data set or a neighbor, are truncated at
            random, smaller ones padded. N + 1 holds them all. Full batches (q = 1) are of all examples, whatever their number.
        neighboring_relation: Which data sets are neighbors.
        accountant: `"pld"` or `"rdp"`.
        target_epsilon: The goal that the noise was calibrated for; None if the noise multiplier was given.
        target_delta: The delta at which `epsilon()` answers, 0 for a pure epsilon; None if it was not given.
        noise: `"gaussian"`, or `"laplace"` for private zeroth-order steps along one direction.
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
    noise: NoiseName = "gaussian"

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

    def release(self, num_steps: int) -> SampledRelease:
        """`num_steps` steps of this plan, as the accountant sees them."""
        return SampledRelease(
            self.noise,
            self.num_examples,
            self.sampling_prob,
            self.padded_batch_size,
            self.noise_multiplier,
            num_steps,
        )

    def dp_event(self, num_steps: int | None = None) -> dp_accounting.DpEvent:
        """The `DpEvent` of `num_steps` steps, by default of the whole plan.

        Give it to an accountant built with this plan's `neighboring_relation`. Truncated Poisson sampling has an event of its
        own, which PLD takes and RDP refuses; `epsilon()` charges for truncation under RDP as well. Where a record may be added,
        the event is that of a neighbor with one more; `epsilon()` is also that of a neighbor with one less, where it is larger.

        Raises:
            ValueError: batches are truncated and the noise is Laplace, for which there is no event.
        """
        return self.release(self._steps(num_steps)).dp_event(self.neighboring_relation)

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

    def describe(self, *, unit: str | None = None) -> str:
        """A paragraph for a report: what is guaranteed, what is weak about it, under which assumptions, and what is not covered.

        Args:
            unit: What one of the `num_examples` is, a noun such as `"user"`; None for a record, which is one example.
        """
        if self.noise == "gaussian":
            noise = f"Gaussian noise of multiplier {self.noise_multiplier:g}, added once a step to the sum"
        else:
            noise = (
                f"Laplace noise of scale {self.noise_multiplier:g} times the clip norm (the noise multiplier), added once a step "
                "to the one number that is summed"
            )
        return (
            f"{self._claim(unit)}. {self._judgment(unit)}Mechanism: {self.num_steps} steps, {self._sampler_in_words(unit)}; "
            f"{self.clipping_in_words(unit)}; {noise}, which is divided by the expected batch size. "
            f"Accountant: {self._accountant_in_words()}. "
            "Not covered: anything else computed from the same data (metrics, losses and counts of the training set, the "
            "choice of hyper-parameters by looking at it, the values of num_examples and of this plan itself); correlated "
            f"{unit or 'record'}s, such as several from one person; whoever sees the noise key or which {unit or 'example'}s were "
            "sampled; and the gap "
            f"between real-valued {self.noise.capitalize()} noise and floating-point draws from a pseudo-random generator."
        )

    def clipping_in_words(self, unit: str | None = None) -> str:
        """The clipping policy, of the gradients of what `unit` names as in `describe`."""
        return (
            str(self.clipping)
            if unit is None
            else str(self.clipping).replace("per-example", f"per-{unit.replace(' ', '-')}")
        )

    def _sampler_in_words(self, unit: str | None) -> str:
        units = f"{unit or 'example'}s"
        may_grow = self.neighboring_relation == NeighboringRelation.ADD_OR_REMOVE_ONE
        if self.sampling_prob == 1:
            neighbor = f", and of a training set with one more or less on all {units} of it" if may_grow else ""
            return f"each on all {self.num_examples} {units}{neighbor}"
        words = (
            f"each on a Poisson sample with probability {self.sampling_prob:.6g} (expected batch size "
            f"{self.expected_batch_size:.6g})"
        )
        if self.padded_batch_size < self.num_examples:
            words += f", truncated at random to {self.padded_batch_size} {units}, which is charged for"
        elif self.padded_batch_size == self.num_examples and may_grow:
            words += f", which a training set with one more has truncated at random to {self.num_examples}: that is charged for"
        return words

    def _judgment(self, unit: str | None) -> str:
        if self.target_delta is None or self.noise_multiplier == 0:
            return ""
        found = accounting.judge(self.epsilon(), self.target_delta, self.num_examples, unit=unit or "record")
        return "".join(f"{sentence} " for sentence in found)

    def _accountant_in_words(self) -> str:
        if self.target_delta == 0:
            return "basic composition of the pure epsilons of the steps"
        return f"{self.accountant.upper()} (dp_accounting {importlib.metadata.version('dp-accounting')})"

    def _claim(self, unit: str | None) -> str:
        if self.noise_multiplier == 0:
            return "This run is NOT differentially private: no noise is added"
        if self.target_delta is None:
            return (
                f"The run is a {self.noise.capitalize()} mechanism of noise multiplier {self.noise_multiplier:g}; epsilon needs a "
                "delta"
            )
        if math.isinf(self.epsilon()):
            return f"This run has NO guarantee at delta={self.target_delta:g}: its epsilon is infinite"
        epsilon = accounting.format_epsilon(self.epsilon())
        private = (
            f"{epsilon}-differentially private, purely (delta = 0),"
            if self.target_delta == 0
            else f"({epsilon}, {self.target_delta:g})-differentially private"
        )
        return (
            f"The released model is {private} "
            f"with respect to {_RELATION_IN_WORDS[self.neighboring_relation].format(unit or 'record')} "
            f"({self.neighboring_relation.name}) in a training set of {self.num_examples} {unit or 'example'}s"
        )

    def _delta(self, delta: float | None) -> float:
        delta = self.target_delta if delta is None else delta
        if delta is None:
            raise ValueError("delta is not set: pass delta=... here, or target_delta=... to jaxdp.plan.")
        return check_delta("delta", delta, noise=self.noise)

    def _steps(self, num_steps: int | None) -> int:
        return self.num_steps if num_steps is None else _validate.nonnegative_integer("num_steps", num_steps)


def check_delta(name: str, delta: float, *, noise: NoiseName) -> float:
    """Returns `delta` if it lies in (0, 1), or is 0 and the noise Laplace."""
    if _validate.real_number(name, delta) == 0:
        if noise == "laplace":
            return 0.0
        raise ValueError(
            f"{name} must lie in (0, 1), got {delta!r}: that is pure differential privacy, which Gaussian noise never has; use a "
            "delta such as 1e-5, or noise='laplace'."
        )
    return _validate.probability(name, delta, allow_one=False)
