"""Adapters: a fresh one changes nothing, and a merged one computes the same without being there."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.models import Lora, add_adapters, load_model, merge, parts, split

pytestmark = pytest.mark.unoptimized
GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
TOKENS = np.random.default_rng(0).integers(0, 96, size=24)


@functools.partial(jax.jit, static_argnums=0)  # a program for each model, whatever the test
def program(model, params, tokens):
    return model.logits(params, tokens)


def logits(model, params):
    return np.asarray(program(model, params, TOKENS))


def leaves(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def trained(params, stddev=0.2):
    """The parameters with adapters that do something."""
    rng = np.random.default_rng(1)

    def leaf(path, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return rng.normal(0, stddev, value.shape).astype(np.float32) if "lora_" in name else value

    return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize("name", ["gpt2", "opt_post_norm", "qwen3"])
def test_fresh_adapters_change_no_logit(name, key):
    base = load_model(GOLDENS / name)
    model, params = add_adapters(key, base.model, base.params, Lora(4, 8, ("all-linear",)))
    np.testing.assert_allclose(logits(model, params), logits(base.model, base.params), rtol=0, atol=2e-5)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())


@pytest.mark.parametrize("name", NAMES)
def test_merged_is_adapted(name, key):
    base = load_model(GOLDENS / name)
    targets = ("all-linear", "head/out") if "out" in base.params["head"] else ("all-linear",)
    model, params = add_adapters(key, base.model, base.params, Lora(3, 4.5, targets))
    params = trained(params)
    merged_model, merged = merge(model, params)
    assert merged_model == base.model
    assert jax.tree.structure(merged) == jax.tree.structure(base.params)
    assert np.max(np.abs(logits(model, params) - logits(base.model, base.params))) > 0.1
    np.testing.assert_allclose(logits(merged_model, merged), logits(model, params), rtol=0, atol=2e-4)


def test_merging_is_w_plus_alpha_over_rank_a_b_and_rounds_once(key):
    base = load_model(GOLDENS / "llama3", param_dtype=jnp.bfloat16)
    model, params = add_adapters(key, base.model, base.params, Lora(2, 6, ("v",)))
    params = trained(params)
    _, merged = merge(model, params)
    before, after = (tree["blocks"]["attention"]["v"] for tree in (params, merged))
    for i in range(2):
        exact = before["kernel"][i].astype(np.float64) + 3.0 * (
            before["lora_a"][i].astype(np.float64) @ before["lora_b"][i].astype(np.float64)
        )
        error = np.abs(after["kernel"][i].astype(np.float64) - exact)
        assert after["kernel"].dtype == jnp.bfloat16
        assert np.all(error <= 2.0**-8 * np.abs(exact) + 1e-6)
    assert after.keys() == {"kernel"}
    assert merged["blocks"]["attention"]["q"]["kernel"] is base.params["blocks"]["attention"]["q"]["kernel"]


def test_merging_blocks_in_segments_is_merging_them_in_one_stack(key):
    base = load_model(GOLDENS / "llama3")
    model, params = add_adapters(key, base.model, base.params, Lora(2, 6, ("q", "down")))
    params = trained(params)
    segments = tuple(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["blocks"]) for i in range(2))
    _, in_segments = merge(model, {**params, "blocks": segments})
    _, in_one = merge(model, params)
    for i in range(2):
        jax.tree.map(
            lambda one, part, i=i: np.testing.assert_array_equal(one[i], part[0]),
            in_one["blocks"],
            in_segments["blocks"][i],
        )


def test_a_is_uniform_within_one_over_root_in_and_b_is_zero(key):
    base = load_model(GOLDENS / "llama3")
    _, params = add_adapters(key, base.model, base.params, Lora(64, 1, ("all-linear",)))
    for path, leaf in leaves(params["blocks"]).items():
        if path.endswith("lora_b"):
            assert not np.any(leaf)
        if path.endswith("lora_a"):
            bound = 1 / math.sqrt(leaf.shape[1])
            assert np.max(np.abs(leaf)) <= bound
            # the standard deviation of a uniform draw is bound / sqrt(3)
            assert abs(np.std(np.asarray(leaf)) * math.sqrt(3) / bound - 1) < 0.05
            assert abs(np.mean(np.asarray(leaf))) < 0.05 * bound
            assert np.max(np.abs(leaf[0] - leaf[1])) > 0.5 * bound  # every block has its own draw


def test_the_draw_of_a_depends_on_key_and_path_alone(key):
    base = load_model(GOLDENS / "llama3")
    _, few = add_adapters(key, base.model, base.params, Lora(4, 1, ("v",)))
    _, many = add_adapters(key, base.model, base.params, Lora(4, 1, ("all-linear",)))
    _, other = add_adapters(jax.random.key(5), base.model, base.params, Lora(4, 1, ("v",)))
    a = few["blocks"]["attention"]["v"]["lora_a"]
    np.testing.assert_array_equal(a, many["blocks"]["attention"]["v"]["lora_a"])
    assert np.any(a != other["blocks"]["attention"]["v"]["lora_a"])
    assert np.any(a != many["blocks"]["attention"]["k"]["lora_a"])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q", "v"), {"attention/q", "attention/v"}),
        (("q_proj", "v_proj"), {"attention/q", "attention/v"}),
        (("blocks/mlp/*",), {"mlp/gate", "mlp/up", "mlp/down"}),
        (("all-linear",), {f"attention/{x}" for x in "qkvo"} | {"mlp/gate", "mlp/up", "mlp/down"}),
    ],
)
def test_patterns_choose_the_layers_that_get_adapters(targets, expected, key):
    base = load_model(GOLDENS / "llama3")
    model, params = add_adapters(key, base.model, base.params, Lora(2, 2, targets))
    adapters, _ = split(params, lambda path: "/lora_" in path)
    assert adapters.keys() == {"blocks"}
    assert leaves(adapters["blocks"]).keys() == {f"{path}/lora_{half}" for path in expected for half in "ab"}
    assert leaves(parts(model, params, "lora")[0]).keys() == leaves(adapters).keys()


def test_adapters_are_float32_over_a_narrow_base(key):
    base = load_model(GOLDENS / "gpt2", param_dtype=jnp.bfloat16)
    _, params = add_adapters(key, base.model, base.params, Lora(2, 2, ("c_attn",)))
    qkv = params["blocks"]["attention"]["qkv"]
    assert qkv["kernel"].dtype == jnp.bfloat16
    assert qkv["lora_a"].dtype == qkv["lora_b"].dtype == jnp.float32


def test_adding_twice_and_merging_nothing_are_refused(key):
    base = load_model(GOLDENS / "gpt2")
    model, params = add_adapters(key, base.model, base.params, Lora(2, 2, ("c_attn",)))
    with pytest.raises(ValueError, match=r"has adapters already.*merge"):
        add_adapters(key, model, params, Lora(2, 2, ("c_attn",)))
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(base.model, base.params)
    with pytest.raises(TypeError, match="secret_key"):
        add_adapters(0, base.model, base.params, Lora(2, 2, ("c_attn",)))
