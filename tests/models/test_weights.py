"""Folders in and out: what is saved is what was loaded, whatever the dtype, the shards and the names' prefix."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxdp.models import load_model, save_model

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


def copy_of(name, tmp_path, **config):
    """A golden's folder, to be changed."""
    folder = shutil.copytree(GOLDENS / name, tmp_path / name)
    folder.chmod(0o755)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def tensors_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


def write(folder, tensors):
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_saving_what_was_loaded_gives_the_same_tensors_bit_for_bit(name, tmp_path):
    save_model(tmp_path / "out", load_model(GOLDENS / name))
    before, after = tensors_of(GOLDENS / name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype
        assert tensor.tobytes() == after[tensor_name].tobytes(), tensor_name
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (GOLDENS / name / "config.json").read_text()
    )


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_shapes_that_the_model_says(name):
    pretrained = load_model(GOLDENS / name)
    shapes = pretrained.model.shapes()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), pretrained.params
    )
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(pretrained.params))


def test_stacked_rows_are_the_tensors_of_their_blocks():
    pretrained, file = load_model(GOLDENS / "llama3"), tensors_of(GOLDENS / "llama3")
    for i in range(2):
        # nn.Linear stores [out, in], and we [in, out]
        np.testing.assert_array_equal(
            pretrained.params["blocks"]["attention"]["k"]["kernel"][i],
            file[f"model.layers.{i}.self_attn.k_proj.weight"].T,
        )
    gpt2, file = load_model(GOLDENS / "gpt2"), tensors_of(GOLDENS / "gpt2")
    for i in range(2):
        np.testing.assert_array_equal(  # Conv1D stores [in, out]
            gpt2.params["blocks"]["attention"]["qkv"]["kernel"][i], file[f"transformer.h.{i}.attn.c_attn.weight"]
        )


@pytest.mark.parametrize("max_shard_bytes", [1, 9_000, 30_000])
def test_shards_with_an_index_are_the_same_model(max_shard_bytes, tmp_path):
    pretrained = load_model(GOLDENS / "llama3")
    save_model(tmp_path, pretrained, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(pretrained.params))
    for shard in shards:
        held = safetensors.numpy.load_file(shard)
        assert held.keys() == {name for name, file in index["weight_map"].items() if file == shard.name}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= max_shard_bytes
    assert_same_tree(load_model(tmp_path).params, pretrained.params)


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (np.float64, np.float32),
        (np.float32, np.float32),
        (np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16),
        (ml_dtypes.float8_e5m2, ml_dtypes.bfloat16),
    ],
)
def test_every_float_dtype_is_read_exactly(stored, held, tmp_path):
    folder = copy_of("llama3", tmp_path)
    wanted = {name: tensor.astype(stored) for name, tensor in tensors_of(folder).items()}
    write(folder, wanted)
    in_float32, as_stored = load_model(folder).params, load_model(folder, param_dtype=None).params
    for params, dtype in ((in_float32, np.float32), (as_stored, held)):
        for i in range(2):
            leaf = params["blocks"]["mlp"]["gate"]["kernel"][i]
            assert leaf.dtype == dtype
            expected = wanted[f"model.layers.{i}.mlp.gate_proj.weight"].astype(np.float32).T
            np.testing.assert_array_equal(leaf.astype(np.float32), expected)


@pytest.mark.parametrize(
    ("first", "second", "held"),
    [
        (np.float16, np.float32, np.float32),
        (np.float16, ml_dtypes.bfloat16, np.float32),  # neither holds the other
        (ml_dtypes.float8_e5m2, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    ],
)
def test_a_stacked_leaf_of_two_dtypes_is_held_in_one_that_has_both(first, second, held, tmp_path):
    folder = copy_of("llama3", tmp_path)
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]
    tensors = tensors_of(folder)
    stored = [tensors[name].astype(dtype) for name, dtype in zip(names, (first, second), strict=True)]
    write(folder, tensors | dict(zip(names, stored, strict=True)))
    leaf = load_model(folder, param_dtype=None).params["blocks"]["mlp"]["gate"]["kernel"]
    assert leaf.dtype == held
    for row, tensor in zip(leaf, stored, strict=True):
        np.testing.assert_array_equal(row.astype(np.float64), tensor.T.astype(np.float64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_survive_a_round_trip_and_config_json_names_their_dtype(dtype, tmp_path):
    pretrained = load_model(GOLDENS / "qwen3", param_dtype=dtype)
    on_device = dataclasses.replace(pretrained, params=jax.tree.map(jnp.asarray, pretrained.params))
    save_model(tmp_path, on_device)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert_same_tree(load_model(tmp_path, param_dtype=None).params, pretrained.params)


def test_both_names_of_the_dtype_setting_follow_what_is_saved(tmp_path):
    old = load_model(copy_of("gpt2", tmp_path, torch_dtype="float16", dtype="float16", summary_type="kept"))
    save_model(tmp_path / "out", old)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["summary_type"] == "kept"


def test_names_without_the_prefix_of_the_full_model_are_the_same_model(tmp_path):
    for name, prefix in (("gpt2", "transformer."), ("llama_tied", "model."), ("opt_pre_norm", "model.")):
        folder = copy_of(name, tmp_path)
        write(folder, {key.removeprefix(prefix): tensor for key, tensor in tensors_of(folder).items()})
        assert_same_tree(load_model(folder).params, load_model(GOLDENS / name).params)


def test_a_tied_head_is_one_leaf_and_its_copy_in_the_file_is_not_read(tmp_path):
    folder = copy_of("gpt2", tmp_path)
    tensors = tensors_of(folder)
    write(folder, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    pretrained = load_model(folder)
    assert "out" not in pretrained.params["head"]
    assert_same_tree(pretrained.params, load_model(GOLDENS / "gpt2").params)
    save_model(tmp_path / "out", pretrained)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_buffers_that_are_no_parameters_are_ignored(tmp_path):
    folder = copy_of("gpt2", tmp_path)
    mask = np.tril(np.ones((1, 1, 48, 48), np.bool_))
    write(folder, {**tensors_of(folder), "transformer.h.0.attn.bias": mask, "h.1.attn.masked_bias": np.float32(-1e4)})
    assert_same_tree(load_model(folder).params, load_model(GOLDENS / "gpt2").params)


def test_tensors_larger_than_a_piece_are_read_whole(tmp_path, monkeypatch):
    expected = load_model(GOLDENS / "llama3").params
    for piece_bytes in (1, 100, 1000, 5000):
        monkeypatch.setattr("jaxdp.models.tensor_files.PIECE_BYTES", piece_bytes)
        assert_same_tree(load_model(GOLDENS / "llama3").params, expected)


def test_blocks_in_segments_are_saved_in_their_order(tmp_path):
    pretrained = load_model(GOLDENS / "qwen3")
    stack = pretrained.params["blocks"]
    segments = tuple(jax.tree.map(lambda leaf, rows=rows: leaf[rows], stack) for rows in (slice(2), slice(2, 3)))
    save_model(tmp_path, dataclasses.replace(pretrained, params={**pretrained.params, "blocks": segments}))
    assert_same_tree(load_model(tmp_path).params, pretrained.params)


def test_saving_replaces_the_model_and_leaves_other_files_alone(tmp_path):
    pretrained = load_model(GOLDENS / "llama3")
    (tmp_path / "report.json").write_text("{}")
    save_model(tmp_path, pretrained, max_shard_bytes=9_000)
    save_model(tmp_path, pretrained)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "report.json"}
    save_model(tmp_path, pretrained, max_shard_bytes=9_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_tree(load_model(tmp_path).params, pretrained.params)


def test_saved_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    (tmp_path / "any").touch()
    save_model(tmp_path / "out", load_model(GOLDENS / "llama3"), max_shard_bytes=9_000)
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_a_model_is_saved_over_the_folder_it_came_from(tmp_path):
    folder = copy_of("llama3", tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    pretrained = load_model(folder)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, pretrained.params)
    save_model(folder, dataclasses.replace(pretrained, params=doubled))
    assert_same_tree(load_model(folder).params, doubled)
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_the_files_of_the_tokenizer_come_along(tmp_path):
    folder = copy_of("llama3", tmp_path)
    companions = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    companions += ("generation_config.json", "tokenizer.model", "added_tokens.json")
    for name in companions:
        (folder / name).write_text(name)
    (folder / "README.md").write_text("the model card of another model")
    save_model(tmp_path / "out", load_model(folder))
    for name in companions:
        assert (tmp_path / "out" / name).read_text() == name
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_real_model_loads_and_saves(jaxdp_data, tmp_path):
    folder = jaxdp_data / "models" / "stories260K-hf"
    pretrained = load_model(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(pretrained.params)) == 260_032
    save_model(tmp_path, pretrained)
    for name, tensor in tensors_of(folder).items():
        np.testing.assert_array_equal(tensors_of(tmp_path)[name], tensor)


# Peak anonymous memory (RssAnon of /proc/self/status, polled every millisecond: mapped pages of the file do not count, and
# the kernel may drop them) over what the process held before.
_METER = """
import sys, threading, time
import jax, numpy as np
from jaxdp.models import load_model

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

load_model(sys.argv[2], param_dtype=None)  # warm up imports and caches on a tiny model
before, peak, is_done = anonymous_bytes(), 0, False

def poll():
    global peak
    while not is_done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

thread = threading.Thread(target=poll)
thread.start()
params = load_model(sys.argv[1], param_dtype=None).params
is_done = True
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((max(peak, anonymous_bytes()) - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads RssAnon in /proc")
def test_peak_memory_of_loading_is_at_most_1_1_times_the_model(dtype, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 16_384,
        "hidden_size": 1024 if dtype == np.float32 else 1536,
        "intermediate_size": 2816,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,  # the embedding alone is a third of the model
    }
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    width, forward, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    row = np.random.default_rng(0).normal(size=(1, max(width, forward))).astype(dtype)

    def tensor(*shape):
        return np.ascontiguousarray(np.broadcast_to(row[0, : shape[-1]], shape))

    layer = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (forward, width), "mlp.up_proj": (forward, width), "mlp.down_proj": (width, forward)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(3) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    write(folder, {name: tensor(*shape) for name, shape in shapes.items()})
    command = [sys.executable, "-c", _METER, str(folder), str(GOLDENS / "llama3")]
    ratio, size = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert size > 1.5e8
    assert ratio <= 1.1
