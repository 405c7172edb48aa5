"""The only reader of JAX's jaxprs: what differs between JAX versions ends here, and is tested on both ends.

A function becomes a list of equations; an equation may hold inner jaxprs. Everything else of this package sees equations
through the names below, and an equation that none of them recognizes is opaque: parameters that enter it take the route
that is always exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.extend import core as jex

Var = Any
Equation = Any

# Calls whose body is simply the computation: walked in place. `pjit` and `core_call` are names of older versions.
_INLINE = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_REMAT = ("remat2", "checkpoint", "remat")


@dataclasses.dataclass(frozen=True)
class Body:
    """A jaxpr with the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any]

    @staticmethod
    def of(jaxpr: Any) -> Body:
        # JAX 0.10 wraps an inner jaxpr and its constants in a ClosedJaxpr; later versions let the jaxpr carry them.
        if isinstance(jaxpr, jex.ClosedJaxpr):
            return Body(jaxpr.jaxpr, jaxpr.consts)
        return Body(jaxpr, getattr(jaxpr, "consts", ()))

    @property
    def invars(self) -> Sequence[Var]:
        return self.jaxpr.invars

    @property
    def outvars(self) -> Sequence[Var]:
        return self.jaxpr.outvars

    @property
    def equations(self) -> Sequence[Equation]:
        return self.jaxpr.eqns


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of (params, example) as a jaxpr, and the pytree of its output."""

    body: Body
    out_tree: Any


def trace(fun: Callable[..., Any], params: Any, example: Any) -> Traced:
    """Traces `fun(params, example)` at the shapes of its arguments, which may be `jax.ShapeDtypeStruct`s."""
    closed, out_shape = jax.make_jaxpr(fun, return_shape=True)(params, example)
    return Traced(Body.of(closed), tree_util.tree_structure(out_shape))


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def inlined(eqn: Equation) -> Body | None:
    """The body of a call that only groups equations (`jit`), else None."""
    name = _INLINE.get(eqn.primitive.name)
    return None if name is None or name not in eqn.params else Body.of(eqn.params[name])


def rematerialized(eqn: Equation) -> tuple[Body, dict[str, Any]] | None:
    """The body of a `jax.checkpoint` and the keyword arguments that make another like it, else None."""
    if eqn.primitive.name not in _REMAT or "jaxpr" not in eqn.params:
        return None
    options = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
    return Body.of(eqn.params["jaxpr"]), options


def branches(eqn: Equation) -> Sequence[Body] | None:
    """The branches of a `lax.cond` or `lax.switch`, chosen by its first operand, else None."""
    return [Body.of(branch) for branch in eqn.params["branches"]] if eqn.primitive.name == "cond" else None


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `lax.scan`: its operands and body arguments are constants, then carry, then slices."""

    body: Body
    num_consts: int
    num_carry: int
    length: int
    options: dict[str, Any]

    @property
    def num_leading(self) -> int:
        return self.num_consts + self.num_carry

    def settle(self, operands: Sequence[bool]) -> list[bool]:
        """Which arguments of the body may depend on the operands marked True, in any iteration."""
        marks = list(operands)
        while True:
            carried = depends(self.body, marks)[1][: self.num_carry]
            now = [a or b for a, b in zip(marks[self.num_consts : self.num_leading], carried, strict=True)]
            if now == marks[self.num_consts : self.num_leading]:
                return marks
            marks[self.num_consts : self.num_leading] = now


def scan(eqn: Equation) -> Scan | None:
    """The parts of a `lax.scan`, else None."""
    if eqn.primitive.name != "scan":
        return None
    params = eqn.params
    if "num_consts" in params:  # JAX 0.10
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.11: a flat tree of the three groups
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    options = {"reverse": params["reverse"], "unroll": params["unroll"]}
    return Scan(Body.of(params["jaxpr"]), num_consts, num_carry, params["length"], options)


def contains(body: Body, primitive: str) -> bool:
    """Whether a body, or any jaxpr inside it, has an equation of a primitive."""
    return any(
        eqn.primitive.name == primitive or any(contains(inner, primitive) for inner in _all_bodies(eqn))
        for eqn in body.equations
    )


def has_narrow_floats(body: Body) -> bool:
    """Whether a body, or any jaxpr inside it, holds a floating-point value narrower than float32."""

    def is_narrow(atom: Any) -> bool:
        dtype = getattr(atom.aval, "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4

    return any(map(is_narrow, body.invars)) or any(
        any(map(is_narrow, (*eqn.invars, *eqn.outvars))) or any(map(has_narrow_floats, _all_bodies(eqn)))
        for eqn in body.equations
    )


def _all_bodies(eqn: Equation) -> list[Body]:
    values = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [Body.of(value) for value in values if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]


def convolves_with(eqn: Equation, operands: Sequence[bool]) -> bool:
    """Whether an equation is, or holds, a convolution whose kernel may depend on the operands marked True."""
    if eqn.primitive.name == "conv_general_dilated":
        return operands[1]
    inner, loop = inlined(eqn) or (rematerialized(eqn) or (None,))[0], scan(eqn)
    if inner is not None:
        parts = [(inner, list(operands))]
    elif loop is not None:
        parts = [(loop.body, loop.settle(operands))]
    else:
        parts = [(body, [any(operands)] * len(body.invars)) for body in _all_bodies(eqn)]
    for body, arguments in parts:
        marks, _ = depends(body, arguments)
        for inner_eqn in body.equations:
            marked = [not is_literal(atom) and marks.get(atom, False) for atom in inner_eqn.invars]
            if convolves_with(inner_eqn, marked):
                return True
    return False


def depends(body: Body, arguments: Sequence[bool]) -> tuple[dict[Var, bool], list[bool]]:
    """Which variables of a body, and which of its outputs, may depend on the arguments marked True."""
    marks: dict[Var, bool] = dict(zip(body.invars, arguments, strict=True))

    def read(atom: Any) -> bool:
        return not is_literal(atom) and marks.get(atom, False)

    for eqn in body.equations:
        marks.update(zip(eqn.outvars, _outputs_depend(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return marks, [read(atom) for atom in body.outvars]


def _outputs_depend(eqn: Equation, operands: list[bool]) -> list[bool]:
    inner = inlined(eqn) or (rematerialized(eqn) or (None,))[0]
    if inner is not None:
        return depends(inner, operands)[1]
    loop = scan(eqn)
    if loop is not None:
        return depends(loop.body, loop.settle(operands))[1]
    return [any(operands)] * len(eqn.outvars)


def evaluate(
    body: Body, arguments: Sequence[Any], equation: Callable[[Equation, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Runs a body, equation by equation: `equation(eqn, operands)` gives what the outputs of each become."""
    env: dict[Any, Any] = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    env.update(zip(body.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return literal(atom) if is_literal(atom) else env[atom]

    for eqn in body.equations:
        env.update(zip(eqn.outvars, equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in body.outvars]


def literal(atom: Any) -> jax.Array:
    """The value of a literal, in its dtype."""
    return jnp.asarray(atom.val, atom.aval.dtype)


def evaluate_equation(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Runs one equation as it stands."""
    # Whatever the user's arithmetic promoted is explicit in the equation already.
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
