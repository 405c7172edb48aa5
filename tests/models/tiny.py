"""The smallest `config.json` of every kind of block, head and embedding."""

from typing import Any

_LLAMA = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 11,
    "hidden_size": 8,
    "ffn_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "init_std": 0.3,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2_untied": _GPT2 | {"tie_word_embeddings": False},
    "opt": _OPT,
    "opt_post_norm": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 6, "tie_word_embeddings": False},
    "opt_post_norm_tied": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 6},
    "llama": _LLAMA | {"model_type": "llama"},
    "llama_tied": _LLAMA | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral": _LLAMA | {"model_type": "mistral", "sliding_window": 3},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 6},
    "qwen3_tied": _LLAMA | {"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True},
}
