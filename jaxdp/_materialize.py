"""One value, many readers: what a norm is taken of, a sum must read from the same buffer (S4e).

XLA may compute the producer of a value once inside each kernel that reads it, and LLVM contracts a product and a sum to one
rounding in some kernels and not in others. Two readers then see two values of one variable: for a record whose gradient
cancels, 0 and rounding noise times the scale of its loss. `materialize` returns the same bits behind a wall that no fusion
crosses, so that all readers behind it load what one computation stored.

The wall, by platform:

- CPU: a `while` loop over the value. Fusion does not enter loops, and XLA neither duplicates nor recomputes one. How often
  it runs is not known to the compiler: never, or twice where the first number is NaN; it negates, which twice is the identity
  on every bit pattern. An optimization barrier is removed before fusion there; a conditional may become a `select`.
- Elsewhere: an optimization barrier, which XLA's GPU and TPU compilers remove only after fusion. A loop would make the
  host wait for its condition.

That both hold for the compiler at hand is not taken on trust: `tests/compiled_program.py` reads compiled programs.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Tree = TypeVar("Tree")

_LARGE = 2**20  # bytes: below, a copy costs less than compiling a loop


def materialize(tree: Tree) -> Tree:
    """The same bits, in buffers that no consumer can recompute.

    **Guarantee**: all that reads the result reads the same floating-point numbers, NaN included, whatever the compiler fuses,
    contracts or carries at excess precision. Derivatives pass through.

    Args:
        tree: Pytree of arrays. What is not floating-point, or has no entries, is returned as it is.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [k for k, leaf in enumerate(leaves) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)]
    with jax.named_scope("jaxdp_wall"):
        for k, leaf in zip(chosen, _materialize_all([leaves[k] for k in chosen]) if chosen else [], strict=True):
            leaves[k] = leaf
    return treedef.unflatten(leaves)


def materialize_one(x: jax.Array) -> jax.Array:
    """`materialize` of what `jax.vmap` maps: one wall around the values of all examples."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x

    @custom_vmap
    def of_one(x: jax.Array) -> jax.Array:
        return materialize(x)

    @of_one.def_vmap
    def of_all(size: int, in_batched: Any, x: jax.Array) -> Any:
        del size
        return materialize(x), in_batched[0]

    return of_one(x)


@jax.custom_jvp
def _materialize_all(arrays: list[jax.Array]) -> list[jax.Array]:
    return lax.platform_dependent(
        arrays, cpu=_behind_a_loop, default=lambda arrays: list(lax.optimization_barrier(arrays))
    )


@_materialize_all.defjvp
def _jvp(primals: Any, tangents: Any) -> Any:
    return _materialize_all(*primals), tangents[0]


def _behind_a_loop(given: list[jax.Array]) -> list[jax.Array]:
    arrays = [
        array.squeeze() for array in given
    ]  # over an axis of size 1 XLA may lay the two sides out differently, and copy

    def goes_on(carry: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
        done, arrays = carry
        # Read from the loop's own state: another reader of the value before it would cost a copy of the whole.
        first = lax.slice(arrays[0], (0,) * arrays[0].ndim, (1,) * arrays[0].ndim).reshape(())
        return jnp.isnan(first) & (done < 2)

    def negated(carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        done, arrays = carry
        return done + 1, [-array for array in arrays]

    arrays = lax.while_loop(goes_on, negated, (jnp.int32(0), arrays))[1]
    return [array.reshape(like.shape) for array, like in zip(arrays, given, strict=True)]


def zero_rows(x: jax.Array, keep: jax.Array) -> jax.Array:
    """x `[R, n]` with the rows that are not to be kept set to zero, in place where no other reader is left.

    On a CPU a `where` would be a second array of the size of all per-example gradients, since products do not fuse with what
    they read; where these are large, a loop over the rows in question, of which there are few, writes these alone.
    """

    def selected(x: jax.Array, keep: jax.Array) -> jax.Array:
        return jnp.where(keep[:, None], x, jnp.zeros_like(x))

    in_place = _zero_in_a_loop if x.size * x.dtype.itemsize >= _LARGE else selected
    with jax.named_scope("jaxdp_zeroed"):
        return lax.platform_dependent(x, keep, cpu=in_place, default=selected)


def _zero_in_a_loop(x: jax.Array, keep: jax.Array) -> jax.Array:
    rows = jnp.argsort(keep)  # False first
    count = jnp.sum(~keep, dtype=jnp.int32)
    zero = jnp.zeros((1, x.shape[1]), x.dtype)

    def zero_one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, x = carry
        return done + 1, lax.dynamic_update_slice_in_dim(x, zero, rows[done], axis=0)

    return lax.while_loop(lambda carry: carry[0] < count, zero_one, (jnp.int32(0), x))[1]
