"""Finishing after the backward pass: from what the sites of a leaf left behind to its norm and its clipped sum.

Sites inside scans leave one payload for each iteration. The iterations of a repeated weight are more tokens of one matrix;
those of a stacked weight are matrices of their own, which belong to one clipping group or, layer by layer, to several.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp._materialize import materialize
from jaxdp.clipping import squared_norms
from jaxdp.gradients.factors import Payload
from jaxdp.gradients.norms import add, gradient_of, rows_by_token, squared_norm, weighted_sum
from jaxdp.gradients.plan import LeafPlan
from jaxdp.gradients.sites import Key, Site, Slot
from jaxdp.gradients.uses import Loop


def _merged(site: Site, payload: Payload) -> tuple[Payload, bool]:
    """Moves the loops around a site: repeated ones become tokens, stacked ones one leading axis.

    Returns:
        The payload `[S, B, ...]`, or `[B, ...]` without stacked loops; and whether it has that axis.
    """
    loops = len(site.loops)
    stacked = [axis for axis, loop in enumerate(site.loops) if loop.is_stacked]
    repeated = [axis for axis, loop in enumerate(site.loops) if not loop.is_stacked]

    def move(name: str, value: jax.Array) -> jax.Array:
        rest = list(range(loops, value.ndim))  # B first
        token_axis = 1 if name == "left" and value.ndim - loops == 2 else 2  # ids are [B, T]
        order = [*stacked, *rest[:token_axis], *repeated, *rest[token_axis:]]
        value = jnp.transpose(value, order) if order != list(range(value.ndim)) else value
        shape = value.shape[len(stacked) :]
        tokens_end = token_axis + len(repeated) + 1
        if repeated:
            shape = (*shape[:token_axis], math.prod(shape[token_axis:tokens_end]), *shape[tokens_end:])
        return value.reshape((-1, *shape) if stacked else shape)

    return {name: move(name, value) for name, value in payload.items()}, bool(stacked)


@dataclasses.dataclass(frozen=True)
class LeftBehind:
    """What a site left behind, its loops merged; `has_axis` if the payload has an axis of stacked iterations."""

    site: Site
    payload: Payload
    has_axis: bool

    def map(self, function: Callable[..., jax.Array], *rows: jax.Array) -> jax.Array:
        return (
            lax.map(lambda xs: function(*xs), (self.payload, *rows)) if self.has_axis else function(self.payload, *rows)
        )


def left_behind(leaf: LeafPlan, reports: Mapping[Key, Slot]) -> list[LeftBehind]:
    late = [LeftBehind(site, *_merged(site, reports[site.key].report.rows)) for site in leaf.sites]
    if leaf.kind != "joint":
        return late
    if leaf.norm_route == "gram":
        first, factoring = late[0], leaf.sites[0].factoring
        if len(late) > 1 or factoring is None or not factoring.has_ids:
            return late
        rows = first.map(lambda payload: rows_by_token(**payload)[:, None])
        return [dataclasses.replace(first, payload=first.payload | {"right": materialize(rows)})]  # S4e

    def gradient(payloads: Sequence[Payload]) -> jax.Array:
        parts = [gradient_of(site.factoring, payload) for site, payload in zip(leaf.sites, payloads, strict=True)]
        return add(parts)

    # The sum of the uses is small: formed once, the norm and the sum are of the same tensor (S4).
    payloads, has_axis = [each.payload for each in late], late[0].has_axis
    whole = materialize(lax.map(gradient, payloads) if has_axis else gradient(payloads))  # S4e
    return [LeftBehind(leaf.sites[0], {"gradient": whole}, has_axis)]


def late_squared_norm(leaf: LeafPlan, late: Sequence[LeftBehind]) -> jax.Array:
    """The squared norm of each example, `[B]`; of each of its layers, `[B, L]`, where these are clipped one by one."""

    def norm(parts: Sequence[LeftBehind]) -> jax.Array:
        sites, payloads, has_axis = [part.site for part in parts], [part.payload for part in parts], parts[0].has_axis

        def one(payloads: Sequence[Payload]) -> jax.Array:
            return squared_norm_of_sites(leaf, sites, payloads)

        if not has_axis:
            return by_layer(leaf, sites[0], one(payloads))
        square = lax.map(one, payloads)
        return by_layer(leaf, sites[0], square.reshape(*sites[0].stacked_lengths, *square.shape[1:]))

    return norm(late) if leaf.kind == "joint" else add([norm([part]) for part in late])


def squared_norm_of_sites(leaf: LeafPlan, sites: Sequence[Site], payloads: Sequence[Payload]) -> jax.Array:
    if is_whole_stack(leaf, sites[0]):
        return squared_norms(payloads[0]["gradient"], by_layer=True)
    return squared_norm([site.factoring for site in sites], payloads, leaf.norm_route, sites[0].kernels)


def is_whole_stack(leaf: LeafPlan, site: Site) -> bool:
    """Whether a site holds all layers of a leaf that are clipped one by one."""
    return isinstance(leaf.group, tuple) and not site.scans_layers and site.layer is None


def by_layer(leaf: LeafPlan, site: Site, square: jax.Array) -> jax.Array:
    """`[*stacked, B]`, or `[B, L]` for a whole stack, to `[B]`, or to `[B, L]` if the layers are clipped one by one."""
    if not isinstance(leaf.group, tuple):
        return jnp.sum(square, axis=tuple(range(square.ndim - 1)))
    if is_whole_stack(leaf, site):
        return square
    if site.scans_layers:
        return jnp.sum(square, axis=tuple(range(1, square.ndim - 1))).T
    square = jnp.sum(square, axis=tuple(range(square.ndim - 1)))
    return jnp.zeros((len(square), len(leaf.group)), square.dtype).at[:, site.layer].set(square)


def columns_of_site(leaf: LeafPlan, site: Site, values: jax.Array) -> jax.Array:
    """The columns of `[B, K]` that concern a site: `[B]`, `[layers, B]` if it scans the layers, `[B, L]` for a whole stack."""
    if not isinstance(leaf.group, tuple):
        return values[:, leaf.group]
    if site.layer is not None:
        return values[:, leaf.group[site.layer]]
    columns = values[:, jnp.asarray(leaf.group)]
    return columns.T if site.scans_layers else columns


def late_sum(leaf: LeafPlan, late: Sequence[LeftBehind], factors: jax.Array, keep: jax.Array) -> jax.Array:
    def total(part: LeftBehind) -> jax.Array:
        site = part.site
        rows = [columns_of_site(leaf, site, factors), columns_of_site(leaf, site, keep)]
        if part.has_axis:
            stacked = [loop for loop in site.loops if loop.is_stacked]
            rows = [over_loops(row, stacked).reshape(-1, row.shape[-1]) for row in rows]

        def one(payload: Payload, factors: jax.Array, keep: jax.Array) -> jax.Array:
            return weighted_sum(site.factoring, payload, factors, keep, kernels=site.kernels)

        sums = part.map(one, *rows)
        return site.to_leaf(sums.reshape(*site.stacked_lengths, *site.total_shape) if part.has_axis else sums)

    return add([total(part) for part in late])


def over_loops(row: jax.Array, loops: Sequence[Loop]) -> jax.Array:
    """`[B]`, or `[layers, B]` for the outermost stacked loop, repeated to `[*loops, B]`."""
    shape = [1] * len(loops)
    if row.ndim == 2:
        shape[[loop.is_stacked for loop in loops].index(True)] = row.shape[0]
    row = row.reshape(*shape, row.shape[-1])
    return jnp.broadcast_to(row, (*(loop.length for loop in loops), row.shape[-1]))
