"""Views: the rearrangements through which a parameter travels from the top of the function to where it is used.

Each entry of a view is one entry of the parameter, so the gradient with respect to a view, put back in place, is the
gradient with respect to the parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.gradients import jaxprs

SCAN_SLICE = "scan_slice"


@dataclasses.dataclass(frozen=True)
class ViewOp:
    """One rearrangement.

    Attributes:
        key: Equal for equal rearrangements.
        in_shape: Shape of what it rearranges; for the slice of a scan, with the scanned axis.
        apply: The rearrangement, in any dtype; None for the slice of a scan.
        box: For a static slice, the half-open range of each axis; else None.
    """

    key: Hashable
    in_shape: tuple[int, ...]
    apply: Callable[[jax.Array], jax.Array] | None = dataclasses.field(compare=False)
    box: tuple[tuple[int, int], ...] | None = None

    @property
    def is_scan_slice(self) -> bool:
        return self.apply is None


@dataclasses.dataclass(frozen=True)
class View:
    """A rearrangement of one parameter leaf.

    Attributes:
        leaf: Index of the leaf.
        ops: The rearrangements, in order; casts are left out, since gradients are put back in float32.
        shape: Its shape.
    """

    leaf: int
    ops: tuple[ViewOp, ...]
    shape: tuple[int, ...]

    def scanned(self) -> View:
        """The slice that one iteration of a scan sees."""
        op = ViewOp((SCAN_SLICE, self.shape), self.shape, None)
        return View(self.leaf, (*self.ops, op), self.shape[1:])

    @property
    def num_stacked(self) -> int:
        return sum(op.is_scan_slice for op in self.ops)

    def base(self) -> tuple[View, tuple[int, ...]]:
        """The view before its last transpositions, and the axis of that base which each axis of the view is."""
        axes, ops, shape = tuple(range(len(self.shape))), self.ops, self.shape
        while ops and isinstance(ops[-1].key, tuple) and ops[-1].key[0] == "transpose":
            permutation: Any = ops[-1].key[1]
            axes = tuple(permutation[axis] for axis in axes)
            shape, ops = ops[-1].in_shape, ops[:-1]
        return View(self.leaf, ops, shape), axes

    def put_back(self, value: jax.Array) -> jax.Array:
        """The transpose of the view: `[*stacked, *shape]` to the shape of the leaf, zero where the view does not reach."""
        depth = self.num_stacked
        for op in reversed(self.ops):
            if op.apply is None:
                depth -= 1
                continue
            back = _transpose_of(op.apply, op.in_shape, value.dtype)
            for _ in range(depth):
                back = jax.vmap(back)
            value = back(value)
        return value


def _transpose_of(apply: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: Any) -> Any:
    transposed = jax.linear_transpose(apply, jax.ShapeDtypeStruct(shape, dtype))
    return lambda value: transposed(value)[0]


def are_disjoint(first: View, second: View) -> bool:
    """Whether two views of one leaf are known to share no entry: they part at two static slices that do not overlap."""
    for a, b in zip(first.ops, second.ops, strict=False):
        if a == b:
            continue
        if a.box is None or b.box is None or a.in_shape != b.in_shape:
            return False
        return any(
            stop <= start_b or stop_b <= start for (start, stop), (start_b, stop_b) in zip(a.box, b.box, strict=True)
        )
    return False


def view_ops(eqn: jaxprs.Equation) -> list[ViewOp | None] | None:
    """How each output of an equation rearranges its first operand; None if the equation is no rearrangement.

    An entry is None where the output is the operand itself, apart from its dtype.
    """
    name, params = eqn.primitive.name, eqn.params
    in_shape = tuple(eqn.invars[0].aval.shape)
    out_shape = tuple(eqn.outvars[0].aval.shape)
    if name in ("convert_element_type", "copy", "copy_p"):
        return [None] if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating) else None
    if name == "transpose":
        permutation = tuple(params["permutation"])
        return [ViewOp(("transpose", permutation), in_shape, lambda x: lax.transpose(x, permutation))]
    same_order = (name == "reshape" and len(eqn.invars) == 1 and params.get("dimensions") is None) or name in (
        "squeeze",
        "expand_dims",
    )
    if not same_order and name == "broadcast_in_dim" and len(eqn.invars) == 1:
        same_order = math.prod(in_shape) == math.prod(out_shape)  # it only adds axes of size one
    if same_order:
        if in_shape == out_shape:
            return [None]
        return [ViewOp(("reshape", in_shape, out_shape), in_shape, lambda x: lax.reshape(x, out_shape))]
    if name == "rev":
        dimensions = tuple(params["dimensions"])
        return [ViewOp(("rev", dimensions), in_shape, lambda x: lax.rev(x, dimensions))]
    if name == "slice":
        strides = params["strides"]
        return [_slice(in_shape, params["start_indices"], params["limit_indices"], strides)]
    if name == "split":
        axis, start, out = params["axis"], 0, []
        for size in params["sizes"]:
            starts, limits = [0] * len(in_shape), list(in_shape)
            starts[axis], limits[axis] = start, start + int(size)
            out.append(_slice(in_shape, starts, limits, None))
            start += int(size)
        return out
    return None


def _slice(in_shape: tuple[int, ...], starts: Any, limits: Any, strides: Any) -> ViewOp | None:
    starts, limits = tuple(map(int, starts)), tuple(map(int, limits))
    strides = (1,) * len(starts) if strides is None else tuple(map(int, strides))
    whole = (starts, limits) == ((0,) * len(in_shape), in_shape)
    if whole and set(strides) <= {1}:
        return None
    box = tuple(zip(starts, limits, strict=True))
    return ViewOp(("slice", box, strides), in_shape, lambda x: lax.slice(x, starts, limits, strides), box)
