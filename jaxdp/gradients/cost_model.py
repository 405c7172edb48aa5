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
    """What a device does in a second; only the ratios matter.

    Attributes:
        flops: Floating-point operations of one product for all examples.
        small_flops: Those of a product for each example: Gram matrices and per-example gradients.
        bytes: Read or written.
    """

    flops: float
    small_flops: float
    bytes: float


# By the CPU's the rule takes 1.4 % more time than the fastest routes do over the shapes of `benchmarks.norm_routes`, 22 % at worst,
# and by rates fitted to them no less. The GPU's are those of a data sheet.
RATES = {"cpu": Rates(60e9, 60e9, 12e9), "gpu": Rates(790e12, 790e12, 4.3e12)}


def predicted_seconds(sizes: tuple[int, int, int], tokens: int, rows: int, rates: Rates) -> dict[str, float]:
    """Route -> seconds for the norms and the clipped sum of one dense use, the time rule of algorithms.md 1.10.

    Args:
        sizes: H, I, J.
        tokens: T.
        rows: B.
        rates: Of the device.
    """
    h, i, j = sizes
    product, entries = 2.0 * rows * h * tokens * i * j, 4.0 * rows * h * i * j
    gram = 2.0 * rows * h * tokens**2 * (i + j) / rates.small_flops + 4 * 4.0 * rows * h * tokens**2 / rates.bytes
    direct = product / rates.small_flops + 2 * entries / rates.bytes
    return {
        "gram": gram + product / rates.flops,
        "direct": direct + product / rates.flops,
        "spill": direct + entries / rates.bytes,  # the stored gradients are summed instead of multiplied again
    }


def fastest(sizes: tuple[int, int, int], tokens: int, rows: int, rates: Rates) -> str:
    """The route with the least `predicted_seconds`; gradients are stored only where they take no more room than factors."""
    seconds = predicted_seconds(sizes, tokens, rows, rates)
    if not _is_small(sizes, tokens):
        del seconds["spill"]
    return min(seconds, key=seconds.__getitem__)


def _is_small(sizes: tuple[int, int, int], tokens: int) -> bool:
    h, i, j = sizes
    return h * i * j <= 2 * tokens * (i + j) * h


def norm_route(uses: Sequence[tuple[Factoring, tuple[Loop, ...]]], rows: int) -> tuple[NormRoute, bool]:
    """Gram or direct, and whether to keep the per-example gradients for the sum (spill).

    Several uses of one weight are summed into one stored gradient where it is small, and take Gram matrices elsewhere.
    """
    tokens = sum(
        factoring.num_tokens * math.prod(loop.length for loop in loops if not loop.is_stacked)
        for factoring, loops in uses
    )
    sizes = uses[0][0].sizes
    is_joint = len(uses) > 1 or any(not loop.is_stacked for loop in uses[0][1])
    if tokens == 1 or (uses[0][0].has_ids and not is_joint):
        return "gram", False
    if is_joint:
        return ("direct" if _is_small(sizes, tokens) else "gram"), False
    route = fastest(sizes, tokens, rows, RATES["cpu" if jax.default_backend() == "cpu" else "gpu"])
    return ("gram", False) if route == "gram" else ("direct", route == "spill")


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
