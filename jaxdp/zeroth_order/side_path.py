"""A part of the model along a low-rank direction, without a perturbed copy of any matrix (LOZO, EGGROLL).

    x (W + L Rᵀ) = x W + (x L) Rᵀ

The matrices are the same for all directions and both signs, so `jax.vmap` over those makes one product with W of all their
rows, and W itself is read once. The part is traced, and its jaxpr is evaluated with the factors of each matrix travelling
beside it: through casts and transpositions to the products and lookups that read it. A matrix that reaches anything else is
perturbed there, out of place, which is the definition.

The side path is computed in float32 and added before the product is rounded: in bfloat16 a perturbation is not lost in the last
place of a weight.

Sources: LOZO, arXiv 2410.07698; batches of such directions, EGGROLL, arXiv 2511.16652.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp._typing import Params
from jaxdp.gradients import jaxprs
from jaxdp.zeroth_order.directions import Factors


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A matrix and what is added to it, on their way to where they are read."""

    matrix: jax.Array
    move: Factors

    def whole(self) -> jax.Array:
        return (self.matrix.astype(jnp.float32) + self.move.dense()).astype(self.matrix.dtype)


def apply_along(
    part: Callable[[Params, Any], Any], params: Params, direction: Params, scale: jax.Array, stream: Any
) -> Any:
    """`part(params + scale * direction, stream)`.

    Args:
        part: A pure function.
        params: Pytree of arrays.
        direction: The same pytree, where matrices `[m, n]` may be `Factors`; others are added as they are.
        scale: A float32 scalar, which may differ under `jax.vmap`, as the direction may.
        stream: The other argument, a pytree of arrays or None.
    """
    leaves, treedef = jax.tree.flatten(params)
    moves = treedef.flatten_up_to(direction)

    def moved(leaf: Any, move: Any) -> Any:
        if isinstance(move, Factors):
            return _Moved(jnp.asarray(leaf), move.scaled(scale))
        return (leaf.astype(jnp.float32) + scale * move).astype(leaf.dtype)

    closed, shapes = jax.make_jaxpr(part, return_shape=True)(params, stream)
    arguments = [*map(moved, leaves, moves), *jax.tree.leaves(stream)]
    return jax.tree.unflatten(jax.tree.structure(shapes), map(_whole, _run(jaxprs.Body.of(closed), arguments)))


def _run(body: jaxprs.Body, arguments: Sequence[Any]) -> list[Any]:
    return jaxprs.evaluate(body, arguments, _equation)


def _equation(eqn: jaxprs.Equation, operands: list[Any]) -> list[Any]:
    moved = [position for position, operand in enumerate(operands) if isinstance(operand, _Moved)]
    if not moved:
        return jaxprs.evaluate_equation(eqn, operands)
    if (body := jaxprs.inlined(eqn)) is not None:
        return _run(body, operands)
    if (scan := jaxprs.scan(eqn)) is not None:
        return _scan(scan, operands)
    if len(moved) == 1:
        (position,) = moved
        found = _read(eqn, operands, position)
        if found is not None:
            return [found]
    return jaxprs.evaluate_equation(eqn, [_whole(operand) for operand in operands])


def _read(eqn: jaxprs.Equation, operands: list[Any], position: int) -> Any:
    """The output of an equation that reads one moved matrix in a way that needs no copy of it; None for others."""
    name, there = eqn.primitive.name, operands[position]
    if name == "convert_element_type":
        (matrix,) = jaxprs.evaluate_equation(eqn, [there.matrix])
        return _Moved(matrix, there.move) if jnp.issubdtype(matrix.dtype, jnp.floating) else None
    if name == "transpose" and tuple(eqn.params["permutation"]) == (1, 0):
        return _Moved(there.matrix.T, Factors(there.move.right, there.move.left))
    if name == "dot_general":
        return _product(eqn, operands, position)
    if name == "gather" and position == 0:
        return _lookup(eqn, *operands)
    return None


def _product(eqn: jaxprs.Equation, operands: list[Any], position: int) -> jax.Array | None:
    """x W + (x L) Rᵀ for a product over one axis of the matrix; None for others."""
    contracting, batching = eqn.params["dimension_numbers"]
    here, there = contracting[position], contracting[1 - position]
    if len(here) != 1 or batching[position]:
        return None
    moved, x = operands[position], operands[1 - position]
    out = eqn.outvars[0].aval
    near, far = (moved.move.left, moved.move.right) if here[0] == 0 else (moved.move.right, moved.move.left)
    inner = lax.dot_general(
        x.astype(jnp.float32), near, ((there, (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )  # [*free axes of x, r]
    side = lax.dot_general(inner, far, (((inner.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    if position == 0:
        side = jnp.moveaxis(side, -1, 0)
    sides = (moved.matrix, x) if position == 0 else (x, moved.matrix)
    main = lax.dot_general(
        *sides, eqn.params["dimension_numbers"], precision=eqn.params["precision"], preferred_element_type=jnp.float32
    )
    return (main + side).astype(out.dtype)


def _lookup(eqn: jaxprs.Equation, moved: _Moved, ids: jax.Array, *rest: Any) -> jax.Array | None:
    """W[ids] + L[ids] Rᵀ for whole rows; None for others."""
    numbers, sizes, out = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.outvars[0].aval
    rank, width = moved.move.left.shape[-1], moved.matrix.shape[1]
    of_rows = (tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)) == ((0,), (0,))
    if rest or not of_rows or numbers.operand_batching_dims or tuple(sizes) != (1, width):
        return None
    if tuple(numbers.offset_dims) != (len(out.shape) - 1,):
        return None
    (rows,) = jaxprs.evaluate_equation(eqn, [moved.matrix, ids])
    left = lax.gather(moved.move.left, ids, numbers, (1, rank), mode=eqn.params["mode"], fill_value=0)
    side = lax.dot_general(
        left, moved.move.right, (((left.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    return (rows.astype(jnp.float32) + side).astype(out.dtype)


def _scan(scan: jaxprs.Scan, operands: list[Any]) -> list[Any]:
    """A scan whose body may read matrices that are the same in all iterations."""
    consts = operands[: scan.num_consts]
    rest = [_whole(operand) for operand in operands[scan.num_consts :]]

    def inside(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        out = [_whole(value) for value in _run(scan.body, [*consts, *carry, *slices])]
        return out[: scan.num_carry], out[scan.num_carry :]

    carry, stacked = lax.scan(
        inside, rest[: scan.num_carry], rest[scan.num_carry :], length=scan.length, **scan.options
    )
    return [*carry, *stacked]


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, _Moved) else value
