"""Static costs of a route, from shapes alone: the time rule of algorithms.md 1.10."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jaxdp.gradients.factors import Factoring
from jaxdp.gradients.norms import NormRoute

if TYPE_CHECKING:
    from jaxdp.gradients.sites import Site
    from jaxdp.gradients.uses import Loop


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a leaf costs beyond the non-private step.

    Attributes:
        flops: Floating-point operations of its norms.
        kept_bytes: What book-keeping keeps of it until the factors are known.
        scratch_bytes: What its norm needs while it is taken.
    """

    flops: float
    kept_bytes: int
    scratch_bytes: int


@dataclasses.dataclass(frozen=True)
class Rates:
    """Floating-point operations and bytes for each second; only their ratio matters."""

    flops: float
    bytes: float


_RATES = {"cpu": Rates(60e9, 12e9), "gpu": Rates(790e12, 4.3e12)}


def norm_route(uses: Sequence[tuple[Factoring, tuple[Loop, ...]]], rows: int) -> tuple[NormRoute, bool]:
    """Gram or direct, and whether to keep the per-example gradients for the sum (spill).

    Several uses of one weight are summed into one stored gradient where it is small, and take Gram matrices elsewhere.
    """
    rates = _RATES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    tokens = sum(
        factoring.num_tokens * math.prod(loop.length for loop in loops if not loop.is_stacked)
        for factoring, loops in uses
    )
    h, i, j = uses[0][0].sizes
    is_joint = len(uses) > 1 or any(not loop.is_stacked for loop in uses[0][1])
    if tokens == 1 or (uses[0][0].has_ids and not is_joint):
        return "gram", False
    is_small = h * i * j <= 2 * tokens * (i + j) * h  # the per-example gradient takes no more room than its factors
    if is_joint:
        return ("direct" if is_small else "gram"), False
    product = 2.0 * rows * h * tokens * i * j / rates.flops
    entries = 4.0 * rows * h * i * j / rates.bytes
    gram = 2.0 * rows * h * tokens**2 * (i + j) / rates.flops + 4 * 4.0 * rows * h * tokens**2 / rates.bytes
    direct = product + 2 * entries
    spill = direct + entries - product  # the stored gradients are summed instead of multiplied again
    if is_small and spill < min(gram, direct):
        return "direct", True
    return ("gram", False) if gram <= direct else ("direct", False)


def cost_of(sites: Sequence[Site], route: NormRoute, rows: int) -> Cost:
    flops, kept, scratch = 0.0, 0, 0
    for site in sites:
        repeats = math.prod(loop.length for loop in site.loops)
        kept += sum(rows * repeats * math.prod(s.shape) * s.dtype.itemsize for s in site.payload.values())
        if site.factoring is None or site.spills:
            continue
        (h, i, j), t = site.factoring.sizes, site.factoring.num_tokens
        if t == 1:
            flops += 2.0 * rows * repeats * h * (i + j)
        elif site.factoring.has_ids:
            flops += 2.0 * rows * repeats * t * t * j
            scratch = max(scratch, 4 * rows * t * t)
        elif route == "gram":
            flops += 2.0 * rows * repeats * h * t * t * (i + j)
            scratch = max(scratch, 2 * 4 * rows * h * t * t)
        else:
            flops += 2.0 * rows * repeats * h * t * i * j
            scratch = max(scratch, 4 * rows * h * i * j)
    return Cost(flops, kept, scratch)
