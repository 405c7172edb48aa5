"""Qwen3, the dense models: a Llama whose queries and keys are normalized in each head, of a width of its own.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from jaxdp.models import hf_config as hf, llama
from jaxdp.models.attention import Attention, Cache, Implementation
from jaxdp.models.layers import ACTIVATIONS, GatedMlp, Linear, RMSNorm
from jaxdp.models.rotary import Rotary
from jaxdp.models.tensors import Tensor, norm

PREFIXES = llama.PREFIXES
IGNORED = llama.IGNORED
TENSORS: dict[str, Tensor] = {
    **llama.TENSORS,
    **norm("blocks/attention/q_norm", "model.layers.{}.self_attn.q_norm", use_bias=False),
    **norm("blocks/attention/k_norm", "model.layers.{}.self_attn.k_norm", use_bias=False),
}
Embed = llama.Embed
Head = llama.Head


@dataclasses.dataclass(frozen=True)
class Config:
    """What a `config.json` of a Qwen3 says, in the words of this package.

    Attributes:
        vocab_size: V.
        num_blocks: N.
        width: D.
        max_length: Positions that the model was trained for.
        is_tied: Whether the head is the token embedding.
        num_heads: H.
        num_kv_heads: K.
        head_dim: P; H P need not be D.
        feed_forward: F.
        activation: Of the gate.
        norm_eps: Of the RMSNorms.
        rotary: Rotary positions.
        has_attention_bias: Whether q, k, v and o have biases.
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
    has_attention_bias: bool
    stddev: float

    @classmethod
    def from_hf(cls, hf_config: hf.HfConfig) -> Config:
        """From a parsed `config.json` of model type `qwen3`.

        Raises:
            ValueError: A setting is missing, or not implemented.
        """
        hf.refuse(hf_config, use_sliding_window=False)
        for kind in hf_config.get("layer_types") or ():
            hf.choice({"layer_types": kind}, "layer_types", "", ["full_attention"])
        num_heads = hf.integer(hf_config, "num_attention_heads")
        num_kv_heads = hf.integer(hf_config, "num_key_value_heads", 32)
        hf.divided("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
        head_dim = hf.integer(hf_config, "head_dim", 128)
        return cls(
            vocab_size=hf.integer(hf_config, "vocab_size"),
            num_blocks=hf.integer(hf_config, "num_hidden_layers"),
            width=hf.integer(hf_config, "hidden_size"),
            max_length=hf.integer(hf_config, "max_position_embeddings", 32768),
            is_tied=hf.flag(hf_config, "tie_word_embeddings", default=False),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            feed_forward=hf.integer(hf_config, "intermediate_size"),
            activation=hf.choice(hf_config, "hidden_act", "silu", ACTIVATIONS),
            norm_eps=hf.number(hf_config, "rms_norm_eps", 1e-6),
            rotary=Rotary.from_hf(hf_config, head_dim),
            has_attention_bias=hf.flag(hf_config, "attention_bias", default=False),
            stddev=hf.number(hf_config, "initializer_range", 0.02),
        )

    @property
    def cache_heads(self) -> tuple[int, int]:
        """K and P of the cached keys and values."""
        return self.num_kv_heads, self.head_dim


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
            qk_norm_eps=c.norm_eps,
            implementation=implementation,
        )
        linear = functools.partial(Linear, use_bias=False, stddev=c.stddev, dtype=dtype)
        up, down = (c.width, c.feed_forward), (c.feed_forward, c.width)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMlp(linear(*up), linear(*up), linear(*down), activation=c.activation)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [L, D] -> [L, D]
        mixed, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache
