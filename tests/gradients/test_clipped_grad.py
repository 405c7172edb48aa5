"""Laws of `clipped_grad`."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import jaxdp
from jaxdp import NeighboringRelation

pytestmark = pytest.mark.unoptimized
POLICIES = {
    "flat": jaxdp.flat(0.7),
    "automatic": jaxdp.automatic(0.7),
    "per_layer_module": jaxdp.per_layer(0.7),
    "per_layer_leaf": jaxdp.per_layer(0.7, group_by="leaf", split="dimension"),
    "per_layer_named": jaxdp.per_layer({"first": 0.4, "second": 0.3}),
    "quantile": jaxdp.quantile(0.7),
}


@pytest.fixture(params=POLICIES)
def policy_name(request):
    return request.param


@pytest.fixture(params=["vmap", "two_pass", "auto"])
def method(request):
    """The definition, the one method that differentiates twice, and what a user gets: book-keeping or per-layer."""
    return request.param


@functools.cache
def compiled(loss_fn, policy_name, method, microbatch_size=None):
    """The program of eight examples and a mask, which many laws are about."""
    return jax.jit(
        jaxdp.clipped_grad(loss_fn, clipping=POLICIES[policy_name], microbatch_size=microbatch_size, method=method)
    )


EVERYONE = np.zeros(8, bool)


@functools.cache
def gradient(loss_fn):
    return jax.jit(jax.grad(loss_fn))


def definition(loss_fn, policy, params, batch, is_padding):
    """The equation: a Python loop over the examples, in float64 where it matters."""
    groups = policy.groups(params)
    clip_norms = policy.clip_norms(groups).astype(np.float64)
    total = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(params)]
    for i in range(len(is_padding)):
        if is_padding[i]:
            continue
        grads = [
            np.asarray(g, np.float64)
            for g in jax.tree.leaves(gradient(loss_fn)(params, jax.tree.map(lambda x, i=i: x[i], batch)))
        ]
        for k, clip_norm in enumerate(clip_norms):
            members = [j for j, group in enumerate(groups.leaf_groups) if group == k]
            norm = np.sqrt(sum(np.sum(grads[j] ** 2) for j in members))
            factor = clip_norm / (norm + 0.01) if "Automatic" in repr(policy) else min(1, clip_norm / norm)
            for j in members:
                total[j] += factor * grads[j]
    return jax.tree.unflatten(jax.tree.structure(params), total)


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [*((name, None) for name in POLICIES), ("flat", 3), ("per_layer_leaf", 3), ("flat", 1), ("per_layer_leaf", 100)],
)
def test_clipped_grad_equals_its_definition(name, microbatch_size, params, loss_fn, batch, method):
    is_padding = np.arange(8) >= 6
    grad_fn = compiled(loss_fn, name, method, microbatch_size)
    total, not_private = grad_fn(params, batch, is_padding_example=is_padding)
    expected = definition(loss_fn, POLICIES[name], params, batch, is_padding)
    chex.assert_trees_all_close(total, jax.tree.map(np.float32, expected), rtol=2e-5, atol=1e-5)
    losses = jax.vmap(loss_fn, (None, 0))(params, batch)
    chex.assert_trees_all_close(not_private.loss[:6], losses[:6], rtol=1e-5)
    chex.assert_trees_all_equal(not_private.loss[6:], jnp.zeros(2))
    assert not_private.contributed.tolist() == [True] * 6 + [False] * 2


def test_infinite_clip_is_the_gradient_of_the_summed_loss(params, loss_fn, batch, method):
    total, _ = jax.jit(jaxdp.clipped_grad(loss_fn, clipping=jaxdp.flat(np.inf), method=method))(params, batch)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss_fn, (None, 0))(p, batch))))(params)
    chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.5, 2.0, 100.0])
def test_clipping_in_closed_form(clip_norm):
    """Example i's gradient is full of i's, zero included: the sum is sum_i i * min(1, C / (i sqrt(d)))."""
    d, n = 5, 6
    total, not_private = jaxdp.clipped_grad(lambda w, x: jnp.sum(w) * x, clipping=jaxdp.flat(clip_norm))(
        jnp.zeros(d), jnp.arange(n, dtype=jnp.float32)
    )
    norms = np.arange(n) * np.sqrt(d)
    expected = np.sum(np.arange(n) * np.minimum(1, clip_norm / np.maximum(norms, 1e-30)))
    np.testing.assert_allclose(total, np.full(d, expected), rtol=1e-5)
    np.testing.assert_allclose(not_private.l2_norms[:, 0], norms, rtol=1e-5)


vectors = hnp.arrays(
    np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32, allow_nan=False).map(lambda x: x * abs(x) ** 0.5)
)


@pytest.mark.unoptimized(False)  # rounding
@pytest.mark.parametrize("name", POLICIES)
def test_dropping_any_example_moves_the_sum_by_at_most_the_sensitivity(name, params, method):
    policy = POLICIES[name]
    template = {"first": {"kernel": jnp.zeros(2)}, "second": {"kernel": jnp.zeros(2)}}

    def linear(w, x):  # the gradient of example x is x itself
        return w["first"]["kernel"] @ x[:2] + w["second"]["kernel"] @ x[2:]

    grad_fn = jaxdp.clipped_grad(linear, clipping=policy, method=method)
    summed = jax.jit(lambda x, mask: grad_fn(template, x, is_padding_example=mask)[0])
    none = np.zeros(5, bool)

    @hypothesis.given(x=vectors, index=st.integers(0, 4), other=vectors)
    def check(x, index, other):
        everyone = np.concatenate([np.float64(leaf) for leaf in jax.tree.leaves(summed(x, none))])
        dropped = np.concatenate([np.float64(leaf) for leaf in jax.tree.leaves(summed(x, np.arange(5) == index))])
        rounding = 1e-6 * 5  # of a float32 sum of five vectors within the bound
        assert np.linalg.norm(everyone - dropped) <= grad_fn.sensitivity() + rounding
        replaced = x.copy()
        replaced[index] = other[index]
        swapped = np.concatenate([np.float64(leaf) for leaf in jax.tree.leaves(summed(replaced, none))])
        bound = grad_fn.sensitivity(NeighboringRelation.REPLACE_ONE)
        assert np.linalg.norm(everyone - swapped) <= bound + rounding

    check()
    # The bound is reached: one large example alone, in each direction.
    alone = summed(np.full((5, 4), 1e6, np.float32), np.arange(5) > 0)
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(alone)))
    assert norm == pytest.approx(grad_fn.sensitivity(), rel=1e-4)
    opposite = np.full((5, 4), 1e6, np.float32) * np.float32(-1)
    there, here = summed(np.full((5, 4), 1e6, np.float32), np.arange(5) > 0), summed(opposite, np.arange(5) > 0)
    gap = np.sqrt(
        sum(
            np.sum((np.float64(a) - np.float64(b)) ** 2)
            for a, b in zip(*map(jax.tree.leaves, (there, here)), strict=True)
        )
    )
    assert gap == pytest.approx(grad_fn.sensitivity(NeighboringRelation.REPLACE_ONE), rel=1e-4)


@pytest.mark.unoptimized(False)  # rounding
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_stored_contribution_is_within_the_clip_norm(dtype, method):
    """S4(b): the norm of what is summed is at most C, in every dtype, for adversarial sizes and signs."""
    rng = np.random.default_rng(3)
    grad_fn = jax.jit(jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=jaxdp.flat(1.0), method=method))
    for size in (1, 42, 1000, 100_003):
        for scale in (1e-4, 1e-2, 1.0, 30.0):
            x = (rng.choice([-1, 1], size) * scale * (1 + rng.random(size) / 256)).astype(np.float32)
            total, _ = grad_fn(jnp.zeros(size, dtype), jnp.asarray(x[None], dtype))
            assert total.dtype == jnp.float32
            assert np.linalg.norm(np.float64(total)) <= 1.0 + 1e-7


@pytest.mark.unoptimized(False)  # rounding
def test_a_float16_gradient_of_a_million_small_entries_has_its_norm(method):
    grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=jaxdp.flat(1.0), method=method)
    x = jnp.full((1, 1_000_000), 1e-4, jnp.float16)
    _, not_private = grad_fn(jnp.zeros(1_000_000, jnp.float16), x)
    assert float(not_private.l2_norms[0, 0]) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.unoptimized(False)  # rounding
def test_norms_of_many_entries_do_not_stagnate():
    """A running float32 sum of 1.0 stops at 2^24; the norm of 2e7 ones must not."""
    size = 20_000_000
    grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w) * x, clipping=jaxdp.flat(1.0))
    _, not_private = jax.jit(grad_fn)(jnp.zeros(size), jnp.ones(1))
    assert float(not_private.l2_norms[0, 0]) == pytest.approx(np.sqrt(size), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "microbatch_size"), [*((name, None) for name in POLICIES), ("flat", 3), ("per_layer_leaf", 3)]
)
def test_non_finite_examples_contribute_zero_and_leave_the_others_alone(
    name, microbatch_size, params, loss_fn, batch, method
):
    grad_fn = compiled(loss_fn, name, method, microbatch_size)
    without, _ = grad_fn(params, batch, is_padding_example=np.arange(8) == 2)
    for bad in (np.nan, np.inf, -np.inf, 1e30):  # whose square overflows
        spoiled = (batch[0].copy(), batch[1].copy())
        spoiled[1][2] = bad
        got, not_private = grad_fn(params, spoiled, is_padding_example=EVERYONE)
        chex.assert_trees_all_equal(got, without)
        assert not bool(not_private.contributed[2])
        assert int(not_private.contributed.sum()) == 7
    assert grad_fn._cache_size() == 1


def test_a_non_finite_loss_with_a_finite_gradient_contributes_zero(method):
    def loss(w, x):
        return jnp.sum(w * x) + jax.lax.stop_gradient(1.0 / x[0])

    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0), method=method)
    total, not_private = jax.jit(grad_fn)(jnp.zeros(2), jnp.array([[0.0, 0.3], [0.4, 0.0]]))
    np.testing.assert_allclose(total, [0.4, 0.0])
    assert not_private.contributed.tolist() == [False, True]


@pytest.mark.unoptimized(False)  # rounding
def test_gradients_too_small_to_square_stay_bounded(method):
    """Squares below 1e-38 flush to zero; AUTO-S must not turn that into C / gamma without bound."""
    for policy in (jaxdp.flat(1e-9), jaxdp.automatic(1.0, gamma=1e-9)):
        grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=policy, method=method)
        total, _ = grad_fn(jnp.zeros(1000), jnp.full((1, 1000), 1e-20))
        assert np.linalg.norm(np.float64(total)) <= policy.total_l2_clip_norm


def test_padding_rows_change_nothing_whatever_they_hold(policy_name, params, loss_fn, batch, method):
    alone, _ = compiled(loss_fn, policy_name, method)(params, batch, is_padding_example=EVERYONE)
    grad_fn = jax.jit(jaxdp.clipped_grad(loss_fn, clipping=POLICIES[policy_name], method=method))
    for content in (np.nan, 3.0):
        padded = jax.tree.map(lambda x, content=content: np.concatenate([x, np.full_like(x, content)]), batch)
        total, not_private = grad_fn(params, padded, is_padding_example=np.arange(16) >= 8)
        chex.assert_trees_all_close(total, alone, rtol=1e-5, atol=1e-5)
        assert np.all(np.isfinite(not_private.loss))
        chex.assert_trees_all_equal(not_private.loss[8:], jnp.zeros(8))


def test_all_padding_and_one_example_batches_are_finite(policy_name, params, loss_fn, batch, method):
    grad_fn = compiled(loss_fn, policy_name, method)
    nothing, _ = grad_fn(params, batch, is_padding_example=np.ones(8, bool))
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, params))
    one, _ = grad_fn(params, batch, is_padding_example=np.arange(8) > 0)
    assert 0 < float(optax.tree.norm(one)) <= POLICIES[policy_name].total_l2_clip_norm * (1 + 1e-6)
    assert grad_fn._cache_size() == 1


def test_the_order_of_examples_changes_only_rounding(policy_name, params, loss_fn, batch, method):
    grad_fn = compiled(loss_fn, policy_name, method)
    order = np.array([3, 1, 4, 7, 5, 2, 6, 0])
    forward, _ = grad_fn(params, batch, is_padding_example=EVERYONE)
    shuffled, _ = grad_fn(params, jax.tree.map(lambda x: x[order], batch), is_padding_example=EVERYONE)
    chex.assert_trees_all_close(forward, shuffled, rtol=1e-5, atol=1e-5)


def test_aux_comes_back_per_example_and_blank_for_padding(params, loss_fn, batch, method):
    def with_aux(p, example):
        return loss_fn(p, example), {"x": example[0], "one": jnp.int32(1)}

    for microbatch_size in (None, 3):
        grad_fn = jaxdp.clipped_grad(
            with_aux, clipping=jaxdp.flat(1.0), has_aux=True, microbatch_size=microbatch_size, method=method
        )
        _, not_private = jax.jit(grad_fn)(params, batch, is_padding_example=np.arange(8) >= 5)
        np.testing.assert_array_equal(not_private.aux["x"][:5], batch[0][:5])
        assert not_private.aux["one"].tolist() == [1] * 5 + [0] * 3


def test_an_example_may_carry_a_key(batch, method):
    def dropout_loss(w, example):
        x, key = example
        return jnp.sum(w * x * jax.random.bernoulli(key, 0.5, (3,)).astype(jnp.float32))

    keys = jax.random.split(jax.random.key(0), 8)
    whole, parts = (
        jax.jit(jaxdp.clipped_grad(dropout_loss, clipping=jaxdp.flat(1.0), microbatch_size=size, method=method))(
            jnp.ones(3), (batch[0], keys)
        )[0]
        for size in (None, 3)
    )
    chex.assert_trees_all_close(whole, parts, rtol=1e-5)


@pytest.mark.unoptimized(False)  # memory
def test_microbatches_bound_the_memory():
    """XLA's own account: a microbatch of 8 needs at most a quarter of the temporary memory of 64 rows at once."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    def temporary_bytes(microbatch_size):
        grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0), microbatch_size=microbatch_size)
        compiled = jax.jit(grad_fn).lower(jnp.zeros((64, 256)), jnp.zeros((64, 4, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(None) / 4


def test_float64_stays_float64(method):
    with jax.enable_x64(True):
        grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=jaxdp.flat(1.0), method=method)
        total, _ = grad_fn(jnp.zeros(3, jnp.float64), jnp.array([[3.0, 4.0, 0.0]], jnp.float64))
        assert total.dtype == jnp.float64
        np.testing.assert_allclose(total, [0.6, 0.8, 0.0], rtol=1e-5)
