"""Where and how a function uses each of its parameters, read off its jaxpr.

The rule is to accept what is proven and to fall back on everything else. A leaf is accepted if every path from it ends in
an equation whose gradient factors (`factors.py`), or where no gradient flows. A weight that is a constant of a scan, is
used in several equations, or both, is one matrix with more tokens: its joint norm needs every cross term. Treating such uses
as separate under-estimates the norm, and clipping then releases more than C (S4, S6).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from jaxdp.gradients import factors, jaxprs
from jaxdp.gradients.factors import Factoring
from jaxdp.gradients.views import View, ViewOp, are_disjoint, view_ops

#: Position of an equation: its index in each body on the way, with the branch for a cond.
Path: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A scan around a use.

    Attributes:
        path: Position of the scan.
        length: Its iterations.
        is_stacked: True if each iteration sees a slice of its own; False if all see the same entries.
    """

    path: Path
    length: int
    is_stacked: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the nest of bodies something stands.

    Attributes:
        path: Its position.
        scope: Position of the innermost scan, cond or checkpoint around it; `()` for none.
        choices: The (position of a cond, branch) pairs around it.
        is_rematerialized: Whether it lies in a checkpoint.
    """

    path: Path
    scope: Path = ()
    choices: tuple[tuple[Path, int], ...] = ()
    is_rematerialized: bool = False


@dataclasses.dataclass(frozen=True)
class Use:
    """An equation whose weight is a view of a parameter, and how its gradient factors.

    Attributes:
        place: Where the equation stands.
        loops: The scans around it, outermost first.
        view: The view of the parameter that `factoring` speaks of; the operand transposes it.
        factoring: How the gradient factors.
        operand: Which operand of the equation the weight is.
        other: Which operand it meets.
        equation: The equation, of one example.
    """

    place: Place
    loops: tuple[Loop, ...]
    view: View
    factoring: Factoring
    operand: int
    other: int
    equation: jaxprs.Equation = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class CopyPoint:
    """The deepest variable through which every use of a leaf passes: where the per-example copy is made.

    Attributes:
        path: Position of the body of the variable.
        scope: As of a place.
        loops: The scans around it, outermost first; a copy stands in stacked loops only.
        var: The variable.
        view: What it holds.
        dtype: Its dtype.
    """

    path: Path
    scope: Path
    loops: tuple[Loop, ...]
    var: jaxprs.Var
    view: View
    dtype: Any


Kind: TypeAlias = Literal["dense", "embedding", "conv", "joint", "copy", "unused"]


@dataclasses.dataclass(frozen=True)
class LeafUses:
    """How one leaf is used.

    Attributes:
        kind: `"dense"`, `"embedding"` and `"conv"`: each entry meets an example in one equation; `"joint"`: some entries in
            several; `"copy"`: in a way that is not recognized; `"unused"`: no gradient reaches it.
        uses: The equations, unless the kind is `"copy"`.
        copy: Where to copy the leaf, if the kind is `"copy"`.
        reason: Why the kind is what it is.
    """

    kind: Kind
    uses: tuple[Use, ...]
    copy: CopyPoint | None
    reason: str


@dataclasses.dataclass(frozen=True)
class _Arrival:
    view: View
    loops: tuple[Loop, ...]
    copy: CopyPoint | None
    copy_is_settled: bool


class _Finder:
    def __init__(self) -> None:
        self.uses: dict[int, list[Use]] = collections.defaultdict(list)
        self.refused: dict[int, list[str]] = collections.defaultdict(list)
        self.copies: dict[int, CopyPoint] = {}

    def end(self, arrival: _Arrival, outcome: Use | str) -> None:
        """Records an equation that a parameter enters and does not leave: a use, or why it is none."""
        leaf = arrival.view.leaf
        assert arrival.copy is not None
        assert self.copies.setdefault(leaf, arrival.copy) == arrival.copy, "the paths of a leaf part before its copy"
        if isinstance(outcome, str):
            self.refused[leaf].append(outcome)
        else:
            self.uses[leaf].append(outcome)

    def visit(
        self, body: jaxprs.Body, arriving: Sequence[_Arrival | None], private: Sequence[bool], place: Place
    ) -> list[_Arrival | None]:
        """Follows the parameters through a body; returns what its outputs hold.

        Args:
            body: The body.
            arriving: What its arguments hold.
            private: Which arguments may differ between examples.
            place: Where it stands.
        """
        is_private, _ = jaxprs.depends(body, private)
        consumers = collections.Counter(
            atom
            for atom in itertools.chain(body.outvars, *(eqn.invars for eqn in body.equations))
            if not jaxprs.is_literal(atom)
        )
        env: dict[Any, _Arrival] = {}

        def arrive(var: Any, arrival: _Arrival | None) -> None:
            if arrival is None:
                return
            if not arrival.copy_is_settled:
                copy = CopyPoint(place.path, place.scope, arrival.loops, var, arrival.view, var.aval.dtype)
                arrival = dataclasses.replace(arrival, copy=copy, copy_is_settled=consumers[var] > 1)
            env[var] = arrival

        def read(atom: Any) -> _Arrival | None:
            return None if jaxprs.is_literal(atom) else env.get(atom)

        for var, arrival in zip(body.invars, arriving, strict=True):
            arrive(var, arrival)
        for index, eqn in enumerate(body.equations):
            operands = [read(atom) for atom in eqn.invars]
            if any(operands):
                here = dataclasses.replace(place, path=(*place.path, index))
                marks = [not jaxprs.is_literal(atom) and is_private.get(atom, False) for atom in eqn.invars]
                for var, arrival in zip(eqn.outvars, self.equation(eqn, operands, marks, here), strict=True):
                    arrive(var, arrival)
        return [read(atom) for atom in body.outvars]

    def equation(
        self, eqn: jaxprs.Equation, operands: list[_Arrival | None], private: list[bool], place: Place
    ) -> list[_Arrival | None]:
        nothing: list[_Arrival | None] = [None] * len(eqn.outvars)
        if carries_no_gradient(eqn):
            return nothing
        body = jaxprs.inlined(eqn)
        if body is not None:
            return self.visit(body, operands, private, place)
        rematerialized = jaxprs.rematerialized(eqn)
        if rematerialized is not None:
            self.enclosed(rematerialized[0], operands, private, dataclasses.replace(place, is_rematerialized=True))
            return nothing
        branches = jaxprs.branches(eqn)
        if branches is not None and private[0]:
            # Every branch runs, and the one that is not taken must not leave a NaN: `jax.vmap` knows how.
            for arrival in operands:
                if arrival is not None:
                    self.end(arrival, "it enters a `cond` that the example decides")
            return nothing
        if branches is not None:
            settled = [_settled(arrival) for arrival in operands[1:]]
            for number, branch in enumerate(branches):
                choices = (*place.choices, (place.path, number))
                self.enclosed(
                    branch,
                    settled,
                    private[1:],
                    dataclasses.replace(place, path=(*place.path, number), choices=choices),
                )
            return nothing
        scan = jaxprs.scan(eqn)
        if scan is not None:
            self.scan(scan, operands, scan.settle(private), place)
            return nothing
        arrivals = [arrival for arrival in operands if arrival is not None]
        ops = view_ops(eqn) if len(arrivals) == 1 and operands[0] is not None else None
        if ops is not None:
            (arrival,) = arrivals
            if len(ops) > 1:
                arrival = dataclasses.replace(arrival, copy_is_settled=True)
            return [_moved(arrival, op, tuple(var.aval.shape)) for op, var in zip(ops, eqn.outvars, strict=True)]
        for operand, arrival in enumerate(operands):
            if arrival is not None:
                self.end(arrival, _recognize(eqn, operand, arrival, place, is_alone=len(arrivals) == 1))
        return nothing

    def enclosed(
        self, body: jaxprs.Body, arriving: Sequence[_Arrival | None], private: Sequence[bool], place: Place
    ) -> None:
        """Visits a body that a parameter cannot leave as a parameter."""
        for arrival in self.visit(body, arriving, private, dataclasses.replace(place, scope=place.path)):
            if arrival is not None:
                self.end(arrival, "it leaves a scan, cond or checkpoint unchanged")

    def scan(self, scan: jaxprs.Scan, operands: list[_Arrival | None], private: Sequence[bool], place: Place) -> None:
        arriving: list[_Arrival | None] = []
        for position, arrival in enumerate(operands):
            entering = None
            if arrival is not None and position < scan.num_consts:
                loop = Loop(place.path, scan.length, is_stacked=False)
                entering = dataclasses.replace(arrival, loops=(*arrival.loops, loop), copy_is_settled=True)
            elif arrival is not None and position < scan.num_leading:
                self.end(arrival, "it is carried through a scan")
            elif arrival is not None:
                loop = Loop(place.path, scan.length, is_stacked=True)
                entering = dataclasses.replace(arrival, view=arrival.view.scanned(), loops=(*arrival.loops, loop))
            arriving.append(entering)
        self.enclosed(scan.body, arriving, private, place)


def _recognize(eqn: jaxprs.Equation, operand: int, arrival: _Arrival, place: Place, *, is_alone: bool) -> Use | str:
    name = eqn.primitive.name
    if not is_alone:
        return f"it meets another parameter in `{name}`"
    view, axes = arrival.view.base()
    other = 1 - operand
    if name == "dynamic_slice" and operand == 0:
        found = factors.row(eqn, axes, view.shape)
        if isinstance(found, str):
            return found
        factoring, other = found
    elif name == "dot_general":
        factoring = factors.dense(eqn, operand, axes, view.shape)
    elif name == "gather" and operand == 0:
        factoring = factors.embedding(eqn, axes, view.shape)
    elif name == "conv_general_dilated" and operand == 1:
        factoring = factors.conv(eqn, axes, view.shape)
    else:
        apart = ", which runs one example after the other" if jaxprs.sees_a_batch(eqn) else ""
        return f"it enters `{name}`{apart}"
    if isinstance(factoring, str):
        return factoring
    return Use(place, arrival.loops, view, factoring, operand, other, eqn)


def _settled(arrival: _Arrival | None) -> _Arrival | None:
    return None if arrival is None else dataclasses.replace(arrival, copy_is_settled=True)


def _moved(arrival: _Arrival, op: ViewOp | None, shape: tuple[int, ...]) -> _Arrival | None:
    view = arrival.view if op is None else View(arrival.view.leaf, (*arrival.view.ops, op), shape)
    return dataclasses.replace(arrival, view=view)


def carries_no_gradient(eqn: jaxprs.Equation) -> bool:
    """Whether no gradient flows back through an equation: it stops it, or returns no real numbers."""
    if eqn.primitive.name == "stop_gradient":
        return True
    return not any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)


def find_uses(traced: jaxprs.Traced, shapes: Sequence[tuple[int, ...]]) -> list[LeafUses]:
    """How `fun(params, example)` uses each leaf of its parameters.

    Args:
        traced: The function; its first output is the loss.
        shapes: Shape of each leaf.
    """
    finder = _Finder()
    params = [_Arrival(View(leaf, (), shape), (), None, False) for leaf, shape in enumerate(shapes)]
    rest = [None] * (len(traced.body.invars) - len(shapes))
    # A site or a copy returns one value for each example, so whatever depends on a parameter counts as private too.
    outputs = finder.visit(traced.body, [*params, *rest], [True] * len(traced.body.invars), Place(()))
    if outputs[0] is not None:
        finder.end(outputs[0], "it is the loss itself")
    return [_conclude(finder, leaf) for leaf in range(len(shapes))]


def _conclude(finder: _Finder, leaf: int) -> LeafUses:
    refused, uses = finder.refused.get(leaf), tuple(finder.uses.get(leaf, ()))
    if refused:
        return LeafUses("copy", (), finder.copies[leaf], "; ".join(dict.fromkeys(refused)))
    if not uses:
        return LeafUses("unused", (), None, "no gradient reaches it")
    if all(loop.is_stacked for use in uses for loop in use.loops) and all(
        are_disjoint(a.view, b.view) or _are_exclusive(a.place, b.place) for a, b in itertools.combinations(uses, 2)
    ):
        return LeafUses(uses[0].factoring.kind, uses, None, _describe(uses))
    aligned = _aligned(uses)
    if isinstance(aligned, str):
        return LeafUses("copy", (), finder.copies[leaf], aligned)
    return LeafUses("joint", aligned, None, f"several uses of the same entries: {_describe(uses)}")


def _describe(uses: Sequence[Use]) -> str:
    counts = collections.Counter(use.factoring.kind for use in uses)
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in counts.items())


def _are_exclusive(a: Place, b: Place) -> bool:
    """Whether two places lie in different branches of one cond, so that one example runs at most one of them."""
    there = dict(a.choices)
    return any(there.get(cond, number) != number for cond, number in b.choices)


def _aligned(uses: Sequence[Use]) -> tuple[Use, ...] | str:
    """The uses with the same indices on the left, so that their tokens stack; or why they have none."""
    leader = next((use for use in uses if use.factoring.has_ids), uses[0])  # ids stand on the left
    h, i, j = leader.factoring.axes
    aligned = []
    for use in uses:
        if use.view.ops != leader.view.ops:
            return "several uses, of different parts or shapes of it"
        if use.factoring.axes != (h, i, j) and not use.factoring.has_ids:
            use = dataclasses.replace(use, factoring=use.factoring.swapped())
        if use.factoring.axes != (h, i, j):
            return "several uses, whose gradients factor differently"
        aligned.append(use)
    return tuple(aligned)
