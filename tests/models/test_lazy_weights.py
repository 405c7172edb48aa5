"""A model that is opened is the model that is loaded, bit for bit, and never whole in memory."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxdp import quantization
from jaxdp.fingerprint import fingerprint
from jaxdp.models import Lora, add_adapters, join, load_model, merge, parts, save_model
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.tensor_files import OpenFile
from jaxdp.models.weights import open_model
from jaxdp.zeroth_order import buckets
from tests.models.test_bad_folders import MODELS, check, spoiled  # noqa: F401 (a fixture)

pytestmark = pytest.mark.unoptimized  # nothing is computed in compiled programs
GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_same_bits(a, b)


@contextlib.contextmanager
def reading(monkeypatch):
    """Yields the sizes of what is read from files, in their order."""
    sizes, read = [], OpenFile.read

    def spy(self, offset, num_bytes):
        sizes.append(num_bytes)
        return read(self, offset, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "read", spy)
        yield sizes


@pytest.fixture
def never_whole(monkeypatch):
    """No stack of blocks may be made an array."""

    def refuse(self, dtype=None, copy=None):
        raise AssertionError(f"{self!r} was made whole")

    monkeypatch.setattr(LazyStack, "__array__", refuse)


@pytest.mark.parametrize("param_dtype", [np.float32, ml_dtypes.bfloat16, None], ids=["float32", "bfloat16", "stored"])
@pytest.mark.parametrize("name", NAMES)
def test_an_opened_model_has_the_bits_of_the_loaded_one(name, param_dtype):
    opened, loaded = (read(GOLDENS / name, param_dtype=param_dtype) for read in (open_model, load_model))
    assert (opened.model, opened.hf_config, opened.folder) == (loaded.model, loaded.hf_config, loaded.folder)
    assert_same_tree(opened.params, loaded.params)
    stacks = jax.tree.leaves(opened.params["blocks"])
    assert all(isinstance(stack, LazyStack) for stack in stacks)
    rest = [leaf for part in ("embed", "head") for leaf in jax.tree.leaves(opened.params[part])]
    assert all(isinstance(leaf, np.ndarray) for leaf in rest)
    for stack, array in zip(stacks, jax.tree.leaves(loaded.params["blocks"]), strict=True):
        assert (stack.ndim, stack.size, stack.nbytes, len(stack)) == (array.ndim, array.size, array.nbytes, len(array))
        for found, expected in ((list(stack), list(array)), ([stack[i] for i in range(len(stack))], list(array))):
            for block, row in zip(found, expected, strict=True):
                assert_same_bits(block, row)
                assert block.flags.c_contiguous
        assert_same_bits(stack[-1], array[-1])
        for chosen in (slice(1, None), slice(-1), slice(None, None, -1), slice(1, None)):
            assert_same_bits(stack[chosen], array[chosen])
        assert_same_bits(stack[1:][0], array[1])
        assert_same_bits(stack.astype(jnp.bfloat16), array.astype(jnp.bfloat16))
        with pytest.raises(IndexError):
            stack[len(stack)]
        with pytest.raises(ValueError, match="not in memory"):
            np.array(stack, copy=False)


def test_shards_and_float8_are_opened_too(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama3", tmp_path / "float8")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    narrow = {name: np.ascontiguousarray(value.astype(ml_dtypes.float8_e4m3fn)) for name, value in tensors.items()}
    safetensors.numpy.save_file(narrow, folder / "model.safetensors", {"format": "pt"})
    save_model(tmp_path / "shards", load_model(GOLDENS / "llama3"), max_shard_bytes=9_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for of in (folder, tmp_path / "shards"):
        assert_same_tree(open_model(of, param_dtype=None).params, load_model(of, param_dtype=None).params)


@pytest.mark.parametrize("name", MODELS)
def test_bad_model_folders_are_refused_when_they_are_opened(name, spoiled):  # noqa: F811
    case = MODELS[name]
    folder = spoiled(case)
    check(case, lambda: open_model(folder))


def test_a_block_is_read_when_it_is_asked_for_and_no_other(monkeypatch):
    tensors = safetensors.numpy.load_file(GOLDENS / "llama3" / "model.safetensors")
    in_blocks = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." in name)
    others = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." not in name)
    header = (GOLDENS / "llama3" / "model.safetensors").stat().st_size - in_blocks - others
    with reading(monkeypatch) as sizes:
        params = open_model(GOLDENS / "llama3").params
        assert sum(sizes) == header + others
        stack = params["blocks"]["mlp"]["gate"]["kernel"]
        views = stack[1:], stack.astype(np.float16), stack.derived(stack.shape, stack.dtype, lambda i: -stack[i])
        assert sum(sizes) == header + others
        for view in (stack, *views):
            sizes.clear()
            view[0]
            assert sum(sizes) == tensors["model.layers.0.mlp.gate_proj.weight"].nbytes


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_the_fingerprint_is_that_of_the_arrays(name):
    assert fingerprint(open_model(GOLDENS / name).params) == fingerprint(load_model(GOLDENS / name).params)
    narrow = fingerprint(open_model(GOLDENS / name, param_dtype=jnp.bfloat16).params)
    assert narrow == fingerprint(load_model(GOLDENS / name, param_dtype=jnp.bfloat16).params)
    assert narrow != fingerprint(load_model(GOLDENS / name).params)


@pytest.mark.parametrize(("how", "last_k"), [("full", None), ("bitfit", None), ("last-k", 1)])
def test_an_opened_model_is_taken_apart_as_a_loaded_one(how, last_k):
    opened, loaded = open_model(GOLDENS / "gpt2"), load_model(GOLDENS / "gpt2")
    found = parts(opened.model, opened.params, how, last_k=last_k)
    expected = parts(loaded.model, loaded.params, how, last_k=last_k)
    assert_same_tree(found, expected)
    assert_same_tree(join(*found), join(*expected))


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("param_dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_opened_model_is_merged_and_saved_to_the_same_bytes(param_dtype, key, tmp_path):
    written = []
    for read in (load_model, open_model):
        base = read(GOLDENS / "llama3", param_dtype=param_dtype)
        model, params = add_adapters(key, base.model, base.params, Lora(3, 6, ("q", "blocks/mlp/*")))
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + 0.25 if "lora_b" in jax.tree_util.keystr(path) else leaf, params
        )
        model, params = merge(model, params)
        folder = tmp_path / read.__name__
        save_model(folder, dataclasses.replace(base, model=model, params=params), max_shard_bytes=9_000)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) > 3


@pytest.mark.usefixtures("never_whole")
def test_an_opened_model_is_saved_over_the_folder_it_came_from(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama3", tmp_path / "model")
    folder.chmod(0o755)
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    opened = open_model(folder)
    doubled = jax.tree.map(
        lambda leaf: (
            leaf.derived(leaf.shape, leaf.dtype, lambda i: 2 * leaf[i]) if isinstance(leaf, LazyStack) else 2 * leaf
        ),
        opened.params,
    )
    save_model(folder, dataclasses.replace(opened, params=doubled))
    after = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], 2 * tensor)


@pytest.mark.parametrize("format", ["int8", "int6", "int4"])
def test_blocks_are_packed_one_by_one_to_the_same_bytes(format, monkeypatch, never_whole):
    loaded, opened = (read(GOLDENS / "llama3", param_dtype=None).params["blocks"] for read in (load_model, open_model))
    but = lambda path: path.startswith("attention/q")  # noqa: E731
    expected = quantization.quantize_matrices(loaded, format, but=but)
    found = quantization.quantize_matrices(opened, format, but=but)
    layout, num_blocks = buckets.layout_of(expected)
    assert buckets.layout_of(found) == (layout, num_blocks)
    assert isinstance(found["attention"]["q"]["kernel"], LazyStack)
    tensors = safetensors.numpy.load_file(GOLDENS / "llama3" / "model.safetensors")
    for index in (1, 0):
        with reading(monkeypatch) as sizes:
            bucket = buckets.packed(layout, found, index)
        # Each tensor of the block once, and no other block.
        assert sum(sizes) == sum(tensor.nbytes for name, tensor in tensors.items() if f".layers.{index}." in name)
        for dtype, flat in buckets.packed(layout, expected, index).items():
            assert_same_bits(bucket[dtype], flat)


def test_packed_arrays_may_be_asked_for_in_any_order():
    loaded, opened = (read(GOLDENS / "llama3").params["blocks"]["mlp"]["up"] for read in (load_model, open_model))
    expected = quantization.quantize_matrices(loaded, "int6")["kernel"]
    found = quantization.quantize_matrices(opened, "int6")["kernel"]
    assert (found.spec, found.dtype) == (expected.spec, expected.dtype)
    arrays, wanted = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(arrays) == 3
    for index, number in ((1, 2), (0, 0), (0, 0), (1, 1), (1, 0), (0, 2), (0, 1), (0, 1)):
        assert_same_bits(arrays[number][index], wanted[number][index])


def test_weights_that_cannot_be_packed_are_named_with_their_block():
    bad = np.ones((3, 4, 2), np.float32)
    bad[2, 1, 0] = np.inf
    stack = LazyStack(bad.shape, bad.dtype, bad.__getitem__)
    packed = quantization.quantize_matrices({"kernel": stack}, "int4")["kernel"]
    packed.arrays.scales[1]
    with pytest.raises(ValueError, match=r"block 2: w\[1, 0\] is inf"):
        packed.arrays.scales[2]


def write_llama(folder, num_blocks, width=128):
    """A model in which the blocks are most of the memory."""
    config = {"model_type": "llama", "vocab_size": 32, "hidden_size": width, "intermediate_size": 2 * width}
    config |= {"num_hidden_layers": num_blocks, "num_attention_heads": 2, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (2 * width, width),
        "mlp.up_proj": (2 * width, width),
        "mlp.down_proj": (width, 2 * width),
    }
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.{i}.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(num_blocks)
        for name, shape in shapes.items()
    }
    others = {"model.embed_tokens.weight": (32, width), "model.norm.weight": (width,)}
    tensors |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in others.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


def test_the_memory_of_packing_does_not_grow_with_the_number_of_blocks(tmp_path):
    """What is kept of a block is what the stream keeps; the file, and the blocks as they were read, are never there together."""
    peaks = []
    for num_blocks in (2, 12):
        folder = tmp_path / f"{num_blocks}"
        block_bytes = write_llama(folder, num_blocks)
        tracemalloc.start()
        try:
            params = open_model(folder, param_dtype=None).params
            expected = fingerprint(params)
            packed = quantization.quantize_matrices(params["blocks"], "int4")
            layout, _ = buckets.layout_of(packed)
            for i in range(num_blocks):
                buckets.packed(layout, packed, i)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert expected == fingerprint(load_model(folder, param_dtype=None).params)
    assert peaks[1] < peaks[0] + block_bytes / 4  # of 10 blocks more; the header of the file grows
    assert peaks[1] < 4 * block_bytes


def test_the_memory_of_saving_is_that_of_a_shard(tmp_path):
    block_bytes = write_llama(tmp_path / "model", 6)
    opened = open_model(tmp_path / "model")
    tracemalloc.start()
    try:
        save_model(tmp_path / "out", opened, max_shard_bytes=2 * block_bytes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.2 * block_bytes  # of 6: a shard of 2, and the tensor behind it as it is read and as it is stored
    assert_same_tree(load_model(tmp_path / "out").params, load_model(tmp_path / "model").params)


def test_a_file_that_is_replaced_leaves_an_opened_model_as_it_was(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama3", tmp_path / "model")
    folder.chmod(0o755)
    opened, loaded = open_model(folder), load_model(folder)
    save_model(folder, dataclasses.replace(loaded, params=jax.tree.map(np.zeros_like, loaded.params)))
    assert not np.any(load_model(folder).params["blocks"]["mlp"]["up"]["kernel"])
    assert_same_tree(opened.params, loaded.params)


def test_a_file_that_is_written_into_is_refused(tmp_path):
    file = shutil.copytree(GOLDENS / "llama3", tmp_path / "model") / "model.safetensors"
    file.chmod(0o644)
    stack = open_model(file.parent).params["blocks"]["mlp"]["up"]["kernel"]
    stack[0]
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"model\.safetensors was written into while it was being read.*start again"):
        stack[0]
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="was written into"):
        stack[1]


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_files_are_open_while_a_leaf_lives_and_no_longer():
    def num_open():
        gc.collect()
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(GOLDENS)) for link in links if os.path.islink(link))

    assert num_open() == 0
    load_model(GOLDENS / "llama3")
    assert num_open() == 0
    params = open_model(GOLDENS / "llama3").params
    assert num_open() == 1
    stack = params["blocks"]["mlp"]["up"]["kernel"].astype(np.float16)[1:]
    del params
    assert num_open() == 1
    stack[0]
    del stack
    assert num_open() == 0
