"""How busy the link between host and device is, and how much of its work hides behind computation."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxdp.zeroth_order import Placement, State

#: Steps without prefetching at the start of a run: two may compile, the third is timed.
_SERIAL_STEPS = 3


class LinkMeter:
    """Times a run's steps.

        overlap = (t_serial - t) / t_link

    with t the time of a step, t_serial that of a step in which blocks travel while nothing computes, and t_link that of a
    step's transfers alone. 1: the link costs no time; 0: all of it is waited for.

    Args:
        link_bytes: What crosses the link in one step, both ways.
        link_seconds: What that takes alone, by `seconds_alone`.
    """

    def __init__(self, link_bytes: float, link_seconds: float) -> None:
        self.link_bytes, self.link_seconds = link_bytes, link_seconds
        self._num_steps, self._serial_seconds, self._seconds = 0, 0.0, 0.0

    def timed(self, serial: Callable[..., Any], overlapped: Callable[..., Any]) -> Callable[..., Any]:
        """A step that takes `serial` for the first few and then `overlapped`, which give the same bits, and times them."""

        def step(*arguments: Any) -> Any:
            begin, is_serial = time.perf_counter(), self._num_steps < _SERIAL_STEPS
            state, info = (serial if is_serial else overlapped)(*arguments)
            jax.block_until_ready(info)
            seconds = time.perf_counter() - begin
            self._num_steps += 1
            if is_serial:
                self._serial_seconds = seconds
            else:
                self._seconds += seconds
            return state, info

        return step

    @property
    def step_seconds(self) -> float | None:
        """Mean time of a step; None before there is one to tell."""
        num = self._num_steps - _SERIAL_STEPS
        return self._seconds / num if num > 0 else None

    @property
    def overlap(self) -> float | None:
        """The hidden part of the transfers; None before it is known."""
        if self.step_seconds is None or self.link_seconds == 0:
            return None
        return min(1.0, max(0.0, (self._serial_seconds - self.step_seconds) / self.link_seconds))

    def __str__(self) -> str:
        if self.step_seconds is None:
            return "link not measured yet"
        rate = self.link_bytes / self.step_seconds / 1e9
        return f"link {rate:.3g} GB/s, {self.overlap or 0.0:.0%} overlapped"

    def to_json(self) -> dict[str, Any]:
        """For `report.json`."""
        return {
            "bytes_per_step": self.link_bytes,
            "seconds_per_step_alone": self.link_seconds,
            "seconds_per_step_not_overlapped": self._serial_seconds,
            "seconds_per_step": self.step_seconds,
            "overlap": self.overlap,
        }


def seconds_alone(state: State, placement: Placement, *, write_every: int) -> float:
    """The time of one step's transfers while nothing computes: of one block each way, times the blocks."""
    frozen = () if state.frozen is None else state.frozen.blocks
    buckets = list(frozen or state.blocks)
    of_a_block = 1 if frozen else max(1, len(state.parts))
    seconds = 0.0
    for bucket in buckets[:of_a_block]:
        there = jax.block_until_ready(placement.fetch(bucket))
        seconds += _best(functools.partial(placement.fetch, bucket))
        if not frozen:
            seconds += _best(functools.partial(placement.store, there)) / write_every
    return len(buckets) / of_a_block * seconds


def _best(transfer: Callable[[], Any], *, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(transfer())
        times.append(time.perf_counter() - begin)
    return min(times)
