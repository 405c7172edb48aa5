"""Contenders at their best: the microbatch size at which a step is fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.peers import Contender, Problem, Settings

ROUNDS = 3


def candidates(rows: int) -> list[int | None]:
    """All rows at once, and every proper divisor of the batch."""
    return [None, *(size for size in range(1, rows) if rows % size == 0)]


def tune(
    contenders: Sequence[Contender], problem: Problem, settings: Settings, *, turn_seconds: float
) -> tuple[list[Contender], dict[str, Any]]:
    """Gives every contender that can be tuned its fastest microbatch size, by a short alternating run of all sizes.

    Returns:
        The contenders; and, for the record, what was tried and chosen.
    """
    tuned: list[Contender] = []
    record: dict[str, Any] = {}
    for contender in contenders:
        if not contender.is_tuned:
            tuned.append(contender)
            continue
        if (noisy := contender.name.removesuffix("_clip_only")) in record:  # their difference is to be the noise
            tuned.append(contender.with_microbatch_size(record[noisy]["chosen_microbatch_size"]))
            continue
        sizes = {_name(size): size for size in candidates(problem.rows)}
        trainers = {name: contender.with_microbatch_size(size).make(problem, settings) for name, size in sizes.items()}
        for trainer in trainers.values():
            trainer.step()  # the first step compiles
        times, _ = harness.alternate(
            {name: trainer.step for name, trainer in trainers.items()}, rounds=ROUNDS, turn_seconds=turn_seconds
        )
        spreads = {name: harness.Spread.of(seconds) for name, seconds in times.items()}
        best = min(spreads, key=lambda name: spreads[name].median)
        tuned.append(contender.with_microbatch_size(sizes[best]))
        record[contender.name] = {
            "chosen_microbatch_size": sizes[best],
            "seconds_per_step": {name: dataclasses.asdict(spread) for name, spread in spreads.items()},
        }
    return tuned, record


def _name(size: int | None) -> str:
    return "whole batch" if size is None else str(size)
