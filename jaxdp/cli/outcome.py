"""What a run of `jaxdp finetune` came to, however it was trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxdp.cli.training_loop import Progress
from jaxdp.cli.update_check import UpdateCheck
from jaxdp.mechanism import Ledger


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that is reported and released.

    Attributes:
        trainable: The trained parameters, as `Tuning.trainable`.
        ledger: What was released.
        progress: Losses and time.
        updates: What moved.
        before: Scores of the evaluation records before training; None without them.
        after: The same after training.
        more: Further entries of `report.json`.
    """

    trainable: Any
    ledger: Ledger
    progress: Progress
    updates: UpdateCheck
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
