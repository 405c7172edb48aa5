"""The models of the benchmarks, once, as pure functions of one example.

Parameters are one flat dict under the names and in the layouts of a torch `state_dict` (a linear weight is `[out, in]`), so
that a peer in either framework starts from the same numbers, and their updates compare entry by entry.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


class Model(Protocol):
    """What a benchmark trains."""

    def init(self, rng: np.random.Generator) -> dict[str, Any]: ...

    def draw_batch(self, rng: np.random.Generator, rows: int) -> Any: ...

    def loss(self, params: Any, example: Any) -> jax.Array: ...


LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A fully connected classifier with ReLU.

    Attributes:
        widths: Inputs, hidden widths, classes.
    """

    widths: tuple[int, ...] = (784, 1024, 1024, 10)

    def init(self, rng: np.random.Generator) -> Params:
        params: Params = {}
        for index, (fan_in, fan_out) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            params |= _linear(rng, f"layers.{index}", fan_in, fan_out, bias=True)
        return params

    def draw_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return {
            "inputs": rng.standard_normal((rows, self.widths[0]), np.float32),
            "labels": rng.integers(self.widths[-1], size=rows, dtype=np.int32),
        }

    def loss(self, params: Params, example: Batch) -> jax.Array:
        """The cross-entropy of one example."""
        x = jnp.asarray(example["inputs"])  # [D]
        last = len(self.widths) - 2
        for index in range(last + 1):
            x = _apply_linear(params, f"layers.{index}", x)
            x = x if index == last else jax.nn.relu(x)
        return _cross_entropy(x, example["labels"])


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A small decoder-only language model: pre-norm, learned positions, untied head.

    Attributes:
        num_blocks: N.
        width: D, the width of the residual stream; the feed-forward layer is four times as wide.
        num_heads: Attention heads.
        length: L, tokens of one example.
        vocabulary: Number of tokens.
    """

    num_blocks: int = 4
    width: int = 256
    num_heads: int = 4
    length: int = 128
    vocabulary: int = 4096

    def init(self, rng: np.random.Generator) -> Params:
        width = self.width
        params: Params = {
            "tokens.weight": 0.02 * rng.standard_normal((self.vocabulary, width), np.float32),
            "positions.weight": 0.02 * rng.standard_normal((self.length, width), np.float32),
        }
        for index in range(self.num_blocks):
            block = f"blocks.{index}"
            params |= _norm(f"{block}.attention_norm", width)
            params |= _linear(rng, f"{block}.query_key_value", width, 3 * width, bias=True)
            params |= _linear(rng, f"{block}.attention_out", width, width, bias=True)
            params |= _norm(f"{block}.feed_forward_norm", width)
            params |= _linear(rng, f"{block}.feed_forward_in", width, 4 * width, bias=True)
            params |= _linear(rng, f"{block}.feed_forward_out", 4 * width, width, bias=True)
        return params | _norm("norm", width) | _linear(rng, "head", width, self.vocabulary, bias=False)

    def draw_batch(self, rng: np.random.Generator, rows: int) -> Batch:
        tokens = rng.integers(self.vocabulary, size=(rows, self.length + 1), dtype=np.int32)
        return {"inputs": tokens[:, :-1].copy(), "labels": tokens[:, 1:].copy()}

    def loss(self, params: Params, example: Batch) -> jax.Array:
        """The mean next-token cross-entropy of one example."""
        x = jnp.asarray(params["tokens.weight"])[example["inputs"]] + jnp.asarray(params["positions.weight"])  # [L, D]
        for index in range(self.num_blocks):
            block = f"blocks.{index}"
            x = x + self._attention(params, block, _apply_norm(params, f"{block}.attention_norm", x))
            hidden = _apply_linear(
                params, f"{block}.feed_forward_in", _apply_norm(params, f"{block}.feed_forward_norm", x)
            )
            x = x + _apply_linear(params, f"{block}.feed_forward_out", jax.nn.gelu(hidden, approximate=True))
        logits = _apply_linear(params, "head", _apply_norm(params, "norm", x))  # [L, vocabulary]
        return jnp.mean(jax.vmap(_cross_entropy)(logits, example["labels"]))

    def _attention(self, params: Params, block: str, x: jax.Array) -> jax.Array:
        heads = _apply_linear(params, f"{block}.query_key_value", x)
        query, key, value = jnp.moveaxis(heads.reshape(self.length, 3, self.num_heads, -1), 1, 0)  # [L, heads, D/heads]
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return _apply_linear(params, f"{block}.attention_out", mixed.reshape(self.length, self.width))


def _linear(rng: np.random.Generator, name: str, fan_in: int, fan_out: int, *, bias: bool) -> Params:
    weight = rng.standard_normal((fan_out, fan_in), np.float32) / np.sqrt(fan_in, dtype=np.float32)
    return {f"{name}.weight": weight} | ({f"{name}.bias": np.zeros(fan_out, np.float32)} if bias else {})


def _norm(name: str, width: int) -> Params:
    return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}


def _apply_linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    y = x @ params[f"{name}.weight"].T
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _apply_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + LAYER_NORM_EPS)
    weight, bias = (jnp.broadcast_to(params[f"{name}.{part}"], x.shape) for part in ("weight", "bias"))
    return centered * scale * weight + bias


def _cross_entropy(logits: jax.Array, label: np.ndarray) -> jax.Array:
    return jax.nn.logsumexp(logits) - logits[label]
