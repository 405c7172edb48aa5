"""What a direct check found: facts that the owner of key, data and plan can look at, where an attack must guess."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: What was measured, in words.
        measured: The number found.
        allowed: The largest number that is no fault.
    """

    name: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.allowed)  # NaN has not


@dataclasses.dataclass(frozen=True)
class Check:
    """All measurements of one law.

    Attributes:
        law: The law, in words.
        unit: The unit of all numbers.
        cases: One entry for each measurement.
        covered: What was checked: names of kinds, and the members of each.
        power: The smallest fault that the check would have seen, in words.
    """

    law: str
    unit: str
    cases: tuple[Case, ...]
    covered: dict[str, tuple[str, ...]]
    power: str

    @property
    def worst(self) -> Case:
        """The case that exceeds what is allowed by the largest factor, or comes closest to it."""
        return max(self.cases, key=lambda case: (not case.passed, case.measured / case.allowed))

    @property
    def failed(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if not case.passed)

    @property
    def passed(self) -> bool:
        return not self.failed
