"""Rotary position embedding, with the frequency scalings of longer contexts.

Source: arXiv 2104.09864. Pairs are (i, i + P/2), as Hugging Face stores them, not adjacent entries.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.models import hf_config as hf


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The frequencies by which each pair of a head's entries rotates from one position to the next.

    Attributes:
        head_dim: P.
        theta: Base of the geometric series of wavelengths.
        scaling: `"linear"` divides every frequency by `factor`; `"llama3"` only those whose wavelength exceeds
            `original_max_length / low_freq_factor`, none below `original_max_length / high_freq_factor`, and blends between.
        factor: By how much the context was extended.
        low_freq_factor: Of `"llama3"`.
        high_freq_factor: Of `"llama3"`.
        original_max_length: Of `"llama3"`: the context before extension, in tokens.
    """

    head_dim: int
    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    @classmethod
    def from_hf(cls, hf_config: hf.HfConfig, head_dim: int) -> Rotary:
        """From `rope_theta` and `rope_scaling`, or the newer `rope_parameters`, of a `config.json`.

        Raises:
            ValueError: A kind of scaling that is not implemented, or a part of the head that is not rotated.
        """
        hf.divided("head_dim", head_dim, "the size of a rotated pair", 2)
        scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
            raise ValueError(f"config.json: rope_scaling must be one set of numbers for all layers, got {scaling!r}.")
        for source in (hf_config, scaling):
            hf.refuse(source, partial_rotary_factor=1.0)
        theta = hf.number({"rope_theta": hf_config.get("rope_theta")} | scaling, "rope_theta", 10_000.0)
        # "type" is the older name of "rope_type".
        kinds = ("default", "linear", "llama3")
        kind: Any = hf.choice({"rope_type": scaling.get("type")} | scaling, "rope_type", "default", kinds)
        if kind == "default":
            return cls(head_dim, theta)
        factor = hf.number(scaling, "factor")
        if kind == "linear":
            return cls(head_dim, theta, kind, factor)
        low, high = hf.number(scaling, "low_freq_factor"), hf.number(scaling, "high_freq_factor")
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor = {low} must be below high_freq_factor = {high}.")
        return cls(head_dim, theta, kind, factor, low, high, hf.integer(scaling, "original_max_position_embeddings"))

    def frequencies(self) -> np.ndarray:
        """Radians per position of each pair, `[P / 2]` float32."""
        plain = self.theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.scaling == "linear":
            plain = plain / self.factor
        elif self.scaling == "llama3":
            turns = self.original_max_length * plain / (2.0 * math.pi)  # within the original context
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0.0, 1.0)
            plain = kept * plain + (1.0 - kept) * plain / self.factor
        return plain.astype(np.float32)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates `x` `[L, H, P]` by `positions` `[L]`, in float32; returns the dtype of `x`."""
        angles = positions.astype(jnp.float32)[:, None, None] * self.frequencies()[None, None, :]  # [L, 1, P / 2]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
