"""The kernels as programs to compile, at the dense layers of known models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels

LAYERS = {  # model: (D, P) of its dense layers
    "gpt2": [(768, 768), (768, 2304), (768, 3072)],
    "gpt2-large": [(1280, 1280), (1280, 3840), (1280, 5120)],
    "llama-7b": [(4096, 4096), (4096, 11008)],
}
SHAPES = [layer for layers in LAYERS.values() for layer in layers]
LENGTHS = (128, 1024)
BATCH = 8


def program(
    name: str, num_tokens: int, width: int, out: int, *, implementation: pallas_kernels.Implementation
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """A function and what to compile it for.

    Args:
        name: "gram_norms", "wgrad_norms", "wgrad_norms stored", "clip_noise_dense" (accumulator and noise) or
            "clip_noise_dense accumulating" (accumulator, no noise).
        num_tokens: T.
        width: D.
        out: P.
        implementation: As in `pallas_kernels.api`.
    """
    operands = [jax.ShapeDtypeStruct((BATCH, num_tokens, size), jnp.bfloat16) for size in (width, out)]
    factors, total, scalar = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((BATCH,), (width, out), ()))
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
    call = functools.partial(pallas_kernels.clip_noise_dense, implementation=implementation)

    def final(x, g, factors, accumulator, noise_stddev, key_data):
        return call(x, g, factors, accumulator=accumulator, noise_stddev=noise_stddev, key_data=key_data)

    def accumulating(x, g, factors, accumulator):
        return call(x, g, factors, accumulator=accumulator)

    return {
        "gram_norms": (functools.partial(pallas_kernels.gram_norms, implementation=implementation), operands),
        "wgrad_norms": (functools.partial(pallas_kernels.wgrad_norms, implementation=implementation), operands),
        "wgrad_norms stored": (
            functools.partial(
                pallas_kernels.wgrad_norms, store=True, dtype=jnp.bfloat16, implementation=implementation
            ),
            operands,
        ),
        "clip_noise_dense": (final, [*operands, factors, total, scalar, key_data]),
        "clip_noise_dense accumulating": (accumulating, [*operands, factors, total]),
    }[name]


NAMES = ("gram_norms", "wgrad_norms", "wgrad_norms stored", "clip_noise_dense", "clip_noise_dense accumulating")
