"""The figure of a run: loss and epsilon against step."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from jaxdp.mechanism import PrivacyPlan


class EpsilonCurve:
    """The epsilon spent so far at some twenty steps of a plan, computed as they are reached."""

    def __init__(self, plan: PrivacyPlan, num_points: int = 20):
        self._plan = plan
        self.steps = np.unique(np.linspace(0, plan.num_steps, num_points + 1).round().astype(int))

    def at_most(self, step: int) -> float:
        """An upper bound on the epsilon of `step` steps: the value at the next grid point."""
        return self._plan.epsilon(num_steps=int(self.steps[np.searchsorted(self.steps, step)]))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        return self.steps, np.array([self._plan.epsilon(num_steps=int(step)) for step in self.steps])


def curve_png(losses: Sequence[float], curve: EpsilonCurve, *, title: str, private: bool) -> bytes:
    """A PNG of the training loss (left axis) and of epsilon (right axis) against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = max(1, len(losses) // 30)
    if len(losses) >= 2 * smooth:
        finite = np.nan_to_num(np.asarray(losses), nan=float(np.nanmean(losses)))
        axis.plot(steps[smooth - 1 :], np.convolve(finite, np.ones(smooth) / smooth, "valid"), color="tab:blue")
    axis.set(xlabel="step", title=title)
    axis.set_ylabel("mean training loss of the batch (not private)", color="tab:blue")
    axis.set_ylim(bottom=0)
    axis.spines[["top"]].set_visible(False)
    if private:
        right = axis.twinx()
        grid, values = curve.points()
        right.plot(grid, values, color="tab:red")
        right.set_ylabel("epsilon spent", color="tab:red")
        right.set_ylim(0, 1.1 * max(v for v in values if math.isfinite(v)))
        right.spines[["top"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
