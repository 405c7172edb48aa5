"""`expand_directions`: K scalars to an estimate of the gradient, as an optax transformation.

    G = sum_k g_k z_k / K

Where the model and an optimizer's state fit the device, any optax optimizer follows it: Adam, momentum, `optax.contrib`. The
directions are those of a streamed run with the same key: `BlockParams` have the addresses of their blocks, and a pytree of any
other kind stands at address 0 as a whole (S17).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxdp._typing import Key, Params
from jaxdp.block_model import BlockParams
from jaxdp.zeroth_order import directions
from jaxdp.zeroth_order.directions import Law, Rademacher, rounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpandDirectionsState:
    """State of `expand_directions`.

    Attributes:
        direction_words: Of the direction key, uint32 `[2]`. Public.
        step: Index of the next step, uint32: the scalars of the next update must belong to its directions.
    """

    direction_words: jax.Array
    step: jax.Array


def expand_directions(direction_key: Key, *, law: Law | None = None) -> optax.GradientTransformation:
    """Turns the K projected gradients of a step into an estimate of the gradient.

    Put it first in `optax.chain`. `update` takes g, float32 `[K]`, in the place of gradients; a non-finite entry counts as zero
    (S9). The number of updates is the index of the step whose directions are drawn, so every step must be handed on, also
    one without a finite example, whose g is zero.

        tx = optax.chain(expand_directions(direction_key), optax.adam(1e-3))
        found = projected_gradients(loss_fn)(params, batch, direction_key=direction_key, step=t)
        g = aggregation.mean(found.projected_gradients, found.contributed)
        updates, opt_state = tx.update(g, opt_state, params)

    Args:
        direction_key: A typed key, public; not the noise key of a private run (S8).
        law: What directions are drawn from; `Rademacher()` by default.

    Returns:
        An `optax.GradientTransformation`. Its updates have the shapes and dtypes of `params`; they are summed in float32, one
        direction at a time.

    Raises:
        ValueError: at trace time, if `params` is missing or the updates are not `[K]`.
    """
    law = Rademacher() if law is None else law
    words = directions.words_of(direction_key)

    def init(params: Params) -> ExpandDirectionsState:
        del params
        return ExpandDirectionsState(jnp.array(words, copy=True), jnp.zeros((), jnp.uint32))

    def update(
        updates: Any, state: ExpandDirectionsState, params: Params | None = None
    ) -> tuple[Params, ExpandDirectionsState]:
        if params is None:
            raise ValueError("expand_directions needs params, whose shapes the directions have: pass params.")
        shape = getattr(updates, "shape", None)
        if shape is None or len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"expand_directions takes the K projected gradients of a step, an array [K]; got "
                f"{jax.tree.structure(updates) if shape is None else shape}. Put it first in optax.chain."
            )
        estimate = expanded(law, updates, params, root=state.direction_words, step=state.step)
        estimate = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), estimate, params)
        return estimate, ExpandDirectionsState(state.direction_words, state.step + jnp.uint32(1))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]  # our state is a dataclass


def expanded(law: Law, projected_gradients: jax.Array, shapes: Params, *, root: jax.Array, step: jax.Array) -> Params:
    """G = sum_k g_k z_k / K in float32, by the same rounding in every program; holds one direction of one block at a time.

    Args:
        law: What directions are drawn from.
        projected_gradients: g `[K]`; a non-finite entry counts as zero.
        shapes: The parameters, or their shapes.
        root: The words of the direction key, uint32 `[2]`.
        step: Index of the step, uint32.
    """
    K = projected_gradients.shape[0]
    finite = jnp.where(jnp.isfinite(projected_gradients), projected_gradients, 0.0).astype(jnp.float32)
    coefficients = finite * jnp.float32(1 / K)

    def at(block: jax.Array, shapes: Params) -> Params:
        def add_term(k: jax.Array | int, total: Params) -> Params:
            k = jnp.asarray(k, jnp.uint32)
            z = directions.leaf_directions(law, root, step=step, k=k, block=block, shapes=shapes)
            return jax.tree.map(lambda leaf, entry: leaf + rounded(coefficients[k] * entry), total, z)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        return add_term(0, zeros) if K == 1 else lax.fori_loop(0, K, add_term, zeros)

    return _by_block(at, shapes)


def direction(law: Law, shapes: Params, *, root: jax.Array, step: jax.Array, k: jax.Array) -> Params:
    """z_k of a step, whole, in float32, drawn block by block; arguments as above."""

    def at(block: jax.Array, shapes: Params) -> Params:
        return directions.leaf_directions(law, root, step=step, k=k, block=block, shapes=shapes)

    return _by_block(at, shapes)


def _by_block(at: Callable[[jax.Array, Params], Params], shapes: Params) -> Params:
    """`at(address, shapes)` of each block of `BlockParams`, one after the other; of anything else as block 0."""
    if not isinstance(shapes, BlockParams):
        return at(jnp.uint32(0), shapes)
    one, addresses = _one_block(shapes.blocks)
    return BlockParams(at(jnp.uint32(0), shapes.resident), lax.map(lambda block: at(block, one), addresses))


def _one_block(stacked: Params) -> tuple[Params, jax.Array]:
    """The shapes of one block of `[N, ...]`, and the addresses of all."""
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(stacked)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"the leaves of blocks are not stacked [N, ...] with one N: their first axes are {lengths}.")
    ((num_blocks,),) = lengths
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    return one, jnp.arange(1, num_blocks + 1, dtype=jnp.uint32)
