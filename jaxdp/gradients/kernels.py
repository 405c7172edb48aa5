"""Which sites take their norm or their clipped sum from a kernel of `pallas_kernels`, and what these round (S4).

Decided once for each site, from shapes and dtypes, when the plan is made: the norm must know how the sum will be taken, since
it charges for its rounding. A kernel serves one dense product or convolution of bfloat16 or float16 with more than one token,
whose factors are kept. Everything else is XLA's: float32 operands, several products side by side, embeddings, weights with a
joint norm, one token, and per-example gradients that are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxdp import _validate
from jaxdp.gradients.factors import Factoring, Payload
from pallas_kernels import Implementation, support

if TYPE_CHECKING:
    from jaxdp.gradients.norms import NormRoute

_SUM = "clip_noise_dense"
_NORM: Mapping[NormRoute, str] = {"gram": "gram_norms", "direct": "wgrad_norms"}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementation of a site's norm and that of its clipped sum."""

    norm: Implementation = "xla"
    sum: Implementation = "xla"


XLA = Kernels()


def check_implementation(implementation: Any, method: str) -> Implementation | None:
    if implementation is None:
        return None
    _validate.one_of("implementation", implementation, get_args(Implementation))
    if method == "vmap" and implementation != "xla":
        raise ValueError(
            f"method='vmap' forms the gradient of every example and calls no kernel: implementation={implementation!r} would do "
            "nothing; leave it out, or use another method."
        )
    return implementation


def check_runs_here(implementation: Implementation | None) -> None:
    """Refuses a named implementation that no operand could have, for the JAX or the device that is compiled for."""
    reason = None if implementation is None else support.why_not_here(implementation)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}; None chooses what can.")


def choose_kernels(
    factoring: Factoring | None,
    payload: Mapping[str, jax.ShapeDtypeStruct],
    route: NormRoute,
    *,
    rows: int,
    implementation: Implementation | None,
) -> Kernels:
    """The one decision, for a site that is alone in its norm.

    Args:
        factoring: How its gradient factors; None for a copy.
        payload: Shapes of what it passes on, of one example.
        route: How its norm is taken.
        rows: Examples that are differentiated at once.
        implementation: As in `clipped_grad`.
    """
    if factoring is None or factoring.has_ids or factoring.num_tokens == 1 or "gradient" in payload:
        return XLA
    if payload["left"].shape[0] != 1:  # H
        return XLA
    x, g = (jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype) for s in (payload["left"], payload["right"]))
    if support.why_not_on("mosaic_gpu", x, g) is not None:
        return XLA
    return Kernels(
        norm=pallas_kernels.chosen_implementation(_NORM[route], x, g, implementation),
        sum=pallas_kernels.chosen_implementation(_SUM, x, g, implementation),
    )


def _operands(payload: Payload) -> tuple[jax.Array, jax.Array]:
    return payload["left"][:, 0], payload["right"][:, 0]  # [B, T, D], [B, T, P]


def squared_norm(payload: Payload, route: NormRoute, kernels: Kernels) -> tuple[jax.Array, int]:
    """||M_b||^2 by a kernel, `[B]`, and the roundings behind it, as `pallas_kernels.roundings` counts them."""
    x, g = _operands(payload)
    kernel = {"gram": pallas_kernels.gram_norms, "direct": pallas_kernels.wgrad_norms}[route]
    square = kernel(x, g, implementation=kernels.norm)
    assert isinstance(square, jax.Array)
    return square, pallas_kernels.roundings(_NORM[route], x.shape, g.shape)


def weighted_sum(payload: Payload, factors: jax.Array, keep: jax.Array, kernels: Kernels) -> jax.Array:
    """sum_b factors_b M_b by a kernel, `[1, I, J]` float32: it leaves out whatever a factor of zero belongs to (S9)."""
    x, g = _operands(payload)
    kept = jnp.where(keep, factors, jnp.zeros_like(factors)).astype(jnp.float32)
    return pallas_kernels.clip_noise_dense(x, g, kept, implementation=kernels.sum)[None]


def sum_roundings(payload: Payload) -> int:
    """The roundings of `weighted_sum`."""
    x, g = _operands(payload)
    return pallas_kernels.roundings(_SUM, x.shape, g.shape)
