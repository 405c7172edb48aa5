"""A resident run with optax: its estimates are those of the equation, with SGD it is the streamed run, its noise is DP-SGD's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jaxdp
from jaxdp.block_model import loss_fn as block_loss_fn
from jaxdp.zeroth_order import ForwardMode, Gaussian, LowRank, OneSided, Rademacher, Sgd, TwoSided, make_step
from jaxdp.zeroth_order.aggregation import mean
from jaxdp.zeroth_order.resident import make_resident_step, projected_gradients
from jaxdp.zeroth_order.transform import expand_directions, expanded
from tests.zeroth_order.models import toy, toy_batch, toy_params
from tests.zeroth_order.test_estimators import direction

pytestmark = pytest.mark.unoptimized
LAWS = [Rademacher(), Gaussian(), LowRank(rank=2, refresh_every=2)]
toy_loss = functools.partial(block_loss_fn, toy())
SMALL = {"w": np.float32([0.5, -1.0, 2.0])}
ROWS = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)


def small_loss(params, row):
    return jnp.sum(jnp.square(jnp.tanh(params["w"] * row) - 0.5))


def on_device(params):
    return jax.tree.map(jnp.asarray, params)


def assert_close(found, expected, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, **tolerances)


def run(loss, params, batch, key, *, tx=None, num_steps=4, mask=None, noise_key=None, **options):
    init, step = make_resident_step(loss, optax.sgd(1e-2) if tx is None else tx, **options)
    state, infos = init(params, direction_key=key, **({} if noise_key is None else {"noise_key": noise_key})), []
    for _ in range(num_steps):
        state, info = step(state, batch, mask)
        infos.append(info)
    return state, infos


def make_plan(num_examples=6, noise_multiplier=0.0, clipping=None, **options):
    """Every example in every step."""
    settings = {"sampling_prob": 1.0, "num_steps": 20, "target_delta": 1e-3} | options
    clipping = jaxdp.flat(np.inf) if clipping is None else clipping
    return jaxdp.plan(num_examples=num_examples, noise_multiplier=noise_multiplier, clipping=clipping, **settings)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_the_estimate_is_its_equation(law, key):
    """G = sum_k g_k z_k / K with the directions of every block at its own address."""
    params, g = toy_params(), np.float32([1.5, -0.25, np.nan, 2.0])
    tx = expand_directions(key, law=law)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(3):
        found, state = update(jnp.asarray(g), state, on_device(params))
        assert int(state.step) == step + 1
        zs = [direction(law, params, key, step, k) for k in (0, 1, 3)]  # a non-finite one counts as zero (S9)
        expected = jax.tree.map(
            lambda *z: sum(c * np.asarray(d) for c, d in zip(g[[0, 1, 3]], z, strict=True)) / 4, *zs
        )
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pytree_without_blocks_stands_at_address_zero(key):
    from jaxdp.zeroth_order.directions import leaf_directions, words_of

    params = {"blocks": jnp.zeros((3, 4, 5)), "head": jnp.zeros(7, jnp.bfloat16)}
    tx = expand_directions(key)
    found, _ = tx.update(jnp.ones(1), tx.init(params), params)
    at = {"step": jnp.uint32(0), "k": jnp.uint32(0), "block": jnp.uint32(0)}
    z = leaf_directions(Rademacher(), words_of(key), **at, shapes=params)
    assert_close(found, jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), z, params))
    assert found["head"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "estimator", [TwoSided(3, 1e-2), OneSided(3, 1e-2), ForwardMode(3)], ids=lambda e: type(e).__name__
)
def test_per_example_projected_gradients_are_their_equation(estimator, key):
    params, batch, step = on_device(toy_params()), toy_batch(), 5
    gradients = projected_gradients(toy_loss, estimator=estimator, law=Gaussian())
    found = jax.jit(functools.partial(gradients, direction_key=key))(params, batch, step=np.uint32(step))
    losses = jax.jit(jax.vmap(toy_loss, (None, 0)))
    for k in range(3):
        z = direction(Gaussian(), params, key, step, k)

        def at(scale, z=z):
            return losses(jax.tree.map(lambda w, d: w + np.float32(scale) * d, params, z), batch)

        if isinstance(estimator, TwoSided):
            expected = (at(1e-2) - at(-1e-2)) / 2e-2
        elif isinstance(estimator, OneSided):
            expected = (at(1e-2) - at(0)) / 1e-2
        else:
            _, expected = jax.jvp(lambda w: losses(w, batch), (params,), (z,))
        np.testing.assert_allclose(found.projected_gradients[:, k], expected, rtol=2e-3, atol=2e-3)
    assert found.projected_gradients.shape == (6, 3)
    np.testing.assert_allclose(found.loss, losses(params, batch), rtol=0.1)
    assert found.contributed.all()


@pytest.mark.parametrize(
    ("law", "estimator"),
    [(Rademacher(), TwoSided(1)), (Gaussian(), TwoSided(3))],
    ids=lambda value: type(value).__name__,
)
def test_with_sgd_it_is_the_streamed_run(law, estimator, key):
    params, batch = toy_params(), toy_batch()
    steps = make_step(toy(), Sgd(1e-2), estimator=estimator, law=law)
    streamed = steps.init(params, direction_key=key)
    state, infos = run(toy_loss, params, batch, key, estimator=estimator, law=law)
    for info in infos:
        streamed, expected = steps.step(streamed, batch)
        np.testing.assert_allclose(
            info.projected_gradients, expected.scalars.projected_gradients, rtol=5e-3, atol=5e-3
        )  # a difference of losses: 1e-7 / mu
    assert_close(state.params, steps.flush(streamed).params(), rtol=1e-4, atol=1e-4)
    # The same scalars give the same parameters, to rounding.
    replayed = steps.init(params, direction_key=key)
    for info in infos:
        replayed = steps.replay(replayed, jaxdp.zeroth_order.Scalars(info.projected_gradients, jnp.float32(1e-2)))
    assert_close(state.params, steps.flush(replayed).params(), rtol=1e-5, atol=1e-5)


@pytest.mark.unoptimized(False)  # XLA's own account
def test_one_direction_is_in_memory_at_a_time(key):
    """K directions of the model together would be K copies of it."""
    shapes = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    root = jax.random.key_data(key)

    def temporary(K):
        fun = jax.jit(lambda g: expanded(Gaussian(), g, shapes, root=root, step=jnp.uint32(0)))
        return fun.lower(jnp.zeros(K)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) <= temporary(2) + 4096 < 8 * 512 * 512 * 4


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["adam", "momentum", "chain"])
def test_any_optimizer_lowers_the_loss(name, params, loss_fn, batch, key):
    """And a chain behind `expand_directions` is the run of `make_resident_step`."""
    tx = {
        "adam": optax.adam(0.02),
        "momentum": optax.sgd(0.003, momentum=0.9),
        "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
    }[name]
    estimator = TwoSided(8)
    _, infos = run(loss_fn, params, batch, key, tx=tx, num_steps=60, estimator=estimator)
    assert infos[-1].not_private.mean_loss() < 0.6 * infos[0].not_private.mean_loss()

    chained = optax.chain(expand_directions(key), tx)
    found = projected_gradients(loss_fn, estimator=estimator)

    @jax.jit
    def one(params, opt_state, step):
        probed = found(params, batch, direction_key=key, step=step)
        g = mean(probed.projected_gradients, probed.contributed)
        updates, opt_state = chained.update(g, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    w, opt_state = params, chained.init(params)
    for step in range(3):
        w, opt_state = one(w, opt_state, np.uint32(step))
    assert_close(
        w, run(loss_fn, params, batch, key, tx=tx, num_steps=3, estimator=estimator)[0].params, rtol=1e-4, atol=1e-5
    )


def test_non_finite_examples_count_as_absent(key):
    """S9: in the mean without a plan, and as a contribution of zero with one; nothing is raised."""
    mask = np.isin(np.arange(6), [1, 4])
    poisoned = np.where(mask[:, None], np.float32(np.nan), ROWS)
    for plan in (None, make_plan(noise_multiplier=1.0, clipping=jaxdp.flat(1.0))):
        init, step = make_resident_step(small_loss, optax.sgd(1e-2), plan=plan)
        start = functools.partial(init, SMALL, direction_key=key, noise_key=jax.random.key(3))
        state, info = step(start(), poisoned)
        other, masked = step(start(), ROWS, mask)
        np.testing.assert_array_equal(info.projected_gradients, masked.projected_gradients)
        assert_close(state.params, other.params)
        assert not info.not_private.contributed[mask].any()
        assert info.not_private.contributed[~mask].all()
        nothing, info = step(start(), ROWS * np.float32(np.nan))
        assert np.isfinite(info.projected_gradients).all()
        if plan is None:
            assert_close(nothing.params, SMALL)


def test_no_noise_and_infinite_clip_is_the_run_without_a_plan(key):
    """The divisor is the expected batch size, which is the realized one when every example is in every step (S2)."""
    plain, _ = run(small_loss, SMALL, ROWS, key, estimator=TwoSided(4), num_steps=3)
    init, step = make_resident_step(small_loss, optax.sgd(1e-2), estimator=TwoSided(4), plan=make_plan())
    planned = init(SMALL, direction_key=key)
    for _ in range(3):
        planned, _ = step(planned, ROWS)
    assert_close(planned.params, plain.params, rtol=1e-4, atol=1e-4)
    assert planned.ledger.num_steps == 3 == int(planned.step)
    planned, info = step(planned, ROWS, np.arange(6) < 3)
    rows = np.asarray(info.not_private.projected_gradients)[3:]
    np.testing.assert_allclose(info.projected_gradients, rows.sum(0) / 6, rtol=1e-4)  # not / 3
    assert planned.ledger.num_steps == 4


def test_each_example_is_one_clipped_vector(key):
    """DP-AggZO without noise: v_i = D_i / K clipped as one vector; the update is along sum_k y_k z_k / (q N)."""
    K, C, batch, params = 4, 0.05, toy_batch(), toy_params()
    plan = make_plan(clipping=jaxdp.flat(C))
    state, (info,) = run(toy_loss, params, batch, key, plan=plan, estimator=TwoSided(K), num_steps=1)
    D = np.asarray(info.not_private.projected_gradients, np.float64)
    norms = np.linalg.norm(D / K, axis=1)
    assert norms.min() > C
    y = (D / K * (C / norms)[:, None]).sum(0)
    np.testing.assert_allclose(info.projected_gradients, K * y / 6, rtol=1e-4)
    zs = [direction(Rademacher(), params, key, 0, k) for k in range(K)]
    step = jax.tree.map(lambda *z: 1e-2 / 6 * sum(c * np.asarray(d) for c, d in zip(y, z, strict=True)), *zs)
    assert_close(state.params, jax.tree.map(lambda w, d: w - d, params, step), rtol=1e-4, atol=1e-5)


def test_the_noise_has_its_scale_and_its_own_key(key):
    """One draw of K numbers of std K sigma C / (q N), accepted by a KS test that rejects 2/3 and 3/2 of it (S8, S11 v)."""
    K = 2000
    plan = make_plan(noise_multiplier=1.3, clipping=jaxdp.flat(0.7))
    init, step = make_resident_step(
        lambda w, row: 0.0 * w["w"][0] * row[0], optax.sgd(1.0), plan=plan, estimator=TwoSided(K)
    )

    def noise(direction_key, noise_key):
        state, first = step(init(SMALL, direction_key=direction_key, noise_key=noise_key), ROWS)
        return np.asarray(first.projected_gradients), np.asarray(step(state, ROWS)[1].projected_gradients)

    found, following = noise(key, jax.random.key(8))
    stddev = K * 1.3 * 0.7 / 6
    assert stats.kstest(found / stddev, "norm").pvalue > 1e-3
    assert stats.kstest(found / (stddev * 2 / 3), "norm").pvalue < 1e-6
    assert stats.kstest(found / (stddev * 3 / 2), "norm").pvalue < 1e-6
    for other in (following, noise(key, jax.random.key(9))[0]):  # a draw of its own for each step and each key
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.1
    np.testing.assert_array_equal(
        found, noise(jax.random.key(4), jax.random.key(8))[0]
    )  # none of it the direction key's


def test_normalization_follows_the_noise(key):
    """y / std(y) of the released numbers (S14), and of the means without a plan; without spread, zero."""
    plan = make_plan(noise_multiplier=1.0, clipping=jaxdp.flat(0.5))
    for options in ({}, {"plan": plan, "noise_key": jax.random.key(3)}):
        shared = {"estimator": OneSided(4, 1e-2), "num_steps": 1, **options}
        _, (raw,) = run(small_loss, SMALL, ROWS, key, **shared)
        _, (found,) = run(small_loss, SMALL, ROWS, key, is_normalized=True, **shared)
        g = np.asarray(raw.projected_gradients)
        np.testing.assert_allclose(found.projected_gradients, g / g.std(), rtol=1e-4)
    flat = run(lambda w, row: 0.0 * row[0], SMALL, ROWS, key, is_normalized=True, estimator=OneSided(4), num_steps=1)
    np.testing.assert_array_equal(flat[1][0].projected_gradients, np.zeros(4))


def test_the_budget_is_kept_and_a_run_goes_on_from_its_checkpoint(key, tmp_path):
    plan = make_plan(noise_multiplier=1.0, clipping=jaxdp.flat(1.0), num_steps=4)
    init, step = make_resident_step(small_loss, optax.sgd(1e-2, momentum=0.9), plan=plan)
    state = init(SMALL, direction_key=key, noise_key=jax.random.key(3))
    with jaxdp.Checkpointer(tmp_path / "run", plan) as checkpointer:
        for t in range(4):
            if t == 2:
                checkpointer.save(state)
            state, _ = step(state, ROWS)
        restored, _ = checkpointer.restore(init(SMALL, direction_key=jax.random.key(1)))
    for _ in range(2):
        restored, _ = step(restored, ROWS)
    assert_close(restored.params, state.params)
    with pytest.raises(jaxdp.BudgetExhaustedError, match="all 4 steps"):
        step(restored, ROWS)


def test_a_step_is_traced_once_and_joins_frozen_arrays(key):
    traces = []

    def loss(trained, example, frozen):
        traces.append(None)
        return toy_loss(trained._replace(resident=trained.resident | frozen), example)

    params = toy_params()
    trained = params._replace(resident={"scale": params.resident["scale"]})
    init, step = make_resident_step(loss, optax.sgd(1e-2))
    state = init(trained, direction_key=key)
    counts = []
    for shift in (0.0, 1.0):
        frozen = {"table": params.resident["table"] + np.float32(shift)}
        state, info = step(state, toy_batch(), np.arange(6) == 2, frozen)
        assert np.isfinite(info.projected_gradients).all()
        counts.append(len(traces))
    assert counts[0] == counts[1]
    assert step.compiled._cache_size() == 1


def test_bad_input_is_refused(key):
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation"):
        make_resident_step(toy_loss, 1e-3)
    with pytest.raises(ValueError, match="num_directions above 1"):
        make_resident_step(toy_loss, optax.sgd(1.0), is_normalized=True)
    with pytest.raises(ValueError, match="flat"):
        make_resident_step(
            toy_loss, optax.sgd(1.0), plan=make_plan(noise_multiplier=1.0, clipping=jaxdp.per_layer(0.1))
        )
    init, step = make_resident_step(toy_loss, optax.sgd(1.0))
    with pytest.raises(TypeError, match="state must be the ResidentState"):
        step(toy_params(), toy_batch())
    _, vector_step = make_resident_step(lambda params, row: row * params["w"], optax.sgd(1.0))
    with pytest.raises(ValueError, match="must return a scalar"):
        vector_step(init(SMALL, direction_key=key), ROWS)
    plan = make_plan(noise_multiplier=1.0, clipping=jaxdp.flat(1.0))
    private_init, private_step = make_resident_step(toy_loss, optax.sgd(1.0), plan=plan)
    with pytest.raises(ValueError, match="made without a plan"):
        private_step(init(toy_params(), direction_key=key), toy_batch())
    with pytest.raises(ValueError, match="noise_key is the direction key"):
        private_init(toy_params(), direction_key=key, noise_key=key)
    tx = expand_directions(key)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.ones(2), tx.init({}))
    with pytest.raises(ValueError, match=r"an array \[K\]"):
        tx.update(toy_params(), tx.init({}), toy_params())
