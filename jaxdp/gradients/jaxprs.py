"""The only reader of JAX's jaxprs: what differs between JAX versions ends here, and is tested on both ends.

A function becomes a list of equations; an equation may hold inner jaxprs. Everything else of this package sees equations
through the names below, and an equation that none of them recognizes is opaque: parameters that enter it take the route
that is always exact.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.extend import core as jex
from jax.interpreters import batching

Var = Any
Equation = Any

# Calls whose body is simply the computation: walked in place. `pjit` and `core_call` are names of older versions.
# A `custom_vmap` is its function of one example: the rule, which sees a batch, is not asked (S3).
_INLINE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_vmap_call": "call",
}
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
    """A function, such as one of (params, example), as a jaxpr, and the pytree and the shapes of its output."""

    body: Body
    out_tree: Any
    out: Any = None

    @functools.cached_property
    def couplings(self) -> Couplings:
        """What in it could reach other records when it is mapped over a batch, its gradient included."""
        return find_couplings(self.body, derivative="reverse")


def trace(fun: Callable[..., Any], *arguments: Any) -> Traced:
    """Traces `fun(*arguments)`, as `fun(params, example)`, at the shapes of its arguments; `jax.ShapeDtypeStruct`s will do."""
    closed, out_shape = jax.make_jaxpr(fun, return_shape=True)(*arguments)
    return Traced(Body.of(closed), tree_util.tree_structure(out_shape), out_shape)


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def inlined(eqn: Equation) -> Body | None:
    """The body of a call that only groups equations (`jit`), or that says beside it what a batch is, else None."""
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


def _all_bodies(eqn: Equation) -> list[Body]:
    values = list(eqn.params.values())
    if (
        hi := eqn.params.get("_prim")
    ) is not None:  # JAX 0.12: a primitive that is an object, with what it was traced to
        values += [
            getattr(value, "jaxpr", value) for value in (*vars(hi).values(), *getattr(hi, "params", {}).values())
        ]
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else [value])]
    return [Body.of(value) for value in flat if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]


@dataclasses.dataclass(frozen=True)
class Couplings:
    """What in a function of one example could reach other examples once it is mapped over a batch.

    Attributes:
        apart: Identities (`id`) of the equations that `jax.vmap` may not have as they stand, or that hold such a one. `inlined`,
            `rematerialized`, `branches` and `scan` lead further in; what they do not open runs one example after the other.
        names: What they are, for people.
        collectives: Pairs of a primitive and an axis that is bound outside of the function.
        stateful: Primitives that read what an earlier call left on the host or in a mutable array.
    """

    apart: frozenset[int]
    names: tuple[str, ...]
    collectives: tuple[tuple[str, str], ...]
    stateful: tuple[str, ...]


#: Casts between types of manual axes: values stay as they are. `axis_index` tells a position, which is public.
_NOT_COLLECTIVE = ("pvary", "pcast", "core_pvary", "reshard", "axis_index", "axis_size")
#: What maps a function of the host or of another language without showing it two examples at once.
_MAPPED_ONE_BY_ONE = ("sequential", "sequential_unrolled")


def find_couplings(body: Body, *, derivative: Literal["reverse", "forward"] | None) -> Couplings:
    """Looks for couplings in all that runs: bodies of any depth, and the rules of custom derivatives if there is a derivative.

    Args:
        body: The function.
        derivative: Which derivative is taken of it.
    """
    apart: set[int] = set()
    names: dict[str, None] = {}
    collectives: dict[tuple[str, str], None] = {}
    stateful: dict[str, None] = {}

    def visit(body: Body, bound: frozenset[str], derivative: str | None) -> bool:
        is_apart = False
        for eqn in body.equations:
            collectives.update(dict.fromkeys(_collectives(eqn, bound)))
            if eqn.primitive.name == "io_callback" and (eqn.outvars or eqn.params.get("ordered")):
                stateful["io_callback"] = None
            if eqn.primitive.name == "rng_uniform":  # the device's generator, which no key seeds
                stateful["rng_uniform"] = None
            why = sees_a_batch(eqn)
            if why is not None:
                names[why] = None
            found = why is not None
            inside, bodies = bound | _axes_bound_by(eqn), _all_bodies(eqn)
            is_custom = eqn.primitive.name in _CUSTOM_DERIVATIVES and bool(bodies)
            for inner in bodies:
                found |= visit(inner, inside, None if is_custom else derivative)
            if is_custom and derivative is not None:
                rules = _rules(eqn, derivative)
                # All that runs is there to be seen, or it runs as if it were coupled.
                found |= visit(rules, inside, None) if rules is not None else True
            if found:
                apart.add(id(eqn))
            is_apart |= found
        return is_apart

    visit(body, frozenset(), derivative)
    if any(type(effect).__name__ in ("WriteEffect", "AccumEffect") for effect in body.jaxpr.effects):
        stateful["a mutable array that the loss writes to"] = None
    return Couplings(frozenset(apart), tuple(names), tuple(collectives), tuple(stateful))


_CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "call_hi_primitive")


def sees_a_batch(eqn: Equation) -> str | None:
    """Why `jax.vmap` of an equation may show it two examples at once, or is not defined; None if neither."""
    name = eqn.primitive.name
    if name == "custom_vmap_call":
        return "jax.custom_batching.custom_vmap"
    if "vmap_method" in eqn.params:  # `pure_callback` and `ffi_call`
        vmap_method = eqn.params["vmap_method"]
        return None if vmap_method in _MAPPED_ONE_BY_ONE else f"{name}(vmap_method={vmap_method!r})"
    # `jax.vmap` draws for a whole batch of such keys from the first of them.
    if name == "rng_bit_generator" or any(_is_key_of_a_device_generator(var) for var in (*eqn.invars, *eqn.outvars)):
        return f"{name} with a key of another generator than threefry"
    if name.startswith("ragged_dot"):  # has rules for some of its forms only, and others in its gradient
        return name
    if not eqn.invars or eqn.primitive in batching.fancy_primitive_batchers:  # all rules are in there
        return None
    # What the batching trace maps by itself, and primitives of JAX's newer kind, which have a method for it.
    is_known = name in _CUSTOM_DERIVATIVES or name in _INLINE
    return None if is_known or hasattr(eqn.params.get("_prim"), "batch") else name


def _is_key_of_a_device_generator(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and str(dtype) != "key<fry>"


def _axes_bound_by(eqn: Equation) -> frozenset[str]:
    """Names of the axes that an equation binds for its body: those of `shard_map` and `pmap`."""
    manual = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ()))
    mapped = eqn.params.get("axis_name") if eqn.primitive.name == "xla_pmap" else None
    return frozenset(manual) | (frozenset() if mapped is None else frozenset([mapped]))


def _collectives(eqn: Equation, bound: frozenset[str]) -> list[tuple[str, str]]:
    """The primitive of an equation with each axis by name that it reads across, other than the bound ones."""
    if eqn.primitive.name in _NOT_COLLECTIVE or _all_bodies(eqn):
        return []
    axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    axes = axes if isinstance(axes, tuple | list | set | frozenset) else (axes,)
    # Axes by number are those of the array: what is left of an axis that was bound by `jax.vmap` inside the function.
    names = [axis for axis in axes if axis is not None and not isinstance(axis, numbers.Integral)]
    return [(eqn.primitive.name, str(axis)) for axis in names if axis not in bound]


def _rules(eqn: Equation, derivative: str) -> Body | None:
    """What runs for the derivative of an equation with rules of its own; None if the rules cannot be traced."""
    real = [jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in eqn.invars]

    def differentiated(*operands: Any) -> Any:
        def of_real(*chosen: Any) -> list[Any]:
            rest = iter(chosen)
            values = [next(rest) if is_real else value for value, is_real in zip(operands, real, strict=True)]
            found = evaluate_equation(eqn, values)
            return [value for value in found if jnp.issubdtype(value.dtype, jnp.inexact)]

        chosen = [value for value, is_real in zip(operands, real, strict=True) if is_real]
        if derivative == "forward":
            return jax.jvp(of_real, chosen, [jnp.ones_like(value) for value in chosen])
        values, pull = jax.vjp(of_real, *chosen)
        return values, pull([jnp.ones_like(value) for value in values])

    try:
        operands = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
        return Body.of(jax.make_jaxpr(differentiated)(*operands))
    except Exception:  # whatever a user's rule may raise: the derivative itself will, if it is ever taken
        return None


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
