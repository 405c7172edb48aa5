"""A model that passes through the device block by block writes what a resident one writes, and scores what it scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import models, quantization, text
from jaxdp.text.block_scores import (
    choice_score_blocks,
    evaluate_choices_sums,
    evaluate_language_model_sums,
    language_model_score_blocks,
)
from jaxdp.zeroth_order import BlockParams, Placement, Scalars, Sgd, generation, make_step
from jaxdp.zeroth_order.generation import generate
from tests.text.test_blocks import choices, whole
from tests.zeroth_order.models import language_model, token_batch

pytestmark = pytest.mark.unoptimized
STREAMED = Placement(is_streamed=True)
PROMPT = [4, 17, 9]


@pytest.fixture(scope="module", params=["opt", "llama"])
def tiny(request):
    """A model whose tokens vary, unlike at its start, its host parameters, and what `jaxdp.models.generate` writes."""
    model, blocks, params = language_model(request.param)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape, np.float32), params)
    on_device = whole(jax.tree.map(jnp.asarray, params))
    written = functools.partial(models.generate, model, on_device)
    return model, blocks, params, written


def test_the_tokens_are_those_of_the_resident_model(tiny, key):
    model, blocks, params, written = tiny
    expected = written(PROMPT, max_new_tokens=9)
    assert len(set(expected)) > 2
    state = make_step(blocks, Sgd(1e-2), placement=STREAMED).init(params, direction_key=key)
    assert generate(model, state, PROMPT, max_new_tokens=9) == expected
    assert (
        generate(model, state, PROMPT, max_new_tokens=9, stop_tokens=[expected[4]], prefetch=0)
        == (expected[: expected.index(expected[4])])
    )
    assert generate(model, params, PROMPT, max_new_tokens=9, prefetch=3) == expected  # from where they lie on the host
    sampling = {"max_new_tokens": 9, "key": key, "temperature": 3.0, "top_k": 20}
    sampled = written(PROMPT, **sampling)
    assert sampled != expected
    assert generate(model, state, PROMPT, **sampling) == sampled
    assert not any(leaf.is_deleted() for bucket in state.blocks for leaf in jax.tree.leaves(bucket))


def test_the_logits_are_the_same_but_for_rounding(tiny, monkeypatch):
    """Of every token, from the compiled programs themselves: a scan over blocks, and one block after the other.

    Two programs, which some CPUs round alike and others do not.
    """
    model, _, params, written = tiny
    resident, streamed = [], []

    def spy(module, name, pick, seen):
        function = getattr(module, name)

        def spied(*args):
            found = function(*args)
            seen.append(np.asarray(pick(found)))
            return found

        monkeypatch.setattr(module, name, spied)

    spy(models.generation, "_next_logits", lambda found: found[0], resident)
    spy(generation, "_leave", lambda found: found, streamed)
    assert written(PROMPT, max_new_tokens=5) == generate(model, params, PROMPT, max_new_tokens=5)
    assert len(resident) == len(streamed) == 5
    np.testing.assert_allclose(streamed, resident, rtol=1e-4, atol=1e-4)


def meant_by(leaf):
    if not isinstance(leaf, quantization.Packed):
        return leaf
    return np.asarray(quantization.dequantize(leaf.arrays, leaf.spec, jnp.float32))


@pytest.mark.parametrize("format", [None, "int8"])
def test_frozen_weights_and_adapters_are_joined(format, key):
    """Blocks in two stores, of which one stays on the device; and quantized ones, whose weights are what they stand for."""
    adapted = language_model("llama")[0].with_lora(models.Lora(rank=2, alpha=8.0, targets=("q_proj", "up_proj")))
    drawn = jax.tree.map(lambda leaf: leaf + np.float32(0.3), adapted.init(key))
    trained, frozen = models.split(drawn, lambda path: path.endswith(("/lora_a", "/lora_b")) or path.startswith("head"))
    waiting = meant = frozen["blocks"]
    if format is not None:
        waiting = quantization.quantize_matrices(meant, format)
        meant = jax.tree.map(meant_by, waiting, is_leaf=lambda leaf: isinstance(leaf, quantization.Packed))
    expected = models.generate(adapted, models.join(trained, {**frozen, "blocks": meant}), PROMPT, max_new_tokens=6)
    steps = make_step(text.language_model_blocks(adapted), Sgd(1e-2), placement=STREAMED)
    base = BlockParams({"embed": frozen["embed"]}, waiting)
    state = steps.init(BlockParams({"head": trained["head"]}, trained["blocks"]), direction_key=key, frozen=base)
    assert generate(adapted, state, PROMPT, max_new_tokens=6) == expected
    if format is not None:
        with pytest.raises(ValueError, match="the blocks are quantized"):
            generate(adapted, base, PROMPT, max_new_tokens=2)


def test_an_update_that_waits_is_not_overlooked(key):
    """S16: a deferred state has no parameters; after `flush`, what is written is that of the flushed ones."""
    model, blocks, params = language_model("llama")
    steps = make_step(blocks, Sgd(0.5), placement=STREAMED)
    scalars = Scalars(jnp.ones(1), jnp.float32(0.3))
    state = steps.replay(steps.init(params, direction_key=key), scalars)
    with pytest.raises(TypeError, match="call flush first"):
        generate(model, state, PROMPT, max_new_tokens=2)
    state = steps.flush(state)
    found = whole(jax.tree.map(jnp.asarray, state.params()))
    assert generate(model, state, PROMPT, max_new_tokens=6) == models.generate(model, found, PROMPT, max_new_tokens=6)


def test_programs_grow_neither_with_depth_nor_with_length(key):
    """One program of a block for the prompt and one for a token, while prompt and cache round to the same sizes."""
    sizes = []
    for depth in (2, 5):
        config = {
            "model_type": "llama", "vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": depth,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        model = models.causal_lm(config)
        params = model.init(key)
        host = BlockParams({name: params[name] for name in ("embed", "head")}, params["blocks"])
        before = generation._advance._cache_size()
        for prompt in ([3, 4, 5], [3, 4, 5, 6]):
            generate(model, host, prompt, max_new_tokens=4)
        sizes.append(generation._advance._cache_size() - before)
    assert sizes == [2, 2]  # of each model, which is part of what is compiled for


def test_streamed_scores_are_those_of_the_evaluation(key):
    """Perplexity by token and accuracy: every counted token, every text weighs the same, whatever the batches."""
    model, blocks, params = language_model("llama")
    state = make_step(blocks, Sgd(1e-2), placement=STREAMED).init(params, direction_key=key)  # as a training run has it
    resident = whole(jax.tree.map(jnp.asarray, params))
    texts = token_batch(5)
    texts["weights"] *= np.random.default_rng(0).integers(0, 2, texts["weights"].shape)
    texts["weights"][3] = 0.0
    texts["weights"][1, :, 2:] = 0.0
    steps = make_step(language_model_score_blocks(model, head_tokens=5), Sgd(1e-2), placement=STREAMED)
    expected = text.evaluate_language_model(model.logits, resident, texts, batch_rows=2)
    found = evaluate_language_model_sums(lambda batch: steps.losses(state, batch), texts, batch_rows=3)
    np.testing.assert_allclose(found.perplexity, expected.perplexity, rtol=1e-5)
    assert found.num_tokens == expected.num_tokens == int(texts["weights"].sum())
    sums = steps.losses(state, texts)
    np.testing.assert_array_equal(sums.num_tokens, texts["weights"].sum((1, 2)))

    for is_single in (True, False):
        rows = [choices(is_single) | {"label": np.int32([i % 3, 2])} for i in range(4)]
        rows[1]["is_example"] = np.array([True, False])
        data = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        steps = make_step(choice_score_blocks(model, head_tokens=5), Sgd(1e-2), placement=STREAMED)
        sums_of = functools.partial(steps.losses, state)
        expected = text.evaluate_choices(model.logits, resident, data, batch_rows=2)
        found = evaluate_choices_sums(sums_of, data, batch_rows=3)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        assert (found.num_correct, found.num_examples) == (expected.num_correct, 7)
    with pytest.raises(ValueError, match="expected the output of encode_choices"):
        evaluate_choices_sums(sums_of, texts)
    with pytest.raises(ValueError, match="no token of the evaluation set"):
        evaluate_language_model_sums(sums_of, texts | {"weights": texts["weights"] * 0})


def test_bad_input_is_refused(key):
    model, _, params = language_model("llama")
    with pytest.raises(TypeError, match="must be a State of make_step or BlockParams, got dict"):
        generate(model, whole(params), PROMPT, max_new_tokens=2)
    short = jax.tree.map(lambda leaf: leaf[:2], params.blocks)
    with pytest.raises(ValueError, match="state has 2 blocks, and the model 3"):
        generate(model, params._replace(blocks=short), PROMPT, max_new_tokens=2)
    with pytest.raises(ValueError, match="exceed the model's context of 12"):
        generate(model, params, PROMPT, max_new_tokens=10)
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, params, PROMPT, max_new_tokens=2, temperature=1.0)
