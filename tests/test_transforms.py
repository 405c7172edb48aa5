"""`dp_aggregate` is the mechanism, and has none of the five faults of optax's transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

import jaxdp

pytestmark = pytest.mark.unoptimized


def make_plan(noise_multiplier=1.0, clipping=None, **kwargs):
    settings = {"num_examples": 40, "sampling_prob": 0.2, "num_steps": 20, "padded_batch_size": 8, "target_delta": 1e-3}
    return jaxdp.plan(clipping=clipping or jaxdp.flat(1.0), noise_multiplier=noise_multiplier, **(settings | kwargs))


@functools.partial(jax.jit, static_argnums=0)
def per_example(loss_fn, params, batch):
    return jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "clipping",
    [jaxdp.flat(0.5), jaxdp.per_layer(0.5), jaxdp.automatic(), jaxdp.quantile(0.3, count_stddev=1e-6)],
    ids=lambda c: type(c).__name__,
)
def test_it_takes_the_same_steps_as_make_dp_step(clipping, params, loss_fn, batch, key):
    plan = make_plan(0.0, clipping)  # the noise of each is its own
    mask = np.arange(8) >= 6
    init, step = jaxdp.make_dp_step(loss_fn, optax.adam(0.1), plan)
    state = init(params, noise_key=key)
    tx = optax.chain(jaxdp.dp_aggregate(plan, key), optax.adam(0.1))
    opt_state, ours, update = tx.init(params), params, jax.jit(tx.update)
    for _ in range(3):
        state, _ = step(state, batch, mask)
        grads = per_example(loss_fn, ours, batch)
        updates, opt_state = update(grads, opt_state, ours, is_padding_example=mask, unknown_argument=1)
        ours = optax.apply_updates(ours, updates)
    chex.assert_trees_all_close(ours, state.params, rtol=1e-4, atol=1e-5)
    assert int(opt_state[0].step) == 3


def test_fault_1_padding_does_not_change_the_update(params, loss_fn, batch, key):
    tx = jaxdp.dp_aggregate(make_plan(0.0), key)
    half = jax.tree.map(lambda x: np.concatenate([x[:4], np.zeros_like(x[:4])]), batch)
    grads = per_example(loss_fn, params, half)
    update, _ = tx.update(grads, tx.init(params), params, is_padding_example=np.arange(8) >= 4)
    clipped, _ = jaxdp.clipped_grad(loss_fn, clipping=jaxdp.flat(1.0))(params, jax.tree.map(lambda x: x[:4], batch))
    chex.assert_trees_all_close(update, jax.tree.map(lambda x: x / 8.0, clipped), rtol=1e-6, atol=1e-7)  # q N = 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fault_2_a_bad_example_or_an_empty_batch_stays_finite(bad, params, loss_fn, batch, key):
    tx = jaxdp.dp_aggregate(make_plan(), key)
    state = tx.init(params)
    spoiled = (batch[0], np.where(np.arange(8)[:, None] == 2, np.float32(bad), batch[1]))
    update, _ = tx.update(per_example(loss_fn, params, spoiled), state, params, is_padding_example=np.zeros(8, bool))
    without, _ = tx.update(per_example(loss_fn, params, batch), state, params, is_padding_example=np.arange(8) == 2)
    chex.assert_trees_all_equal(update, without)
    empty, _ = tx.update(per_example(loss_fn, params, spoiled), state, params, is_padding_example=np.ones(8, bool))
    chex.assert_tree_all_finite(empty)
    assert float(optax.tree.norm(empty)) > 0


def test_fault_3_noise_is_drawn_in_float32_and_cast_afterwards(key):
    low = jaxdp.dp_aggregate(make_plan(), key)
    params = jnp.zeros(5_000, jnp.bfloat16)
    state = low.init(params)
    got, _ = low.update(jnp.zeros((8, 5_000), jnp.bfloat16), state, params, is_padding_example=np.ones(8, bool))
    wide, _ = low.update(jnp.zeros((8, 5_000)), state, jnp.zeros(5_000), is_padding_example=np.ones(8, bool))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


def test_fault_4_a_leaf_without_its_batch_axis_is_named(params, loss_fn, batch, key):
    tx = jaxdp.dp_aggregate(make_plan(), key)
    grads = per_example(loss_fn, params, batch)
    grads["first"]["bias"] = params["first"]["bias"]
    with pytest.raises(ValueError, match="first/bias"):
        tx.update(grads, tx.init(params), params, is_padding_example=np.zeros(8, bool))
    masked = optax.multi_transform({"train": tx, "frozen": optax.set_to_zero()}, {"first": "train", "second": "frozen"})
    with pytest.raises(ValueError, match="trainable leaves only"):  # optax lets a frozen leaf keep its batch axis
        masked.init(params)


def test_fault_5_a_transformation_before_it_is_refused(params, loss_fn, batch, key):
    """Adam's moments have no batch axis, so per-example gradients cannot pass through it first."""
    tx = optax.chain(optax.adam(0.1), jaxdp.dp_aggregate(make_plan(), key))
    with pytest.raises((ValueError, TypeError)):
        tx.update(per_example(loss_fn, params, batch), tx.init(params), params, is_padding_example=np.zeros(8, bool))


def test_it_works_under_jit_and_past_the_plan_releases_nothing(params, loss_fn, batch, key):
    plan = make_plan(num_steps=2)
    tx = jaxdp.dp_aggregate(plan, key)
    update = jax.jit(tx.update)
    state, grads = tx.init(params), per_example(loss_fn, params, batch)
    for _ in range(2):
        updates, state = update(grads, state, params, is_padding_example=np.zeros(8, bool))
        assert float(optax.tree.norm(updates)) > 0
    updates, state = update(grads, state, params, is_padding_example=np.zeros(8, bool))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.step) == 2
    with pytest.raises(jaxdp.BudgetExhaustedError, match="num_steps"):
        tx.update(grads, state, params, is_padding_example=np.zeros(8, bool))


def test_a_state_of_another_plan_is_refused(params, loss_fn, batch, key):
    grads = per_example(loss_fn, params, batch)
    state = jaxdp.dp_aggregate(make_plan(1.0), key).init(params)
    with pytest.raises(ValueError, match="another plan"):
        jaxdp.dp_aggregate(make_plan(2.0), key).update(grads, state, params, is_padding_example=np.zeros(8, bool))
    longer = jaxdp.dp_aggregate(make_plan(1.0, num_steps=30), key)  # the same mechanism
    longer.update(grads, state, params, is_padding_example=np.zeros(8, bool))


def test_a_second_run_of_one_transformation_draws_other_noise(params, loss_fn, batch, key):
    """S8: equal noise on two sums would cancel in their difference."""
    tx, empty = jaxdp.dp_aggregate(make_plan(), key), np.ones(8, bool)
    grads = per_example(loss_fn, params, batch)
    first, second = (tx.update(grads, tx.init(params), params, is_padding_example=empty)[0] for _ in range(2))
    assert float(jnp.abs(first["first"]["kernel"] - second["first"]["kernel"]).max()) > 1e-3


def test_one_state_stepped_with_two_gradients_draws_two_noises(key):
    """S8: equal noise would cancel, and the difference of two updates be that of two sums, in the clear."""
    width = 4000
    rng = np.random.default_rng(3)
    one, other = (rng.normal(size=(8, width)).astype(np.float32) for _ in range(2))
    params, mask = jnp.zeros(width), np.zeros(8, bool)

    def updates_of(noise_multiplier):
        tx = jaxdp.dp_aggregate(make_plan(noise_multiplier), key)
        state, update = tx.init(params), jax.jit(tx.update)
        return [
            8 * np.asarray(update(g, state, params, is_padding_example=mask)[0], np.float64) for g in (one, other, one)
        ]

    noisy, exact = updates_of(1.0), updates_of(0.0)
    assert np.abs(exact[0] - exact[1]).max() > 1e-3
    found = (noisy[0] - noisy[1]) - (exact[0] - exact[1])
    assert stats.kstest(found, stats.norm(0, np.sqrt(2)).cdf).pvalue > 1e-3
    assert np.std(found) == pytest.approx(np.sqrt(2), rel=5 / np.sqrt(2 * width))
    np.testing.assert_array_equal(noisy[0], noisy[2])  # the same gradients again are the same release


def test_init_is_refused_inside_a_transformation(params, key):
    """Its key would be one constant: every call, or every mapped run, would get the same noise."""
    tx = jaxdp.dp_aggregate(make_plan(), key)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    chained = optax.chain(tx, optax.sgd(0.1))
    for start in (
        lambda: jax.jit(tx.init)(params),
        lambda: jax.vmap(tx.init)(stacked),
        lambda: jax.eval_shape(tx.init, params),
        lambda: jax.jit(lambda: tx.init(params))(),
        lambda: jax.jit(chained.init)(params),
    ):
        with pytest.raises(TypeError, match=r"init of dp_aggregate was called inside a JAX .* with jax\.device_put"):
            start()
    assert int(chained.init(params)[0].step) == 0


def test_it_works_through_nnx_optimizer(batch, key):
    plan = make_plan(0.5)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(jaxdp.dp_aggregate(plan, key), optax.sgd(0.1)), wrt=nnx.Param)
    before = np.array(model.kernel[...])

    @nnx.jit
    def step(model, optimizer, batch, mask):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, example):
            return jnp.sum(jnp.square(nnx.merge(graphdef, params, rest)(example[0]) - example[1]))

        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        optimizer.update(model, grads, is_padding_example=mask)

    for _ in range(3):
        step(model, optimizer, batch, np.arange(8) >= 5)
    assert np.isfinite(np.array(model.kernel[...])).all()
    assert np.abs(np.array(model.kernel[...]) - before).max() > 1e-3


def test_per_layer_groups_an_nnx_layer_as_one():
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    groups = jaxdp.per_layer(1.0).groups(nnx.state(model, nnx.Param))
    assert len(groups.names) == 2
    assert sorted(groups.sizes) == [6, 8]


@pytest.mark.parametrize("jit", [False, True])
def test_averages_of_multi_steps_are_refused(key, jit):
    tx = optax.MultiSteps(jaxdp.dp_aggregate(make_plan(), key), 2).gradient_transformation()
    params = {"w": jnp.ones(3)}
    update = jax.jit(tx.update) if jit else tx.update
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="takes per-example gradients"):
        update({"w": jnp.ones((8, 3))}, tx.init(params), params, is_padding_example=np.zeros(8, bool))
