"""Language models of known sizes in plain JAX: GPT-2, and a stack of Llama blocks.

`loss(params, example)` takes the L + 1 tokens of one example. Parameters are one flat dict, as in `benchmarks.models`, drawn
by JAX: under `jax.eval_shape` a model of any size takes no memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

Layer = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What the two share: pre-norm blocks between an embedding and a head.

    Attributes:
        num_blocks: N.
        width: D, the width of the residual stream.
        num_heads: Attention heads.
        length: L, predicted tokens of one example.
        vocabulary: Number of tokens.
        scan: Stack the blocks on a leading axis N and scan over them; otherwise they are unrolled.
        remat: Keep only the input of each block for the backward pass, and compute the rest again.
        dtype: Of the parameters and the activations; norms, softmax and loss compute in float32.
    """

    num_blocks: int = 12
    width: int = 768
    num_heads: int = 12
    length: int = 128
    vocabulary: int = 50257
    scan: bool = False
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def outer_shapes(self) -> Shapes:
        """The parameters outside the blocks."""
        raise NotImplementedError

    def block_shapes(self) -> Shapes:
        """The parameters of one block."""
        raise NotImplementedError

    def embed(self, params: Layer, tokens: jax.Array) -> jax.Array:  # [L] -> [L, D]
        raise NotImplementedError

    def block(self, layer: Layer, x: jax.Array) -> jax.Array:  # [L, D] -> [L, D]
        raise NotImplementedError

    def logits(self, params: Layer, x: jax.Array) -> jax.Array:  # [L, D] -> [L, vocabulary]
        raise NotImplementedError

    def shapes(self) -> Shapes:
        """Every parameter."""
        if self.scan:
            blocks = {f"blocks.{name}": (self.num_blocks, *shape) for name, shape in self.block_shapes().items()}
        else:
            blocks = {
                f"blocks.{index}.{name}": shape
                for index in range(self.num_blocks)
                for name, shape in self.block_shapes().items()
            }
        return self.outer_shapes() | blocks

    def init(self, rng: np.random.Generator) -> dict[str, Any]:
        return _drawer(self)(jax.random.key(int(rng.integers(2**31))))

    def _draw(self, key: jax.Array) -> dict[str, Any]:
        params = {}
        for index, (name, shape) in enumerate(self.shapes().items()):
            if name.endswith("bias"):
                leaf = jnp.zeros(shape)
            elif name.endswith("scale"):
                leaf = jnp.ones(shape)
            else:
                leaf = 0.02 * jax.random.normal(jax.random.fold_in(key, index), shape)
            params[name] = leaf.astype(self.dtype)
        return params

    def draw_batch(self, rng: np.random.Generator, rows: int) -> Any:  # [B, L + 1]
        return rng.integers(self.vocabulary, size=(rows, self.length + 1), dtype=np.int32)

    def loss(self, params: Any, example: Any) -> jax.Array:
        """The mean next-token cross-entropy of one example, `[L + 1]`."""
        tokens = jnp.asarray(example)
        x = self._blocks(params, self.embed(params, tokens[:-1]))
        logits = self.logits(params, x).astype(jnp.float32)
        of_labels = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_labels)

    def _blocks(self, params: Layer, x: jax.Array) -> jax.Array:
        block = jax.checkpoint(self.block) if self.remat else self.block
        if self.scan:
            stacked = {name: params[f"blocks.{name}"] for name in self.block_shapes()}
            return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, stacked)[0]
        for index in range(self.num_blocks):
            x = block({name: params[f"blocks.{index}.{name}"] for name in self.block_shapes()}, x)
        return x


@dataclasses.dataclass(frozen=True)
class Gpt2(LanguageModel):
    """GPT-2: learned positions, LayerNorm, biases, gelu.

    Attributes:
        positions: Rows of the table of positions, at least `length`.
        tied: The head is the token embedding.
    """

    positions: int = 1024
    tied: bool = True

    SIZES: ClassVar = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}

    @classmethod
    def of_size(cls, size: str, **options: Any) -> Gpt2:
        """The published model of 124, 355 or 774 million parameters."""
        num_blocks, width, num_heads = cls.SIZES[size]
        return cls(num_blocks, width, num_heads, **options)

    def outer_shapes(self) -> Shapes:
        d, v = self.width, self.vocabulary
        shapes = {"tokens.embedding": (v, d), "positions.embedding": (self.positions, d), **_norm("norm", d)}
        return shapes if self.tied else shapes | {"head.kernel": (d, v)}

    def block_shapes(self) -> Shapes:
        d = self.width
        return {
            **_norm("attention_norm", d),
            **_dense("query_key_value", d, 3 * d),
            **_dense("attention_out", d, d),
            **_norm("feed_forward_norm", d),
            **_dense("feed_forward_in", d, 4 * d),
            **_dense("feed_forward_out", 4 * d, d),
        }

    def embed(self, params: Layer, tokens: jax.Array) -> jax.Array:
        return params["tokens.embedding"][tokens] + params["positions.embedding"][jnp.arange(self.length)]

    def block(self, layer: Layer, x: jax.Array) -> jax.Array:
        heads = _apply_dense(layer, "query_key_value", _layer_norm(layer, "attention_norm", x))
        query, key, value = jnp.moveaxis(heads.reshape(self.length, 3, self.num_heads, -1), 1, 0)  # [L, heads, D/heads]
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + _apply_dense(layer, "attention_out", mixed.reshape(self.length, self.width))
        hidden = _apply_dense(layer, "feed_forward_in", _layer_norm(layer, "feed_forward_norm", x))
        return x + _apply_dense(layer, "feed_forward_out", jax.nn.gelu(hidden, approximate=True))

    def logits(self, params: Layer, x: jax.Array) -> jax.Array:
        x = _layer_norm(params, "norm", x)
        return x @ (params["tokens.embedding"].T if self.tied else params["head.kernel"])


@dataclasses.dataclass(frozen=True)
class Llama(LanguageModel):
    """A stack of Llama blocks: RMSNorm, rotary positions, SwiGLU, no biases; the defaults are four blocks of the 7B model.

    The vocabulary is small, so that blocks are what is measured.

    Attributes:
        feed_forward: Width of the feed-forward layer.
    """

    num_blocks: int = 4
    width: int = 4096
    num_heads: int = 32
    vocabulary: int = 512
    feed_forward: int = 11008

    def outer_shapes(self) -> Shapes:
        d, v = self.width, self.vocabulary
        return {"tokens.embedding": (v, d), "norm.scale": (d,), "head.kernel": (d, v)}

    def block_shapes(self) -> Shapes:
        d, f = self.width, self.feed_forward
        square = {f"{name}.kernel": (d, d) for name in ("query", "key", "value", "attention_out")}
        feed_forward = {"gate.kernel": (d, f), "up.kernel": (d, f), "down.kernel": (f, d)}
        return {"attention_norm.scale": (d,), **square, "feed_forward_norm.scale": (d,), **feed_forward}

    def embed(self, params: Layer, tokens: jax.Array) -> jax.Array:
        return params["tokens.embedding"][tokens]

    def block(self, layer: Layer, x: jax.Array) -> jax.Array:
        y = _rms_norm(layer, "attention_norm", x)
        query, key, value = (
            (y @ layer[f"{name}.kernel"]).reshape(self.length, self.num_heads, -1) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True)
        x = x + mixed.reshape(self.length, self.width) @ layer["attention_out.kernel"]
        y = _rms_norm(layer, "feed_forward_norm", x)
        return x + (jax.nn.silu(y @ layer["gate.kernel"]) * (y @ layer["up.kernel"])) @ layer["down.kernel"]

    def logits(self, params: Layer, x: jax.Array) -> jax.Array:
        return _rms_norm(params, "norm", x) @ params["head.kernel"]


@functools.cache
def _drawer(model: LanguageModel) -> Any:
    return jax.jit(model._draw)  # kept: every contender draws the parameters again


def _dense(name: str, fan_in: int, fan_out: int) -> Shapes:
    return {f"{name}.kernel": (fan_in, fan_out), f"{name}.bias": (fan_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.scale": (width,), f"{name}.bias": (width,)}


def _apply_dense(layer: Layer, name: str, x: jax.Array) -> jax.Array:
    y = x @ layer[f"{name}.kernel"]
    return y + jnp.broadcast_to(layer[f"{name}.bias"], y.shape)


def _layer_norm(layer: Layer, name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normal = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + NORM_EPS)
    scale, bias = (jnp.broadcast_to(layer[f"{name}.{part}"], x.shape) for part in ("scale", "bias"))
    return normal.astype(x.dtype) * scale + bias


def _rms_norm(layer: Layer, name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPS)
    return normal.astype(x.dtype) * jnp.broadcast_to(layer[f"{name}.scale"], x.shape)


def _rotate(x: jax.Array) -> jax.Array:  # [L, heads, D/heads]
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angles = np.outer(np.arange(x.shape[0], dtype=np.float32), frequencies)[:, None, :]  # [L, 1, D/heads/2]
    cos, sin = (jnp.broadcast_to(f(angles), (*x.shape[:-1], half)).astype(x.dtype) for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
