"""A block in stages, of which only one need be on the device: for blocks of which two or three do not fit.

The matrices of a block are used one after the other. The block's function is traced, and its equations are cut where some leaves
have been used for the last time and others have yet to be: each stage is a function of its own leaves and of what the stages
before it computed. Whatever depends on parameters or on the example alone is computed where it is read, so that no stage hands
on a cast of a matrix, or a mask.

A cut moves no equation past another, and directions are by position (S17): a run in stages takes its updates from the same scalars
to the same parameters, bit for bit, as one without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.gradients import jaxprs
from jaxdp.models.trainable import join
from jaxdp.zeroth_order import buckets
from jaxdp.zeroth_order.buckets import Layout, Part

#: A pytree's structure, and the shapes and dtypes of its leaves: hashable.
_Shapes: TypeAlias = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which leaves of a block travel together.

    Attributes:
        groups: The numbers of the leaves of each stage, in the order in which the block uses them.
    """

    groups: tuple[tuple[int, ...], ...]


def split_block(
    model: BlockModel,
    params: BlockParams,
    example: Any,
    *,
    frozen: BlockParams | None = None,
    max_bytes: int | None = None,
) -> Stages:
    """Cuts a block into stages of at most `max_bytes`, where it can be cut.

    Leaves that one equation reads together stay together, and so do those whose uses are interleaved, whatever their size.

    Args:
        model: The loss of one example, in parts.
        params: The trained parameters, arrays or shapes; blocks stacked `[N, ...]`.
        example: One example, arrays or shapes, of any length that the model takes.
        frozen: Frozen parameters that belong to no block, if any, as for `init`.
        max_bytes: Of the parameters of a stage. Default: a quarter more than the largest stage that cannot be cut has, so that its
            bias has no stage of its own.

    Raises:
        ValueError: `frozen` has blocks; they travel whole.
    """
    if frozen is not None and jax.tree.leaves(frozen.blocks):
        raise ValueError(
            "blocks with frozen leaves are not split: stream them whole, or train all leaves of the blocks."
        )
    if max_bytes is not None:
        _validate.positive_integer("max_bytes", max_bytes)
    layout, _ = buckets.layout_of(params.blocks)
    frozen_resident = None if frozen is None else frozen.resident
    hidden = jax.eval_shape(
        lambda resident, frozen, example: model.embed(resident if frozen is None else join(resident, frozen), example),
        params.resident,
        frozen_resident,
        example,
    )
    sizes = [size * jnp.dtype(dtype).itemsize for dtype, size in layout.stored]
    together = _Equations.of(model.block, layout, _shapes_of(hidden), example).inseparable()
    limit = (
        max(sum(sizes[number] for number in group) for group in together) * 5 // 4 if max_bytes is None else max_bytes
    )
    groups: list[list[int]] = [[]]
    for group in together:
        if groups[-1] and sum(sizes[number] for number in groups[-1] + group) > limit:
            groups.append([])
        groups[-1] += group
    return Stages(tuple(tuple(sorted(group)) for group in groups))


def stage(model: BlockModel, part: Part, parts: tuple[Part, ...]) -> BlockModel:
    """The model with one stage of its block in the place of the block; its parameters are the list of the part's leaves."""
    groups = tuple(part.numbers for part in parts)
    return dataclasses.replace(model, block=_Stage(model.block, part.whole, groups, part.position))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Live:
    """What passes from one stage to the next.

    Attributes:
        values: What was computed and will be read.
        hidden: The shapes of what entered the block, from which its equations follow.
    """

    values: list[jax.Array]
    hidden: _Shapes = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One stage of a block, as a function of its leaves. Hashable: equal stages share their compiled programs."""

    block: Callable[[Any, Any, Any], Any]
    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    position: int

    def __call__(self, leaves: list[jax.Array], arrived: Any, example: Any) -> Any:
        is_first, is_last = self.position == 0, self.position == len(self.groups) - 1
        hidden = _shapes_of(arrived) if is_first else arrived.hidden
        equations = _Equations.of(self.block, self.layout, hidden, example)  # batches may differ in shape
        starts = equations.starts(self.groups)
        begin, end = starts[self.position], starts[self.position + 1]

        known = dict(zip(equations.body.jaxpr.constvars, equations.body.consts, strict=True))
        known.update((equations.leaves[n], leaf) for n, leaf in zip(self.groups[self.position], leaves, strict=True))
        known.update(zip(equations.of_example, jax.tree.leaves(example), strict=True))
        values = jax.tree.leaves(arrived) if is_first else arrived.values
        known.update(zip(equations.live(begin), values, strict=True))

        def value(atom: Any) -> Any:
            if jaxprs.is_literal(atom):
                return jaxprs.literal(atom)
            if atom not in known:  # of parameters and the example alone
                evaluate(equations.made_by[atom])
            return known[atom]

        def evaluate(eqn: Any) -> None:
            operands = [value(atom) for atom in eqn.invars]
            known.update(zip(eqn.outvars, jaxprs.evaluate_equation(eqn, operands), strict=True))

        for eqn in equations.moving[begin:end]:
            evaluate(eqn)
        if is_last:
            return equations.out_tree.unflatten([value(atom) for atom in equations.body.outvars])
        return _Live([known[var] for var in equations.live(end)], hidden)


@dataclasses.dataclass(frozen=True)
class _Equations:
    """A traced block.

    Attributes:
        body: Without calls inside it, where they only group equations.
        out_tree: Of the block's output.
        leaves: The variables of its parameters.
        of_hidden: Of what enters.
        of_example: Of the example.
        moving: The equations that depend on what enters, in their order. The others can be evaluated anywhere.
        made_by: The equation of each variable that depends on none of it.
        reads: The leaves that each of the moving equations reads, directly or through others; last those that the outputs do.
    """

    body: jaxprs.Body
    out_tree: Any
    leaves: Sequence[Any]
    of_hidden: Sequence[Any]
    of_example: Sequence[Any]
    moving: list[Any]
    made_by: dict[Any, Any]
    reads: list[frozenset[int]]

    @staticmethod
    def of(block: Callable[[Any, Any, Any], Any], layout: Layout, hidden: _Shapes, example: Any) -> _Equations:
        arguments = (layout.block(), _unflattened(hidden), jax.tree.map(_shape_of, example))
        closed, out = jax.make_jaxpr(block, return_shape=True)(*arguments)
        inlined = jax.make_jaxpr(lambda *values: _inlined(jaxprs.Body.of(closed), values))(*jax.tree.leaves(arguments))
        body = jaxprs.Body.of(inlined)
        first = len(layout.shapes)
        second = first + len(jax.tree.leaves(arguments[1]))
        leaves, of_hidden, of_example = body.invars[:first], body.invars[first:second], body.invars[second:]

        is_moving, _ = jaxprs.depends(body, [first <= i < second for i in range(len(body.invars))])
        needs: dict[Any, frozenset[int]] = {var: frozenset((number,)) for number, var in enumerate(leaves)}
        moving, made_by, reads = [], {}, []

        def needed(atoms: Sequence[Any]) -> frozenset[int]:
            return frozenset().union(*(needs.get(atom, ()) for atom in atoms if not jaxprs.is_literal(atom)))

        for eqn in body.equations:
            if any(is_moving[var] for var in eqn.outvars):
                moving.append(eqn)
                reads.append(needed(eqn.invars))
            else:
                made_by.update((var, eqn) for var in eqn.outvars)
                needs.update((var, needed(eqn.invars)) for var in eqn.outvars)
        reads.append(needed(body.outvars))
        return _Equations(body, jax.tree.structure(out), leaves, of_hidden, of_example, moving, made_by, reads)

    def uses(self) -> list[tuple[int, int]]:
        """The first and the last of the moving equations that each leaf is read by; the first for one that none reads."""
        found = []
        for number in range(len(self.leaves)):
            at = [i for i, read in enumerate(self.reads) if number in read]
            found.append((at[0], at[-1]) if at else (0, 0))
        return found

    def inseparable(self) -> list[list[int]]:
        """The finest groups of leaves between whose uses the block can be cut, in order."""
        uses, groups, end = self.uses(), [], -1
        for number in sorted(range(len(uses)), key=lambda number: uses[number]):
            first, last = uses[number]
            if first > end:
                groups.append([])
            groups[-1].append(number)
            end = max(end, last)
        return groups

    def starts(self, groups: tuple[tuple[int, ...], ...]) -> list[int]:
        """The first moving equation of each stage, and the end: a stage begins where its leaves are first read."""
        uses = self.uses()
        starts = [0, *(min(uses[number][0] for number in group) for group in groups[1:]), len(self.moving)]
        for group, begin, end in zip(groups, starts, [*starts[1:-1], len(self.reads)], strict=False):
            for number in group:
                if not begin <= uses[number][0] <= uses[number][1] < end:
                    raise ValueError(
                        f"leaf {number} of a block is used outside its stage {group}; the stages belong to another model, or the "
                        "block computes otherwise at this length: call split_block with such an example."
                    )
        return starts

    def live(self, begin: int) -> list[Any]:
        """The variables that are known in front of a moving equation, and read there or later."""
        later = {atom for eqn in self.moving[begin:] for atom in eqn.invars if not jaxprs.is_literal(atom)}
        later |= {atom for atom in self.body.outvars if not jaxprs.is_literal(atom)}
        before = [*self.of_hidden, *(var for eqn in self.moving[:begin] for var in eqn.outvars)]
        return before[: len(self.of_hidden)] if begin == 0 else [var for var in before if var in later]


def _inlined(body: jaxprs.Body, arguments: Sequence[Any]) -> list[Any]:
    """Runs a body with what calls group; inside `make_jaxpr` it leaves the equations alone."""

    def equation(eqn: Any, operands: list[Any]) -> list[Any]:
        inner = jaxprs.inlined(eqn) or (jaxprs.rematerialized(eqn) or (None,))[0]
        return jaxprs.evaluate_equation(eqn, operands) if inner is None else _inlined(inner, operands)

    return jaxprs.evaluate(body, arguments, equation)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype)


def _shapes_of(tree: Params) -> _Shapes:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in leaves)


def _unflattened(shapes: _Shapes) -> Any:
    treedef, leaves = shapes
    return treedef.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves])
