"""Named checks of values and shapes: every message says what was given and what to do instead."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class BudgetExhaustedError(RuntimeError):
    """A step was asked for beyond the steps that a plan accounts for."""


def real_number(name: str, value: Any) -> float:
    """Returns `value` as a float; refuses NaN, booleans and non-numbers."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}.")
    result = float(value)
    if math.isnan(result):
        raise ValueError(f"{name} is NaN; give a number.")
    return result


def positive(name: str, value: Any, *, allow_infinite: bool = False) -> float:
    result = real_number(name, value)
    if result <= 0 or (math.isinf(result) and not allow_infinite):
        kind = "positive" if allow_infinite else "positive and finite"
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    return result


def nonnegative(name: str, value: Any) -> float:
    result = real_number(name, value)
    if result < 0 or math.isinf(result):
        raise ValueError(f"{name} must be nonnegative and finite, got {value!r}.")
    return result


def probability(name: str, value: Any, *, allow_one: bool = True) -> float:
    """Returns `value` if it lies in (0, 1], or in (0, 1) with `allow_one=False`."""
    result = real_number(name, value)
    if not 0 < result <= 1 or (result == 1 and not allow_one):
        raise ValueError(f"{name} must lie in (0, 1{']' if allow_one else ')'}, got {value!r}.")
    return result


def positive_integer(name: str, value: Any) -> int:
    return _integer_from(name, value, smallest=1)


def nonnegative_integer(name: str, value: Any) -> int:
    return _integer_from(name, value, smallest=0)


def _integer_from(name: str, value: Any, *, smallest: int) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if int(value) < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}.")
    return int(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")
    return value


# A norm below this would drown in the float32 underflow of squared gradient entries (about 1e-19 each, 1e-13 over 1e12
# entries), and a norm above it in their overflow: both would let an example pass unclipped or vanish.
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-9, 1e15


def clip_norm(name: str, value: Any, *, allow_infinite: bool = True) -> float:
    result = positive(name, value, allow_infinite=allow_infinite)
    if not math.isinf(result) and not SMALLEST_CLIP_NORM <= result <= LARGEST_CLIP_NORM:
        raise ValueError(
            f"{name} must lie in [{SMALLEST_CLIP_NORM:g}, {LARGEST_CLIP_NORM:g}], where float32 norms are exact "
            f"enough to bound a sum; got {value!r}. Rescale the loss instead."
        )
    return result


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The entries in which two records differ, as `name: 1 there, 2 here; ...`; empty if there are none."""
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names)


def leaf_name(path: Any) -> str:
    """`jax.tree_util` key path as a readable string: `dense/kernel`; the root of a bare array is `<root>`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def floating_params(params: Any, *, name: str = "params") -> None:
    """Checks that every leaf is a floating-point array, and that there is at least one."""
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(f"{name} has no array leaves: there is nothing to differentiate.")
    for leaf, value in leaves:
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise TypeError(
                f"{name} leaf {leaf!r} is {value!r} of type {type(value).__name__}, not an array; "
                "convert it with jnp.asarray or keep it out of the differentiated pytree."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{name} leaf {leaf!r} has dtype {value.dtype}, which has no real-valued gradient; differentiate the "
                "trainable floating-point leaves only and close over the rest."
            )


def batch_axis(batch: Any, *, name: str = "batch") -> int:
    """Returns the common leading axis size `B` of every leaf of `batch`."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if shapes and all(shapes) and shapes[0][0] > 0 and all(shape[0] == shapes[0][0] for shape in shapes):
        return shapes[0][0]  # without the paths of the leaves: naming them at every step takes longer than the check
    leaves = named_leaves(batch)
    if not leaves:
        raise ValueError(f"{name} has no array leaves, so it has no batch axis.")
    sizes: dict[str, int] = {}
    for leaf, value in leaves:
        shape = np.shape(value)
        if not shape:
            raise ValueError(
                f"{name} leaf {leaf!r} is a scalar, without the leading batch axis [B, ...]; "
                "stack the examples, or add an axis with value[None]."
            )
        sizes[leaf] = shape[0]
    if len(set(sizes.values())) != 1:
        listing = ", ".join(f"{leaf!r}: {size}" for leaf, size in sizes.items())
        raise ValueError(
            f"{name} leaves disagree on the leading batch axis ({listing}); stack the same examples in each."
        )
    raise ValueError(
        f"{name} has a leading axis of size 0; pad it to a fixed size and mark the rows with is_padding_example, as "
        "jaxdp.poisson_batches does for an empty draw."
    )


def padding_mask(mask: Any, batch_axis_size: int) -> jax.Array:
    """Returns `is_padding_example` as a bool array `[B]`; None means that every row is an example."""
    if mask is None:
        return jnp.zeros(batch_axis_size, bool)
    array = mask if isinstance(mask, jax.Array) else jnp.asarray(mask)
    if array.dtype != jnp.bool_:
        raise TypeError(f"is_padding_example must be boolean, True where the row is padding; got dtype {array.dtype}.")
    if array.shape != (batch_axis_size,):
        raise ValueError(
            f"is_padding_example must have shape ({batch_axis_size},), one entry for each row of the batch; got {array.shape}."
        )
    return array


def typed_key(name: str, key: Any) -> jax.Array:
    """Checks for one typed PRNG key; raw uint32 keys and integers are refused."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} must be a typed JAX key, got {type(key).__name__}; make one with jaxdp.secret_key(), which draws "
            "fresh entropy from the operating system."
        )
    if key.shape != ():
        raise ValueError(f"{name} must be a single key, got an array of keys of shape {key.shape}.")
    return key
