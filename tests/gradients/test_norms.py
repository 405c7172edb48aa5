"""What `squared_norm` promises of `weighted_sum`: with a factor of C over the norm, no example adds more than C (S4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.gradients import norms
from jaxdp.gradients.factors import Factoring

B, T, I, J = 4, 64, 24, 40  # noqa: E741 (the indices of the equations)


def dense(tokens=T, groups=1):
    return Factoring("dense", ((), (0,), (1,)), (I, J), tokens, False, lambda x, g: {"left": x, "right": g}, groups)


def alternating(rng, size, tokens=T):
    """Tokens that nearly cancel: the sum is far smaller than its terms."""
    left = np.repeat(rng.normal(size=(B, 1, 1, size)), tokens, axis=2)
    signs = np.where(np.arange(tokens) % 2, 1.0, -1.0)[None, None, :, None]
    return left * signs


OPERANDS = {
    "random": lambda rng: (rng.normal(size=(B, 1, T, I)), rng.normal(size=(B, 1, T, J))),
    "one_sign": lambda rng: (np.abs(rng.normal(size=(B, 1, T, I))), np.abs(rng.normal(size=(B, 1, T, J)))),
    "cancelling": lambda rng: (
        alternating(rng, I) * (1 + 1e-6 * rng.normal(size=(B, 1, T, I))),
        np.abs(alternating(rng, J)) * np.sign(alternating(rng, J)[:, :, 1:2]),
    ),
    "cancelling_to_rounding": lambda rng: (
        alternating(rng, I),
        np.repeat(rng.normal(size=(B, 1, 1, J)), T, axis=2) * (1 + 1e-7 * rng.normal(size=(B, 1, T, J))),
    ),
    "huge_inputs_tiny_cotangents": lambda rng: (
        1e18 * rng.normal(size=(B, 1, T, I)),
        1e-23 * rng.normal(size=(B, 1, T, J)),
    ),
    "tiny_inputs_huge_cotangents": lambda rng: (
        1e-22 * rng.normal(size=(B, 1, T, I)),
        1e17 * rng.normal(size=(B, 1, T, J)),
    ),
    "drifting": lambda rng: (  # +1 and -2 cancel exactly, but not once they are scaled: every term rounds the same way
        np.ones((B, 1, T, I)),
        np.broadcast_to(np.repeat([1.0, -2.0, 1e-3], [42, 21, 1])[None, None, :, None], (B, 1, T, J)).copy(),
    ),
    "one_token_matters": lambda rng: (
        np.where(np.arange(T)[None, None, :, None] == 7, 1e4, 1e-4) * rng.normal(size=(B, 1, T, I)),
        rng.normal(size=(B, 1, T, J)),
    ),
}


def exact(left, right):
    return np.einsum("bhti,bhtj->bij", np.float64(left), np.float64(right))


@functools.partial(jax.jit, static_argnames="route")
def contribution(payload, clip_norm, row, *, route):
    """What one example adds, and the norms by which it is clipped."""
    estimates = jnp.sqrt(norms.squared_norm([dense()], [payload], route))
    keep = (jnp.arange(B) == row) & jnp.isfinite(estimates)
    clip = jaxdp.flat(1.0).factors(estimates[:, None] / clip_norm, jnp.ones((1, 1), estimates.dtype))[:, 0]
    return norms.weighted_sum(dense(), payload, jnp.where(keep, clip, 0.0), keep), estimates


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_no_example_adds_more_than_the_clip_norm(name, route, dtype):
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):  # in float16 some are infinite, and are dropped
        left, right = (jnp.asarray(x.astype(dtype)) for x in OPERANDS[name](rng))
    payload = {"left": left, "right": right}

    true_norms = np.linalg.norm(exact(left, right).reshape(B, -1), axis=1)
    middle, estimates = np.median(true_norms), np.inf
    for clip_norm in (1e-3, middle / 2 + 1e-9 if middle < 1e30 else 1.0, 1e3):
        for row in range(B):
            total, estimates = contribution(payload, jnp.float32(clip_norm), row, route=route)
            assert np.linalg.norm(np.float64(total)) <= clip_norm * (1 + 1e-6)
    if dtype == jnp.float32 and name in ("random", "one_sign", "one_token_matters"):
        np.testing.assert_allclose(estimates, true_norms, rtol=1e-3)  # the worst case of rounding is charged
        assert np.all(estimates >= true_norms * (1 - 1e-6))


def biased(num_tokens):
    """+1 on two thirds of the tokens and -2 on the others: the norm is exactly zero, and every product rounds one way."""
    third = num_tokens // 3
    return jnp.concatenate([jnp.ones(2 * third), -2 * jnp.ones(third)]) * 1e6


def embedding_of_one_id(w, example):
    ids = (0.0 * example).astype(jnp.int32)  # of a constant XLA would compute the norms, for a minute
    return jnp.sum(w[ids] * example[:, None])


def siamese(w, example):
    third = example.shape[0] // 3
    first = jnp.ones((2 * third, 16)) @ w
    second = jnp.ones((third, 16)) @ w
    return jnp.sum(first) * example[0] + jnp.sum(second) * example[-1]


def recurrent(w, example):
    return jnp.sum(jax.lax.map(lambda x: jnp.ones(16) @ w * x, example))


def one_product(w, example):
    return jnp.sum((jnp.ones((*example.shape, 16)) @ w) * example[:, None])


@pytest.mark.parametrize("method", ["book_keeping", "two_pass"])
@pytest.mark.parametrize("loss", [embedding_of_one_id, siamese, recurrent, one_product])
def test_a_record_that_is_all_rounding_stays_within_the_clip_norm(loss, method):
    """S4(c): a bound from measured errors let these through at up to 60 C."""
    params = jnp.zeros((7, 1)) if loss is embedding_of_one_id else jnp.zeros((16, 16))
    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0), method=method)
    released = jax.jit(lambda batch, bound: grad_fn(params, batch, clip_norms=bound)[0])
    for num_tokens in (192, 1536):
        for clip_norm in np.geomspace(0.3, 3.0, 12, dtype=np.float32):
            total = released(biased(num_tokens)[None], clip_norm[None])
            assert np.linalg.norm(np.float64(total)) <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize(
    ("width", "outputs", "a", "b", "ratio"),
    [
        (100_000, 64, 1.4115597009658813, 1.2936946153640747, 300),
        (1024, 512, 1.5100394487380981, 1.3522762060165405, 1000),
    ],
)
def test_two_long_tokens_that_nearly_cancel_stay_within_the_clip_norm(width, outputs, a, b, ratio):
    """S4(d): equal terms round one way, so the Gram norm misses by far more than random rounding would."""

    def loss(w, example):
        return jnp.sum((example["x"] @ w) * example["v"][:, None])

    second = -a / b * (1 + 2 / ratio)
    batch = {"x": jnp.stack([jnp.full(width, a), jnp.full(width, b)])[None], "v": jnp.array([[1.0, second]])}
    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(0.01), method="book_keeping")
    total, _ = jax.jit(grad_fn)(jnp.zeros((width, outputs)), batch)
    assert np.linalg.norm(np.float64(total)) <= 0.01 * (1 + 1e-6)


def test_the_gram_norm_of_tokens_that_cancel_is_what_rounding_may_hide():
    """S4(d): each of the 2 T sums behind it may be off by half a unit, so no less than that may be charged."""
    left = jnp.ones((B, 1, T, I))
    right = jnp.where(jnp.arange(T) % 2 == 0, 1.0, -1.0)[None, None, :, None] * jnp.ones((B, 1, T, J))
    square = norms.squared_norm([dense()], [{"left": left, "right": right}], "gram")
    scale = np.sqrt(T * I) * np.sqrt(T * J)
    assert np.all(square >= 2 * T * 2.0**-24 * scale**2)


def test_a_formed_gradient_and_the_sum_are_each_charged_for_its_rounding():
    """S4(c): T + 2 roundings each, of half a unit; the tests with adversaries see only both left out."""
    payload = {"left": jnp.ones((B, 1, T, I)), "right": jnp.ones((B, 1, T, J))}
    norm = np.sqrt(np.float64(norms.squared_norm([dense()], [payload], "direct")))
    np.testing.assert_allclose(norm / (T * np.sqrt(I * J)) - 1, 2 * (T + 2) * 2.0**-24, rtol=0.1)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_terms_of_a_gram_norm_are_summed_axis_by_axis(heads):
    """S4(d): 2 T roundings are charged for them. Merged to one sum over all axes they could be T^2 in one chain."""
    left, right = jnp.zeros((B, heads, T, I)), jnp.zeros((B, heads, T, J))

    def square(left, right):
        return norms.squared_norm([dense(groups=heads)], [{"left": left, "right": right}], "gram")

    lines = jax.jit(square).lower(left, right).compile().as_text().splitlines()
    sums = [line for line in lines if " reduce(" in line and f"f32[{B},{heads},{T}]" in line.split(" reduce(")[0]]
    sums += [line for line in lines if " reduce(" in line and f"f32[{B},{T}]" in line.split(" reduce(")[0]]
    assert len(sums) == 1  # over the tokens s, to one number for each token t
    assert "dimensions={2}" in sums[0] or "dimensions={3}" in sums[0]


@pytest.mark.parametrize(("tokens", "length"), [(3, 6), (3, 1536), (600, 1300)])  # one block, a whole number, a rest
def test_a_gram_matrix_in_blocks_is_the_gram_matrix(tokens, length):
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.normal(size=(B, 2, count, length)), jnp.float32) for count in (tokens, 5))
    want = np.einsum("bhtk,bhsk->bhts", np.float64(x), np.float64(y))
    np.testing.assert_allclose(norms._gram(x, y), want, atol=1e-5 * np.sqrt(length))


def test_the_gram_norm_holds_no_copy_of_its_operands():
    operands = [jnp.zeros((8, 1, 32, width)) for width in (4096, 5000)]

    def square(left, right):
        return norms.squared_norm([dense(32)], [{"left": left, "right": right}], "gram")

    memory = jax.jit(square).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(x.nbytes for x in operands) / 4


@pytest.mark.parametrize("route", ["gram", "direct"])
def test_uses_of_one_weight_are_one_matrix_with_more_tokens(route):
    """The cross terms: two uses that agree have twice the norm, two that oppose have none."""
    rng = np.random.default_rng(1)
    left, right = (jnp.asarray(x, jnp.float32) for x in OPERANDS["random"](rng))
    once = {"left": left, "right": right}
    opposite = {"left": left, "right": -right}
    one = np.sqrt(norms.squared_norm([dense()], [once], route))
    np.testing.assert_allclose(np.sqrt(norms.squared_norm([dense()] * 2, [once, once], route)), 2 * one, rtol=1e-3)
    none = np.sqrt(norms.squared_norm([dense()] * 2, [once, opposite], route))
    assert np.all(none < 0.2 * one)  # what the worst case of rounding costs; a norm without cross terms is 1.4 * one


def test_a_tied_head_has_a_joint_norm_with_its_table():
    rng = np.random.default_rng(2)
    vocabulary, tokens, width = 11, 7, 5
    ids = jnp.asarray(rng.integers(vocabulary, size=(B, tokens)), jnp.float32)
    table = {"left": ids, "right": jnp.asarray(rng.normal(size=(B, 1, tokens, width)), jnp.float32)}
    head = {
        "left": jnp.asarray(rng.normal(size=(B, 1, tokens, vocabulary)), jnp.float32),
        "right": jnp.asarray(rng.normal(size=(B, 1, tokens, width)), jnp.float32),
    }
    axes, shape = ((), (0,), (1,)), (vocabulary, width)
    embedding = Factoring("embedding", axes, shape, tokens, True, lambda x, g: {})
    product = Factoring("dense", axes, shape, tokens, False, lambda x, g: {})
    joint = norms.squared_norm([embedding, product], [table, head], "gram")
    one_hot = np.eye(vocabulary)[np.int64(ids)]
    true = np.einsum("btv,btd->bvd", one_hot, table["right"][:, 0]) + exact(head["left"], head["right"])
    np.testing.assert_allclose(np.sqrt(joint), np.linalg.norm(true.reshape(B, -1), axis=1), rtol=1e-4)


def test_an_example_that_is_not_kept_is_never_multiplied():
    """S9: 0 * inf is NaN."""
    left, right = jnp.full((B, 1, T, I), jnp.inf), jnp.full((B, 1, T, J), jnp.nan)
    keep = jnp.arange(B) > 0
    payload = {"left": left.at[1:].set(1.0), "right": right.at[1:].set(1.0)}
    total = norms.weighted_sum(dense(), payload, jnp.where(keep, 1.0, 0.0), keep)
    np.testing.assert_array_equal(total, np.full((1, I, J), 3.0 * T))
