"""The loop of every subcommand that trains: checkpoints, exact resumption, Ctrl-C, and a progress bar, or lines in a log."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxdp.accounting import format_epsilon
from jaxdp.checkpointing import Checkpointer
from jaxdp.cli import interrupts
from jaxdp.cli.curve import EpsilonCurve
from jaxdp.mechanism import PrivacyPlan
from jaxdp.sampling import poisson_batches
from jaxdp.training import StepInfo, TrainingState

#: Of a run whose output is no terminal.
_SECONDS_BETWEEN_LINES = 60.0


@dataclasses.dataclass
class Progress:
    """What a run reports about itself, and a checkpoint carries on: not part of the guarantee.

    Attributes:
        losses: The mean training loss of each batch: not private (S15).
        wall_seconds: Time spent in all processes of this run so far.
    """

    losses: list[float]
    wall_seconds: float


def train(
    step: Callable[[TrainingState, Any, Any], tuple[TrainingState, StepInfo]],
    state: TrainingState,
    source: Any,
    the_plan: PrivacyPlan,
    checkpointer: Checkpointer,
    *,
    fingerprint: str,
    folder: Path,
    checkpoint_every: int,
    tokens_per_step: float | None = None,
) -> Iterator[tuple[TrainingState, Progress]]:
    """Runs the steps of a plan that are left, and yields the state it begins with and the state after each step.

    It begins with the newest checkpoint if there is one, and else with `state`. A yielded state is donated to the next
    step: read what you need before going on.

    Args:
        step: As `make_dp_step` makes it, for `step(state, batch, is_padding_example)`.
        state: As `init(params)` makes it.
        source: The training set, as `poisson_batches` takes it.
        the_plan: The privacy numbers.
        checkpointer: Where the state is saved: before the first step, every `checkpoint_every` steps, at the end, and when
            interrupted.
        fingerprint: Of the training set; a resumed run must see the same (S8).
        folder: Of the run, to name in messages.
        checkpoint_every: Steps between checkpoints.
        tokens_per_step: The mean number of tokens of a batch, for a rate in the progress bar: not private.

    Raises:
        ValueError: the run began with another training set.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    start = time.perf_counter()
    if checkpointer.latest_step() is not None:
        state, extra = checkpointer.restore(state)
        progress = Progress(extra["losses"], extra["wall_seconds"])
        check_same_data(extra["data_sha256"], fingerprint, folder)
        seed = np.random.SeedSequence(int(extra["sampling_entropy"]))
        print(f"resumed after step {state.step} of {the_plan.num_steps}")
    else:  # also a run that was killed before its first checkpoint: it has released nothing
        seed, progress = np.random.SeedSequence(), Progress([], 0.0)

    def save(state: TrainingState, info: Any) -> None:
        extra = {
            "sampling_entropy": str(seed.entropy),
            "data_sha256": fingerprint,  # here and not in config.json: it could confirm a guess of the data
            "losses": progress.losses,
            "wall_seconds": progress.wall_seconds,
        }
        checkpointer.save(state, extra=extra)

    if checkpointer.latest_step() is None:
        save(state, None)  # the noise key is on disk before it noises anything: no crash can lead to a second key
    yield state, progress
    yield from run_steps(
        step,
        state,
        poisson_batches(source, the_plan, seed, start_step=state.step),
        the_plan,
        progress,
        save=save,
        folder=folder,
        save_every=checkpoint_every,
        tokens_per_step=tokens_per_step,
        start=start - progress.wall_seconds,
    )


def run_steps(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Iterable[tuple[Any, Any]],
    the_plan: PrivacyPlan,
    progress: Progress,
    *,
    save: Callable[[Any, Any], None],
    folder: Path,
    save_every: int,
    start: float,
    tokens_per_step: float | None = None,
    more: Callable[[], str | None] = lambda: None,
) -> Iterator[tuple[Any, Progress]]:
    """Runs the batches that are left, with a progress bar or, without a terminal, a line a minute; yields the state after each.

    Args:
        step: `step(state, batch, is_padding_example) -> (state, info)`.
        state: It has the index of the next step as `step`.
        batches: Of `poisson_batches`, from that step on.
        the_plan: Of the run.
        progress: It is kept up to date.
        save: `save(state, info)`: with the last step, at Ctrl-C, and every `save_every` steps. `progress` is then complete.
        folder: Of the run, to name in messages.
        save_every: 1 for every step.
        start: When the run would have begun, had it not been interrupted, by `time.perf_counter`.
        tokens_per_step: As in `train`.
        more: What else the progress bar shows.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    curve = EpsilonCurve(the_plan)
    bar = tqdm(batches, total=the_plan.num_steps, initial=state.step, unit="step", disable=None)
    pending: list[jax.Array] = []  # losses still on the device: reading each at once would wait for each step
    last_line = time.perf_counter()
    with bar, interrupts.deferred() as interrupted:
        for batch, is_padding_example in bar:
            state, info = step(state, batch, is_padding_example)
            pending.append(info.not_private.mean_loss())
            last = state.step == the_plan.num_steps
            stop = interrupted() and not last
            is_due = last or stop or state.step % save_every == 0
            if is_due or len(pending) == 20:
                progress.losses += [float(value) for value in pending]
                pending.clear()
                progress.wall_seconds = time.perf_counter() - start
                status = _postfix(progress, the_plan, curve, bar, tokens_per_step, more())
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and time.perf_counter() - last_line >= _SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    print(f"step {state.step} of {the_plan.num_steps}: {status}", flush=True)
            if is_due:
                save(state, info)
            if stop:
                raise KeyboardInterrupt(
                    f"saved step {state.step} of {the_plan.num_steps}; go on with the same options and --resume --out {folder}"
                )
            yield state, progress


def check_same_data(there: str, here: str, folder: Path) -> None:
    """Refuses to go on with other data: one noise key and step would noise two different sums (S8)."""
    if there != here:
        raise ValueError(
            f"the training set is not the one that the run in {folder} began with; give it the same data, or start a new run."
        )


def _postfix(
    progress: Progress,
    the_plan: PrivacyPlan,
    curve: EpsilonCurve,
    bar: Any,
    tokens_per_step: float | None,
    more: str | None,
) -> str:
    parts = [f"loss {progress.losses[-1]:.3f} (not private)"]
    rate = bar.format_dict["rate"]
    if tokens_per_step is not None and rate:
        parts.append(f"{rate * tokens_per_step:,.0f} tokens/s")
    if more is not None:
        parts.append(more)
    private = the_plan.noise_multiplier > 0
    parts.append(f"epsilon <={format_epsilon(curve.at_most(len(progress.losses)))}" if private else "epsilon none")
    return ", ".join(parts)
