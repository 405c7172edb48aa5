"""A language model small enough to fine-tune in a second, and records for it."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxdp.models import causal_lm
from jaxdp.models.saving import save_model
from jaxdp.models.weights import Pretrained
from tests import processes

GPT2 = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def byte_names() -> list[str]:
    """The 256 symbols of byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_model(folder: pathlib.Path, config: dict) -> pathlib.Path:
    model = causal_lm(config)
    params = jax.device_get(model.init(jax.random.key(0)))
    save_model(folder, Pretrained(model, params, config, None))
    names = {name: index for index, name in enumerate([*byte_names(), "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(names))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder: GPT-2 with 3 blocks of width 16 over bytes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", GPT2)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> pathlib.Path:
    """The same without biases."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama", LLAMA)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> pathlib.Path:
    """`private.txt` with 120 lines, `public.txt` with 30, `reviews.jsonl` with classes and users."""
    folder = tmp_path_factory.mktemp("texts")
    animals, verbs = ["cat", "dog", "fox", "hen", "owl"], ["sat", "ran", "hid", "sang", "slept", "ate"]
    lines = [
        f"the {animal} {verb} {place}"
        for verb in verbs
        for animal in animals
        for place in ("here", "there", "in", "out", "up")
    ]
    (folder / "private.txt").write_text("\n".join(lines[:120]))
    (folder / "public.txt").write_text("\n".join(lines[120:]))
    reviews = [
        {"text": f"{line}", "label": index % 2, "user": f"u{index % 20}", "prompt": line[:8], "completion": line[8:]}
        for index, line in enumerate(lines[:80])
    ]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    return folder


@pytest.fixture
def user_environment() -> dict[str, str]:
    return processes.user_environment()


@pytest.fixture
def jaxdp_command(user_environment):
    """Runs `jaxdp ...` in a process of its own."""

    def run(*args, cwd, check=True):
        command = [sys.executable, "-W", "error::UserWarning", "-m", "jaxdp", *map(str, args)]
        result = subprocess.run(command, cwd=cwd, env=user_environment, capture_output=True, text=True, timeout=300)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run
