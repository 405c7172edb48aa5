"""The layers that the architectures share, as flax NNX modules of one sequence `[L, ...]`.

A constructor declares parameters and makes no arrays; values are filled in at call time, and cast to the compute dtype at
use. Norms compute in float32. Matrices meet their inputs as plain products and tables as plain gathers, never merged with
anything, so that whoever analyzes the function sees where each parameter enters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

#: By the names of Hugging Face.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """How a parameter starts: constant + stddev * normal, or uniform in [-bound, bound] if `bound` is positive."""

    constant: float = 0.0
    stddev: float = 0.0
    bound: float = 0.0


def parameter(*shape: int, **start: float) -> nnx.Param[Any]:
    """A parameter without a value; the keywords are those of `Start`."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), start=Start(**start))


class Linear(nnx.Module):
    """y = x W + b, with the adapter's (alpha / r) (x A) B where it has one.

    Parameters: kernel W `[in, out]`, bias b `[out]`, lora_a A `[in, r]`, lora_b B `[r, out]`.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, stddev: float, dtype: Any) -> None:
        self.dtype = dtype
        self.kernel = parameter(in_features, out_features, stddev=stddev)
        self.bias = parameter(out_features) if use_bias else None
        self.lora_a = nnx.data(None)  # a parameter once `adapt` is called
        self.lora_b = nnx.data(None)
        self.lora_scale = 0.0

    def adapt(self, rank: int, scale: float) -> None:
        """Gives the layer an adapter that starts by changing nothing: A uniform as in PEFT, B zero."""
        in_features, out_features = self.kernel.shape
        self.lora_a = parameter(in_features, rank, bound=in_features**-0.5)
        self.lora_b = parameter(rank, out_features)
        self.lora_scale = scale

    def __call__(self, x: jax.Array, *, out_dtype: Any = None) -> jax.Array:
        """`[L, in]` to `[L, out]`, accumulated in and returned as `out_dtype`, or the compute dtype."""
        y = _product(x, cast(self.kernel, self.dtype), out_dtype)
        if self.bias is not None:
            y = y + jnp.broadcast_to(cast(self.bias, y.dtype), y.shape)
        if self.lora_a is not None and self.lora_b is not None:
            inner = _product(x, cast(self.lora_a, self.dtype), None)
            y = y + self.lora_scale * _product(inner, cast(self.lora_b, self.dtype), out_dtype)
        return y


class Embedding(nnx.Module):
    """Rows of a table. Parameters: table `[V, D]`."""

    def __init__(self, num_rows: int, width: int, *, stddev: float, dtype: Any) -> None:
        self.dtype = dtype
        self.table = parameter(num_rows, width, stddev=stddev)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[L]` to `[L, D]`; NaN where an id is outside the table."""
        return jnp.take(self.table[...], ids, axis=0).astype(self.dtype)


def tied_logits(hidden: jax.Array, table: Any) -> jax.Array:
    """Logits `[L, V]` in float32 of `hidden` `[L, D]` against an embedding table `[V, D]`."""
    return _product(hidden, jnp.asarray(table, hidden.dtype).T, jnp.float32)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis. Parameters: scale, bias `[D]`."""

    def __init__(self, width: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = parameter(width, constant=1.0)
        self.bias = parameter(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(cast(param, jnp.float32), x.shape) for param in (self.scale, self.bias))
        return (normal * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis. Parameters: scale `[D]`. Source: arXiv 1910.07467."""

    def __init__(self, width: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = parameter(width, constant=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normal * jnp.broadcast_to(cast(self.scale, jnp.float32), x.shape)).astype(x.dtype)


class Mlp(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, up: Linear, down: Linear, *, activation: str) -> None:
        self.activation = activation
        self.up = up
        self.down = down

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMlp(nnx.Module):
    """down(activation(gate(x)) * up(x)). Source: arXiv 2002.05202."""

    def __init__(self, gate: Linear, up: Linear, down: Linear, *, activation: str) -> None:
        self.activation = activation
        self.gate = gate
        self.up = up
        self.down = down

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


def cast(param: Any, dtype: Any) -> jax.Array:
    """The value of a parameter, which may be a NumPy array, in the dtype it is used in."""
    return jnp.asarray(param[...], dtype)


def _product(x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=out_dtype)
