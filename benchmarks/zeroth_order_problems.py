"""What the benchmarks of zeroth-order steps train: OPT models of the published sizes, with random weights.

All blocks of a model have the same random weights, which take the memory of one block until they are placed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.models import causal_lm
from jaxdp.models.causal_lm import CausalLM
from jaxdp.text import language_model_blocks

_DRAWN = 2**20


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and the shape of its batch.

    Attributes:
        num_blocks: N.
        width: Of the residual stream; the feed-forward layer is four times as wide.
        num_heads: Of the attention.
        vocabulary: Tokens; the embedding is tied to the head.
        batch: Sequences.
        length: Tokens of a sequence.
        dtype: Of parameters and computation.
    """

    num_blocks: int
    width: int
    num_heads: int
    vocabulary: int = 50272
    batch: int = 1
    length: int = 2048
    dtype: str = "bfloat16"

    @property
    def config(self) -> dict[str, Any]:
        """As in an OPT model's `config.json`."""
        return {
            "model_type": "opt",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_blocks,
            "num_attention_heads": self.num_heads,
            "ffn_dim": 4 * self.width,
            "max_position_embeddings": self.length,
            "word_embed_proj_dim": self.width,
            "do_layer_norm_before": True,
        }

    @functools.cached_property
    def model(self) -> CausalLM:
        """The model; on a GPU with cuDNN's attention."""
        dtype = jnp.dtype(self.dtype)
        is_fused = jax.default_backend() == "gpu" and dtype == jnp.bfloat16
        return causal_lm(self.config, dtype=dtype, implementation="cudnn" if is_fused else None)

    @functools.cached_property
    def blocks(self) -> BlockModel:
        """The loss of one sequence in parts."""
        return language_model_blocks(self.model)

    @functools.cached_property
    def params(self) -> BlockParams:
        """Random weights on the host; the blocks are views of one."""
        shapes = self.model.shapes(jnp.dtype(self.dtype))
        resident = {part: shapes[part] for part in ("embed", "head") if part in shapes}
        one = jax.tree.map(lambda leaf: _random(leaf.shape[1:], leaf.dtype), shapes["blocks"])
        blocks = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (self.num_blocks, *leaf.shape)), one)
        return BlockParams(jax.tree.map(lambda leaf: _random(leaf.shape, leaf.dtype), resident), blocks)

    @property
    def num_params(self) -> int:
        """Of the whole model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def block_bytes(self) -> int:
        """Of the parameters of one block."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params.blocks)) // self.num_blocks

    @property
    def tokens_per_step(self) -> int:
        """Of one batch."""
        return self.batch * self.length

    def draw_batch(self) -> dict[str, np.ndarray]:
        """Random tokens, as a row of `encode_texts` for each sequence."""
        shape = (self.batch, 1, self.length)
        tokens = np.random.default_rng(1).integers(self.vocabulary, size=shape, dtype=np.int32)
        weights = np.broadcast_to((np.arange(self.length) > 0).astype(np.float32), shape)
        return {"tokens": tokens, "weights": weights.copy()}


def _random(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if len(shape) < 2:  # biases and the scales of norms
        return np.full(shape, 0.5, dtype)
    drawn = np.random.default_rng(0).normal(0.0, 0.02, _DRAWN).astype(np.float32).astype(dtype)
    return np.resize(drawn, shape)


#: A CPU's, and OPT models of the published sizes.
PROBLEMS = {
    "tiny": Problem(num_blocks=2, width=16, num_heads=2, vocabulary=31, length=8, dtype="float32"),
    "cpu": Problem(num_blocks=6, width=256, num_heads=4, vocabulary=1024, length=128, dtype="float32"),
    # Blocks of more than 2^20 entries, whose directions are drawn leaf by leaf, as those of all real models.
    "cpu-512": Problem(num_blocks=4, width=512, num_heads=8, vocabulary=1024, length=128, dtype="float32"),
    "opt-1.3b": Problem(24, 2048, 32),
    "opt-6.7b": Problem(32, 4096, 32),
    "opt-13b": Problem(40, 5120, 40),
    "opt-30b": Problem(48, 7168, 56),
}
