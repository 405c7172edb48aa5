"""Reads compiled programs (S4e): does each clipped sum read the very buffers that a norm was taken of?

The arithmetic of norms and sums carries the names of its scopes, `jaxdp_norm` and `jaxdp_sum`, into the optimized HLO. From each
such instruction `faults` walks back through whatever only moves numbers about, or is the same in every kernel, to where the
numbers come from: a buffer, written once by an instruction of the program, or an argument. Two things are faults:

- arithmetic that is not of the reader, inside the kernel that reads: the compiler put the producer of a gradient, or of a factor of
  one, into a norm or a sum, where it may round as nowhere else;
- a buffer that a sum reads, and no norm.

The text of HLO is no documented format. So a program in which no norm or no sum is found is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, TypeAlias

NORM, SUM, FACTORS, WALL, ZEROED = "jaxdp_norm", "jaxdp_sum", "jaxdp_factors", "jaxdp_wall", "jaxdp_zeroed"

# Each gives the same bits wherever it is computed: a kernel may repeat it.
_LOGIC = "and not or xor compare select is-finite shift-left shift-right-arithmetic shift-right-logical"
_MOVES = (
    "bitcast bitcast-convert broadcast concatenate constant copy copy-done copy-start dynamic-slice dynamic-update-slice gather "
    "get-dimension-size iota opt-barrier pad partition-id reshape reverse slice transpose tuple"
)
_ROUNDS_ALIKE = "abs clamp convert maximum minimum negate sign"
_EXACT = frozenset(f"{_LOGIC} {_MOVES} {_ROUNDS_ALIKE}".split())
_NUMBER = re.compile(r"\b(f16|bf16|f32|f64|f8\w*)\[")
_INTEGERS = ("s", "u", "pred")
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")

#: A buffer: the computation and the name of the instruction that writes it, and which of its results; or an argument.
Source: TypeAlias = tuple[str, str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    computation: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    index: int  # of a get-tuple-element or a parameter
    called: tuple[str, ...]
    scope: str

    def is_in(self, scope: str) -> bool:
        return scope in self.scope


class Program:
    """The instructions of an HLO module, by name, and who calls whom."""

    def __init__(self, text: str):
        self.instructions: dict[tuple[str, str], Instruction] = {}
        self.roots: dict[str, str] = {}
        self.callers: dict[str, list[Instruction]] = {}
        self.entry = ""
        computation = None
        for line in text.splitlines():
            if match := _HEAD.match(line):
                computation = match["name"]
                self.entry = computation if match["entry"] else self.entry
            elif line.startswith("}"):
                computation = None
            elif computation is not None and (match := _LINE.match(line)):
                instruction = _instruction(computation, match["name"], match["rest"])
                self.instructions[computation, instruction.name] = instruction
                if match["root"]:
                    self.roots[computation] = instruction.name
                for name in instruction.called:
                    self.callers.setdefault(name, []).append(instruction)
        self._name_the_nameless()

    def _name_the_nameless(self) -> None:
        """XLA drops the scope of a product that it makes canonical, or the end of it: it is that of what alone reads the product.

        A product of the user that only a sum reads is then taken for one of the sum; its operands are no buffers that a norm
        read, and so the fault is still found.
        """
        readers: dict[tuple[str, str], list[str]] = {}
        for (computation, name), one in reversed(self.instructions.items()):
            scopes = readers.get((computation, name), [])
            is_nameless = not one.scope or (one.opcode == "dot" and not one.is_in("jaxdp_"))
            if is_nameless and len(scopes) == 1:
                one = self.instructions[computation, name] = dataclasses.replace(one, scope=scopes[0])
            for position, operand in enumerate(one.operands):
                scopes = [one.scope]
                if one.opcode == "fusion":
                    inside = [each for each in self.instructions.values() if each.computation == one.called[0]]
                    entry = next((e.name for e in inside if e.opcode == "parameter" and e.index == position), None)
                    scopes = [each.scope for each in inside if entry in each.operands]
                readers.setdefault((computation, operand), []).extend(scopes)

    def operand(self, instruction: Instruction, position: int) -> Instruction:
        return self.instructions[instruction.computation, instruction.operands[position]]

    def root(self, computation: str) -> Instruction:
        return self.instructions[computation, self.roots[computation]]

    @functools.cached_property
    def applied(self) -> set[str]:
        """The computations of two numbers that reductions and the like apply."""
        return {name for name, callers in self.callers.items() if any(c.opcode in _APPLIES for c in callers)}

    def is_fused(self, one: Instruction) -> bool:
        return any(caller.opcode == "fusion" for caller in self.callers.get(one.computation, []))

    def readers(self, scope: str) -> list[Instruction]:
        """The arithmetic of a scope."""
        return [
            each
            for each in self.instructions.values()
            if each.is_in(scope)
            and not each.is_in(ZEROED)  # a loop that writes zeros
            and each.opcode not in _NOT_ARITHMETIC
            and each.computation not in self.applied
        ]

    def leaves_unchanged(self, loop: Instruction, index: int) -> bool:
        """Whether a loop hands on an element of its state as it is."""
        body = loop.called[1] if _is_condition(self, loop.called[0]) else loop.called[0]
        element = self.element(self.root(body), index)
        return element.opcode == "get-tuple-element" and (
            element.index == index and self.operand(element, 0).opcode == "parameter"
        )

    def element(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that makes one element of a tuple, as far as it can be seen."""
        return self.operand(instruction, index) if instruction.opcode == "tuple" else instruction


_APPLIES = frozenset(
    {"reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map", "all-reduce", "reduce-scatter"}
)
_NOT_ARITHMETIC = _EXACT | {
    "parameter",
    "get-tuple-element",
    "fusion",
    "call",
    "while",
    "conditional",
    "async-start",
    "async-done",
}


def _is_condition(program: Program, computation: str) -> bool:
    return program.root(computation).shape.startswith("pred[")


def _instruction(computation: str, name: str, rest: str) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split_arguments(rest)
    index = 0
    if opcode == "parameter":
        index = int(arguments)
    elif opcode == "get-tuple-element":
        index = int(re.findall(r"index=(\d+)", attributes)[0])
    called = re.findall(r"(?:calls|body|condition|to_apply|called_computation)=%?([\w.\-]+)", attributes)
    branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes)
    called += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
    scope = re.search(r'op_name="([^"]*)"', attributes)
    names = re.findall(r"%([\w.\-]+)", arguments)
    return Instruction(
        name, computation, opcode.strip(), shape, tuple(names), index, tuple(called), scope[1] if scope else ""
    )


def _split_shape(rest: str) -> tuple[str, str]:
    if not rest.startswith("("):
        shape, _, rest = rest.partition(" ")
        return shape, rest
    return _split_at_end(rest, 1)


def _element_shape(shape: str, path: tuple[int, ...]) -> str:
    """That of an element of a flat tuple."""
    return re.findall(r"\w+\[[^\]]*\]", shape)[path[0]] if len(path) == 1 else shape


def _split_arguments(rest: str) -> tuple[str, str]:
    return _split_at_end("(" + rest, 1)


def _split_at_end(text: str, start: int) -> tuple[str, str]:
    """A text that opens with a parenthesis, at the one that closes it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:position].lstrip("("), text[position + 1 :].strip()
    raise AssertionError(f"no end of {text[:80]!r}")


class _Walk:
    """From a reader back to the buffers that it reads."""

    def __init__(self, program: Program, own: tuple[str, ...], stop: tuple[str, ...]):
        self.program, self.own, self.stop = program, own, stop
        self.faults: set[str] = set()
        self.sources = functools.cache(self._sources)
        self._active: set[Any] = set()

    def _sources(self, instruction: Instruction, path: tuple[int, ...], kernel: str | None) -> frozenset[Source]:
        """The buffers behind an element of a result. `kernel`: the fusion that reads, while the walk is inside of it."""
        here = (instruction.computation, instruction.name, path)
        if here in self._active:  # around a loop
            return frozenset()
        self._active.add(here)
        try:
            return frozenset(self._step(instruction, path, kernel))
        finally:
            self._active.discard(here)

    def _step(self, one: Instruction, path: tuple[int, ...], kernel: str | None) -> set[Source]:
        program, buffer = self.program, (one.computation, one.name, path)
        if any(one.is_in(scope) for scope in self.stop) and one.opcode not in ("parameter", "while"):
            return set()
        if one.opcode == "get-tuple-element":
            return set(self.sources(program.operand(one, 0), (one.index, *path), kernel))
        if one.opcode == "tuple" and path:
            return set(self.sources(program.operand(one, path[0]), path[1:], kernel))
        if one.opcode == "opt-barrier":
            return set(self.sources(program.operand(one, 0), path, kernel))
        if one.opcode == "parameter":
            return self._parameter(one, path)
        if one.opcode in ("call", "fusion", "async-start", "async-done"):
            if not one.called:
                return set(self.sources(program.operand(one, 0), path, kernel))
            return self._called(one, path, buffer)
        if one.opcode == "while":
            if one.is_in(WALL) or not path:
                return {buffer}
            if one.is_in(ZEROED) or program.leaves_unchanged(one, path[0]):  # the first writes zeros only
                return set(self.sources(program.operand(one, 0), path, None))
            return {buffer}
        if one.opcode == "conditional":
            return {buffer}
        if one.opcode in _EXACT or any(one.is_in(scope) for scope in self.own) or not _NUMBER.search(one.shape):
            return self.operands(one, kernel)
        if kernel is not None:
            self.faults.add(f"{one.opcode} {one.scope or one.name!r} is computed inside the kernel {kernel}")
            return set()
        return {buffer}

    def operands(self, one: Instruction, kernel: str | None) -> set[Source]:
        found: set[Source] = set()
        for position in range(len(one.operands)):
            if one.opcode in ("dynamic-slice", "gather") and position > 0 and one.opcode == "dynamic-slice":
                continue  # where, not what
            if one.opcode == "dynamic-update-slice" and position > 1:
                continue
            found |= self.sources(self.program.operand(one, position), (), kernel)
        return found

    def _called(self, one: Instruction, path: tuple[int, ...], buffer: Source) -> set[Source]:
        """A kernel, or a call, whose result is read: only data movement and the reader's own arithmetic are looked through."""
        inner = _Walk(self.program, self.own, self.stop)
        found = inner.sources(self.program.root(one.called[0]), path, one.name)
        return {buffer} if inner.faults else set(found)

    def _parameter(self, one: Instruction, path: tuple[int, ...]) -> set[Source]:
        program = self.program
        if one.computation == program.entry:
            if one.shape.startswith(_INTEGERS):
                return set()  # of one value everywhere
            return {(one.computation, one.name, path)}
        found: set[Source] = set()
        for caller in program.callers.get(one.computation, []):
            if caller.opcode == "while":
                if path and program.leaves_unchanged(caller, path[0]):
                    found |= self.sources(program.operand(caller, 0), path, None)
                else:
                    found.add((one.computation, one.name, path))
            elif caller.opcode == "conditional":
                position = 1 + caller.called.index(one.computation)
                found |= self.sources(program.operand(caller, position), path, None)
            else:
                found |= self.sources(program.operand(caller, one.index), path, None)
        return found


def faults(text: str) -> list[str]:
    """What is wrong with a compiled program, in words; empty if every sum reads what a norm was taken of.

    Args:
        text: The optimized HLO, `compiled.as_text()`.

    Raises:
        ValueError: the program has no norm or no sum of `jaxdp`.
    """
    program = Program(text)
    norms, sums = program.readers(NORM), program.readers(SUM)
    deciders = [
        one for one in program.instructions.values() if one.is_in(FACTORS) and one.computation not in program.applied
    ]
    if not (norms or deciders) or not sums:
        raise ValueError(f"{len(norms)} norms, {len(deciders)} factors and {len(sums)} sums found: nothing to check.")
    found: set[str] = set()
    read: dict[str, set[Source]] = {}
    for scope, readers, stop in ((NORM, norms, (FACTORS,)), (SUM, sums, (NORM, FACTORS))):
        walk = _Walk(program, (scope,), stop)
        read[scope] = set()
        for reader in readers:
            read[scope] |= walk.operands(reader, reader.computation if program.is_fused(reader) else None)
        found |= walk.faults
    # What decides a factor is as good as a norm: XLA makes of the root of one square an absolute value, which has no arithmetic.
    decides = _Walk(program, (NORM, FACTORS), ())
    for one in deciders:
        read[NORM] |= decides.operands(one, one.computation if program.is_fused(one) else None)
    for computation, name, path in read[SUM] - read[NORM]:
        one = program.instructions[computation, name]
        if _element_shape(one.shape, path).startswith(_INTEGERS):
            continue  # of one value everywhere
        found.add(f"a sum reads {one.opcode} {one.scope or name!r} {one.shape}{list(path) or ''}, and no norm does")
    return sorted(found)
