"""OPT: learned positions with an offset, biases, ReLU; LayerNorm before each part, or after it (350M).

Source: arXiv 2205.01068.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdp.models import hf_config as hf
from jaxdp.models.attention import Attention, Cache, Implementation
from jaxdp.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, Mlp, tied_logits
from jaxdp.models.tensors import Tensor, layer, norm

PREFIXES = ("model.",)
IGNORED = ()

#: Position p is row p + 2: the first two rows are left from the padding index of fairseq.
POSITION_OFFSET = 2

_DECODER = "model.decoder"
_BLOCK = "model.decoder.layers.{}"
TENSORS: dict[str, Tensor] = {
    "embed/tokens/table": Tensor(f"{_DECODER}.embed_tokens.weight"),
    "embed/positions/table": Tensor(f"{_DECODER}.embed_positions.weight"),
    **layer("embed/project", f"{_DECODER}.project_in", is_transposed=True, use_bias=False),
    **norm("blocks/attention_norm", f"{_BLOCK}.self_attn_layer_norm", use_bias=True),
    **layer("blocks/attention/q", f"{_BLOCK}.self_attn.q_proj", is_transposed=True),
    **layer("blocks/attention/k", f"{_BLOCK}.self_attn.k_proj", is_transposed=True),
    **layer("blocks/attention/v", f"{_BLOCK}.self_attn.v_proj", is_transposed=True),
    **layer("blocks/attention/o", f"{_BLOCK}.self_attn.out_proj", is_transposed=True),
    **norm("blocks/mlp_norm", f"{_BLOCK}.final_layer_norm", use_bias=True),
    **layer("blocks/mlp/up", f"{_BLOCK}.fc1", is_transposed=True),
    **layer("blocks/mlp/down", f"{_BLOCK}.fc2", is_transposed=True),
    **norm("head/norm", f"{_DECODER}.final_layer_norm", use_bias=True),
    **layer("head/project", f"{_DECODER}.project_out", is_transposed=True, use_bias=False),
    **layer("head/out", "lm_head", is_transposed=True, use_bias=False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a `config.json` of an OPT says, in the words of this package.

    Attributes:
        vocab_size: V.
        num_blocks: N.
        width: D.
        max_length: Positions; the table has two rows more.
        is_tied: Whether the head is the token embedding.
        num_heads: H.
        feed_forward: F.
        activation: Of the feed-forward part.
        embedding_width: Width of the token embedding and of the head; projected to D and back where it differs.
        is_pre_norm: Whether the norms stand before attention and feed-forward, or after the sum with the residual stream.
        has_final_norm: Whether a norm follows the last block.
        has_bias: Whether the linear layers of a block have biases.
        stddev: Of the random initialization.
    """

    vocab_size: int
    num_blocks: int
    width: int
    max_length: int
    is_tied: bool
    num_heads: int
    feed_forward: int
    activation: str
    embedding_width: int
    is_pre_norm: bool
    has_final_norm: bool
    has_bias: bool
    stddev: float

    @classmethod
    def from_hf(cls, hf_config: hf.HfConfig) -> Config:
        """From a parsed `config.json` of model type `opt`.

        Raises:
            ValueError: A setting is missing, or not implemented.
        """
        hf.refuse(hf_config, layer_norm_elementwise_affine=True)
        width, num_heads = hf.integer(hf_config, "hidden_size"), hf.integer(hf_config, "num_attention_heads")
        hf.divided("hidden_size", width, "num_attention_heads", num_heads)
        is_pre_norm = hf.flag(hf_config, "do_layer_norm_before", default=True)
        return cls(
            vocab_size=hf.integer(hf_config, "vocab_size"),
            num_blocks=hf.integer(hf_config, "num_hidden_layers"),
            width=width,
            max_length=hf.integer(hf_config, "max_position_embeddings", 2048),
            is_tied=hf.flag(hf_config, "tie_word_embeddings", default=True),
            num_heads=num_heads,
            feed_forward=hf.integer(hf_config, "ffn_dim"),
            activation=hf.choice(hf_config, "activation_function", "relu", ACTIVATIONS),
            embedding_width=hf.integer(hf_config, "word_embed_proj_dim", width),
            is_pre_norm=is_pre_norm,
            has_final_norm=is_pre_norm and not hf.flag(hf_config, "_remove_final_layer_norm", default=False),
            has_bias=hf.flag(hf_config, "enable_bias", default=True),
            stddev=hf.number(hf_config, "init_std", 0.02),
        )

    @property
    def cache_heads(self) -> tuple[int, int]:
        """K and P of the cached keys and values."""
        return self.num_heads, self.width // self.num_heads


class Embed(nnx.Module):
    """Tokens `[L]` and their positions to `[L, D]`."""

    def __init__(self, config: Config, *, dtype: Any) -> None:
        c = config
        self.tokens = Embedding(c.vocab_size, c.embedding_width, stddev=c.stddev, dtype=dtype)
        self.positions = Embedding(c.max_length + POSITION_OFFSET, c.width, stddev=c.stddev, dtype=dtype)
        self.project = _projection(c, c.embedding_width, c.width, dtype=dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.tokens(tokens)
        x = x if self.project is None else self.project(x)
        return x + self.positions(positions + POSITION_OFFSET)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); post-norm, norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: Config, *, dtype: Any, implementation: Implementation) -> None:
        c = config
        self.is_pre_norm = c.is_pre_norm
        self.attention_norm = LayerNorm(c.width, eps=1e-5)
        self.attention = Attention(
            c.width,
            *(c.num_heads, *c.cache_heads),
            use_bias=c.has_bias,
            stddev=c.stddev,
            dtype=dtype,
            implementation=implementation,
        )
        self.mlp_norm = LayerNorm(c.width, eps=1e-5)
        self.mlp = Mlp(
            Linear(c.width, c.feed_forward, use_bias=c.has_bias, stddev=c.stddev, dtype=dtype),
            Linear(c.feed_forward, c.width, use_bias=c.has_bias, stddev=c.stddev, dtype=dtype),
            activation=c.activation,
        )

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        if self.is_pre_norm:
            mixed, cache = self.attention(self.attention_norm(x), positions, cache)
            x = x + mixed
            return x + self.mlp(self.mlp_norm(x)), cache
        mixed, cache = self.attention(x, positions, cache)
        x = self.attention_norm(x + mixed)
        return self.mlp_norm(x + self.mlp(x)), cache


class Head(nnx.Module):
    """`[L, D]` to logits `[L, V]`, against the embedding table if the head is tied to it."""

    def __init__(self, config: Config, *, dtype: Any) -> None:
        c = config
        self.norm = LayerNorm(c.width, eps=1e-5) if c.has_final_norm else None
        self.project = _projection(c, c.width, c.embedding_width, dtype=dtype)
        if c.is_tied:
            self.out = None
        else:
            self.out = Linear(c.embedding_width, c.vocab_size, use_bias=False, stddev=c.stddev, dtype=dtype)

    def __call__(self, x: jax.Array, table: Any) -> jax.Array:
        x = x if self.norm is None else self.norm(x)
        x = x if self.project is None else self.project(x)
        return tied_logits(x, table) if self.out is None else self.out(x, out_dtype=jnp.float32)


def _projection(c: Config, width_in: int, width_out: int, *, dtype: Any) -> Linear | None:
    if c.embedding_width == c.width:
        return None
    return Linear(width_in, width_out, use_bias=False, stddev=c.stddev, dtype=dtype)
