"""Bad folders: one table. Each is a typed error that names the value and the remedy, and leaves what was there whole."""

import contextlib
import dataclasses
import errno
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxdp.models import (
    Lora,
    add_adapters,
    check_matches,
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    save_model,
)

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def tensors_in(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def set_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def set_tensors(**changes):
    """Replaces tensors; None removes one. Dots in the names are written as two underscores."""

    def change(folder):
        tensors = tensors_in(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: np.asarray(tensor) for name, tensor in tensors.items() if tensor is not None}
        safetensors.numpy.save_file(kept, folder / "model.safetensors")

    return change


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def rename(old, new):
    def change(folder):
        (folder / old).rename(folder / new)

    return change


def cut(name, keep):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return change


def in_shards(change):
    """The model in shards, which `change(folder, index)` then spoils."""

    def spoil(folder):
        save_model(folder, load_model(folder), max_shard_bytes=9_000)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(folder, index)
        file.write_text(json.dumps(index))

    return spoil


def lose_shard(folder, index):
    del index
    sorted(folder.glob("*.safetensors"))[1].unlink()


def lead_outside(folder, index):
    shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder.parent / "model.safetensors")
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"


def forget_map(folder, index):
    del folder
    del index["weight_map"]


def repeat_tensor(folder, index):
    del index
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name = sorted(safetensors.numpy.load_file(first))[0]
    safetensors.numpy.save_file({name: np.zeros(3)}, last)


@dataclasses.dataclass(frozen=True)
class Case:
    change: Callable[[pathlib.Path], Any]
    error: type[Exception]
    value: str  # what the message must name
    remedy: str  # what it must offer
    golden: str = "llama3"


def several(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


MODELS = {
    "folder_missing": Case(shutil.rmtree, FileNotFoundError, "does not exist", "hf download"),
    "folder_is_a_file": Case(
        several(shutil.rmtree, pathlib.Path.touch), NotADirectoryError, "is a file", "hf download"
    ),
    "no_config": Case(
        remove("config.json"), FileNotFoundError, "no config.json", "with config.json and model.safetensors"
    ),
    "an_adapter": Case(
        rename("config.json", "adapter_config.json"), FileNotFoundError, "holds an adapter", "load_adapter"
    ),
    "config_broken": Case(
        write("config.json", '{"model_type": '), ValueError, "config.json is not JSON (Expecting value", "copy it again"
    ),
    "config_binary": Case(
        write("config.json", b"\xff\xfe\x00"), ValueError, "config.json is not JSON", "copy it again"
    ),
    "config_a_list": Case(write("config.json", "[1]"), ValueError, "holds a JSON list", "expected an object"),
    "architecture_unknown": Case(set_config(model_type="mamba"), ValueError, "'mamba'", "supported: gpt2, opt, llama"),
    "architecture_none": Case(
        set_config(model_type=None), ValueError, "model_type is None", "supported: gpt2, opt, llama"
    ),
    "quantized": Case(set_config(quantization_config={"bits": 4}), ValueError, "{'bits': 4}", "use a model without it"),
    "activation": Case(set_config(hidden_act="quadratic"), ValueError, "'quadratic'", "supported: gelu"),
    "rope_type": Case(set_config(rope_parameters={"rope_type": "longrope"}), ValueError, "'longrope'", "supported"),
    "heads_uneven": Case(set_config(num_attention_heads=3, head_dim=None), ValueError, "3", "multiple"),
    "no_weights": Case(
        remove("model.safetensors"), FileNotFoundError, "no model.safetensors", "with config.json and model.safetensors"
    ),
    "only_pickles": Case(
        rename("model.safetensors", "pytorch_model.bin"),
        FileNotFoundError,
        "pytorch_model.bin",
        "safe_serialization=True",
    ),
    "tensor_missing": Case(
        set_tensors(model__norm__weight=None),
        ValueError,
        "lacks tensor 'model.norm.weight'",
        "download the folder again",
    ),
    "block_missing": Case(
        set_config(num_hidden_layers=3),
        ValueError,
        "'model.layers.2.input_layernorm.weight'",
        "another model than config.json",
    ),
    "tensor_misshapen": Case(
        set_tensors(model__norm__weight=np.zeros(33, np.float32)),
        ValueError,
        "has shape [33], but config.json asks for [32]",
        "take both",
    ),
    "tensor_transposed": Case(
        set_tensors(model__layers__0__mlp__up_proj__weight=np.zeros((32, 48), np.float32)),
        ValueError,
        "[32, 48]",
        "asks for [48, 32]",
    ),
    "tensor_unexpected": Case(
        set_tensors(model__extra__weight=np.zeros(3)),
        ValueError,
        "'model.extra.weight'",
        "use the config.json that came",
    ),
    "bias_unexpected": Case(
        set_config(attention_bias=False),
        ValueError,
        "self_attn.k_proj.bias",
        "use the config.json that came",
        "llama_tied",
    ),
    "many_unexpected": Case(set_config(num_hidden_layers=1), ValueError, "and 4 more", "no place for"),
    "tensor_of_integers": Case(
        set_tensors(model__norm__weight=np.zeros(32, np.int8)), ValueError, "has dtype I8", "take the unquantized model"
    ),
    "head_differs_though_tied": Case(
        set_tensors(lm_head__weight=np.ones((96, 32), np.float32)),
        ValueError,
        "differs from",
        "tie_word_embeddings to false",
        "gpt2",
    ),
    "truncated": Case(cut("model.safetensors", -1000), ValueError, "not a whole safetensors file", "download it again"),
    "truncated_header": Case(
        cut("model.safetensors", 100), ValueError, "not a whole safetensors file", "download it again"
    ),
    "empty": Case(cut("model.safetensors", 0), ValueError, "not a whole safetensors file", "download it again"),
    "garbage": Case(
        write("model.safetensors", "garbage" * 99), ValueError, "not a whole safetensors file", "download it again"
    ),
    "pointer": Case(
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        ValueError,
        "not a whole",
        "download it again",
    ),
    "shard_missing": Case(in_shards(lose_shard), FileNotFoundError, "'model-00002-of-", "download the missing file"),
    "shard_outside": Case(
        in_shards(lead_outside), FileNotFoundError, "'../model.safetensors'", "download the missing file"
    ),
    "shard_twice": Case(in_shards(repeat_tensor), ValueError, "is both in", "remove the file"),
    "index_without_map": Case(in_shards(forget_map), ValueError, "no weight_map", "download it again"),
}


@pytest.fixture
def spoiled(tmp_path):
    def spoil(case):
        folder = shutil.copytree(GOLDENS / case.golden, tmp_path / "model")
        case.change(folder)
        return folder

    return spoil


def check(case, call):
    with pytest.raises(case.error) as caught:
        call()
    message = str(caught.value)
    assert case.value in message, message
    assert case.remedy in message, message


@pytest.mark.parametrize("name", MODELS)
def test_bad_model_folders_are_refused_with_a_remedy(name, spoiled):
    case = MODELS[name]
    folder = spoiled(case)
    check(case, lambda: load_model(folder))


TOKENIZERS = {
    "tokenizer_missing": Case(
        lambda folder: None, FileNotFoundError, "no tokenizer in", "tokenizer.json, or vocab.json and merges.txt"
    ),
    "tokenizer_sentencepiece": Case(write("tokenizer.model", b"\n"), FileNotFoundError, "tokenizer.model", "Convert"),
    "tokenizer_garbage": Case(
        write("tokenizer.json", "{}"), ValueError, "tokenizer.json is no tokenizer", "copy it again"
    ),
    "vocabulary_without_merges": Case(write("vocab.json", "{}"), FileNotFoundError, "vocab.json", "and merges.txt"),
    "vocabulary_garbage": Case(
        several(write("vocab.json", "]"), write("merges.txt", "")), ValueError, "no byte-level BPE", "copy both again"
    ),
    "settings_garbage": Case(
        write("tokenizer_config.json", "no"), ValueError, "tokenizer_config.json is not JSON", "copy it again"
    ),
    "special_token_unknown": Case(
        several(
            write("vocab.json", '{"a": 0}'),
            write("merges.txt", "#version: 0.2\n"),
            write("special_tokens_map.json", '{"eos_token": "<end>"}'),
        ),
        ValueError,
        "'<end>' as eos_token",
        "take all of them from one",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bad_tokenizers_are_refused_with_a_remedy(name, spoiled):
    case = TOKENIZERS[name]
    folder = spoiled(case)
    check(case, lambda: load_tokenizer(folder))


def test_a_tokenizer_of_another_model_is_refused(jaxdp_data):
    tokenizer = load_tokenizer(jaxdp_data / "models" / "stories260K-hf")
    with pytest.raises(ValueError, match=r"ids up to 511.*96 rows.*folder of the model"):
        check_matches(tokenizer, load_model(GOLDENS / "llama3").model)


def set_adapter(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def edit_adapter(edit):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(edit(safetensors.numpy.load_file(file)), file)

    return change


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MERGE = "merge_and_unload"
ADAPTERS = {
    "folder_missing": Case(shutil.rmtree, FileNotFoundError, "does not exist", "save_pretrained"),
    "no_config": Case(remove("adapter_config.json"), FileNotFoundError, "no adapter_config.json", "save_pretrained"),
    "only_pickles": Case(
        rename("adapter_model.safetensors", "adapter_model.bin"), FileNotFoundError, "adapter_model.bin", "newer one"
    ),
    "kind_unknown": Case(set_adapter(peft_type="IA3"), ValueError, "'IA3'", "only 'LORA' is"),
    "kind_missing": Case(set_adapter(peft_type=None), ValueError, "peft_type is None", "only 'LORA' is"),
    "dora": Case(set_adapter(use_dora=True), ValueError, "use_dora=True", MERGE),
    "bias": Case(set_adapter(bias="lora_only"), ValueError, "bias='lora_only'", MERGE),
    "bias_of_b": Case(set_adapter(lora_bias=True), ValueError, "lora_bias=True", MERGE),
    "rank_pattern": Case(set_adapter(rank_pattern={"q_proj": 4}), ValueError, "rank_pattern={'q_proj': 4}", MERGE),
    "alpha_pattern": Case(set_adapter(alpha_pattern={"q_proj": 4}), ValueError, "alpha_pattern={'q_proj': 4}", MERGE),
    "modules_to_save": Case(set_adapter(modules_to_save=["lm_head"]), ValueError, "modules_to_save=['lm_head']", MERGE),
    "start_from_singular_vectors": Case(
        set_adapter(init_lora_weights="pissa"), ValueError, "init_lora_weights='pissa'", MERGE
    ),
    "setting_of_the_future": Case(set_adapter(use_magic=7), ValueError, "use_magic=7", MERGE),
    "rank_zero": Case(set_adapter(r=0), ValueError, "r must be at least 1", "got 0"),
    "alpha_missing": Case(set_adapter(lora_alpha=None), TypeError, "lora_alpha must be a real number", "None"),
    "targets_match_nothing": Case(
        edit_adapter(lambda old: {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": old[A]}),
        ValueError,
        "transformer.h.0.attn.c_attn",
        "the base it was trained on",
    ),
    "embedding_adapter": Case(
        edit_adapter(lambda old: {**old, "base_model.model.model.embed_tokens.lora_embedding_A": old[A]}),
        ValueError,
        "lora_embedding_A",
        "the base it was trained on",
    ),
    "head_of_its_own": Case(
        edit_adapter(lambda old: {**old, "base_model.model.lm_head.base_layer.weight": np.zeros((96, 32))}),
        ValueError,
        "differs from the head",
        MERGE,
    ),
    "nothing_in_it": Case(edit_adapter(lambda old: {}), ValueError, "adapts nothing", "the base it was trained on"),
    "some_blocks": Case(
        edit_adapter(lambda old: {name: tensor for name, tensor in old.items() if ".layers.1." in name}),
        ValueError,
        "adapts some blocks only",
        MERGE,
    ),
    "rank_of_another": Case(set_adapter(r=5), ValueError, "ask for [5, 32]", "its own adapter_config.json"),
    "misshapen": Case(
        edit_adapter(lambda old: {**old, A: old[A].T.copy()}),
        ValueError,
        "has shape [32, 3]",
        "the base it was trained on",
    ),
    "truncated": Case(cut("adapter_model.safetensors", -10), ValueError, "not a whole safetensors file", "copy"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_adapters_are_refused_with_a_remedy(name, tmp_path, key):
    base = load_model(GOLDENS / "llama3")
    save_adapter(tmp_path / "adapter", *add_adapters(key, base.model, base.params, Lora(3, 6, ("q", "v"))))
    ADAPTERS[name].change(tmp_path / "adapter")
    check(ADAPTERS[name], lambda: load_adapter(tmp_path / "adapter", base.model, base.params))


def test_an_adapter_on_an_adapter_is_refused(tmp_path, key):
    base = load_model(GOLDENS / "llama3")
    model, params = add_adapters(key, base.model, base.params, Lora(3, 6, ("q",)))
    save_adapter(tmp_path, model, params)
    with pytest.raises(ValueError, match=r"has adapters already.*base model"):
        load_adapter(tmp_path, model, params)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is full at the second file of weights."""
    save_file, written = safetensors.numpy.save_file, []

    def save(tensors, filename, metadata=None):
        if written:
            pathlib.Path(filename).write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(filename)
        save_file(tensors, filename, metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", save)
    return written


def test_a_full_disk_leaves_the_old_output_whole(tmp_path, full_disk):
    pretrained = load_model(GOLDENS / "llama3")
    out = shutil.copytree(GOLDENS / "qwen3", tmp_path / "out")
    before = contents(out)
    with pytest.raises(
        OSError, match=r"out: No space left on device; the files that were there are untouched.*Free space"
    ) as caught:
        save_model(out, pretrained, max_shard_bytes=9_000)
    assert caught.value.errno == errno.ENOSPC
    assert full_disk
    assert contents(out) == before
    load_model(out)


def test_a_full_disk_leaves_no_new_folder(tmp_path, full_disk):
    pretrained = load_model(GOLDENS / "llama3")
    with pytest.raises(OSError, match="nothing was left behind"):
        save_model(tmp_path / "new", pretrained, max_shard_bytes=9_000)
    assert full_disk
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path, full_disk, key):
    base = load_model(GOLDENS / "llama3")
    model, params = add_adapters(key, base.model, base.params, Lora(3, 6, ("q",)))
    save_adapter(tmp_path, model, params)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="untouched"):
        save_adapter(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, params))
    assert full_disk
    assert contents(tmp_path) == before


_LIMITED = """
import resource, signal, sys
from jaxdp.models import load_model, save_model
pretrained = load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the real writer meets a real error of the system
try:
    save_model(sys.argv[2], pretrained)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ") or not hasattr(resource, "RLIMIT_FSIZE"), reason="limits file sizes")
def test_the_writer_itself_fails_with_an_error_of_ours(tmp_path):
    out = shutil.copytree(GOLDENS / "qwen3", tmp_path / "out")
    before = contents(out)
    command = [sys.executable, "-c", _LIMITED, str(GOLDENS / "llama3"), str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"cannot write .*out: .*untouched. Free space", printed), printed
    assert contents(out) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*another folder"):
        save_model(tmp_path / "file" / "out", load_model(GOLDENS / "llama3"))


def test_what_cannot_be_saved_is_refused_before_anything_is_touched(tmp_path, key):
    base = load_model(GOLDENS / "llama3")
    model, params = add_adapters(key, base.model, base.params, Lora(3, 6, ("q",)))
    lacking = {**base.params, "head": {"norm": base.params["head"]["norm"]}}
    misshapen = jax.tree.map(lambda leaf: leaf[:1], base.params)
    replace = dataclasses.replace
    for call, message in (
        (lambda: save_model(tmp_path / "x", replace(base, model=model, params=params)), "has adapters.*merge"),
        (lambda: save_model(tmp_path / "x", replace(base, params=params)), "disagree on blocks/attention/q/lora_a"),
        (lambda: save_model(tmp_path / "x", replace(base, params=lacking)), "disagree on head/out/kernel"),
        (lambda: save_model(tmp_path / "x", replace(base, params=misshapen)), r"shape \[1.*the model's \[2"),
        (lambda: save_model(tmp_path / "x", base, max_shard_bytes=0), "max_shard_bytes must be at least 1"),
        (lambda: save_adapter(tmp_path / "x", base.model, base.params), "no adapters to save.*save_model"),
        (lambda: save_adapter(tmp_path / "x", model, base.params), "disagree on blocks/attention/q/lora_a"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [9_000, 10**9])
def test_a_machine_that_stops_between_two_renames_leaves_nothing_that_loads(max_shard_bytes, tmp_path, monkeypatch):
    base = load_model(GOLDENS / "llama3")
    save_model(tmp_path, base, max_shard_bytes=max_shard_bytes)
    replace, moved = pathlib.Path.replace, []

    def stop(self, target):
        if moved:
            raise KeyboardInterrupt  # no error of the system: nothing in the code expects it
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", stop)
    doubled = dataclasses.replace(base, params=jax.tree.map(lambda leaf: 2 * leaf, base.params))
    with contextlib.suppress(KeyboardInterrupt):
        save_model(tmp_path, doubled, max_shard_bytes=max_shard_bytes)
    assert moved
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        load_model(tmp_path)
    # Nor is anything lost.
    (staging,) = tmp_path.glob(".incomplete-*")
    assert {path.name for path in (*staging.iterdir(), *tmp_path.iterdir())} >= {"config.json"}
    assert list(staging.glob("model*.safetensors"))
