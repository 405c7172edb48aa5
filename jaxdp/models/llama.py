"""Llama 2 and 3, TinyLlama and Mistral: RMSNorm before each part, rotary positions, grouped heads, gated feed-forward.

Source: arXiv 2302.13971, 2407.21783; Mistral, 2310.06825.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdp.models import hf_config as hf
from jaxdp.models.attention import Attention, Cache, Implementation
from jaxdp.models.layers import ACTIVATIONS, Embedding, GatedMlp, Linear, RMSNorm, tied_logits
from jaxdp.models.rotary import Rotary
from jaxdp.models.tensors import Tensor, layer, norm

PREFIXES = ("model.",)
IGNORED = ("*.rotary_emb.inv_freq",)

_BLOCK = "model.layers.{}"
TENSORS: dict[str, Tensor] = {
    "embed/tokens/table": Tensor("model.embed_tokens.weight"),
    **norm("blocks/attention_norm", f"{_BLOCK}.input_layernorm", use_bias=False),
    **layer("blocks/attention/q", f"{_BLOCK}.self_attn.q_proj", is_transposed=True),
    **layer("blocks/attention/k", f"{_BLOCK}.self_attn.k_proj", is_transposed=True),
    **layer("blocks/attention/v", f"{_BLOCK}.self_attn.v_proj", is_transposed=True),
    **layer("blocks/attention/o", f"{_BLOCK}.self_attn.o_proj", is_transposed=True),
    **norm("blocks/mlp_norm", f"{_BLOCK}.post_attention_layernorm", use_bias=False),
    **layer("blocks/mlp/gate", f"{_BLOCK}.mlp.gate_proj", is_transposed=True),
    **layer("blocks/mlp/up", f"{_BLOCK}.mlp.up_proj", is_transposed=True),
    **layer("blocks/mlp/down", f"{_BLOCK}.mlp.down_proj", is_transposed=True),
    **norm("head/norm", "model.norm", use_bias=False),
    **layer("head/out", "lm_head", is_transposed=True, use_bias=False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a `config.json` of a Llama or Mistral says, in the words of this package.

    Attributes:
        vocab_size: V.
        num_blocks: N.
        width: D.
        max_length: Positions that the model was trained for.
        is_tied: Whether the head is the token embedding.
        num_heads: H.
        num_kv_heads: K.
        head_dim: P.
        feed_forward: F.
        activation: Of the gate.
        norm_eps: Of the RMSNorms.
        rotary: Rotary positions.
        sliding_window: Positions that each one sees, itself included; None for all.
        has_attention_bias: Whether q, k, v and o have biases.
        has_mlp_bias: Whether gate, up and down have biases.
        stddev: Of the random initialization.
    """

    vocab_size: int
    num_blocks: int
    width: int
    max_length: int
    is_tied: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    activation: str
    norm_eps: float
    rotary: Rotary
    sliding_window: int | None
    has_attention_bias: bool
    has_mlp_bias: bool
    stddev: float

    @classmethod
    def from_hf(cls, hf_config: hf.HfConfig) -> Config:
        """From a parsed `config.json` of model type `llama` or `mistral`.

        Raises:
            ValueError: A setting is missing, or not implemented.
        """
        hf.refuse(hf_config)
        is_mistral = hf_config.get("model_type") == "mistral"
        width, num_heads = hf.integer(hf_config, "hidden_size"), hf.integer(hf_config, "num_attention_heads")
        num_kv_heads = hf.integer(hf_config, "num_key_value_heads", 8 if is_mistral else num_heads)
        hf.divided("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
        head_dim = hf_config.get("head_dim")
        if head_dim is None:
            head_dim = hf.divided("hidden_size", width, "num_attention_heads", num_heads)
        head_dim = hf.integer({"head_dim": head_dim}, "head_dim")
        has_window = is_mistral and hf_config.get("sliding_window", 4096) is not None
        return cls(
            vocab_size=hf.integer(hf_config, "vocab_size"),
            num_blocks=hf.integer(hf_config, "num_hidden_layers"),
            width=width,
            max_length=hf.integer(hf_config, "max_position_embeddings", 4096 * 32 if is_mistral else 2048),
            is_tied=hf.flag(hf_config, "tie_word_embeddings", default=False),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            feed_forward=hf.integer(hf_config, "intermediate_size"),
            activation=hf.choice(hf_config, "hidden_act", "silu", ACTIVATIONS),
            norm_eps=hf.number(hf_config, "rms_norm_eps", 1e-6),
            rotary=Rotary.from_hf(hf_config, head_dim),
            sliding_window=hf.integer(hf_config, "sliding_window", 4096) if has_window else None,
            has_attention_bias=not is_mistral and hf.flag(hf_config, "attention_bias", default=False),
            has_mlp_bias=not is_mistral and hf.flag(hf_config, "mlp_bias", default=False),
            stddev=hf.number(hf_config, "initializer_range", 0.02),
        )

    @property
    def cache_heads(self) -> tuple[int, int]:
        """K and P of the cached keys and values."""
        return self.num_kv_heads, self.head_dim


class Embed(nnx.Module):
    """`[L]` tokens to `[L, D]`; positions enter in the attention."""

    def __init__(self, config: Any, *, dtype: Any) -> None:
        self.tokens = Embedding(config.vocab_size, config.width, stddev=config.stddev, dtype=dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        del positions
        return self.tokens(tokens)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, *, dtype: Any, implementation: Implementation) -> None:
        c = config
        self.attention_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.attention = Attention(
            c.width,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            use_bias=c.has_attention_bias,
            stddev=c.stddev,
            dtype=dtype,
            rotary=c.rotary,
            sliding_window=c.sliding_window,
            implementation=implementation,
        )
        linear = functools.partial(Linear, use_bias=c.has_mlp_bias, stddev=c.stddev, dtype=dtype)
        up, down = (c.width, c.feed_forward), (c.feed_forward, c.width)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMlp(linear(*up), linear(*up), linear(*down), activation=c.activation)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        mixed, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Head(nnx.Module):
    """`[L, D]` to logits `[L, V]`, against the embedding table if the head is tied to it."""

    def __init__(self, config: Any, *, dtype: Any) -> None:
        c = config
        self.norm = RMSNorm(c.width, eps=c.norm_eps)
        if c.is_tied:
            self.out = None
        else:
            self.out = Linear(c.width, c.vocab_size, use_bias=False, stddev=c.stddev, dtype=dtype)

    def __call__(self, x: jax.Array, table: Any) -> jax.Array:
        x = self.norm(x)
        return tied_logits(x, table) if self.out is None else self.out(x, out_dtype=jnp.float32)
