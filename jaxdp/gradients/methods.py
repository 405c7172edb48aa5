"""The methods: four ways to the same clipped sum.

`vmap` is the definition: one gradient per example, then clip and sum. The others rewrite the function (`rewrite.py`) so that
its backward pass reports what the clipped sum needs.

- `two_pass`: a first backward pass reports norms only, a second one the weighted sums. Least memory.
- `book_keeping`: one backward pass reports the factors of every weight; norms and weighted sums are taken from them.
- `per_layer`: one backward pass, in which each clipping group that lies in one scope is clipped and summed on the spot.

Source: algorithms of arXiv 2110.05679 (ghost), 2210.00038 (book-keeping), 2212.01539 and 2507.01154 (per-layer).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp import _validate
from jaxdp._materialize import materialize
from jaxdp._typing import Batch, LossFn, Params
from jaxdp.clipping import (
    ClippedSum,
    ClippingPolicy,
    Groups,
    LeafGroup,
    PerLayer,
    accumulator,
    clip_and_sum,
    clipping_factors,
)
from jaxdp.gradients import jaxprs
from jaxdp.gradients.factors import Payload
from jaxdp.gradients.finishing import (
    LeftBehind,
    by_layer,
    columns_of_site,
    is_whole_stack,
    late_squared_norm,
    late_sum,
    left_behind,
    over_loops,
    squared_norm_of_sites,
)
from jaxdp.gradients.norms import NormRoute, add, squared_norm, weighted_sum
from jaxdp.gradients.plan import LeafPlan, Plan, make_plan
from jaxdp.gradients.rewrite import Assignment, evaluate, evaluate_alone
from jaxdp.gradients.sites import NOTHING, Key, Report, Site, Slot, Task
from pallas_kernels import Implementation

Method: TypeAlias = Literal["auto", "ghost", "vmap", "two_pass", "book_keeping", "per_layer"]


@dataclasses.dataclass(frozen=True)
class Clipped:
    """What every method returns.

    Attributes:
        sum: The clipped sum.
        loss: `[B]`.
        aux: What the function returned beside the loss, `[B, ...]`; None without.
        norms: `[B, K]`.
        keep: Bool `[B, K]`: which example was summed in which group.
    """

    sum: ClippedSum
    loss: jax.Array
    aux: Any
    norms: jax.Array
    keep: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call at its arguments.

    Attributes:
        fun: The loss of one example.
        has_aux: Whether it returns (loss, aux).
        policy: The clipping policy.
        groups: Its partition of the leaves.
        params: The parameters.
        batch: The examples, stacked.
        is_padding: Bool `[B]`.
        clip_norms: `[K]`.
        implementation: What takes norms and sums, as in `clipped_grad`.
    """

    fun: LossFn
    has_aux: bool
    policy: ClippingPolicy
    groups: Groups
    params: Params
    batch: Batch
    is_padding: jax.Array
    clip_norms: jax.Array
    implementation: Implementation | None = None

    @property
    def size(self) -> int:
        return self.is_padding.shape[0]

    @functools.cached_property
    def traced(self) -> jaxprs.Traced:
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), self.batch)
        return jaxprs.trace(self.fun, self.params, example)

    @functools.cached_property
    def plan(self) -> Plan:
        return make_plan(self.traced, self.params, self.groups, rows=self.size, implementation=self.implementation)

    def after(self, factors: jax.Array, sums: Sequence[jax.Array]) -> Problem:
        """The same problem, to be computed once more after `factors` and `sums` are known.

        A compiler that saw the two passes as one would keep every activation, and the logits, until the second is done. An
        optimization barrier orders nothing on the CPU, so the batch is made to depend on the factors; they are never NaN.
        """
        with jax.named_scope("jaxdp_factors"):
            impossible = jnp.isnan(jnp.sum(factors))
            for each in sums:
                impossible &= jnp.isnan(each.ravel()[0])

        def depending(x: Any) -> Any:
            x = jnp.asarray(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return x
            return jnp.where(impossible, jnp.zeros_like(x), x)

        later = dataclasses.replace(self, batch=jax.tree.map(depending, self.batch))
        later.__dict__.update(traced=self.traced, plan=self.plan)  # they follow from shapes alone
        return later

    def losses(self, assignment: Assignment, slots: Mapping[Key, Slot]) -> tuple[jax.Array, list[jax.Array]]:
        """The loss `[B]` of every example, and the other outputs of the function."""
        axes = {key: Report(len(assignment.members[key][0].loops), None) for key in slots}
        depth = {key: Slot(axis, axis) for key, axis in axes.items()}
        params = jax.tree.leaves(self.params)

        def one(example: Any, slots: Any) -> list[jax.Array]:
            return evaluate(self.traced, assignment, params, example, slots)

        loss, *rest = jax.vmap(one, in_axes=(0, depth))(self.batch, dict(slots))
        return loss, rest

    def aux(self, rest: list[jax.Array]) -> Any:
        """What the function returned beside the loss, from its outputs but the first."""
        return jax.tree.unflatten(self.traced.out_tree, [None, *rest])[1] if self.has_aux else None

    def counts(self, loss: jax.Array) -> jax.Array:
        return ~self.is_padding & jnp.isfinite(loss)  # S9


def _rows(site: Site, size: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros((*(loop.length for loop in site.loops), size, *shape), dtype)


def _totals(site: Site, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros((*site.stacked_lengths, *shape), dtype)


def _payload_slot(site: Site, size: int) -> Slot:
    rows = {name: _rows(site, size, shape.shape, shape.dtype) for name, shape in site.payload.items()}
    return Slot(Report(rows, None), NOTHING)


def _total_dtype(site: Site) -> Any:
    return accumulator(*(shape.dtype for shape in site.payload.values()))


def _report_payload(key: Key) -> Task:
    return lambda payloads, given: Report(payloads[key], None)


def _assign(plan: Plan, chosen: Sequence[tuple[Key, Sequence[Site], Task]]) -> Assignment:
    """An assignment in which only the chosen sites report."""
    members = {key: tuple(sites) for key, sites, _ in chosen}
    tasks = {key: task for key, _, task in chosen}
    groups = {site.key: key for key, sites in members.items() for site in sites}
    reporting = [site for site in plan.sites if site.key in groups]
    uses: dict[Any, Site | None] = {site.key[0]: None for site in plan.sites if site.equation is not None}
    uses |= {site.key[0]: site for site in reporting if site.equation is not None}
    copies = {(site.key[0], site.copied_var): site for site in reporting if site.equation is None}
    return Assignment(uses, copies, tasks, groups, members)


def _norms(problem: Problem, squares: Mapping[int, jax.Array]) -> jax.Array:
    """`[B, K]` from the squared norms of each leaf."""
    dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(problem.params)))
    parts: list[list[jax.Array]] = [[jnp.zeros(problem.size, dtype)] for _ in problem.groups.names]
    for leaf, square in squares.items():
        group = problem.groups.leaf_groups[leaf]
        columns = [(group, square)] if isinstance(group, int) else list(zip(group, square.T, strict=True))
        for index, column in columns:
            parts[index].append(column.astype(dtype))
    return jnp.sqrt(jnp.stack([add(part) for part in parts], axis=1))


def _zero(problem: Problem, leaf: int) -> jax.Array:
    param = jax.tree.leaves(problem.params)[leaf]
    return jnp.zeros(param.shape, accumulator(param.dtype))


def _finish(problem: Problem, loss: jax.Array, aux: Any, norms: jax.Array, totals: Callable[..., Any]) -> Clipped:
    factors, keep, centered_count = clipping_factors(
        norms, problem.policy, problem.clip_norms, counts=problem.counts(loss)
    )
    value = totals(factors, keep)
    return Clipped(ClippedSum(value, centered_count), loss, aux, norms, keep)


# ---- the methods


def by_vmap(problem: Problem) -> Clipped:
    """The definition: the gradient of every example, clipped and summed."""
    traced = problem.traced
    is_apart = bool(apart := traced.couplings.apart)
    fun = functools.partial(evaluate_alone, traced, apart) if is_apart else problem.fun

    def value_and_grad(params: Any, example: Any) -> Any:
        if problem.has_aux:
            return jax.value_and_grad(fun, has_aux=True)(params, example)
        loss, grads = jax.value_and_grad(fun)(params, example)
        return (loss, None), grads

    def gradient(example: Any) -> Any:
        return value_and_grad(problem.params, example)

    # With one kernel gradient for each example a convolution becomes one in groups, which XLA may turn into a dense one with
    # zeros between the groups. A NaN times such a zero would be the NaN of every example: run them one by one (S3, S9).
    one_by_one = is_apart or jaxprs.contains(traced.body, "conv_general_dilated")
    (loss, aux), grads = (lax.map if one_by_one else _vmap)(gradient, problem.batch)
    clipped, norms, keep = clip_and_sum(
        grads, problem.policy, problem.groups, problem.clip_norms, counts=problem.counts(loss)
    )
    return Clipped(clipped, loss, aux, norms, keep)


def _vmap(function: Callable[[Any], Any], batch: Any) -> Any:
    return jax.vmap(function)(batch)


def by_two_passes(problem: Problem) -> Clipped:
    """Norms in a first backward pass, weighted sums in a second: of the factors only those of joint norms are kept.

    The second pass differentiates the same loss again, not one scaled by the factors, which would round differently. Even so the
    compiler may round the two passes differently, and a gradient that cancels in one need not cancel in the other (S4e): so
    each site clips once more, to the norm that the first pass found for it, what the second pass sums. Uses with a joint
    norm, which have none of their own to clip to, keep their factors, and are summed before the second pass.
    """
    plan = problem.plan
    first: list[tuple[Key, Sequence[Site], Any]] = []
    slots: dict[Key, Slot] = {}
    for leaf in plan.leaves:
        for site in leaf.sites:
            if leaf.kind == "joint":
                slots[site.key] = _payload_slot(site, problem.size)
                first.append((site.key, [site], _report_payload(site.key)))
            else:
                shape = (leaf.shape[0],) if is_whole_stack(leaf, site) else ()
                square = _rows(site, problem.size, shape, _total_dtype(site))
                slots[site.key] = Slot(Report(square, None), NOTHING)
                first.append((site.key, [site], _report_norm(site, leaf)))
    assignment = _assign(plan, first)
    loss, pull, rest = jax.vjp(lambda slots: problem.losses(assignment, slots), slots, has_aux=True)
    (reports,) = pull(jnp.ones_like(loss))
    alone = {site.key for leaf in plan.leaves if leaf.kind != "joint" for site in leaf.sites}
    # The second pass clips each site to the very number that the factors are made of (S4e).
    found = materialize({key: report.report.rows for key, report in reports.items() if key in alone})
    squares: dict[int, jax.Array] = {}
    late: dict[int, list[LeftBehind]] = {}
    for leaf in plan.leaves:
        if leaf.kind == "joint":
            late[leaf.index] = left_behind(leaf, reports)
            squares[leaf.index] = late_squared_norm(leaf, late[leaf.index])
        elif leaf.sites:
            squares[leaf.index] = add([by_layer(leaf, site, found[site.key]) for site in leaf.sites])

    def totals(factors: jax.Array, keep: jax.Array) -> Any:
        kept = {index: late_sum(plan.leaves[index], parts, factors, keep) for index, parts in late.items()}
        second: list[tuple[Key, Sequence[Site], Any]] = []
        slots: dict[Key, Slot] = {}
        for leaf in plan.leaves:
            for site in leaf.sites:
                if leaf.index in kept:
                    continue
                rows = {
                    "factors": columns_of_site(leaf, site, factors),
                    "keep": columns_of_site(leaf, site, keep.astype(factors.dtype)),
                }
                if not is_whole_stack(leaf, site):
                    rows = {name: over_loops(row, site.loops) for name, row in rows.items()}
                rows["square"] = found[site.key]
                total = _totals(site, site.total_shape, _total_dtype(site))
                slots[site.key] = Slot(Report(None, total), Report(rows, None))
                second.append((site.key, [site], _report_sum(site, leaf)))
        assignment = _assign(plan, second)
        # XLA would hold the stacked activations of a second forward scan beside those of the first: then they share one.
        shares = any(site.loops and not site.is_rematerialized for site in plan.sites)
        later = problem if shares else problem.after(factors, list(kept.values()))
        again, pull, _ = jax.vjp(lambda slots: later.losses(assignment, slots), slots, has_aux=True)
        seeds, _ = lax.optimization_barrier((jnp.ones_like(again), factors))
        (sums,) = pull(seeds)
        value = []
        for leaf in plan.leaves:
            if leaf.index in kept:
                value.append(kept[leaf.index])
            elif leaf.sites:
                value.append(add([site.to_leaf(sums[site.key].report.totals) for site in leaf.sites]))
            else:
                value.append(_zero(problem, leaf.index))
        return jax.tree.unflatten(jax.tree.structure(problem.params), value)

    return _finish(problem, loss, problem.aux(rest), _norms(problem, squares), totals)


def _report_norm(site: Site, leaf: LeafPlan) -> Task:
    def task(payloads: Mapping[Key, Payload], given: Report) -> Report:
        del given
        return Report(squared_norm_of_sites(leaf, [site], [payloads[site.key]]).astype(_total_dtype(site)), None)

    return task


def _report_sum(site: Site, leaf: LeafPlan) -> Task:
    def task(payloads: Mapping[Key, Payload], given: Report) -> Report:
        rows, payload = given.rows, payloads[site.key]
        factors, keep = rows["factors"], rows["keep"].astype(bool)
        now = squared_norm_of_sites(leaf, [site], [payload])
        with jax.named_scope("jaxdp_factors"):
            keep = keep & jnp.isfinite(now)
            factors = factors * jnp.sqrt(jnp.where(now > rows["square"], rows["square"] / now, 1.0))
        total = weighted_sum(site.factoring, payload, factors, keep, kernels=site.kernels)
        return Report(None, total.astype(_total_dtype(site)))

    return task


def by_one_pass(problem: Problem, *, finish_groups: bool) -> Clipped:
    """One backward pass: book-keeping, or with `finish_groups` the per-layer scheme.

    A group that lies in one scope is clipped and summed there, so that its factors die at once; the others leave their
    factors, or their per-example gradients where these are smaller, and are finished afterwards.
    """
    plan = problem.plan
    early = plan.early_groups() if finish_groups else {}
    early_leaves = {site.leaf for sites in early.values() for site in sites}
    chosen: list[tuple[Key, Sequence[Site], Any]] = []
    slots: dict[Key, Slot] = {}
    keys: dict[LeafGroup, Key] = {}
    for group, sites in early.items():
        key = keys[group] = (sites[0].scope, f"group {group}")
        sums = {f"{site.leaf}": _totals(site, site.total_shape, _total_dtype(site)) for site in sites}
        dtype = accumulator(*(total.dtype for total in sums.values()))
        norm = _rows(sites[0], problem.size, (), dtype)
        counts = over_loops(~problem.is_padding, sites[0].loops)
        slots[key] = Slot(Report(norm, sums), Report(counts, problem.clip_norms[jnp.asarray(group)]))
        chosen.append((key, sites, _clip_group(problem, sites)))
    for leaf in plan.leaves:
        if leaf.index not in early_leaves:
            for site in leaf.sites:
                slots[site.key] = _payload_slot(site, problem.size)
                chosen.append((site.key, [site], _report_payload(site.key)))
    assignment = _assign(plan, chosen)
    loss, pull, rest = jax.vjp(lambda slots: problem.losses(assignment, slots), slots, has_aux=True)
    # A group finishes before the others, so an example whose loss is not finite is silenced from the start, by its cotangent.
    seeds = jnp.where(problem.counts(loss), 1.0, 0.0).astype(loss.dtype) if early else jnp.ones_like(loss)
    (reports,) = pull(seeds)

    late = {
        leaf.index: left_behind(leaf, reports) for leaf in plan.leaves if leaf.sites and leaf.index not in early_leaves
    }
    squares = {index: late_squared_norm(plan.leaves[index], parts) for index, parts in late.items()}
    norms = _norms(problem, squares)
    for group, key in keys.items():
        norms = norms.at[:, jnp.asarray(group)].set(reports[key].report.rows.T.astype(norms.dtype))

    def totals(factors: jax.Array, keep: jax.Array) -> Any:
        value = []
        for leaf in plan.leaves:
            if leaf.index in early_leaves:
                (site,) = leaf.sites
                value.append(site.to_leaf(reports[keys[leaf.group]].report.totals[f"{leaf.index}"]))
            elif leaf.sites:
                value.append(late_sum(leaf, late[leaf.index], factors, keep))
            else:
                value.append(_zero(problem, leaf.index))
        return jax.tree.unflatten(jax.tree.structure(problem.params), value)

    return _finish(problem, loss, problem.aux(rest), norms, totals)


def _clip_group(problem: Problem, sites: Sequence[Site]) -> Task:
    routes: dict[int, NormRoute] = {leaf.index: leaf.norm_route for leaf in problem.plan.leaves}
    dtype = accumulator(*(_total_dtype(site) for site in sites))

    def task(payloads: Mapping[Key, Payload], given: Report) -> Report:
        squares = [
            squared_norm([site.factoring], [payloads[site.key]], routes[site.leaf], site.kernels).astype(dtype)
            for site in sites
        ]
        with jax.named_scope("jaxdp_factors"):
            norm = jnp.sqrt(add(squares))
            keep = given.rows.astype(bool) & jnp.isfinite(norm)  # S9
            bound = given.totals.astype(dtype)
            factors = jnp.where(keep, problem.policy.factors(norm[:, None], bound[None, None])[:, 0], 0.0)
        sums = {
            f"{site.leaf}": weighted_sum(site.factoring, payloads[site.key], factors, keep, kernels=site.kernels)
            for site in sites
        }
        return Report(norm, sums)

    return task


# ---- the choice


def check_method(method: Any, policy: ClippingPolicy) -> Method:
    _validate.one_of("method", method, get_args(Method))
    if method == "per_layer" and not isinstance(policy, PerLayer):
        raise ValueError(
            f"method='per_layer' finishes one layer at a time, which {policy} does not allow: its factors need the norms of all "
            "layers; use clipping=jaxdp.per_layer(...), or another method."
        )
    return method


def choose_method(method: Method, policy: ClippingPolicy, plan: Plan) -> Method:
    """The method that runs, for the one that was asked for.

    Per-layer clipping finishes inside the backward pass. Otherwise one backward pass that keeps the factors is the fastest;
    two passes, which keep the factors of joint norms alone, are chosen where the function rematerializes, since its author
    trades time for memory.

    Raises:
        ValueError: the method is `"ghost"` and a matrix would be copied for each example.
    """
    if method == "ghost":
        copied = [leaf for leaf in plan.leaves if leaf.kind == "copy" and len(leaf.shape) > 1]
        if copied:
            listing = "; ".join(f"{leaf.path!r} {leaf.shape}: {leaf.reason}" for leaf in copied)
            raise ValueError(
                f"method='ghost' would have to copy these parameters for each example: {listing}. Use method='auto', which "
                "does so, or rewrite the function so that each enters matrix products, embeddings or convolutions only."
            )
    if method not in ("auto", "ghost"):
        return method
    if isinstance(policy, PerLayer):
        return "per_layer"
    return "two_pass" if plan.rematerializes else "book_keeping"


def run_method(method: Method, problem: Problem) -> Clipped:
    """Clips and sums by a method."""
    if method != "vmap":
        method = choose_method(method, problem.policy, problem.plan)
    if method == "vmap":
        return by_vmap(problem)
    if method == "two_pass":
        return by_two_passes(problem)
    return by_one_pass(problem, finish_groups=method == "per_layer")
