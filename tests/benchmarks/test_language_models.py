"""The language models of the benchmarks: the published sizes, one function in all forms, and no look ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.language_models import Gpt2, Llama, _rotate

pytestmark = pytest.mark.unoptimized
TINY = {"num_blocks": 2, "width": 8, "num_heads": 2, "length": 6, "vocabulary": 11}
MODELS = {
    "gpt2": Gpt2(**TINY, positions=9),
    "gpt2_untied": Gpt2(**TINY, positions=6, tied=False),
    "llama": Llama(**TINY, feed_forward=12),
}


def num_params(model) -> int:
    return sum(int(np.prod(shape)) for shape in model.shapes().values())


def some_params(model) -> dict:
    """Random biases and scales, too: at their initial values they hide where they are applied."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.3 * rng.normal(size=shape), model.dtype) for name, shape in sorted(model.shapes().items())
    }


def stacked(model, params: dict) -> dict:
    outside = {name: params[name] for name in model.outer_shapes()}
    blocks = range(model.num_blocks)
    inside = {name: jnp.stack([params[f"blocks.{n}.{name}"] for n in blocks]) for name in model.block_shapes()}
    return outside | {f"blocks.{name}": leaf for name, leaf in inside.items()}


def test_sizes_are_the_published_ones():
    assert num_params(Gpt2.of_size("small")) == 124_439_808
    assert num_params(Gpt2.of_size("medium")) == 354_823_168
    assert num_params(Gpt2.of_size("large")) == 774_030_080
    llama_7b = Llama(num_blocks=32, vocabulary=32_000)
    assert num_params(llama_7b) == 6_738_415_616


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_all_forms_are_one_function(model):
    params, tokens = some_params(model), model.draw_batch(np.random.default_rng(1), 1)[0]
    expected, grads = jax.value_and_grad(model.loss)(params, tokens)
    form = dataclasses.replace(model, scan=True, remat=True)
    assert {name: leaf.shape for name, leaf in stacked(model, params).items()} == form.shapes()
    loss, stacked_grads = jax.value_and_grad(form.loss)(stacked(model, params), tokens)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, leaf in stacked(model, grads).items():
        np.testing.assert_allclose(stacked_grads[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_position_sees_a_later_one(model):
    params = some_params(model)

    def logits(tokens):
        return model.logits(params, model._blocks(params, model.embed(params, tokens)))

    tokens = jnp.array([1, 2, 3, 4, 5, 6])
    before, after = logits(tokens), logits(tokens.at[4].set(9))
    np.testing.assert_allclose(before[:4], after[:4], rtol=1e-5, atol=1e-6)
    assert np.all(np.any(before[4:] != after[4:], axis=-1))


def test_rotation_shows_distance_and_nothing_else():
    query, key = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    rotated = [_rotate(jnp.broadcast_to(vector, (6, 1, 4)))[:, 0] for vector in (query, key)]
    products = np.asarray(rotated[0] @ rotated[1].T)  # [L, L]
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(products.round(3))) > 6


@pytest.mark.parametrize("model", [MODELS["gpt2"], MODELS["llama"]])
@pytest.mark.usefixtures("standard_promotion")  # jax.nn mixes bfloat16 and float32
def test_low_precision_stays_close(model):
    low = dataclasses.replace(model, dtype="bfloat16")
    params, tokens = some_params(model), model.draw_batch(np.random.default_rng(1), 1)[0]
    loss = low.loss({name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}, tokens)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, model.loss(params, tokens), rtol=0.05)


def test_a_batch_and_parameters_follow_from_the_seed():
    model = MODELS["gpt2"]
    first, second = (model.init(np.random.default_rng(0)) for _ in range(2))
    assert first.keys() == model.shapes().keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert model.draw_batch(np.random.default_rng(0), 3).shape == (3, model.length + 1)
