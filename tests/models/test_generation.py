"""Generation with a cache is the argmax of the logits without one; sampling is what it says."""

import collections
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.models import generate, generation
from jaxdp.models.weights import load_model

pytestmark = pytest.mark.unoptimized


def greedy(golden, prompt, num_tokens):
    """The definition: the whole text again for every token."""
    length = golden.model.config.max_length
    logits = jax.jit(golden.model.logits)
    tokens = list(prompt)
    for _ in range(num_tokens):
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(golden.params, padded)[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_generation_is_the_argmax_of_the_logits(golden):
    prompt = golden.inputs[0][:9].tolist()
    expected = greedy(golden, prompt, 25)
    assert generate(golden.model, golden.params, prompt, max_new_tokens=25) == expected


def test_logits_token_by_token_equal_those_of_transformers(golden):
    """Where a greedy text may be dull, these are not: every next token is given."""
    tokens, expected = golden.inputs[0], golden.expected[0]
    cache, start = golden.model.init_cache(48), 9
    padded = np.concatenate([tokens[:start], np.zeros(7, np.int32)])
    logits, cache = generation._next_logits(
        golden.model, golden.params, padded, jnp.int32(0), jnp.int32(start - 1), cache
    )
    np.testing.assert_allclose(logits, expected[start - 1], atol=1e-4)
    for position in range(start, tokens.size):
        piece = tokens[position : position + 1]
        logits, cache = generation._next_logits(
            golden.model, golden.params, piece, jnp.int32(position), jnp.int32(0), cache
        )
        np.testing.assert_allclose(logits, expected[position], atol=1e-4)


def test_a_cache_in_pieces_gives_the_same_hidden_states(golden):
    model, tokens = golden.model, golden.inputs[1][:23]
    block = jax.tree.map(lambda leaf: leaf[1], golden.params["blocks"])
    positions = jnp.arange(tokens.size)
    hidden = model.embed(golden.params["embed"], tokens, positions)
    run = jax.jit(model.block)
    expected, _ = run(block, hidden, positions)
    cache = jax.tree.map(lambda leaf: leaf[0], model.init_cache(31))
    for start, stop in ((0, 11), (11, 12), (12, 23)):
        piece = slice(start, stop)
        out, cache = run(block, hidden[piece], positions[piece], cache)
        np.testing.assert_allclose(out, expected[piece], atol=1e-4)


def test_segments_generate_the_same(load):
    golden = load("llama3")
    blocks = golden.params["blocks"]
    parts = tuple(jax.tree.map(lambda leaf, part=part: leaf[part], blocks) for part in (np.s_[:1], np.s_[1:]))
    prompt = golden.inputs[0][:4].tolist()
    segmented = generate(golden.model, golden.params | {"blocks": parts}, prompt, max_new_tokens=12)
    assert segmented == generate(golden.model, golden.params, prompt, max_new_tokens=12)


def test_generation_stops_before_a_stop_token(load):
    golden = load("gpt2")
    prompt = golden.inputs[0][:5].tolist()
    tokens = generate(golden.model, golden.params, prompt, max_new_tokens=20)
    stop = tokens[7]
    stopped = generate(golden.model, golden.params, prompt, max_new_tokens=20, stop_tokens=[stop])
    assert stopped == tokens[: tokens.index(stop)]


def test_sampling_follows_the_softmax_and_only_the_likeliest(load, key):
    golden = load("qwen3")
    prompt = golden.inputs[0][:6].tolist()
    logits = golden.logits()[0][5]
    likeliest = np.argsort(-logits)[:3]
    temperature = float(logits[likeliest[0]] - logits[likeliest[2]])  # none of the three is rare
    drawn = collections.Counter(
        generate(golden.model, golden.params, prompt, max_new_tokens=1, key=k, temperature=temperature, top_k=3)[0]
        for k in jax.random.split(key, 400)
    )
    assert set(drawn) == set(likeliest.tolist())
    weights = np.exp((logits[likeliest] - logits[likeliest[0]]) / temperature)
    observed = np.array([drawn[token] for token in likeliest.tolist()])
    expected = 400 * weights / weights.sum()
    assert np.sum((observed - expected) ** 2 / expected) < 13.8  # chi-square of two degrees of freedom, 0.1 %


def test_sampling_is_a_function_of_its_key(load, key):
    golden = load("gpt2")
    prompt = golden.inputs[0][:5].tolist()

    def sample(k, **options):
        return generate(golden.model, golden.params, prompt, max_new_tokens=15, key=k, **options)

    other = jax.random.key(1)
    assert sample(key, temperature=2.0) == sample(key, temperature=2.0)
    assert sample(key, temperature=2.0) != sample(other, temperature=2.0)
    assert sample(key, temperature=2.0, top_k=1) == sample(other) == sample(None)


def test_one_compilation_serves_every_step(load):
    golden = load("gpt2")
    before = generation._next_logits._cache_size()
    for length in (20, 19, 24):  # one size of padded prompt, and of cache: more than 32
        generate(golden.model, golden.params, golden.inputs[0][:length].tolist(), max_new_tokens=14)
    assert generation._next_logits._cache_size() - before <= 2


def test_bfloat16_generates(load):
    golden = load("llama3")
    model = dataclasses.replace(golden.model, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), golden.params)
    assert len(generate(model, params, [1, 2, 3], max_new_tokens=5)) == 5


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one token"),
        ([96], {}, ValueError, r"ids from 96 to 96, outside the vocabulary \[0, 96\)"),
        ([-1], {}, ValueError, "ids from -1 to -1"),
        ([0.5], {}, TypeError, "must be integers"),
        ([1] * 40, {"max_new_tokens": 9}, ValueError, "exceed the model's context of 48"),
        ([1], {"temperature": 1.0}, ValueError, "needs a key"),
        ([1], {"temperature": -1.0}, ValueError, "temperature must be nonnegative"),
        ([1], {"top_k": 0}, ValueError, "top_k must be at least 1"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(load, prompt, options, error, message):
    golden = load("gpt2")
    with pytest.raises(error, match=message):
        generate(golden.model, golden.params, prompt, **({"max_new_tokens": 4} | options))


def test_a_real_model_tells_its_story(jaxdp_data):
    """200 tokens of stories260K, greedily from nothing, as its author printed them."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = jaxdp_data / "models" / "stories260K-hf"
    loaded = load_model(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = json.loads((folder / "config.json").read_text())["bos_token_id"]
    tokens = generate(loaded.model, loaded.params, [bos], max_new_tokens=200)
    text = tokenizer.decode(tokens)
    story = re.search(r"-t 0.0\n(.*?)\n```", (folder.parent / "stories260K" / "stories260K.md").read_text(), re.DOTALL)
    assert len(tokens) == 200
    assert len(text) > 400
    assert story.group(1).startswith(text)
