"""What a compiled GPU program says of its transfers to and from host memory, read from its scheduled HLO.

The text is no documented format. Whoever reads figures from it should ask for something that must be there as well, so that a
change of the format shows.
"""

from __future__ import annotations

import dataclasses
import math
import re

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$")
_OFFSETS = re.compile(r'"linear":\{"byte_offset":"(-?\d+)","byte_stride":"(-?\d+)"\}')
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_HOST = "S(5)"
_FREE = frozenset({"get-tuple-element", "bitcast", "constant", "parameter", "tuple"})


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One asynchronous copy between host and device.

    Attributes:
        direction: "to_device" or "to_host".
        is_in_loop: Whether it belongs to the body of a loop.
        operations_between: Operations scheduled between its start and its end, other transfers left out.
        matmul_share_between: Of the multiplications of the computation it belongs to, the share scheduled there.
        is_linear: Whether the compiler found its address linear in the loop's counter: a copy engine can then do it.
    """

    direction: str
    is_in_loop: bool
    operations_between: int
    matmul_share_between: float
    is_linear: bool


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def called(self) -> str | None:
        match = re.search(r"calls=%([\w.\-]+)", self.rest)
        return None if match is None else match[1]


def transfers(text: str) -> list[Transfer]:
    """All asynchronous copies of slices of host arrays, in the order of their starts."""
    computations = _computations(text)
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    found = []
    for name, instructions in computations.items():
        if name is None or not any(one.opcode.endswith("-start") for one in instructions):
            continue
        work = [_multiplications(one, computations) for one in instructions]
        total = max(sum(work), 1)
        ends = {_operands(one)[0]: at for at, one in enumerate(instructions) if one.opcode.endswith("-done")}
        for at, one in enumerate(instructions):
            body = computations.get(one.called, [])
            slices = [inner for inner in body if inner.opcode in ("dynamic-slice", "dynamic-update-slice")]
            if not one.opcode.endswith("-start") or _HOST not in one.shape or not slices:
                continue
            between = instructions[at + 1 : ends[one.name]]
            moved = [other for other in between if not other.opcode.endswith(("-start", "-done"))]
            found.append(
                Transfer(
                    direction="to_device" if slices[-1].opcode == "dynamic-slice" else "to_host",
                    is_in_loop=name in bodies,
                    operations_between=sum(other.opcode not in _FREE for other in moved),
                    matmul_share_between=sum(work[at + 1 : ends[one.name]]) / total,
                    is_linear=_OFFSETS.search(slices[-1].rest) is not None,
                )
            )
    return found


def whole_copies(text: str, shape: str) -> int:
    """Copies, on host or device, whose result is a whole array of this shape, such as "bf16[20,314639360]"."""
    return len(re.findall(r"= \(?" + re.escape(shape) + r"[^=\n]*? copy(?:-start)?\(", text))


def slice_offsets(text: str) -> set[tuple[int, int]]:
    """`(first byte, bytes from one iteration to the next)` of all slices of host arrays inside loops."""
    lines = [line for line in text.splitlines() if "dynamic-" in line and '"loop_index"' in line]
    return {(int(offset), int(stride)) for line in lines for offset, stride in _OFFSETS.findall(line)}


def _computations(text: str) -> dict[str | None, list[_Instruction]]:
    found: dict[str | None, list[_Instruction]] = {}
    current: str | None = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            current = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
            found[current] = []
        elif current is not None and (match := _INSTRUCTION.match(line)):
            found[current].append(_Instruction(match["name"], match["shape"], match["opcode"], match["rest"]))
    return found


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _multiplications(instruction: _Instruction, computations: dict[str | None, list[_Instruction]]) -> float:
    """Of the matrix product that an operation is, if it is one. Attention counts as nothing."""
    inside = computations.get(instruction.called, []) if instruction.opcode == "fusion" else [instruction]
    total = 0.0
    for one in inside:
        if one.opcode != "dot":
            continue
        shapes = {other.name: _sizes(other.shape) for other in inside}
        left = shapes.get(_operands(one)[0], [])
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        contracted = [left[int(axis)] for axis in match[1].split(",") if axis] if match and left else []
        total += math.prod(_sizes(one.shape)) * math.prod(contracted)
    return total


def _sizes(shape: str) -> list[int]:
    match = _ARRAY.search(shape)
    return [int(size) for size in match[1].split(",") if size] if match else []
