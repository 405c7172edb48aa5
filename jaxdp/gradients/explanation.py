"""A plan in words: what a user reads before a run."""

from __future__ import annotations

import dataclasses

from jaxdp.clipping import Groups
from jaxdp.gradients.kernels import XLA
from jaxdp.gradients.plan import LeafPlan, Plan


@dataclasses.dataclass(frozen=True)
class LeafExplanation:
    """How one leaf is handled.

    Attributes:
        path: Its path in the pytree.
        shape: Its shape.
        group: The clipping group it belongs to.
        route: `"dense"`, `"embedding"`, `"conv"`, `"joint"` (several uses of the same entries), `"copy"` (one copy for each
            example) or `"unused"`.
        norm: How its norm is taken: `"gram"`, `"direct"`, `"stored"` (from per-example gradients), or `""` without gradient.
        finishes: `"backward"` if it is clipped and summed inside the backward pass, else `"after"`.
        memory_bytes: What clipping keeps of it beyond the non-private step: factors or per-example gradients if it finishes
            after the backward pass, and the scratch of its norm.
        flops: Floating-point operations of its norms.
        reason: Why the route is what it is.
        norm_implementation: What takes its norm, `"xla"` or a kernel's, as in `clipped_grad`; `""` without gradient.
        sum_implementation: What takes its clipped sum.
    """

    path: str
    shape: tuple[int, ...]
    group: str
    route: str
    norm: str
    finishes: str
    memory_bytes: int
    flops: float
    reason: str
    norm_implementation: str
    sum_implementation: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a function's gradients are clipped; `print` it.

    Attributes:
        method: The method that runs.
        rows: Examples differentiated at once, to which memory and FLOPs refer.
        leaves: One entry for each leaf.
    """

    method: str
    rows: int
    leaves: tuple[LeafExplanation, ...]

    @property
    def memory_bytes(self) -> int:
        return sum(leaf.memory_bytes for leaf in self.leaves)

    @property
    def flops(self) -> float:
        return sum(leaf.flops for leaf in self.leaves)

    def __str__(self) -> str:
        # Where XLA takes everything, there is nothing to tell apart.
        has_kernels = any({leaf.norm_implementation, leaf.sum_implementation} - {"", "xla"} for leaf in self.leaves)
        header = (
            "leaf",
            "shape",
            "route",
            "norm",
            *_by_kernels("norm by", "sum by", has_kernels),
            "memory",
            "FLOPs",
            "why",
        )
        lines = [header] + [
            (
                leaf.path,
                str(leaf.shape),
                leaf.route,
                leaf.norm,
                *_by_kernels(leaf.norm_implementation, leaf.sum_implementation, has_kernels),
                _bytes(leaf.memory_bytes),
                f"{leaf.flops:.2g}",
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        total = f"method {self.method}, {self.rows} rows at once: {_bytes(self.memory_bytes)} and {self.flops:.2g} FLOPs beyond"
        return "\n".join([*table, f"{total} the non-private step"])


def _by_kernels(norm: str, total: str, has_kernels: bool) -> tuple[str, ...]:
    return (norm, total) if has_kernels else ()


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def explain(plan: Plan, method: str, groups: Groups, rows: int) -> Explanation:
    early = set()
    if method == "per_layer":
        early = {site.leaf for sites in plan.early_groups().values() for site in sites}
    return Explanation(
        method, rows, tuple(_explain_leaf(plan, leaf, method, groups, leaf.index in early) for leaf in plan.leaves)
    )


def _explain_leaf(plan: Plan, leaf: LeafPlan, method: str, groups: Groups, is_early: bool) -> LeafExplanation:
    if not leaf.sites:
        norm = ""
    elif all("gradient" in site.payload for site in leaf.sites):
        norm = "stored"
    else:
        norm = leaf.norm_route
    names = [groups.names[index] for index in (leaf.group if isinstance(leaf.group, tuple) else (leaf.group,))]
    group = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    finishes = "backward" if is_early or (method == "two_pass" and leaf.kind != "joint") else "after"
    kept = 0 if finishes == "backward" else leaf.cost.kept_bytes
    chosen = [XLA if method == "vmap" else site.kernels for site in leaf.sites]
    passes = 2 if method == "two_pass" and leaf.kind != "joint" else 1
    return LeafExplanation(
        leaf.path,
        leaf.shape,
        group,
        leaf.kind,
        norm,
        finishes,
        kept + leaf.cost.scratch_bytes,
        passes * leaf.cost.flops,
        leaf.reason,
        ", ".join(sorted({kernels.norm for kernels in chosen})),
        ", ".join(sorted({kernels.sum for kernels in chosen})),
    )
