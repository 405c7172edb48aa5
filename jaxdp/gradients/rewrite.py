"""Evaluates a traced function with every site replaced.

Parameters travel as `ParamRef`s, which only a view, a call or a site can take apart. A parameter that reached any other
equation would lose its gradient without a word, so that is an error here, whatever the analysis concluded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp._materialize import materialize_one
from jaxdp.gradients import jaxprs
from jaxdp.gradients.sites import Key, Site, Slot, Task, one_by_one, run_site, slots_below
from jaxdp.gradients.uses import Loop, Path, carries_no_gradient
from jaxdp.gradients.views import view_ops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParamRef:
    """A view of a parameter, on its way to a site."""

    value: jax.Array


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What each site does.

    Attributes:
        uses: The site at an equation, by the position of the equation; None where nothing is to be reported.
        copies: The site that copies a variable, by the position of its body and the variable.
        tasks: What is reported, by the key of the slot that it is reported to.
        groups: The key of the slot of each site: its own, or that of the sites that finish together.
        members: The sites that report to a slot, by its key.
        apart: Identities of the equations that `jax.vmap` may not have as they stand (`jaxprs.Couplings`).
    """

    uses: Mapping[Path, Site | None]
    copies: Mapping[tuple[Path, Any], Site]
    tasks: Mapping[Key, Task]
    groups: Mapping[Key, Key]
    members: Mapping[Key, Sequence[Site]]
    apart: frozenset[int] = frozenset()


@dataclasses.dataclass
class _Pending:
    """A parameter that is copied when something reads it."""

    site: Site
    value: jax.Array


class _Scope:
    """The sites of one scan body, branch or checkpoint as they run: who has yet to join which group."""

    def __init__(self, assignment: Assignment, slots: Mapping[Key, Slot]):
        self.assignment, self.slots = assignment, slots
        self.tokens: dict[Key, Any] = {}
        self.awaited: dict[Key, dict[Key, Site]] = {}
        self._materialized: dict[int, tuple[Any, jax.Array]] = {}

    def materialized(self, x: Any) -> Any:
        """An operand of a site behind a wall (S4e), the same one for all sites that read it."""
        if id(x) not in self._materialized:
            self._materialized[id(x)] = (x, materialize_one(x))  # x is kept, so that no other has its id
        return self._materialized[id(x)][1]

    def run(self, site: Site, x: Any, w: jax.Array) -> jax.Array:
        group = self.assignment.groups[site.key]
        is_first = group not in self.awaited
        waiting = self.awaited.setdefault(group, {member.key: member for member in self.assignment.members[group]})
        del waiting[site.key]
        slot = self.slots[group] if is_first else None
        out, token = run_site(
            site,
            x,
            w,
            task=self.assignment.tasks[group] if is_first else None,
            slot=slot,
            token=self.tokens.get(group),
            awaited=waiting,
        )
        self.tokens[group] = token
        return out


def evaluate(
    traced: jaxprs.Traced, assignment: Assignment, params: Sequence[jax.Array], example: Any, slots: Mapping[Key, Slot]
) -> list[jax.Array]:
    """The outputs of the function for one example, with the sites of `assignment` in place.

    Args:
        traced: The function.
        assignment: The sites.
        params: The leaves of the parameters.
        example: One example.
        slots: The slot of each task.
    """
    arguments = [*(ParamRef(jnp.asarray(leaf)) for leaf in params), *jax.tree.leaves(example)]
    batched = [True] * len(arguments)  # as in `find_uses`
    assignment = dataclasses.replace(assignment, apart=traced.couplings.apart)
    outputs = _run(traced.body, arguments, batched, (), _Scope(assignment, slots))
    return _plain(outputs)


def evaluate_alone(traced: jaxprs.Traced, apart: frozenset[int], *arguments: Any) -> Any:
    """The output of a function that is not mapped, without sites, and without `custom_vmap`, which JAX cannot linearize.

    Args:
        traced: The function.
        apart: As of `jaxprs.Couplings`.
        arguments: Its arguments.
    """
    assignment = Assignment({}, {}, {}, {}, {}, apart)
    arguments = tuple(jax.tree.leaves(arguments))
    outputs = _run(traced.body, arguments, [False] * len(arguments), (), _Scope(assignment, {}))
    return jax.tree.unflatten(traced.out_tree, outputs)


def _run(body: jaxprs.Body, arguments: Sequence[Any], batched: Sequence[bool], path: Path, scope: _Scope) -> list[Any]:
    """Evaluates a body; `batched` marks the arguments that may differ between examples."""
    env: dict[Any, Any] = {}
    is_batched, _ = jaxprs.depends(body, batched)

    def write(var: Any, value: Any) -> None:
        site = scope.assignment.copies.get((path, var)) if isinstance(value, ParamRef) else None
        env[var] = value if site is None else _Pending(site, value.value)

    def read(atom: Any) -> Any:
        if jaxprs.is_literal(atom):
            return jnp.asarray(atom.val, atom.aval.dtype)
        value = env[atom]
        if isinstance(value, _Pending):
            # Copied just before its first use, so that the backward pass reaches the copy right after that use.
            value = env[atom] = scope.run(value.site, None, value.value)
        return value

    for var, value in zip(body.jaxpr.constvars, body.consts, strict=True):
        env[var] = value
    for var, value in zip(body.invars, arguments, strict=True):
        write(var, value)
    for index, eqn in enumerate(body.equations):
        site = scope.assignment.uses.get((*path, index))
        if site is not None and not jaxprs.is_literal(x := eqn.invars[site.other]):
            env[x] = scope.materialized(read(x))
        operands = [read(atom) for atom in eqn.invars]
        batched = [not jaxprs.is_literal(atom) and is_batched.get(atom, False) for atom in eqn.invars]
        for var, value in zip(eqn.outvars, _equation(eqn, operands, batched, (*path, index), scope), strict=True):
            write(var, value)
    return [read(atom) for atom in body.outvars]


def _plain(values: Sequence[Any]) -> list[Any]:
    return [value.value if isinstance(value, ParamRef) else value for value in values]


def _equation(eqn: jaxprs.Equation, operands: list[Any], batched: list[bool], path: Path, scope: _Scope) -> list[Any]:
    refs = [isinstance(operand, ParamRef) for operand in operands]
    is_apart = id(eqn) in scope.assignment.apart
    if not (any(refs) or is_apart) or carries_no_gradient(eqn):
        return _opaque(eqn, _plain(operands), batched, is_apart=is_apart)
    body = jaxprs.inlined(eqn)
    if body is not None:
        return _run(body, operands, batched, path, scope)
    rematerialized = jaxprs.rematerialized(eqn)
    if rematerialized is not None:
        return _rematerialized(*rematerialized, operands, batched, path, scope)
    branches = jaxprs.branches(eqn)
    if branches is not None:
        return _cond(branches, operands, batched, path, scope)
    scan = jaxprs.scan(eqn)
    if scan is not None:
        return _scan(scan, operands, batched, path, scope)
    if path in scope.assignment.uses:
        site = scope.assignment.uses[path]
        if site is None:
            return jaxprs.evaluate_equation(eqn, _plain(operands))
        return [scope.run(site, operands[site.other], operands[site.operand].value)]
    if sum(refs) == 1 and refs[0] and view_ops(eqn) is not None:
        return [ParamRef(value) for value in jaxprs.evaluate_equation(eqn, _plain(operands))]
    if not any(refs):
        return _opaque(eqn, operands, batched, is_apart=True)
    raise AssertionError(f"a parameter reached `{eqn.primitive.name}` without a route; please report this function.")


def _opaque(eqn: jaxprs.Equation, operands: list[Any], batched: list[bool], *, is_apart: bool) -> list[Any]:
    def run(*operands: Any) -> list[Any]:
        return jaxprs.evaluate_equation(eqn, operands)

    # With a kernel for each example XLA may put zeros between the examples and multiply: a NaN would spread (S3, S9).
    is_apart = is_apart or jaxprs.convolves_with(eqn, batched)
    return one_by_one(run)(*operands) if is_apart and any(batched) else run(*operands)


def _rematerialized(
    body: jaxprs.Body,
    options: dict[str, Any],
    operands: list[Any],
    batched: list[bool],
    path: Path,
    scope: _Scope,
) -> list[Any]:
    def inside(operands: list[Any], slots: dict[Key, Slot]) -> list[Any]:
        return _plain(_run(body, operands, batched, path, _Scope(scope.assignment, slots)))

    return jax.checkpoint(inside, **options)(operands, slots_below(scope.slots, path))


def _cond(
    branches: Sequence[jaxprs.Body], operands: list[Any], batched: list[bool], path: Path, scope: _Scope
) -> list[Any]:
    def inside(number: int, body: jaxprs.Body) -> Any:
        place = (*path, number)

        def branch(operands: list[Any], slots: dict[Key, Slot]) -> list[Any]:
            below = _Scope(scope.assignment, slots_below(slots, place))
            return _plain(_run(body, operands, batched[1:], place, below))

        return branch

    index, *rest = operands
    chosen = [inside(number, body) for number, body in enumerate(branches)]
    return lax.switch(index, chosen, rest, slots_below(scope.slots, path))


def _scan(scan: jaxprs.Scan, operands: list[Any], batched: list[bool], path: Path, scope: _Scope) -> list[Any]:
    consts, carry = operands[: scan.num_consts], operands[scan.num_consts : scan.num_leading]
    settled = scan.settle(batched)
    below = slots_below(scope.slots, path)
    # A slot's rows have one entry for each iteration; its totals only if each iteration has entries of its own.
    stacked = {key: _loop_of(scope.assignment, key, path).is_stacked for key in below}
    sliced = {key: slot if stacked[key] else slot.with_totals_of(None) for key, slot in below.items()}

    def inside(carry: list[Any], xs: Any) -> tuple[list[Any], list[Any]]:
        slices, slots = xs
        slots = {key: slot if stacked[key] else slot.with_totals_of(below[key]) for key, slot in slots.items()}
        arguments = [*consts, *carry, *slices]
        out = _plain(_run(scan.body, arguments, settled, path, _Scope(scope.assignment, slots)))
        return out[: scan.num_carry], out[scan.num_carry :]

    xs = (operands[scan.num_leading :], sliced)
    carry, ys = lax.scan(inside, carry, xs, length=scan.length, **scan.options)
    return [*carry, *ys]


def _loop_of(assignment: Assignment, key: Key, path: Path) -> Loop:
    return next(loop for loop in assignment.members[key][0].loops if loop.path == path)
