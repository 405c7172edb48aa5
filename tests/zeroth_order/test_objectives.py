"""Errors as losses: they are what the task counts, and forward passes alone improve them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.block_model import loss_fn as block_loss_fn
from jaxdp.models import generate
from jaxdp.text import objectives as errors
from jaxdp.zeroth_order import BlockParams, ForwardMode, Placement, Sgd, TwoSided, make_step
from jaxdp.zeroth_order.objectives import completion_objective, host_objective, token_f1_error
from jaxdp.zeroth_order.resident import make_resident_step, projected_gradients
from tests.text.test_blocks import choices, whole
from tests.zeroth_order.models import language_model, token_batch

pytestmark = pytest.mark.unoptimized
EOS = 2


@pytest.fixture(scope="module")
def tuned():
    """A tiny Llama that has learned a few texts, so that its greedy completions are neither all right nor all wrong."""
    model, _, params = language_model("llama")
    params = whole(jax.tree.map(jnp.asarray, params))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 31, (6, 1, 12)).astype(np.int32)
    weights = np.zeros((6, 1, 12), np.float32)
    for i, stop in enumerate((8, 9, 10, 11, 8, 9)):
        weights[i, 0, 4 : stop + 1], tokens[i, 0, stop], tokens[i, 0, stop + 1 :] = 1.0, EOS, 0
    batch = {"tokens": tokens, "weights": weights}
    loss = jax.vmap(lambda p, e: jaxdp.text.language_model_loss(lambda t: model.logits(p, t), e), (None, 0))

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: jnp.mean(loss(p, {"tokens": tokens[:4], "weights": weights[:4]})))(params)
        return jax.tree.map(lambda w, g: w - 0.3 * g / (jnp.sqrt(jnp.mean(jnp.square(g))) + 1e-6) * 0.02, params, grads)

    for _ in range(60):
        params = step(params)
    return model, params, batch


def written(model, params, batch):
    """What `generate` writes behind each prompt."""
    return [
        generate(model, params, tokens[0, :4].tolist(), max_new_tokens=8, stop_tokens=[EOS])
        for tokens in batch["tokens"]
    ]


def references(batch):
    return [
        [int(t) for t, w in zip(tokens[0], weights[0], strict=True) if w and t != EOS]
        for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True)
    ]


def f1(answer, reference):
    shared = sum(min(answer.count(v), reference.count(v)) for v in set(answer))
    return 2 * shared / (len(answer) + len(reference)) if answer or reference else 1.0


def of_rows(loss, params, batch):
    return np.asarray(jax.jit(jax.vmap(loss, (None, 0)))(params, batch))


def test_generated_objectives_score_what_generate_writes(tuned):
    """Token F1 in the program, and through strings on the host, of the very texts of `jaxdp.models.generate`."""
    model, params, batch = tuned
    answers, expected = written(model, params, batch), references(batch)
    scores = [1 - f1(*pair) for pair in zip(answers, expected, strict=True)]
    assert 0.1 < np.mean(scores) < 0.9
    options = {"max_new_tokens": 8, "stop_tokens": [EOS]}
    np.testing.assert_allclose(
        of_rows(completion_objective(model, token_f1_error, **options), params, batch), scores, atol=1e-5
    )
    seen = []

    def on_strings(answer, reference):
        seen.append((answer, reference))
        return 1 - f1(answer.split(), reference.split())

    on_host = host_objective(on_strings, lambda ids: " ".join(map(str, ids)))
    np.testing.assert_allclose(
        of_rows(completion_objective(model, on_host, **options), params, batch), scores, atol=1e-5
    )
    assert {answer for answer, _ in seen[1:]} == {" ".join(map(str, answer)) for answer in answers}


def test_exact_match_needs_no_generation(tuned):
    """A completion is written greedily if and only if each of its tokens is the likeliest behind those before it."""
    model, params, batch = tuned
    answers, expected = written(model, params, batch), references(batch)
    wrong = [float(answer != reference) for answer, reference in zip(answers, expected, strict=True)]
    assert 0 < sum(wrong) < 6
    found = of_rows(lambda p, e: errors.exact_match_error(lambda t: model.logits(p, t), e), params, batch)
    np.testing.assert_array_equal(found, wrong)
    resident = {name: params[name] for name in ("embed", "head")}
    blocks = functools.partial(block_loss_fn, errors.exact_match_blocks(model, head_tokens=5))
    np.testing.assert_array_equal(of_rows(blocks, BlockParams(resident, params["blocks"]), batch), wrong)
    fraction = of_rows(lambda p, e: errors.token_error(lambda t: model.logits(p, t), e), params, batch)
    np.testing.assert_array_equal(fraction > 0, np.asarray(wrong) > 0)


@pytest.mark.parametrize("is_single", [True, False], ids=["one token", "several tokens"])
def test_the_choice_error_is_one_minus_the_accuracy(is_single):
    model, _, params = language_model("llama")
    params, example = jax.tree.map(jnp.asarray, params), choices(is_single)

    @jax.jit
    def score(params, example):
        def logits_fn(tokens):
            return model.logits(whole(params), tokens)

        streamed = block_loss_fn(errors.choice_error_blocks(model, head_tokens=5), params, example)
        return (
            jaxdp.text.choice_scores(logits_fn, example),
            jnp.stack([errors.choice_error(logits_fn, example), streamed]),
        )

    best = np.argmax(score(params, example)[0], axis=-1).astype(np.int32)
    for wrong, expected in (([0, 0], 0.0), ([0, 1], 0.5), ([1, 2], 1.0)):
        rows = example | {"label": (best + np.int32(wrong)) % np.int32(3)}
        np.testing.assert_array_equal(score(params, rows)[1], [expected] * 2)
    padding = example | {"label": (best + np.int32([0, 1])) % np.int32(3), "is_example": np.array([True, False])}
    np.testing.assert_array_equal(score(params, padding)[1], [0.0, 0.0])
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params)
    assert np.isnan(score(broken, example)[1]).all()  # dropped (S9), not wrong


def test_token_f1_is_that_of_multisets():
    cases = [([3, 3, 4], [3, 5, 3, 3]), ([7], []), ([], [7]), ([], []), ([5, 6], [6, 5]), ([1, 1, 1], [1])]
    for answer, reference in cases:
        padded = [jnp.asarray([*row, -1, -1, -1, -1][:6], jnp.int32) for row in (answer, reference)]
        np.testing.assert_allclose(token_f1_error(*padded), 1 - f1(answer, reference), atol=1e-5)


def logistic(num_examples=128):
    """Two classes that a linear rule tells apart."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(num_examples, 4)).astype(np.float32)
    return {"x": x, "label": (x @ np.float32([1.0, -2.0, 0.5, 1.5]) > 0).astype(np.int32)}


def test_mezo_improves_an_accuracy(key):
    """The error of argmax itself, which has no gradient, falls from chance."""
    batch = logistic()

    def error(params, example):
        return (jnp.argmax(example["x"] @ params) != example["label"]).astype(jnp.float32)

    init, step = make_resident_step(error, optax.sgd(0.5), estimator=TwoSided(8, 0.2))
    state = init(np.float32([[-0.1, 0.1]] * 4), direction_key=key)
    accuracies = []
    for _ in range(60):
        accuracies.append(1 - float(np.mean(jax.vmap(error, (None, 0))(state.params, batch))))
        state, _ = step(state, batch)
    assert accuracies[0] < 0.7
    assert accuracies[-1] > 0.9


def test_an_error_streams(key):
    """From a model whose blocks pass through the device one by one."""
    model, _, params = language_model("llama")
    rows = [choices(True) | {"label": np.asarray(label, np.int32)} for label in ([0, 1], [2, 0], [1, 1])]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    steps = make_step(errors.choice_error_blocks(model), Sgd(1e-2), placement=Placement(is_streamed=True))
    found = steps.losses(steps.init(params, direction_key=key), batch)
    on_device = whole(jax.tree.map(jnp.asarray, params))
    expected = of_rows(lambda p, e: errors.choice_error(lambda t: model.logits(p, t), e), on_device, batch)
    np.testing.assert_array_equal(found, expected)


def test_what_the_users_function_does_on_a_record_never_shows(key):
    """S9: an exception, NaN, and what is no number are one non-finite example; a private step goes on without them."""
    kinds = {3: RuntimeError("secret"), 4: float("nan"), 5: "text", 6: float("inf")}

    def fun(answer, reference):
        value = kinds.get(len(answer), 0.25 * len(answer))
        if isinstance(value, Exception):
            raise value
        return value

    objective = host_objective(fun, lambda ids: "x" * len(ids), probe=("x", "x"))
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 1], np.int32)
    answers = np.where(np.arange(8) < lengths[:, None], 9, -1).astype(np.int32)
    found = np.asarray(jax.jit(jax.vmap(objective))(answers, answers))
    np.testing.assert_array_equal(found[[0, 1, 6, 7]], [0.25, 0.5, 1.75, 0.25])
    assert np.isnan(found[2:6]).all()

    def loss(params, row):
        return objective(jnp.where(params[0] > 0, row, row - 0), row) * params[0]

    plan = jaxdp.plan(
        num_examples=8,
        sampling_prob=1.0,
        num_steps=2,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=1.0,
        target_delta=1e-3,
    )
    init, step = make_resident_step(loss, optax.sgd(0.1), plan=plan)
    state, info = step(init(jnp.ones(2), direction_key=key), answers)
    np.testing.assert_array_equal(info.not_private.contributed, ~np.isnan(found))
    assert np.isfinite(state.params).all()


def test_a_mistake_in_the_users_function_shows_before_any_work():
    with pytest.raises(ValueError, match=r"fun gave no number .*KeyError"):
        host_objective(lambda answer, reference: {}[answer], str)
    with pytest.raises(ValueError, match="not 'NoneType'"):
        host_objective(lambda answer, reference: None, str)
    with pytest.raises(ValueError, match="fun gave nan"):
        host_objective(lambda answer, reference: float("nan"), str)
    with pytest.raises(ValueError, match="max_new_tokens"):
        completion_objective(language_model("llama")[0], token_f1_error, max_new_tokens=0)


def test_a_nan_in_the_model_is_a_nan_in_the_error(tuned):
    model, params, batch = tuned

    def both(params, example):
        def logits_fn(tokens):
            return model.logits(params, tokens)

        return jnp.stack([error(logits_fn, example) for error in (errors.exact_match_error, errors.token_error)])

    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params)
    assert np.isnan(of_rows(both, broken, batch)).all()
    padding = batch | {"weights": np.zeros_like(batch["weights"])}
    np.testing.assert_array_equal(of_rows(both, params, padding), np.zeros((6, 2)))


def test_forward_mode_is_refused_where_it_would_be_zero(key):
    """A derivative of an accuracy is zero: no step would move, and nobody would be told."""
    model, _, params = language_model("llama")
    params = jax.tree.map(jnp.asarray, params)
    rows = jax.tree.map(lambda leaf: leaf[None], choices(True))
    texts = token_batch(1)
    cases = [
        (lambda p, e: errors.choice_error(lambda t: model.logits(whole(p), t), e), rows),
        (lambda p, e: errors.exact_match_error(lambda t: model.logits(whole(p), t), e), texts),
        (functools.partial(block_loss_fn, errors.choice_error_blocks(model)), rows),
        (lambda p, e: completion_objective(model, token_f1_error, max_new_tokens=2)(whole(p), e), texts),
    ]
    for loss, batch in cases:
        with pytest.raises(TypeError, match="estimate with TwoSided or OneSided"):
            jax.eval_shape(
                functools.partial(projected_gradients(loss, estimator=ForwardMode()), direction_key=key),
                params,
                batch,
                step=0,
            )
