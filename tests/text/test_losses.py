"""Laws of the losses and of evaluation."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxdp
from jaxdp import text
from jaxdp.text import Record

pytestmark = pytest.mark.unoptimized
VOCABULARY = 262
EYE = np.eye(8, dtype=np.float32)
WORDS = (" bad", " good", " fine")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"table": draw(VOCABULARY, 8), "hidden": draw(8, 8), "out": draw(8, VOCABULARY)}


def logits_fn(params, tokens):
    """A causal model that sees everything so far: running means of embeddings, `[L] -> [L, V]`."""
    embedded = jnp.take(params["table"], tokens, axis=0)
    count = jnp.arange(1, tokens.shape[0] + 1, dtype=jnp.float32)[:, None]
    return jnp.tanh((jnp.cumsum(embedded, axis=0) / count) @ params["hidden"]) @ params["out"]


def row(data, i=0):
    return {name: values[i] for name, values in data.items()}


@jax.jit
def token_log_likelihoods(params, tokens):
    return text.token_log_likelihoods(logits_fn(params, tokens), tokens)


@jax.jit
def language_model_loss(params, example):
    return text.language_model_loss(functools.partial(logits_fn, params), example)


@jax.jit
def choice_scores(params, example):
    return text.choice_scores(functools.partial(logits_fn, params), example)


@jax.jit
def choice_loss(params, example):
    return text.choice_loss(functools.partial(logits_fn, params), example)


@pytest.fixture
def texts(tokenizer):
    records = [Record("", s, unit=u) for s, u in (("hello there", "a"), ("b", "b"), ("more of a", "a"))]
    return text.encode_texts(records, tokenizer, max_length=9, max_sequences=4, on_long="split")[0]


@pytest.fixture(params=["one token", "several tokens"])
def choices(request, make_tokenizer):
    """Both forms of `encode_choices`."""
    tokenizer = make_tokenizer(words=WORDS if request.param == "one token" else ())
    records = [
        Record(s, "", label=label, unit=u) for s, label, u in (("ab", "1", "u"), ("c", "0", "v"), ("d", "2", "u"))
    ]
    verbalizers = dict(zip("012", WORDS, strict=True))
    return text.encode_choices(records, tokenizer, verbalizers=verbalizers, max_length=16, max_sequences=3)[0]


def log_probs(params, tokens):
    """The same model in NumPy and float64: `[L, V]`."""
    table, hidden, out = (np.asarray(params[name], np.float64) for name in ("table", "hidden", "out"))
    means = np.cumsum(table[np.asarray(tokens)], axis=0) / np.arange(1, len(tokens) + 1)[:, None]
    logits = np.tanh(means @ hidden) @ out
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_token_log_likelihoods_equal_their_definition(params):
    tokens = np.asarray([1, 70, 70, 5, 200], np.int32)
    actual = token_log_likelihoods(params, tokens)
    expected = [0.0] + [log_probs(params, tokens)[t - 1, tokens[t]] for t in range(1, 5)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual.dtype == jnp.float32


def test_logits_of_any_precision_are_reduced_in_float32():
    """In bfloat16 the logarithm of a sum over 262 tokens would be off by 2^-8 of 5.6."""
    uniform_logits, tokens = jnp.zeros((2, VOCABULARY), jnp.bfloat16), jnp.asarray([1, 7])
    actual = jax.jit(text.token_log_likelihoods)(uniform_logits, tokens)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [0.0, -math.log(VOCABULARY)], rtol=1e-5)


def test_language_model_loss_is_the_mean_over_the_units_own_tokens(params, texts):
    for i in range(2):
        terms = [
            -log_probs(params, tokens)[t - 1, tokens[t]]
            for tokens, weights in zip(texts["tokens"][i], texts["weights"][i], strict=True)
            for t in np.flatnonzero(weights)
        ]
        np.testing.assert_allclose(language_model_loss(params, row(texts, i)), np.mean(terms), rtol=1e-5)


def test_a_uniform_model_has_the_loss_of_its_vocabulary(texts, choices):
    nothing = {
        "table": np.zeros((VOCABULARY, 8), np.float32),
        "hidden": EYE,
        "out": np.zeros((8, VOCABULARY), np.float32),
    }
    np.testing.assert_allclose(language_model_loss(nothing, row(texts)), math.log(VOCABULARY), rtol=1e-5)
    np.testing.assert_allclose(choice_loss(nothing, row(choices)), math.log(3), rtol=1e-5)


def test_padding_tokens_change_nothing(params, make_tokenizer):
    records = [Record("q", "hello")]
    encode = lambda length, pad, s: row(  # noqa: E731
        text.encode_completions(records, make_tokenizer(pad_id=pad), max_length=length, max_sequences=s)[0]
    )
    expected = language_model_loss(params, encode(8, 0, 1))
    for length, pad, sequences in ((12, 0, 1), (12, 99, 1), (12, 99, 3)):
        np.testing.assert_allclose(language_model_loss(params, encode(length, pad, sequences)), expected, rtol=1e-5)


def test_choice_scores_are_mean_log_likelihoods_of_the_candidates(params, make_tokenizer):
    """MeZO, arXiv 2305.17333: candidates of 4, 5 and 5 bytes behind one text."""
    tokenizer = make_tokenizer()
    data, _ = text.encode_choices(
        [Record("ab", "", label="b")], tokenizer, verbalizers=dict(zip("abc", WORDS, strict=True)), max_length=20
    )
    scores = choice_scores(params, row(data))
    context = [1, *tokenizer.encode("ab It was", add_special_tokens=False)]
    expected = []
    for word in WORDS:
        ending = tokenizer.encode(word, add_special_tokens=False)
        table = log_probs(params, [*context, *ending])
        expected.append(np.mean([table[len(context) - 1 + t, token] for t, token in enumerate(ending)]))
    np.testing.assert_allclose(scores, [expected], rtol=1e-5)
    likelihoods = np.exp(expected)
    np.testing.assert_allclose(choice_loss(params, row(data)), -np.log(likelihoods[1] / likelihoods.sum()), rtol=1e-5)


def test_one_sequence_for_all_candidates_is_exactly_one_for_each(params, make_tokenizer):
    """The short form of `encode_choices` against the long one, written out here: loss, scores and gradient."""
    records = [Record("ab", "", label="1", unit="u"), Record("c", "", label="0", unit="u")]
    verbalizers = dict(zip("012", WORDS, strict=True))
    short = row(
        text.encode_choices(
            records, make_tokenizer(words=WORDS), verbalizers=verbalizers, max_length=12, max_sequences=3
        )[0]
    )
    assert "choices" in short
    tokens = np.repeat(np.asarray(short["tokens"])[:, None], 3, axis=1)  # [S, C, L]
    weights = np.zeros(tokens.shape, np.float32)
    for s in range(2):
        tokens[s, np.arange(3), short["position"][s] + 1] = short["choices"][s]
        weights[s, :, short["position"][s] + 1] = 1.0
    long = {"tokens": tokens, "weights": weights, "label": short["label"], "is_example": short["is_example"]}
    np.testing.assert_allclose(choice_scores(params, short)[:2], choice_scores(params, long)[:2], rtol=1e-5)
    (loss_short, grad_short), (loss_long, grad_long) = (
        jax.jit(jax.value_and_grad(choice_loss))(params, example) for example in (short, long)
    )
    np.testing.assert_allclose(loss_short, loss_long, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad_short, grad_long)


def test_choice_loss_is_the_mean_over_the_units_texts(params, choices):
    """Slots without a text count nothing."""
    example = row(choices)
    assert example["is_example"].tolist() == [True, True, False]
    single = []
    for s in range(2):
        only = dict(example, is_example=np.arange(3) == s)
        single.append(choice_loss(params, only))
    np.testing.assert_allclose(choice_loss(params, example), np.mean(single), rtol=1e-5)


def test_losses_do_not_depend_on_other_rows(params, texts, choices):
    """S3: under vmap, a row's loss is that of the row alone."""
    for loss, data in ((language_model_loss, texts), (choice_loss, choices)):
        together = jax.jit(jax.vmap(loss, (None, 0)))(params, data)
        alone = [loss(params, row(data, i)) for i in range(len(data["tokens"]))]
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_rows_of_zeros_are_finite_in_value_and_gradient(params, texts, choices):
    """S10: padding rows of a Poisson batch."""
    for loss, data in ((language_model_loss, texts), (choice_loss, choices)):
        zeros = jax.tree.map(np.zeros_like, row(data))
        value, grad = jax.jit(jax.value_and_grad(loss))(params, zeros)
        assert value == 0.0
        assert all((np.asarray(leaf) == 0.0).all() for leaf in jax.tree.leaves(grad))


def test_what_has_no_weight_may_be_infinite():
    """Logits of -inf where nothing is counted, as a model masks ids that no text has."""

    def model(tokens):
        return jnp.zeros((tokens.shape[0], 4)).at[:, 3].set(-jnp.inf)

    example = {"tokens": jnp.asarray([[0, 3, 1, 2]]), "weights": jnp.asarray([[0.0, 0.0, 1.0, 1.0]])}
    np.testing.assert_allclose(text.language_model_loss(model, example), math.log(3), rtol=1e-5)


def test_a_model_that_wants_a_batch_is_told(texts):
    with pytest.raises(ValueError, match=r"one sequence \[L\]"):
        text.language_model_loss(lambda tokens: jnp.zeros((1, tokens.shape[0], 4)), row(texts))


def test_clipped_grad_sees_every_leaf(params, texts, choices):
    """Through the losses, matrices and tables keep their fast routes, and every method equals the definition."""
    for loss, data in ((language_model_loss, texts), (choice_loss, choices)):
        grad = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(0.1))
        assert {leaf.path: leaf.route for leaf in grad.explain(params, row(data)).leaves} == {
            "table": "embedding",
            "hidden": "dense",
            "out": "dense",
        }
        definition = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(0.1), method="vmap")
        (actual, _), (expected, _) = jax.jit(grad)(params, data), jax.jit(definition)(params, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


# Evaluation.


@hypothesis.given(batch_rows=st.integers(1, 9))
def test_batching_changes_no_evaluation(batch_rows, params, make_tokenizer):
    records = [Record("", "hello there"[:k]) for k in range(1, 8)]
    data, report = text.encode_texts(records, make_tokenizer(), max_length=6, max_sequences=None, on_long="split")
    score = text.evaluate_language_model(logits_fn, params, data, batch_rows=batch_rows)
    terms = [
        -log_probs(params, tokens)[t - 1, tokens[t]]
        for tokens, weights in zip(data["tokens"].reshape(-1, 6), data["weights"].reshape(-1, 6), strict=True)
        for t in np.flatnonzero(weights)
    ]
    assert score.num_tokens == report.num_targets == len(terms)
    np.testing.assert_allclose(score.loss, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(score.perplexity, np.exp(score.loss))


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_accuracy_counts_every_text_once(batch_rows, params, choices):
    score = text.evaluate_choices(logits_fn, params, choices, batch_rows=batch_rows)
    expected_loss, num_correct = [], 0
    for i, s in ((0, 0), (0, 1), (1, 0)):
        example = row(choices, i)
        scores = np.asarray(choice_scores(params, example))[s]
        num_correct += int(scores.argmax() == example["label"][s])
        expected_loss.append(choice_loss(params, dict(example, is_example=np.arange(3) == s)))
    assert (score.num_correct, score.num_examples) == (num_correct, 3)
    assert score.accuracy == num_correct / 3
    np.testing.assert_allclose(score.loss, np.mean(expected_loss), rtol=1e-5)


def test_evaluation_compiles_once(params, texts, choices):
    traces = []

    def counted(params, tokens):
        traces.append(tokens.shape)
        return logits_fn(params, tokens)

    for batch_params in (params, jax.tree.map(np.asarray, params)):
        text.evaluate_language_model(counted, batch_params, texts, batch_rows=2)
        text.evaluate_language_model(counted, batch_params, texts, batch_rows=2)
    assert len(traces) == 1
    for _ in range(2):
        text.evaluate_choices(counted, params, choices, batch_rows=2)
    assert len(traces) == 2


def test_a_hopeless_model_has_infinite_perplexity():
    assert text.LanguageModelScore(1000.0, 5).perplexity == math.inf
    assert math.isnan(text.LanguageModelScore(math.nan, 5).perplexity)
