"""Where the blocks of a zeroth-order run wait, and how its head is cut, so that it fits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from jaxdp.cli.plan_check import gibibytes
from jaxdp.zeroth_order import Placement
from jaxdp.zeroth_order.memory import StepMemory

#: Tokens whose logits exist at once: fewer take little more time, a block that is not prefetched a lot.
HEAD_TOKENS = (256, 64, 16)


def head_tokens_of(max_length: int) -> tuple[int, ...]:
    """Those that make a difference for sequences of a length."""
    most, *fewer = HEAD_TOKENS
    return (most, *(tokens for tokens in fewer if tokens < max_length))


@dataclasses.dataclass(frozen=True)
class Room:
    """What a run may allocate, in bytes; None where nothing tells.

    Attributes:
        device: On the device.
        device_meter: Where that comes from.
        host: On the host.
        host_meter: The same.
        is_shared: Whether both are one memory, as on a CPU.
    """

    device: int | None
    device_meter: str | None
    host: int | None
    host_meter: str | None
    is_shared: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a run uses memory.

    Attributes:
        placement: Where blocks wait.
        is_split: Whether a block travels in stages.
        head_tokens: Tokens of a sequence whose logits exist at once.
        num_at_once: Low-rank directions that pass at once.
        memory: The figures of the step's programs.
        more_host_bytes: What else the run keeps on the host.
    """

    placement: Placement
    is_split: bool
    head_tokens: int
    num_at_once: int
    memory: StepMemory
    more_host_bytes: int

    @property
    def device_bytes(self) -> int:
        """The most that will be on the device at once."""
        return self.memory.device_peak(self.placement)

    @property
    def host_bytes(self) -> int:
        """What the run will add to the host's memory."""
        return self.memory.host_bytes(self.placement) + self.more_host_bytes

    def __str__(self) -> str:
        where = "on the device"
        if self.placement.is_streamed:
            where = f"streamed, {self.placement.prefetch or 'none'} prefetched"
            if self.is_split:
                where = (
                    f"streamed in {len(self.memory.parts)} stages each, {self.placement.prefetch or 'none'} prefetched"
                )
        together = f"; {self.num_at_once} directions at once" if self.num_at_once > 1 else ""
        return f"blocks {where}; logits of {self.head_tokens} tokens of a sequence at a time{together}"

    def lack(self, room: Room) -> str | None:
        """What is missing, in words; None if it fits."""
        if room.device is not None and self.device_bytes > room.device:
            return (
                f"a step needs {gibibytes(self.device_bytes)} on the device, which has {gibibytes(room.device)} "
                f"({room.device_meter})"
            )
        host = self.host_bytes + (self.device_bytes if room.is_shared else 0)
        if room.host is not None and host > room.host:
            return f"the run needs {gibibytes(host)} on the host, which has {gibibytes(room.host)} left ({room.host_meter})"
        return None


def choose(
    memory_of: Callable[[bool, int, int], StepMemory],
    room: Room,
    *,
    is_streamed: bool,
    more_host_bytes: int,
    splits: tuple[bool, ...],
    head_tokens: tuple[int, ...],
    nums_at_once: tuple[int, ...],
    remedies: list[str],
) -> Choice:
    """The fastest way that fits.

    Args:
        memory_of: The figures with blocks in stages or whole, and with so many tokens in the head, and so many directions, at once.
        room: What there is.
        is_streamed: As asked for.
        more_host_bytes: As of `Choice`.
        splits: Whether a block may travel in stages: which to try, in this order.
        head_tokens: The same.
        nums_at_once: The same.
        remedies: What else could help.

    Raises:
        ValueError: nothing fits; with what is missing, and remedies.
    """
    found: dict[tuple[bool, int, int], StepMemory] = {}
    choice = None
    for prefetch in (1, 0) if is_streamed else (1,):  # stages that overlap are faster than whole blocks that do not
        for is_split, num_at_once, tokens in itertools.product(splits, nums_at_once, head_tokens):
            chunks = is_split, tokens, num_at_once
            if chunks not in found:
                found[chunks] = memory_of(*chunks)
            choice = Choice(Placement(is_streamed, prefetch), *chunks, found[chunks], more_host_bytes)
            if choice.lack(room) is None:
                return choice
    assert choice is not None  # there is a head to try
    if not is_streamed:
        streamed = dataclasses.replace(choice, placement=Placement(True, 0))
        remedies = [f"--stream (then {gibibytes(streamed.device_bytes)} on the device)", *remedies]
    raise ValueError(f"{choice.lack(room)}, at the least ({choice}); to make it fit: {', '.join(remedies)}.")
