"""Adapters of the peft library: theirs compute here what they compute there, and ours have their names and shapes."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxdp.models import Lora, add_adapters, load_adapter, load_model, merge, parts, save_adapter

pytestmark = pytest.mark.unoptimized
HERE = pathlib.Path(__file__).parent
NAMES = sorted(path.name for path in (HERE / "peft_goldens").iterdir())
BASES = sorted(path.name for path in (HERE / "goldens").iterdir())


@functools.partial(jax.jit, static_argnums=0)  # a program for each model, whatever the test
def program(model, params, inputs):
    return jax.vmap(lambda row: model.logits(params, row))(inputs)


def logits(model, params, inputs):
    return np.asarray(program(model, params, inputs))


def adapted(name):
    base = load_model(HERE / "goldens" / name)
    return base, *load_adapter(HERE / "peft_goldens" / name, base.model, base.params)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def random_adapters(name, lora, key):
    base = load_model(HERE / "goldens" / name)
    model, params = add_adapters(key, base.model, base.params, lora)
    rng = np.random.default_rng(7)

    def leaf(path, value):
        return rng.normal(0, 0.2, value.shape).astype(np.float32) if "lora_" in jax.tree_util.keystr(path) else value

    return base, model, jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_an_adapter_by_peft_are_those_of_transformers(name):
    golden = np.load(HERE / "peft_goldens" / name / "golden.npz")
    base, model, params = adapted(name)
    assert np.max(np.abs(logits(model, params, golden["inputs"]) - golden["logits"])) <= 1e-4
    # and the adapter does something
    assert np.max(np.abs(logits(base.model, base.params, golden["inputs"]) - golden["logits"])) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_by_peft_is_merged_into_the_same_logits(name):
    golden = np.load(HERE / "peft_goldens" / name / "golden.npz")
    _, model, params = adapted(name)
    assert np.max(np.abs(logits(*merge(model, params), golden["inputs"]) - golden["logits"])) <= 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_saving_a_loaded_adapter_gives_the_same_tensors_bit_for_bit(name, tmp_path):
    _, model, params = adapted(name)
    save_adapter(tmp_path, model, params, base_model=name)
    before = safetensors.numpy.load_file(HERE / "peft_goldens" / name / "adapter_model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor])


def test_rank_stabilized_scaling_becomes_the_alpha_that_scales_alike():
    _, model, _ = adapted("llama3")
    assert config_of(HERE / "peft_goldens" / "llama3")["use_rslora"]
    assert math.isclose(model.lora.scale, 6 / math.sqrt(3))  # alpha / sqrt(r)


@pytest.mark.parametrize(("name", "alpha"), [*((name, 4.5) for name in BASES), ("gpt2", 8.0)])
def test_a_saved_adapter_loads_into_the_same_model(name, alpha, key, tmp_path):
    base, model, params = random_adapters(name, Lora(2, alpha, ("all-linear",)), key)
    save_adapter(tmp_path, model, params)
    loaded_model, loaded = load_adapter(tmp_path, base.model, base.params)
    inputs = np.arange(20).reshape(2, 10)
    assert loaded_model.lora.scale == model.lora.scale
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    np.testing.assert_array_equal(logits(loaded_model, loaded, inputs), logits(model, params, inputs))


def test_a_head_of_its_own_can_carry_an_adapter(key, tmp_path):
    base, model, params = random_adapters("llama3", Lora(2, 4, ("head/out", "q")), key)
    save_adapter(tmp_path, model, params)
    assert config_of(tmp_path)["target_modules"] == ["lm_head", "q_proj"]
    assert "base_model.model.lm_head.lora_A.weight" in safetensors.numpy.load_file(
        tmp_path / "adapter_model.safetensors"
    )
    _, loaded = load_adapter(tmp_path, base.model, base.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama3", ("q", "v"), ["q_proj", "v_proj"]),
        ("gpt2", ("qkv",), ["c_attn"]),
        ("gpt2", ("o",), ["attn.c_proj"]),  # the feed-forward part has a c_proj too
        ("gpt2", ("o", "down"), ["c_proj"]),
        ("opt_pre_norm", ("blocks/mlp/*",), ["fc1", "fc2"]),
    ],
)
def test_target_modules_name_the_adapted_layers_and_no_other(name, targets, expected, key, tmp_path):
    _, model, params = random_adapters(name, Lora(2, 4, targets), key)
    save_adapter(tmp_path, model, params, base_model="somewhere/base")
    config = config_of(tmp_path)
    assert config["target_modules"] == expected
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert (config["r"], config["lora_alpha"], config["bias"], config["peft_type"]) == (2, 4, "none", "LORA")
    assert config["base_model_name_or_path"] == "somewhere/base"


def test_the_adapters_alone_are_enough_to_save_them(key, tmp_path):
    base, model, params = random_adapters("llama3", Lora(2, 4, ("q",)), key)
    adapters, _ = parts(model, params, "lora")
    save_adapter(tmp_path, model, jax.tree.map(jnp.asarray, adapters))
    _, loaded = load_adapter(tmp_path, base.model, base.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_adapters_in_segments_are_saved_in_the_order_of_the_blocks(key, tmp_path):
    base, model, params = random_adapters("llama3", Lora(2, 4, ("q",)), key)
    segments = tuple(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["blocks"]) for i in range(2))
    save_adapter(tmp_path, model, {**params, "blocks": segments})
    _, loaded = load_adapter(tmp_path, base.model, base.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_saving_an_adapter_leaves_other_files_alone(key, tmp_path):
    _, model, params = random_adapters("llama3", Lora(2, 4, ("q",)), key)
    (tmp_path / "report.json").write_text("{}")
    for _ in range(2):
        save_adapter(tmp_path, model, params)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
    }
