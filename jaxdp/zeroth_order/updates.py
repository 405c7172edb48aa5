"""From projected gradients to parameters: updates that are linear in a few scalars, and so can wait.

    G_t = sum_k g_tk z_tk / K                           the estimate
    w  <-  (1 - lr_t wd) w - lr_t sum_h beta^h G_(t-h)     decoupled decay; momentum over a window of H steps

Given the directions, an update is its `H * K` coefficients, its decay and its step. A pending update is that record, applied
to a block when the block is next at hand; every number in it is that of the step that made it (S16).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.zeroth_order import buckets, directions
from jaxdp.zeroth_order.buckets import Bucket, Layout, Part
from jaxdp.zeroth_order.directions import Law, rounded

#: A constant, or a function of the step's index, such as an optax schedule.
LearningRate: TypeAlias = float | Callable[[jax.Array], Any]
Rounding: TypeAlias = Literal["nearest", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Descent along the estimate.

    Attributes:
        learning_rate: Positive, or a schedule `learning_rate(step)`, called with a traced step.
        weight_decay: Decoupled: lr * weight_decay of each entry is taken away. Vectors, which are biases and the scales of
            norms, are left alone.
        momentum: beta; 0 for none.
        momentum_window: H, how many steps momentum reaches back. Each costs its directions once more, and no memory. Default:
            until beta^H is below 1 %.
        is_normalized: Divide the K projected gradients by their spread over the K directions (FZOO, arXiv 2506.09034); a step
            without spread changes nothing.
    """

    learning_rate: LearningRate
    weight_decay: float = 0.0
    momentum: float = 0.0
    momentum_window: int | None = None
    is_normalized: bool = False

    def __post_init__(self) -> None:
        if not callable(self.learning_rate):
            _validate.positive("learning_rate", self.learning_rate)
        _validate.nonnegative("weight_decay", self.weight_decay)
        if not 0.0 <= _validate.real_number("momentum", self.momentum) < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum:g}.")
        if self.momentum_window is not None:
            _validate.positive_integer("momentum_window", self.momentum_window)
            if self.momentum == 0 and self.momentum_window > 1:
                raise ValueError(
                    f"momentum_window {self.momentum_window} needs momentum above 0; without it only the last step counts."
                )

    @property
    def num_terms(self) -> int:
        """H: how many steps' directions one update reads."""
        if self.momentum_window is not None:
            return self.momentum_window
        return 1 if self.momentum == 0 else math.ceil(math.log(0.01) / math.log(self.momentum))

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step, float32."""
        value = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        return jnp.asarray(value, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scalars:
    """What a step adds to a run, and all that it adds: the trajectory is a list of these.

    Attributes:
        projected_gradients: g `[K]`, after averaging and normalization. Finite.
        learning_rate: Of the step.
    """

    projected_gradients: jax.Array
    learning_rate: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """Updates that blocks have yet to see, oldest first.

    Attributes:
        count: How many of the M entries are used.
        steps: Index of each entry's step, uint32 `[M]`.
        coefficients: What multiplies the directions of the steps `steps - h`, `[M, H, K]`; lr included.
        decays: lr * weight_decay, `[M]`.
        history: The projected gradients of the last H - 1 steps, newest first, `[H - 1, K]`.
    """

    count: jax.Array
    steps: jax.Array
    coefficients: jax.Array
    decays: jax.Array
    history: jax.Array


def check_spread(sgd: Sgd, num_directions: int) -> None:
    """Refuses to divide by the spread over a single direction, which has none."""
    if sgd.is_normalized and num_directions < 2:
        raise ValueError(
            "is_normalized divides by the spread over the directions, and one has none: give num_directions above 1."
        )


def nothing_pending(sgd: Sgd, num_directions: int, num_entries: int) -> Pending:
    """No updates, and room for `num_entries`."""
    M, H, K = num_entries, sgd.num_terms, num_directions
    return Pending(
        count=jnp.zeros((), jnp.int32),
        steps=jnp.zeros(M, jnp.uint32),
        coefficients=jnp.zeros((M, H, K), jnp.float32),
        decays=jnp.zeros(M, jnp.float32),
        history=jnp.zeros((H - 1, K), jnp.float32),
    )


def scalars(sgd: Sgd, projected_gradients: jax.Array, step: jax.Array) -> Scalars:
    """The scalars of a step from its projected gradients `[K]`; a non-finite one counts as zero (S9)."""
    g = jnp.where(jnp.isfinite(projected_gradients), projected_gradients, 0.0).astype(jnp.float32)
    if sgd.is_normalized:
        spread = jnp.std(g)
        g = jnp.where(spread > 0, g / jnp.where(spread > 0, spread, 1.0), 0.0)
    return Scalars(g, sgd.rate(step))


def appended(pending: Pending, sgd: Sgd, new: Scalars, step: jax.Array) -> Pending:
    """The pending updates with that of `step` behind them; there must be room.

    `new` must be an argument of the compiled program, not computed in it: around a constant learning rate a compiler would
    multiply in another order, and a replay would differ in the last bit.
    """
    H, K = pending.coefficients.shape[1:]
    past = jnp.concatenate([new.projected_gradients[None], pending.history])  # [H, K]
    weights = (sgd.momentum ** np.arange(H) / K).astype(np.float32)[:, None]  # 0 ** 0 is 1
    reached = (jnp.arange(H, dtype=jnp.uint32) <= step)[:, None]  # no directions before the first step
    coefficients = jnp.where(reached, new.learning_rate * past * weights, 0.0)
    at = pending.count
    return Pending(
        count=at + 1,
        steps=pending.steps.at[at].set(step),
        coefficients=pending.coefficients.at[at].set(coefficients),
        decays=pending.decays.at[at].set(new.learning_rate * jnp.float32(sgd.weight_decay)),
        history=past[: H - 1],
    )


def cleared(pending: Pending) -> Pending:
    """The same after every block has seen the updates; momentum goes on."""
    return dataclasses.replace(pending, count=jnp.zeros_like(pending.count))


def applied(
    pending: Pending, params: Params, *, law: Law, root: jax.Array, block: jax.Array, rounding: Rounding = "nearest"
) -> Params:
    """One block with its pending updates, in float32 and then rounded once to the dtype of each leaf.

    Without entries it is the block, bit for bit. The arithmetic has a fixed order and rounding, so that any program that applies
    the same record gets the same bits.

    Args:
        pending: The record.
        params: The leaves of one block.
        law: What the directions are drawn from.
        root: Words of the direction key.
        block: As in `leaf_directions`.
        rounding: Of leaves narrower than float32. "stochastic" rounds up with the probability of the part cut off, which keeps
            updates below half a unit in the last place (S19).
    """
    leaves, treedef = jax.tree.flatten(params)
    address = {"law": law, "root": root, "block": block, "shapes": params}
    if directions.is_small(params):  # all leaves in one loop
        wide = _with_terms(pending, leaves, only=None, **address)
    else:  # one leaf in float32 at a time
        wide = [_with_terms(pending, [leaf], only=i, **address)[0] for i, leaf in enumerate(leaves)]
    return treedef.unflatten(
        [
            _narrowed(pending, new, old, i, rounding, root=root, block=block, shapes=params)
            for i, (new, old) in enumerate(zip(wide, leaves, strict=True))
        ]
    )


def applied_in_place(
    pending: Pending,
    layout: Layout,
    bucket: Bucket,
    *,
    law: Law,
    root: jax.Array,
    block: jax.Array,
    rounding: Rounding = "nearest",
    part: Part | None = None,
) -> Bucket:
    """`applied` to a bucket, leaf by leaf, so that a donated bucket is changed where it lies.

    With the layout of a `part`, to the leaves of a block that it has.
    """
    shapes = (layout if part is None else part.whole).block()
    if part is None and directions.is_small(shapes):
        params = applied(pending, buckets.unpacked(layout, bucket), law=law, root=root, block=block, rounding=rounding)
        return buckets.replaced(layout, bucket, params)
    for i, number in enumerate(range(len(layout.shapes)) if part is None else part.numbers):
        old = buckets.leaf(layout, bucket, i)
        (wide,) = _with_terms(pending, [old], only=number, law=law, root=root, block=block, shapes=shapes)
        new = _narrowed(pending, wide, old, number, rounding, root=root, block=block, shapes=shapes)
        bucket = buckets.with_leaf(layout, bucket, i, new)
    return bucket


def _with_terms(
    pending: Pending, leaves: list[jax.Array], *, law: Law, root: jax.Array, block: jax.Array, shapes: Params, only: Any
) -> list[jax.Array]:
    """All leaves of a block, or its leaf `only`, in float32 with every entry's decay and terms."""
    M, H, K = pending.coefficients.shape

    def add_terms(entry: jax.Array | int, wide: list[jax.Array]) -> list[jax.Array]:
        step, coefficients = pending.steps[entry], pending.coefficients[entry]
        decay = pending.decays[entry]
        wide = [leaf - rounded(decay * leaf) if leaf.ndim > 1 else leaf for leaf in wide]

        def add_term(term: jax.Array | int, wide: list[jax.Array]) -> list[jax.Array]:
            h, k = (jnp.asarray(part, jnp.uint32) for part in (lax.div(term, K), lax.rem(term, K)))
            z = directions.leaf_directions(law, root, step=step - h, k=k, block=block, shapes=shapes, only=only)
            entries = jax.tree.leaves(z)
            return [leaf - rounded(coefficients[h, k] * entry) for leaf, entry in zip(wide, entries, strict=True)]

        return add_term(0, wide) if H * K == 1 else lax.fori_loop(0, H * K, add_term, wide)

    wide = [leaf.astype(jnp.float32) for leaf in leaves]
    # Without a loop XLA needs no float32 copy of the leaf.
    return add_terms(0, wide) if M == 1 else lax.fori_loop(0, pending.count, add_terms, wide)


def _narrowed(
    pending: Pending,
    wide: jax.Array,
    old: jax.Array,
    number: int,
    rounding: Rounding,
    *,
    root: jax.Array,
    block: jax.Array,
    shapes: Params,
) -> jax.Array:
    """The leaf in its own dtype; the old one if nothing was pending."""
    if rounding == "stochastic" and old.dtype != jnp.float32:
        step = pending.steps[jnp.maximum(pending.count - 1, 0)]
        bits = directions.rounding_bits(root, step=step, block=block, shapes=shapes, only=number)
        new = _stochastically(wide, bits, old)
    else:
        new = wide.astype(old.dtype)
    return jnp.where(pending.count > 0, new, old)


def _stochastically(wide: jax.Array, bits: jax.Array, old: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probabilities that make it right on average."""
    pattern = lax.bitcast_convert_type(wide, jnp.uint32)
    up = lax.bitcast_convert_type((pattern + bits) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(wide), up, wide).astype(old.dtype)  # exact: the lower half is zero
