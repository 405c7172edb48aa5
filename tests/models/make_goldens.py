"""Makes the goldens: tiny models with random parameters, and what `transformers` computes from them.

Run it where torch and transformers are installed: `python tests/models/make_goldens.py`. Each folder holds a Hugging Face
model and `golden.npz` with `inputs` [2, L] and `logits` [2, L, V].

A golden is only worth what it can tell apart. So matrices are large enough for attention to be far from uniform, no scale is 1
and no bias 0, and every setting differs from its default by enough to move the logits: eps, base and scaling of the rotations,
a sliding window and a context shorter than the sequence.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LENGTH = 40
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
}
# Of the four pairs of a head, the first keeps its frequency, the second blends, the last two are divided by the factor.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}


def configs() -> dict[str, transformers.PretrainedConfig]:
    qwen3 = LLAMA | {"head_dim": 12, "num_hidden_layers": 3, "hidden_size": 24}
    return {
        "gpt2": transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=48, layer_norm_epsilon=1e-2, **SPECIAL
        ),
        "opt_pre_norm": transformers.OPTConfig(**OPT, word_embed_proj_dim=32),
        "opt_post_norm": transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        "llama3": transformers.LlamaConfig(
            **LLAMA | {"max_position_embeddings": 512}, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=False
        ),
        "llama_tied": transformers.LlamaConfig(
            **LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, tie_word_embeddings=True
        ),
        "mistral": transformers.MistralConfig(**LLAMA, sliding_window=7),
        "qwen3": transformers.Qwen3Config(**qwen3, tie_word_embeddings=True),
    }


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            draw = 0.3 * draw + (1.0 if name.endswith("weight") else 0.0)  # a norm's scale, or a bias
        elif "embed" in name or "wte" in name or "wpe" in name:
            draw = 0.5 * draw
            if getattr(model.config, "do_layer_norm_before", False):
                # Half of the tokens, and every position, are so small that OPT's fixed eps of 1e-5 shows in the first norm.
                draw[: 96 // 2] *= 0.02
        else:
            draw = 1.5 * draw * max(parameter.shape) ** -0.5
        with torch.no_grad():
            parameter.copy_(draw)


def main() -> None:
    for seed, (name, config) in enumerate(configs().items()):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        randomize(model, torch.Generator().manual_seed(seed))
        inputs = np.random.default_rng(seed).integers(0, 96, size=(2, LENGTH))
        with torch.no_grad():
            logits = model(torch.from_numpy(inputs)).logits.numpy()
        folder = GOLDENS / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", inputs=inputs.astype(np.int32), logits=logits)
        size = sum(path.stat().st_size for path in folder.iterdir())
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        print(f"{name} ({model_type}): {size} bytes, logits {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    main()
