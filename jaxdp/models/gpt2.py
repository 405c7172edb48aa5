"""GPT-2: learned positions, LayerNorm before each part, one fused projection to queries, keys and values.

Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdp.models import hf_config as hf
from jaxdp.models.attention import Cache, Implementation, attend
from jaxdp.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, Mlp, tied_logits
from jaxdp.models.tensors import Tensor, layer, norm

PREFIXES = ("transformer.",)
IGNORED = ("*.attn.bias", "*.attn.masked_bias")  # causal masks

_BLOCK = "transformer.h.{}"
# Its linear layers were stored as [in, out], by a module called Conv1D.
TENSORS: dict[str, Tensor] = {
    "embed/tokens/table": Tensor("transformer.wte.weight"),
    "embed/positions/table": Tensor("transformer.wpe.weight"),
    **norm("blocks/attention_norm", f"{_BLOCK}.ln_1", use_bias=True),
    **layer("blocks/attention/qkv", f"{_BLOCK}.attn.c_attn", is_transposed=False),
    **layer("blocks/attention/o", f"{_BLOCK}.attn.c_proj", is_transposed=False),
    **norm("blocks/mlp_norm", f"{_BLOCK}.ln_2", use_bias=True),
    **layer("blocks/mlp/up", f"{_BLOCK}.mlp.c_fc", is_transposed=False),
    **layer("blocks/mlp/down", f"{_BLOCK}.mlp.c_proj", is_transposed=False),
    **norm("head/norm", "transformer.ln_f", use_bias=True),
    **layer("head/out", "lm_head", is_transposed=True, use_bias=False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a `config.json` of a GPT-2 says, in the words of this package.

    Attributes:
        vocab_size: V.
        num_blocks: N.
        width: D.
        max_length: Rows of the table of positions.
        is_tied: Whether the head is the token embedding.
        num_heads: H.
        feed_forward: F.
        activation: Of the feed-forward part.
        norm_eps: Of the LayerNorms.
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
    norm_eps: float
    stddev: float

    @classmethod
    def from_hf(cls, hf_config: hf.HfConfig) -> Config:
        """From a parsed `config.json` of model type `gpt2`.

        Raises:
            ValueError: A setting is missing, or not implemented.
        """
        hf.refuse(hf_config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        width, num_heads = hf.integer(hf_config, "n_embd"), hf.integer(hf_config, "n_head")
        hf.divided("n_embd", width, "n_head", num_heads)
        return cls(
            vocab_size=hf.integer(hf_config, "vocab_size"),
            num_blocks=hf.integer(hf_config, "n_layer"),
            width=width,
            max_length=hf.integer(hf_config, "n_positions", 1024),
            is_tied=hf.flag(hf_config, "tie_word_embeddings", default=True),
            num_heads=num_heads,
            feed_forward=hf.integer(hf_config, "n_inner", 4 * width),
            activation=hf.choice(hf_config, "activation_function", "gelu_new", ACTIVATIONS),
            norm_eps=hf.number(hf_config, "layer_norm_epsilon", 1e-5),
            stddev=hf.number(hf_config, "initializer_range", 0.02),
        )

    @property
    def cache_heads(self) -> tuple[int, int]:
        """K and P of the cached keys and values."""
        return self.num_heads, self.width // self.num_heads

    @property
    def residual_stddev(self) -> float:
        """Of the two projections that each block adds to the residual stream: 2N of them sum to the size of one."""
        return self.stddev * (2 * self.num_blocks) ** -0.5


class Embed(nnx.Module):
    """Tokens `[L]` and their positions to `[L, D]`."""

    def __init__(self, config: Config, *, dtype: Any) -> None:
        c = config
        self.tokens = Embedding(c.vocab_size, c.width, stddev=c.stddev, dtype=dtype)
        self.positions = Embedding(c.max_length, c.width, stddev=c.stddev, dtype=dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.tokens(tokens) + self.positions(positions)


class FusedAttention(nnx.Module):
    """Attention whose queries, keys and values come from one product."""

    def __init__(self, config: Config, *, dtype: Any, implementation: Implementation) -> None:
        c = config
        self.qkv = Linear(c.width, 3 * c.width, use_bias=True, stddev=c.stddev, dtype=dtype)
        self.o = Linear(c.width, c.width, use_bias=True, stddev=c.residual_stddev, dtype=dtype)
        self.num_heads = c.num_heads
        self.implementation: Implementation = implementation

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        heads = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, -1)  # [L, 3, H, P]
        query, key, value = heads[:, 0], heads[:, 1], heads[:, 2]
        mixed, cache = attend(query, key, value, positions, cache, implementation=self.implementation)
        return self.o(mixed.reshape(x.shape)), cache


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, *, dtype: Any, implementation: Implementation) -> None:
        c = config
        self.attention_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.attention = FusedAttention(c, dtype=dtype, implementation=implementation)
        self.mlp_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.mlp = Mlp(
            Linear(c.width, c.feed_forward, use_bias=True, stddev=c.stddev, dtype=dtype),
            Linear(c.feed_forward, c.width, use_bias=True, stddev=c.residual_stddev, dtype=dtype),
            activation=c.activation,
        )

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        mixed, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Head(nnx.Module):
    """`[L, D]` to logits `[L, V]`, against the embedding table if the head is tied to it."""

    def __init__(self, config: Config, *, dtype: Any) -> None:
        c = config
        self.norm = LayerNorm(c.width, eps=c.norm_eps)
        if c.is_tied:
            self.out = None
        else:
            self.out = Linear(c.width, c.vocab_size, use_bias=False, stddev=c.stddev, dtype=dtype)

    def __call__(self, x: jax.Array, table: Any) -> jax.Array:
        x = self.norm(x)
        return tied_logits(x, table) if self.out is None else self.out(x, out_dtype=jnp.float32)
