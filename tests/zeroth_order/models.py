"""Block models for the tests: a toy with everything by hand, and small real architectures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.models import causal_lm
from jaxdp.text import language_model_blocks


@functools.cache
def toy() -> BlockModel:
    """A residual network whose output reads the input table again: a tied leaf."""

    def embed(resident, example):
        return jnp.tanh(example["x"] @ resident["table"])

    def block(params, hidden, example):
        return hidden + jnp.tanh(hidden @ params["kernel"] + params["bias"])

    def loss(resident, hidden, example):
        out = (hidden @ resident["table"].T).astype(jnp.float32)
        return jnp.sum(jnp.square(out - example["y"])) + jnp.sum(jnp.square(resident["scale"].astype(jnp.float32)))

    return BlockModel(embed, block, loss)


def toy_params(num_blocks=4, width=8, dtype=jnp.float32) -> BlockParams:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.3 * rng.normal(size=shape)).astype(np.float32).astype(dtype)

    blocks = {"kernel": draw(num_blocks, width, width), "bias": draw(num_blocks, width)}
    return BlockParams({"table": draw(3, width), "scale": draw(5)}, blocks)


def toy_batch(size=6, dtype=np.float32, seed=1) -> dict:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(size, 3)).astype(dtype), "y": rng.normal(size=(size, 3)).astype(np.float32)}


_CONFIGS = {
    "opt": {
        "model_type": "opt",
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 12,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": True,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 12,
        "rms_norm_eps": 1e-5,
    },
}


@functools.cache
def language_model(name: str):
    """`(CausalLM, BlockModel, BlockParams)` of a tiny architecture."""
    model = causal_lm(_CONFIGS[name])
    params = jax.device_get(model.init(jax.random.key(0)))
    resident = {part: params[part] for part in ("embed", "head") if part in params}
    return model, language_model_blocks(model, head_tokens=8), BlockParams(resident, params["blocks"])


def token_batch(size=3, length=12) -> dict:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 31, (size, 1, length)).astype(np.int32)
    weights = (np.arange(length) > 0).astype(np.float32)
    return {"tokens": tokens, "weights": np.broadcast_to(weights, (size, 1, length)).copy()}


def bits(params) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
