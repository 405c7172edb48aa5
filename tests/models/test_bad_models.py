"""What a model cannot be or run is refused before any work, by a message with the value and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.models import Lora, causal_lm

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
OPT = {
    "model_type": "opt",
    "vocab_size": 11,
    "hidden_size": 8,
    "ffn_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ({}, "model_type is None.*supported: gpt2, opt, llama, mistral, qwen3"),
        (LLAMA | {"model_type": "mamba"}, "model_type is 'mamba'.*supported"),
        ({"model_type": "gpt2", "vocab_size": 11}, "has no 'n_embd'"),
        ({name: value for name, value in LLAMA.items() if name != "intermediate_size"}, "has no 'intermediate_size'"),
        (GPT2 | {"n_head": 3}, "n_embd = 8 must be a multiple of n_head = 3"),
        (GPT2 | {"activation_function": "mish"}, "activation_function is 'mish'.*supported: gelu, gelu_new"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2 | {"n_layer": 0}, "n_layer must be at least 1"),
        (OPT | {"num_attention_heads": 5}, "hidden_size = 8 must be a multiple"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is .*use a model without it"),
        (LLAMA | {"num_key_value_heads": 3}, "num_attention_heads = 2 must be a multiple of num_key_value_heads = 3"),
        (LLAMA | {"head_dim": 3}, "head_dim = 3 must be a multiple"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn'.*default, linear, llama3",
        ),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set of numbers for all layers"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"hidden_size": -8}, "hidden_size must be at least 1, got -8"),
        (LLAMA | {"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_is_not_implemented_is_refused(hf_config, message):
    with pytest.raises(ValueError, match=message):
        causal_lm(hf_config)


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ([], "must be the object in a config.json, got list"),
        (LLAMA | {"hidden_size": "8"}, "hidden_size must be an integer, got '8'"),
        (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    ],
)
def test_a_config_of_wrong_types_is_refused(hf_config, message):
    with pytest.raises(TypeError, match=message):
        causal_lm(hf_config)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
def test_a_compute_dtype_that_is_not_floating_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        causal_lm(GPT2, dtype=dtype)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (("nothing",), "'nothing' matches no linear layer; this model has blocks/attention/o, .*c_attn"),
        (("q",), "'q' matches no linear layer"),
        (("c_attn", "blocks/mlp/*x"), "'blocks/mlp/\\*x' matches no"),
        ((), "targets is empty"),
    ],
)
def test_adapters_that_match_nothing_are_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        causal_lm(GPT2, lora=Lora(2, 4.0, lora))


def test_targets_are_patterns_of_paths_and_names_of_both_kinds():
    model = causal_lm(LLAMA | {"tie_word_embeddings": False})
    linears = model.linears()
    assert linears["blocks/attention/q"] == "q_proj"
    assert linears["head/out"] == "lm_head"

    def adapted(*targets):
        return sorted(Lora(1, 1.0, targets).adapted(linears))

    assert adapted("q", "v_proj") == ["blocks/attention/q", "blocks/attention/v"]
    assert adapted("blocks/mlp/*") == ["blocks/mlp/down", "blocks/mlp/gate", "blocks/mlp/up"]
    assert adapted("all-linear") == sorted(set(linears) - {"head/out"})
    assert adapted("lm_head") == ["head/out"]
    shapes = model.with_lora(Lora(3, 1.0, ("q",))).shapes()["blocks"]["attention"]
    assert shapes["q"]["lora_a"].shape == (2, 8, 3)
    assert shapes["q"]["lora_b"].shape == (2, 3, 8)
    assert set(shapes["k"]) == {"kernel"}


@pytest.mark.parametrize(
    "options", [{"rank": 0, "alpha": 1.0}, {"rank": 2, "alpha": 0.0}, {"rank": 2, "alpha": np.nan}]
)
def test_a_rank_or_alpha_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match=r"rank|alpha"):
        Lora(targets=("q",), **options)


def test_targets_in_one_string_are_refused():
    with pytest.raises(TypeError, match="must be a tuple of patterns, got the string 'q'"):
        Lora(2, 4.0, "q")


def test_tokens_that_are_no_sequence_within_the_context_are_refused(key):
    model = causal_lm(GPT2)
    params = model.init(key)
    with pytest.raises(ValueError, match=r"one sequence \[L\], got shape \(2, 3\).*jax.vmap"):
        model.logits(params, np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="length 17, beyond the model's context of 16"):
        model.logits(params, np.zeros(17, np.int32))
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        model.logits(params, np.zeros(0, np.int32))


def test_parameters_of_another_tree_or_shape_are_refused_by_name(key):
    model = causal_lm(GPT2)
    params, tokens = model.init(key), np.zeros(3, np.int32)

    def logits(**changes):
        return model.logits(params | changes, tokens)

    with pytest.raises(
        ValueError, match=r"params\['head'\] does not fit.*missing \['norm/bias'\], unexpected \['norm/shift'\]"
    ):
        logits(head={"norm": {"scale": jnp.ones(8), "shift": jnp.zeros(8)}})
    with pytest.raises(ValueError, match=r"leaf 'norm/bias' has shape \(9,\), and the model needs \(8,\)"):
        logits(head={"norm": {"scale": jnp.ones(8), "bias": jnp.zeros(9)}})
    with pytest.raises(ValueError, match=r"holds 3 blocks in segments of \[2, 1\], and the model has 2"):
        logits(blocks=(params["blocks"], jax.tree.map(lambda leaf: leaf[:1], params["blocks"])))
    with pytest.raises(ValueError, match="not stacked"):
        logits(blocks=params["blocks"] | {"mlp": jax.tree.map(lambda leaf: leaf[:1], params["blocks"]["mlp"])})
    with pytest.raises(ValueError, match=r"missing .*lora_a.*model\.lora decides"):
        model.with_lora(Lora(2, 4.0, ("qkv",))).logits(params, tokens)


def test_ids_outside_the_vocabulary_are_loud(key):
    model = causal_lm(GPT2)
    assert jnp.all(jnp.isnan(model.logits(model.init(key), np.array([11], np.int32))))
