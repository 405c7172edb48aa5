"""Sites: the equations whose backward pass reports on per-example gradients instead of forming the parameter's gradient.

A site takes, beside its operands, a *slot*: an argument that its forward pass ignores, and whose cotangent is the report.
So the report travels through scan, checkpoint and cond by JAX's own transposition, stacked where the slot is stacked. What
is reported, and from which numbers, is a `Task`. Several sites of one scope may finish together: each passes what its
gradient is made of to the site before it, as the cotangent of a *token*, and the first one of the forward pass, which the
backward pass reaches last, reports for all (the one-backward per-layer scheme of arXiv 2212.01539).

The batched operation is a `custom_vjp` behind a `custom_vmap`: the function is rewritten for one example, and `jax.vmap`
carries it over the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jaxdp._materialize import materialize
from jaxdp.gradients import jaxprs
from jaxdp.gradients.factors import Factoring, Payload
from jaxdp.gradients.kernels import XLA, Kernels
from jaxdp.gradients.norms import gradient_of, rows_by_token
from jaxdp.gradients.uses import CopyPoint, Loop, Path, Use
from jaxdp.gradients.views import View

#: A site, or a group of sites, by its position.
Key: TypeAlias = tuple[Path, str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What sites report, as the cotangent of arrays of the same shapes.

    Attributes:
        rows: Arrays with one entry for each example, `[*loops, B, ...]`.
        totals: Arrays without a batch axis, `[*stacked loops, ...]`.
    """

    rows: Any
    totals: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """The argument of a site through which it reports.

    Attributes:
        report: Zeros that nothing reads: their cotangent is the report.
        given: What the task reads, in the same two kinds.
    """

    report: Report
    given: Report

    def with_totals_of(self, other: Slot | None) -> Slot:
        """This slot with the totals of another one; without totals for None."""

        def replaced(here: Report, there: Report | None) -> Report:
            return Report(here.rows, None if there is None else there.totals)

        return Slot(
            replaced(self.report, other and other.report),
            replaced(self.given, other and other.given),
        )


NOTHING = Report(None, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One equation with a parameter in it, or the point where a parameter is copied for each example.

    Attributes:
        key: Its identity.
        leaf: The parameter.
        scope: As of a place.
        loops: The scans around it.
        view: The view that its gradient is of.
        factoring: How the gradient factors; None for a copy.
        spills: Whether its per-example gradient is formed rather than its factors kept.
        is_alone: Whether its norm is its own; False for a use that has a joint norm with others.
        payload: Shapes of what it passes on, of one example.
        equation: The equation; None for a copy.
        operand: Which operand of it the parameter is.
        other: Which operand of it meets the parameter.
        copied_var: The variable that a copy copies.
        is_rematerialized: Whether it is an equation inside a checkpoint.
        kernels: What takes its norm and its sum.
    """

    key: Key
    leaf: int
    scope: Path
    loops: tuple[Loop, ...]
    view: View
    factoring: Factoring | None
    spills: bool
    payload: Mapping[str, jax.ShapeDtypeStruct]
    equation: jaxprs.Equation | None
    operand: int
    other: int
    copied_var: Any = None
    is_rematerialized: bool = False
    kernels: Kernels = XLA
    is_alone: bool = True

    @property
    def layer(self) -> int | None:
        """Which slice along the leading axis of the leaf it lies in, if its view starts by taking a single one."""
        box = self.view.ops[0].box if self.view.ops else None
        return box[0][0] if box and box[0][1] - box[0][0] == 1 else None

    @property
    def scans_layers(self) -> bool:
        """Whether its outermost stacked loop runs along the leading axis of the leaf."""
        return bool(self.view.ops) and self.view.ops[0].is_scan_slice

    @property
    def stacked_lengths(self) -> tuple[int, ...]:
        """Iterations of each stacked loop around it, outermost first."""
        return tuple(loop.length for loop in self.loops if loop.is_stacked)

    @property
    def total_shape(self) -> tuple[int, ...]:
        """Shape of its sum over the examples."""
        return self.factoring.sizes if self.factoring is not None else self.view.shape

    @jax.named_scope("jaxdp_sum")
    def to_leaf(self, total: jax.Array) -> jax.Array:
        """A sum `[*stacked, *total_shape]` in the shape of the leaf."""
        if self.factoring is not None:
            back = self.factoring.to_weight
            for _ in self.stacked_lengths:
                back = jax.vmap(back)
            total = back(total)
        return self.view.put_back(total)


def site_of_use(use: Use, leaf: int, *, spills: bool, is_alone: bool) -> Site:
    eqn = use.equation
    x, out = eqn.invars[use.other].aval, eqn.outvars[0].aval
    batched = [jax.ShapeDtypeStruct((1, *aval.shape), aval.dtype) for aval in (x, out)]

    def payload(x: jax.Array, g: jax.Array) -> Payload:
        return _payload(use.factoring, spills, is_alone, x, g)

    shapes = _without_batch(jax.eval_shape(payload, *batched))
    return Site(
        (use.place.path, "use"),
        leaf,
        use.place.scope,
        use.loops,
        use.view,
        use.factoring,
        spills,
        shapes,
        eqn,
        use.operand,
        use.other,
        is_rematerialized=use.place.is_rematerialized,
        is_alone=is_alone,
    )


def site_of_copy(copy: CopyPoint, leaf: int) -> Site:
    shapes = {"gradient": jax.ShapeDtypeStruct(copy.view.shape, copy.dtype)}
    return Site(
        (copy.path, f"copy {leaf}"), leaf, copy.scope, copy.loops, copy.view, None, True, shapes, None, 0, 0, copy.var
    )


def site_of_leaf(leaf: int, var: Any) -> Site:
    """The copy of a whole leaf, where it enters the function."""
    view = View(leaf, (), tuple(var.aval.shape))
    return site_of_copy(CopyPoint((), (), (), var, view, var.aval.dtype), leaf)


def _without_batch(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _payload(factoring: Factoring | None, spills: bool, is_alone: bool, x: Any, g: jax.Array) -> Payload:
    """What norm and sum are both taken of: x and g moved about, or materialized where it is computed from them (S4e)."""
    if factoring is None:
        return {"gradient": g}
    payload = factoring.factor(x, g)
    if spills:
        return {"gradient": materialize(gradient_of(factoring, payload))}
    if factoring.has_ids and is_alone:
        return {"left": payload["left"], "right": materialize(rows_by_token(**payload)[:, None])}
    return {"left": materialize(payload["left"]), "right": payload["right"]} if factoring.kind == "conv" else payload


class Task(Protocol):
    """From the payloads of the sites that finish together, and what was given, to the report."""

    def __call__(self, payloads: Mapping[Key, Payload], given: Report) -> Report: ...


def zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def run_site(
    site: Site,
    x: Any,
    w: jax.Array,
    *,
    task: Task | None,
    slot: Slot | None,
    token: Any,
    awaited: Mapping[Key, Site],
) -> tuple[jax.Array, Any]:
    """Runs a site on one example.

    Args:
        site: The site.
        x: The other operand of its equation, materialized; None for a copy.
        w: The parameter, or a view of it.
        task: What to report; None if an earlier site of the scope reports for this one.
        slot: The slot of the task.
        token: From the site before it that finishes with it, else None.
        awaited: The later sites of the scope that finish with it.

    Returns:
        The output of the equation, or the copy; and the token for the awaited sites, None if there are none.
    """
    token_shapes = {key: dict(other.payload) for key, other in awaited.items()} or None

    def primal(x: Any, w: jax.Array) -> jax.Array:
        if site.equation is None:
            return w
        # Operands beside the two do not matter: they are the starts of axes that are taken whole.
        operands = [x if k == site.other else jnp.zeros_like(x) for k in range(len(site.equation.invars))]
        operands[site.operand] = w
        return jaxprs.evaluate_equation(site.equation, operands)[0]

    @custom_vmap
    def for_one(x: Any, w: jax.Array, slot: Any, token: Any) -> Any:
        del slot, token
        return primal(x, w), zeros_like(token_shapes)

    @for_one.def_vmap
    def for_batch(size: int, in_batched: Any, x: Any, w: jax.Array, slot: Any, token: Any) -> Any:
        assert not in_batched[1], "a parameter with a batch axis"

        def expand(value: jax.Array, is_batched: bool) -> jax.Array:
            return value if is_batched else jnp.broadcast_to(value, (size, *value.shape))

        x = jax.tree.map(expand, x, in_batched[0])
        if slot is not None:
            slot_batched = in_batched[2]
            assert all(jax.tree.leaves(slot_batched.report.rows)), "rows without a batch axis"
            totals = (slot_batched.report.totals, slot_batched.given.totals)
            assert not any(jax.tree.leaves(totals)), "totals with a batch axis"
            given = Report(jax.tree.map(expand, slot.given.rows, slot_batched.given.rows), slot.given.totals)
            slot = Slot(slot.report, given)
        token = jax.tree.map(expand, token, in_batched[3])
        out = _batched_site(site, primal, task, token_shapes, size)(x, w, slot, token)
        return out, jax.tree.map(lambda _: True, out)

    return for_one(x, w, slot, token)


def _batched_site(
    site: Site, primal: Callable[..., jax.Array], task: Task | None, token_shapes: Any, size: int
) -> Callable[..., Any]:
    def forward(x: Any, w: jax.Array) -> jax.Array:
        if x is None:
            return jnp.broadcast_to(w, (size, *w.shape))
        return jax.vmap(lambda row: primal(row, w))(x)

    def tokens() -> Any:
        return jax.tree.map(lambda shape: jnp.zeros((size, *shape.shape), shape.dtype), token_shapes)

    @jax.custom_vjp
    def operation(x: Any, w: jax.Array, slot: Any, token: Any) -> Any:
        del slot, token
        return forward(x, w), tokens()

    def fwd(x: Any, w: jax.Array, slot: Any, token: Any) -> Any:
        del token
        return (forward(x, w), tokens()), (x, w if x is not None else None, slot and slot.given)

    def bwd(residuals: Any, cotangents: Any) -> Any:
        (x, w, given), (g, later) = residuals, cotangents
        g, dx = materialize(g), None  # S4e; x was materialized where it came from
        if x is not None and jnp.issubdtype(x.dtype, jnp.inexact):
            (dx,) = jax.vjp(lambda rows: forward(rows, w), x)[1](g)
        payloads = {site.key: _payload(site.factoring, site.spills, site.is_alone, x, g), **(later or {})}
        if task is None:
            return dx, None, None, payloads
        return dx, None, Slot(task(payloads, given), NOTHING), None

    operation.defvjp(fwd, bwd)
    return operation


def one_by_one(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """A function that a batch goes through one example after the other, forwards and backwards.

    `jax.custom_batching.sequential_vmap` is not differentiable in reverse inside the other transformations used here.
    """

    @jax.custom_vjp
    def batched(args: tuple[jax.Array, ...]) -> list[jax.Array]:
        return lax.map(lambda row: function(*row), args)

    def fwd(args: tuple[jax.Array, ...]) -> Any:
        return batched(args), args

    def bwd(args: tuple[jax.Array, ...], cotangents: list[jax.Array]) -> Any:
        real = [jnp.issubdtype(arg.dtype, jnp.inexact) for arg in args]

        def pull(row: Any) -> list[jax.Array]:
            values, cotangent = row

            def of_real(*chosen: jax.Array) -> list[jax.Array]:
                rest = iter(chosen)
                return function(*(next(rest) if is_real else v for v, is_real in zip(values, real, strict=True)))

            chosen = [value for value, is_real in zip(values, real, strict=True) if is_real]
            return list(jax.vjp(of_real, *chosen)[1](cotangent))

        pulled = iter(lax.map(pull, (args, cotangents)))
        return (tuple(next(pulled) if is_real else None for is_real in real),)

    batched.defvjp(fwd, bwd)

    @custom_vmap
    def for_one(*args: jax.Array) -> list[jax.Array]:
        return function(*args)

    @for_one.def_vmap
    def for_batch(size: int, in_batched: Any, *args: jax.Array) -> Any:
        whole = tuple(
            arg if is_batched else jnp.broadcast_to(arg, (size, *arg.shape))
            for arg, is_batched in zip(args, in_batched, strict=True)
        )
        out = batched(whole)
        return out, [True] * len(out)

    return for_one


def slots_below(slots: Mapping[Key, Slot], path: Path) -> dict[Key, Slot]:
    """The slots of the sites inside the equation at a position."""
    return {key: slot for key, slot in slots.items() if key[0][: len(path)] == path and len(key[0]) >= len(path)}
