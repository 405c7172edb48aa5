"""Logits equal those of `transformers`, by goldens that tell every wrong convention from the right one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.models import CausalLM, Lora, opt
from jaxdp.models.layers import LayerNorm
from jaxdp.models.rotary import Rotary

pytestmark = pytest.mark.unoptimized
TOLERANCE = 1e-4
VISIBLE = 5 * TOLERANCE


def reconfigured(model: CausalLM, **changes) -> CausalLM:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


def test_logits_equal_those_of_transformers(golden):
    assert golden.expected.std() > 0.5, "too flat to tell anything apart"
    assert np.max(np.abs(golden.plain - golden.expected)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"activation": "gelu"}),
        ("gpt2", {"norm_eps": 1e-5}),
        ("opt_pre_norm", {"is_pre_norm": False}),
        ("opt_post_norm", {"is_pre_norm": True}),
        ("opt_pre_norm", {"activation": "gelu"}),
        ("llama3", {"norm_eps": 1e-5}),
        ("qwen3", {"norm_eps": 1e-5}),
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
    ],
    ids=str,
)
def test_a_golden_tells_a_wrong_setting(load, name, changes):
    golden = load(name)
    assert golden.error(reconfigured(golden.model, **changes)) > VISIBLE


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": "default"},
        {"scaling": "linear"},
        {"low_freq_factor": 1.2},
        {"high_freq_factor": 5.0},
        {"theta": 1e4},
    ],
    ids=str,
)
def test_a_golden_tells_a_wrong_scaling_of_the_rotations(load, changes):
    golden = load("llama3")
    rotary = dataclasses.replace(golden.model.config.rotary, **changes)
    assert golden.error(reconfigured(golden.model, rotary=rotary)) > VISIBLE


@pytest.mark.parametrize("name", ["llama3", "llama_tied", "mistral", "qwen3"])
def test_a_golden_tells_adjacent_pairs_from_halves(load, monkeypatch, name):
    golden, rotate = load(name), Rotary.__call__

    def adjacent(self, x, positions):
        halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        first, second = jnp.split(rotate(self, halves, positions), 2, axis=-1)
        return jnp.stack([first, second], axis=-1).reshape(x.shape)

    monkeypatch.setattr(Rotary, "__call__", adjacent)
    assert golden.error() > VISIBLE


@pytest.mark.parametrize("name", ["opt_pre_norm", "opt_post_norm"])
def test_a_golden_tells_the_offset_of_positions(load, monkeypatch, name):
    golden = load(name)
    monkeypatch.setattr(opt, "POSITION_OFFSET", 1)
    assert golden.error() > VISIBLE


def test_a_golden_tells_the_fixed_eps_of_opt(load, monkeypatch):
    golden, normalize = load("opt_pre_norm"), LayerNorm.__call__

    def smaller(self, x):
        self.eps = 1e-6
        return normalize(self, x)

    monkeypatch.setattr(LayerNorm, "__call__", smaller)
    assert golden.error() > VISIBLE


def test_every_leaf_moves_the_logits(golden):
    """No scale, bias or table is ignored: the goldens hold no ones and zeros either."""
    grad = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(golden.model.logits(params, golden.inputs[0])))))(
        golden.params
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
        axes = tuple(range(1, leaf.ndim)) if path[0].key == "blocks" else None
        moved = jnp.max(jnp.abs(leaf), axis=axes)
        # The softmax does not see a constant added to every key: the bias of the keys cancels in theory.
        assert jnp.all(moved > 1e-6), jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(golden.params):
        assert np.std(leaf) > 1e-3, jax.tree_util.keystr(path)


def test_bfloat16_is_close_and_returns_float32(golden):
    model = dataclasses.replace(golden.model, dtype=jnp.bfloat16)
    logits = golden.logits(model)
    assert logits.dtype == np.float32
    assert len(np.unique(logits)) > 0.9 * logits.size, "logits rounded to bfloat16"
    scale = golden.expected.std()
    assert np.sqrt(np.mean((logits - golden.expected) ** 2)) < 0.05 * scale
    assert np.max(np.abs(logits - golden.plain)) > 1e-4 * scale, "it did not compute in bfloat16"


def test_remat_and_segments_change_nothing(golden):
    np.testing.assert_allclose(golden.logits(remat=True), golden.plain, atol=TOLERANCE)
    first, last = (
        jax.tree.map(lambda leaf, part=part: leaf[part], golden.params["blocks"]) for part in (np.s_[:1], np.s_[1:])
    )
    segmented = dataclasses.replace(golden, params=golden.params | {"blocks": (first, last)})
    np.testing.assert_allclose(segmented.logits(), golden.plain, atol=TOLERANCE)


def test_blocks_one_by_one_on_numpy_arrays_equal_logits(golden):
    """Without `jit`, as blocks arrive from host memory."""
    model, params, tokens = golden.model, golden.params, golden.inputs[0]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    positions = jnp.arange(tokens.size)
    hidden = model.embed(params["embed"], tokens, positions)
    for index in range(model.config.num_blocks):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"])
        hidden, cache = model.block(block, hidden, positions)
        assert cache is None
    logits = model.head(params["head"], params["embed"], hidden)
    np.testing.assert_allclose(logits, golden.plain[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mistral", "opt_post_norm"])
def test_gradients_are_those_under_checkpoint_and_vmap(load, name):
    golden = load(name)

    def loss(params, tokens, remat):
        return jnp.mean(jax.nn.logsumexp(golden.model.logits(params, tokens, remat=remat), axis=-1))

    params = jax.tree.map(jnp.asarray, golden.params)
    one_by_one = [jax.jit(jax.grad(loss), static_argnums=2)(params, row, False) for row in golden.inputs]
    batched = jax.jit(jax.vmap(jax.grad(lambda p, row: loss(p, row, True)), (None, 0)))(params, golden.inputs)
    for index, grad in enumerate(one_by_one):
        jax.tree.map(lambda a, b, index=index: np.testing.assert_allclose(a, b[index], atol=1e-4), grad, batched)


def test_init_has_the_shapes_and_is_reproducible(golden, key):
    model = golden.model.with_lora(Lora(2, 4.0, ("all-linear",)))
    params = model.init(key, jnp.bfloat16)
    shapes = model.shapes(jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    again = model.init(key, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    assert kernels
    for kernel in kernels:
        assert jnp.any(kernel[0] != kernel[1]), "two blocks drew the same numbers"
        assert 0.002 < jnp.std(kernel.astype(jnp.float32)) < 0.03


def test_init_starts_at_a_uniform_prediction(tiny, key):
    model = tiny("gpt2")
    model = reconfigured(model, stddev=0.02)
    logits = model.logits(model.init(key), jnp.arange(10))
    assert jnp.max(jnp.abs(logits)) < 0.5


@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt_post_norm"])
def test_fresh_adapters_change_nothing_and_trained_ones_are_a_rank_r_term(load, key, name):
    golden = load(name)
    lora = Lora(3, 6.0, ("all-linear",))
    model = golden.model.with_lora(lora)
    fresh = model.init(key)
    joined = jax.tree.map(np.asarray, merge_dicts(fresh, golden.params))
    assert dataclasses.replace(golden, params=joined).error(model) < TOLERANCE

    def randomize(path, leaf):
        is_b = path[-1].key == "lora_b"
        return jax.random.normal(key, leaf.shape) * 0.1 if is_b else leaf

    trained = jax.tree_util.tree_map_with_path(randomize, joined)
    adapted = dataclasses.replace(golden, params=trained)
    assert adapted.error(model) > VISIBLE
    merged = dataclasses.replace(golden, params=merge_adapters(trained, lora.scale))
    np.testing.assert_allclose(adapted.logits(model), merged.logits(), atol=1e-4)


def merge_dicts(tree, over):
    """`tree` with the leaves of `over` in their places."""
    if not isinstance(tree, dict):
        return over
    return {name: merge_dicts(leaf, over[name]) if name in over else leaf for name, leaf in tree.items()}


def merge_adapters(tree, scale):
    if not isinstance(tree, dict):
        return tree
    merged = {name: merge_adapters(leaf, scale) for name, leaf in tree.items() if not name.startswith("lora")}
    if "lora_a" in tree:
        merged["kernel"] = tree["kernel"] + scale * (tree["lora_a"] @ tree["lora_b"])
    return merged
