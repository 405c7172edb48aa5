"""A loss in parts is the loss, whatever the stretch of tokens that the head sees at once."""

import jax
import numpy as np
import pytest

from jaxdp import text
from jaxdp.block_model import loss_fn
from jaxdp.text import choice_blocks, language_model_blocks
from tests.zeroth_order.models import language_model, token_batch

pytestmark = pytest.mark.unoptimized


def whole(params):
    return {**params.resident, "blocks": params.blocks}


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("head_tokens", [5, 12, 100])
def test_language_models(name, head_tokens):
    model, _, params = language_model(name)
    blocks, params = language_model_blocks(model, head_tokens=head_tokens), jax.tree.map(jax.numpy.asarray, params)
    example = jax.tree.map(lambda leaf: leaf[0], token_batch())
    example["weights"][0, 7:] = 0.0
    expected = text.language_model_loss(lambda tokens: model.logits(whole(params), tokens), example)
    np.testing.assert_allclose(jax.jit(loss_fn, static_argnums=0)(blocks, params, example), expected, rtol=1e-5)


def choices(is_single: bool) -> dict:
    rng, (S, C, L) = np.random.default_rng(3), (2, 3, 12)
    example = {"label": np.asarray([2, 0], np.int32), "is_example": np.asarray([True, True])}
    if is_single:
        return example | {
            "tokens": rng.integers(0, 31, (S, L)).astype(np.int32),
            "position": np.asarray([4, 11], np.int32),
            "choices": np.asarray([[1, 2, 3], [3, 4, 5]], np.int32),
        }
    weights = np.zeros((S, C, L), np.float32)
    weights[:, :, 6:8] = 1.0
    return example | {"tokens": rng.integers(0, 31, (S, C, L)).astype(np.int32), "weights": weights}


@pytest.mark.parametrize("is_single", [True, False], ids=["one token", "several tokens"])
def test_choices(is_single):
    model, _, params = language_model("llama")
    params, example = jax.tree.map(jax.numpy.asarray, params), choices(is_single)
    expected = text.choice_loss(lambda tokens: model.logits(whole(params), tokens), example)
    found = jax.jit(loss_fn, static_argnums=0)(choice_blocks(model, head_tokens=5), params, example)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_stretch_has_a_token():
    with pytest.raises(ValueError, match="head_tokens"):
        language_model_blocks(language_model("opt")[0], head_tokens=0)
