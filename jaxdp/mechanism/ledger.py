"""The ledger: how many steps were released, and at which noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from dp_accounting import NeighboringRelation

from jaxdp import _validate, accounting
from jaxdp.accounting import AccountantName, SampledGaussian
from jaxdp.mechanism.privacy_plan import PrivacyPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a run has released so far, kept in its state and therefore in its checkpoints.

    The entries are NumPy scalars on the host, so that the count is known before a step is dispatched and no float64
    number passes through a float32 array.

    Attributes:
        entries: One `SampledGaussian` for each stretch of steps under one mechanism, oldest first.
    """

    entries: tuple[SampledGaussian, ...] = ()

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
        """The epsilon of everything released so far, composed, at `delta`.

        The theorem behind it covers entries whose noise and sampling were chosen without looking at the data or at earlier
        outputs; a plan changed *because of* what the run showed needs a privacy filter instead (S13).
        """
        _validate.probability("delta", delta, allow_one=False)
        _validate.one_of("accountant", accountant, ("pld", "rdp"))
        releases = [SampledGaussian(**row) for row in self.to_json()]
        return accounting.epsilon(releases, delta, neighboring_relation=neighboring_relation, accountant=accountant)

    def to_json(self) -> list[dict[str, Any]]:
        return [{k: np.asarray(v).item() for k, v in entry._asdict().items()} for entry in self.entries]

    @staticmethod
    def from_json(rows: list[dict[str, Any]]) -> Ledger:
        return Ledger(tuple(_as_numpy(SampledGaussian(**row)) for row in rows))


def _as_numpy(release: SampledGaussian) -> Any:
    return SampledGaussian(*(np.float64(x) if isinstance(x, float) else np.int64(x) for x in release))  # type: ignore[arg-type]


def _same_mechanism(entry: SampledGaussian, plan: PrivacyPlan) -> bool:
    # Compared in float32, in case the state passed through it on its way.
    theirs, ours = entry[:-1], plan.release(0)[:-1]
    return all(np.float32(a) == np.float32(b) for a, b in zip(theirs, ours, strict=True))
