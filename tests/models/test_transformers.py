"""With the real peers: what we save `transformers` and `peft` load, and compute the same from it; and the other way round."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from jaxdp.models import Lora, add_adapters, load_adapter, load_model, load_tokenizer, merge, save_adapter, save_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to answer for

LLAMA = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
OPT = {
    "vocab_size": 90,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def config(name):
    return {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3
        ),
        "gpt2_untied": lambda: transformers.GPT2Config(
            vocab_size=90,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            tie_word_embeddings=False,
        ),
        "opt": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32),
        "opt_post_norm": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        "llama": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE),
        "llama_tied": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, tie_word_embeddings=True),
        "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=5),
        "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True),
    }[name]()


ARCHITECTURES = ("gpt2", "gpt2_untied", "opt", "opt_post_norm", "llama", "llama_tied", "mistral", "qwen3")
INPUTS = np.random.default_rng(0).integers(0, 90, size=(2, 20))


def random_model(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.float32).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(INPUTS)).logits.float().numpy()


def our_logits(model, params):
    return np.asarray(jax.jit(jax.vmap(lambda row: model.logits(params, row)))(INPUTS))


def reloaded(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_load_save_load_by_transformers_keeps_every_logit(name, max_shard_bytes, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    pretrained = load_model(tmp_path / "theirs")
    expected = their_logits(theirs)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(our_logits(pretrained.model, pretrained.params), expected, rtol=0, atol=1e-4)
    save_model(tmp_path / "ours", pretrained, max_shard_bytes=max_shard_bytes)
    np.testing.assert_array_equal(their_logits(reloaded(tmp_path / "ours", dtype="auto")), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_their_shards_and_dtypes_are_read(name, tmp_path):
    theirs = random_model(name).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pretrained = load_model(tmp_path, param_dtype=None)
    for leaf in jax.tree.leaves(pretrained.params):
        assert leaf.dtype.name == "bfloat16"
    in_float32 = our_logits(pretrained.model, pretrained.params)
    # Reloaded, because a model that is cast has cast its rotations too.
    expected = their_logits(reloaded(tmp_path, dtype=torch.float32))
    np.testing.assert_allclose(in_float32, expected, rtol=0, atol=1e-4)
    save_model(tmp_path / "ours", pretrained)
    assert reloaded(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16
    np.testing.assert_array_equal(their_logits(reloaded(tmp_path / "ours", dtype=torch.float32)), expected)


def test_the_real_model_goes_there_and_back(jaxdp_data, tmp_path):
    pretrained = load_model(jaxdp_data / "models" / "stories260K-hf")
    save_model(tmp_path, pretrained)
    global_logits = their_logits(reloaded(tmp_path))
    np.testing.assert_allclose(our_logits(pretrained.model, pretrained.params), global_logits, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Once upon a time").input_ids == load_tokenizer(tmp_path).encode("Once upon a time")


TARGETS = {
    "gpt2": (["c_attn", "c_fc"], ["attn.c_proj"], ["c_proj"]),
    "gpt2_untied": (["c_attn", "lm_head"],),
    "llama": (["q_proj", "v_proj"], "all-linear", ["down_proj", "lm_head"]),
    "opt": (["q_proj", "fc2"],),
    "opt_post_norm": ("all-linear",),
    "qwen3": (["o_proj", "gate_proj"],),
}
CASES = [(name, targets) for name, several in TARGETS.items() for targets in several]


@pytest.mark.parametrize(("name", "targets"), CASES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "init_lora_weights": False}])
def test_adapters_by_peft_compute_the_same_here(name, targets, settings, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **settings)
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    base = load_model(tmp_path / "base")
    model, params = load_adapter(tmp_path / "adapter", base.model, base.params)
    expected = their_logits(adapted)
    assert np.max(np.abs(our_logits(base.model, base.params) - expected)) > 0.05
    np.testing.assert_allclose(our_logits(model, params), expected, rtol=0, atol=1e-4)

    # and merged here and saved, it is the same model for them
    merged_model, merged = merge(model, params)
    save_model(tmp_path / "merged", dataclasses.replace(base, model=merged_model, params=merged))
    np.testing.assert_allclose(their_logits(reloaded(tmp_path / "merged")), expected, rtol=0, atol=2e-4)


OUR_TARGETS = [
    ("gpt2", ("qkv", "down")),
    ("gpt2", ("o",)),
    ("gpt2_untied", ("qkv", "head/out")),
    ("llama", ("q", "v")),
    ("llama", ("all-linear", "head/out")),
    ("opt", ("blocks/attention/*",)),
    ("opt_post_norm", ("all-linear",)),
    ("qwen3", ("blocks/mlp/*",)),
]


@pytest.mark.parametrize(("name", "targets"), OUR_TARGETS)
def test_adapters_of_ours_compute_the_same_in_peft(name, targets, key, tmp_path):
    peft = pytest.importorskip("peft")
    random_model(name).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    model, params = add_adapters(key, base.model, base.params, Lora(4, 6.5, targets))
    rng = np.random.default_rng(2)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.normal(0, 0.2, leaf.shape).astype(np.float32) if "lora_" in jax.tree_util.keystr(path) else leaf
        ),
        params,
    )
    save_adapter(tmp_path / "adapter", model, params, base_model=tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(reloaded(tmp_path / "base"), tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(adapted), our_logits(model, params), rtol=0, atol=1e-4)
    # No layer more and none less: every matrix of theirs is one of ours.
    theirs = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    ours = [
        leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0] if "lora_" in jax.tree_util.keystr(path)
    ]
    assert sum(parameter.numel() for parameter in theirs) == sum(leaf.size for leaf in ours)


SAMPLES = (
    "Once upon a time, there was a little girl named Lily.\nShe said: \"It's 3 o'clock!\"  Don't   go.\t\n\n",
    "naïve café — 你好 🙂 ﬁ ½ \u200b x\r\n<|end|> [PAD]",
    "def f(x):\n    return x ** 2  # 1,234.5\n",
    "",
    " ",
    " leading and trailing ",
)


def tokenizer_folder(name, jaxdp_data, tmp_path):
    """The files as they come, with the settings that the models' own folders have."""
    if name == "stories260K":
        return jaxdp_data / "models" / "stories260K-hf"
    settings = {"tokenizer_class": "GPT2Tokenizer"}
    sources = ("encoder.json", "vocab.bpe") if name == "gpt2" else ("gpt2-vocab.json", "gpt2-merges.txt")
    if name == "opt":
        settings |= {
            "add_bos_token": True,
            "bos_token": "</s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "</s>",
        }
    for source, target in zip(sources, ("vocab.json", "merges.txt"), strict=True):
        shutil.copyfile(jaxdp_data / "tokenizers" / name / source, tmp_path / target)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "opt", "stories260K"])
def test_ids_are_those_of_their_tokenizer(name, jaxdp_data, tmp_path):
    folder = tokenizer_folder(name, jaxdp_data, tmp_path)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.pad_id == theirs.pad_token_id
    story = (jaxdp_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:5000]
    for text in (*SAMPLES, story, "a</s>b <|endoftext|>\n<s>"):
        # A special token that a text spells is text to us, and one of theirs unless they are asked to split it.
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids, repr(text)
        assert ours.encode(text, allow_special_tokens=True) == theirs(text).input_ids, repr(text)
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids, repr(text)
        assert ours.decode(plain) == theirs.decode(plain, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["gpt2", "opt", "stories260K"])
def test_a_tokenizer_that_they_saved_has_the_same_ids(name, jaxdp_data, tmp_path):
    folder = tokenizer_folder(name, jaxdp_data, tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    ours, saved = load_tokenizer(folder), load_tokenizer(tmp_path / "saved")
    assert (saved.eos_id, saved.bos_id, saved.pad_id) == (ours.eos_id, ours.bos_id, ours.pad_id)
    for text in SAMPLES:
        assert saved.encode(text) == ours.encode(text)
