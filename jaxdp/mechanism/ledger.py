"""The ledger: how many steps were released, and at which noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from dp_accounting import NeighboringRelation

from jaxdp import _validate, accounting
from jaxdp.accounting import AccountantName, SampledRelease
from jaxdp.mechanism.privacy_plan import PrivacyPlan, check_delta

_NUMBERS = tuple(field.name for field in dataclasses.fields(SampledRelease) if field.name != "noise")
_MECHANISM = tuple(name for name in _NUMBERS if name != "num_steps")  # names of the plan, too
# The numbers of an entry are leaves of a state; which law the noise had is part of its structure, as no array can hold it.
jax.tree_util.register_dataclass(SampledRelease, data_fields=[*_NUMBERS], meta_fields=["noise"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a run has released so far, kept in its state and therefore in its checkpoints.

    The entries are NumPy scalars on the host, so that the count is known before a step is dispatched and no float64
    number passes through a float32 array.

    Attributes:
        entries: One `SampledRelease` for each stretch of steps under one mechanism, oldest first.
    """

    entries: tuple[SampledRelease, ...] = ()

    @property
    def num_steps(self) -> int:
        """All steps released so far, under any plan; also the index of the next step."""
        return sum(int(entry.num_steps) for entry in self.entries)

    def num_steps_of(self, plan: PrivacyPlan) -> int:
        """The steps released under the mechanism of `plan`."""
        return sum(int(entry.num_steps) for entry in self.entries if _same_mechanism(entry, plan))

    def check_budget(self, plan: PrivacyPlan) -> None:
        """Raises `BudgetExhaustedError` if one more step of `plan` would exceed its `num_steps`."""
        spent = self.num_steps_of(plan)
        if spent >= plan.num_steps:
            raise _validate.BudgetExhaustedError(
                f"all {plan.num_steps} steps of this plan have been released ({spent} so far); step {spent + 1} was not run. "
                "To go on with the same noise at a higher epsilon, use plan.replace(num_steps=...), and ask its epsilon() "
                "first; to stay within the target, plan the longer run from the start with jaxdp.plan(num_steps=...)."
            )

    def record(self, plan: PrivacyPlan, num_steps: int = 1) -> Ledger:
        """The ledger after `num_steps` more steps of `plan`."""
        entries = list(self.entries)
        if entries and _same_mechanism(entries[-1], plan):
            num_steps += int(entries.pop().num_steps)
        return Ledger((*entries, _as_numpy(plan.release(num_steps))))

    def epsilon(
        self,
        *,
        delta: float,
        neighboring_relation: NeighboringRelation,
        accountant: AccountantName = "pld",
    ) -> float:
        """The epsilon of everything released so far, composed, at `delta`, which may be 0 if all noise was Laplace.

        The theorem behind it covers entries whose noise and sampling were chosen without looking at the data or at earlier
        outputs; a plan changed *because of* what the run showed needs a privacy filter instead (S13).
        """
        may_be_pure = all(entry.noise == "laplace" for entry in self.entries)
        check_delta("delta", delta, noise="laplace" if may_be_pure else "gaussian")
        _validate.one_of("accountant", accountant, ("pld", "rdp"))
        releases = [SampledRelease(**row) for row in self.to_json()]
        return accounting.epsilon(releases, delta, neighboring_relation=neighboring_relation, accountant=accountant)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"noise": entry.noise} | {name: np.asarray(value).item() for name, value in _numbers(entry).items()}
            for entry in self.entries
        ]

    @staticmethod
    def from_json(rows: list[dict[str, Any]]) -> Ledger:
        return Ledger(tuple(_as_numpy(SampledRelease(**row)) for row in rows))


def _numbers(release: SampledRelease) -> dict[str, Any]:
    return {name: getattr(release, name) for name in _NUMBERS}


def _as_numpy(release: SampledRelease) -> SampledRelease:
    numbers: dict[str, Any] = {
        name: np.float64(value) if isinstance(value, float) else np.int64(value)
        for name, value in _numbers(release).items()
    }
    return SampledRelease(release.noise, **numbers)


def _same_mechanism(entry: SampledRelease, plan: PrivacyPlan) -> bool:
    # Compared in float32, in case the state passed through it on its way.
    return entry.noise == plan.noise and all(
        np.float32(getattr(entry, name)) == np.float32(getattr(plan, name)) for name in _MECHANISM
    )
