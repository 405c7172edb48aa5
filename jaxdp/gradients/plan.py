"""The plan: which route each parameter leaf takes, why, and what it costs.

A leaf's sites are fixed by how the function uses it (`uses.py`). What is left to choose are the norm route and whether to
form the per-example gradients (spill) or to keep the factors; shapes decide, by the time rule of `cost_model.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.clipping import Groups, LeafGroup
from jaxdp.gradients import jaxprs
from jaxdp.gradients.cost_model import Cost, cost_of, norm_route
from jaxdp.gradients.kernels import choose_kernels
from jaxdp.gradients.norms import NormRoute
from jaxdp.gradients.sites import Site, site_of_copy, site_of_leaf, site_of_use
from jaxdp.gradients.uses import Kind, find_uses
from pallas_kernels import Implementation


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is handled.

    Attributes:
        index: Its position among the leaves.
        path: Its path in the pytree.
        shape: Its shape.
        group: Its clipping group; for a leaf of stacked layers, that of each slice.
        kind: How the function uses it.
        reason: Why the kind is what it is.
        sites: Where its gradient is reported; empty if it has none.
        norm_route: How the norm is taken from factors.
        cost: What it costs for the rows of one microbatch, beyond the non-private step.
    """

    index: int
    path: str
    shape: tuple[int, ...]
    group: LeafGroup
    kind: Kind
    reason: str
    sites: tuple[Site, ...]
    norm_route: NormRoute
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a function of (params, example) is handled.

    Attributes:
        traced: The function.
        leaves: One entry for each leaf.
    """

    traced: jaxprs.Traced
    leaves: tuple[LeafPlan, ...]

    @property
    def rematerializes(self) -> bool:
        """Whether the function trades time for memory by `jax.checkpoint` around equations with parameters."""
        return any(site.is_rematerialized for site in self.sites)

    @property
    def sites(self) -> list[Site]:
        return [site for leaf in self.leaves for site in leaf.sites]

    def early_groups(self) -> dict[LeafGroup, Sequence[Site]]:
        """The clipping groups whose sites all lie in one scope, so that they can finish inside the backward pass.

        The groups of stacked layers are one entry, if the sites lie in one scan over just these layers.
        """
        members: dict[int, list[LeafPlan]] = {}
        for leaf in self.leaves:
            for group in leaf.group if isinstance(leaf.group, tuple) else (leaf.group,):
                if leaf.sites:
                    members.setdefault(group, []).append(leaf)
        early: dict[LeafGroup, Sequence[Site]] = {}
        for leaves in members.values():
            sites = [site for leaf in leaves for site in leaf.sites]
            alone = all(len(leaf.sites) == 1 and leaf.kind != "joint" for leaf in leaves)
            together = len({leaf.group for leaf in leaves}) == 1 and len({site.scope for site in sites}) == 1
            if not alone or not together:
                continue
            if isinstance(leaves[0].group, tuple):
                fits = all(site.scans_layers and len(site.loops) == 1 for site in sites)
            else:
                fits = not any(site.loops for site in sites)
            if fits:
                early[leaves[0].group] = sites
        return early


def make_plan(
    traced: jaxprs.Traced,
    params: Params,
    groups: Groups,
    *,
    rows: int,
    implementation: Implementation | None = None,
) -> Plan:
    """Analyzes a function of (params, example).

    Args:
        traced: The loss of one example.
        params: Pytree of arrays or `jax.ShapeDtypeStruct`s.
        groups: The clipping groups of the leaves.
        rows: Examples that are differentiated at once.
        implementation: What takes norms and sums, as in `clipped_grad`.
    """
    named = _validate.named_leaves(params)
    uses = find_uses(traced, [tuple(leaf.shape) for _, leaf in named])
    leaves = []
    for index, ((path, leaf), found) in enumerate(zip(named, uses, strict=True)):
        sites: tuple[Site, ...] = ()
        kind, reason, group = found.kind, found.reason, groups.leaf_groups[index]
        route: NormRoute = "gram"
        if found.kind == "copy":
            assert found.copy is not None
            sites = (site_of_copy(found.copy, index),)
        elif found.uses:
            route, spills = norm_route([(use.factoring, use.loops) for use in found.uses], rows)
            spills = spills and found.kind not in ("joint", "embedding")
            is_alone = found.kind != "joint"
            sites = tuple(site_of_use(use, index, spills=spills, is_alone=is_alone) for use in found.uses)
            if is_alone:
                sites = tuple(_with_kernels(site, route, rows, implementation) for site in sites)
        if isinstance(group, tuple) and not all(site.scans_layers or site.layer is not None for site in sites):
            kind, reason = "copy", f"its layers are not used one by one: {reason}"
            sites = (site_of_leaf(index, traced.body.invars[index]),)
        cost = cost_of(sites, route, rows)
        leaves.append(LeafPlan(index, path, tuple(leaf.shape), group, kind, reason, sites, route, cost))
    return Plan(traced, tuple(leaves))


def _with_kernels(site: Site, route: NormRoute, rows: int, implementation: Implementation | None) -> Site:
    kernels = choose_kernels(site.factoring, site.payload, route, rows=rows, implementation=implementation)
    return dataclasses.replace(site, kernels=kernels)
