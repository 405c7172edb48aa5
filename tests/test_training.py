"""Laws of the DP-SGD step: ordinary SGD at no noise, one trace, one release a step, resumable, refused past the plan."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jaxdp
from jaxdp import training

pytestmark = pytest.mark.unoptimized
ADD_REMOVE = jaxdp.NeighboringRelation.ADD_OR_REMOVE_ONE


def make_plan(noise_multiplier=1.0, clipping=None, **kwargs):
    settings = {
        "num_examples": 40,
        "sampling_prob": 0.2,
        "num_steps": 20,
        "padded_batch_size": 16,
        "target_delta": 1e-3,
    }
    return jaxdp.plan(clipping=clipping or jaxdp.flat(1.0), noise_multiplier=noise_multiplier, **(settings | kwargs))


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    return rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)


def train(plan, loss_fn, params, data, *, tx=None, noise_key=None, num_steps=None, seed=0, state=None, **kwargs):
    init, step = jaxdp.make_dp_step(loss_fn, tx or optax.sgd(0.1), plan, **kwargs)
    state = init(params, noise_key=noise_key) if state is None else state
    batches = jaxdp.poisson_batches(data, plan, np.random.SeedSequence(seed), start_step=state.step)
    for _, (batch, is_padding) in zip(range(num_steps or plan.num_steps), batches, strict=False):
        state, _ = step(state, batch, is_padding)
    return state, step


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.01, 20), weight_decay=0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "microbatch_size"), [*((name, None) for name in OPTIMIZERS), ("adam", 5)])
def test_no_noise_and_infinite_clip_is_the_ordinary_optimizer(name, microbatch_size, params, loss_fn, data):
    plan = make_plan(0.0, jaxdp.flat(np.inf))
    state, _ = train(plan, loss_fn, params, data, tx=OPTIMIZERS[name](), microbatch_size=microbatch_size)

    tx = OPTIMIZERS[name]()

    def objective(p, batch, is_padding):
        return jnp.sum(jax.vmap(loss_fn, (None, 0))(p, batch), where=~is_padding) / plan.expected_batch_size

    @jax.jit
    def ordinary(p, opt_state, *batch):
        updates, opt_state = tx.update(jax.grad(objective)(p, *batch), opt_state, p)
        return optax.apply_updates(p, updates), opt_state

    expected, opt_state = params, tx.init(params)
    for batch, is_padding in jaxdp.poisson_batches(data, plan, np.random.SeedSequence(0)):
        expected, opt_state = ordinary(expected, opt_state, batch, is_padding)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_step_is_traced_once_whatever_the_realized_batch(params, loss_fn, data):
    plan = make_plan()
    traces = []

    def counted(p, example):
        traces.append(None)
        return loss_fn(p, example)

    init, step = jaxdp.make_dp_step(counted, optax.adam(0.1), plan)
    state = init(params)
    batch = jax.tree.map(lambda x: x[:16], data)
    cases = {
        "all": (batch, np.zeros(16, bool)),
        "one": (batch, np.arange(16) > 0),
        "empty": (batch, np.ones(16, bool)),
        "nan": (jax.tree.map(lambda x: np.where(np.arange(16)[:, None] == 3, np.nan, x), batch), np.zeros(16, bool)),
        "inf": (jax.tree.map(lambda x: np.where(np.arange(16)[:, None] == 3, np.inf, x), batch), np.zeros(16, bool)),
    }
    state, _ = step(state, *cases["all"])
    after_first = len(traces)
    for rows, mask in cases.values():
        state, info = step(state, rows, mask)
        chex.assert_tree_all_finite(state.params)
        chex.assert_tree_all_finite(info.noise_stddevs)
    assert len(traces) == after_first
    assert step.compiled._cache_size() == 1


def test_one_bad_example_changes_nothing_but_its_own_contribution(params, loss_fn, data, key):
    plan = make_plan(0.0)  # the batches differ, and so would their noise
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    batch = jax.tree.map(lambda x: x[:16], data)
    for bad in (np.nan, np.inf):
        spoiled = jax.tree.map(lambda x, bad=bad: np.where(np.arange(16)[:, None] == 3, np.float32(bad), x), batch)
        with_bad, _ = step(init(params, noise_key=key), spoiled, np.zeros(16, bool))
        without, _ = step(init(params, noise_key=key), batch, np.arange(16) == 3)
        chex.assert_trees_all_equal(with_bad.params, without.params)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_frozen_arrays_are_what_a_closure_over_them_would_be(params, loss_fn, data, key, microbatch_size):
    """The same bits as a loss that closes over them; they are neither donated nor changed, and nothing is traced again."""
    plan = make_plan()
    trainable, frozen = {"first": params["first"]}, {"second": params["second"]}
    traces = []

    def joined(trained, example, rest):
        traces.append(None)
        return loss_fn(trained | rest, example)

    settings = {"microbatch_size": microbatch_size}
    init, step = jaxdp.make_dp_step(joined, optax.sgd(0.1), plan, **settings)
    _, closed_step = jaxdp.make_dp_step(lambda p, e: loss_fn(p | frozen, e), optax.sgd(0.1), plan, **settings)
    state, closed = init(trainable, noise_key=key), init(trainable, noise_key=key)
    before = jax.tree.map(np.array, frozen)
    batch, mask = jax.tree.map(lambda x: x[:16], data), np.zeros(16, bool)
    for _ in range(2):
        state, _ = step(state, batch, mask, frozen)
        closed, _ = closed_step(closed, batch, mask)
    chex.assert_trees_all_close(state.params, closed.params, rtol=1e-5)
    chex.assert_trees_all_equal(frozen, before)
    after_two = len(traces)
    moved, _ = step(
        state, batch, mask, jax.tree.map(lambda x: x + 1, frozen)
    )  # an argument, no constant of the program
    assert len(traces) == after_two
    assert not np.allclose(moved.params["first"]["kernel"], closed.params["first"]["kernel"], atol=1e-4)


def test_noise_differs_by_run_and_repeats_by_key(params, loss_fn, data, key):
    plan = make_plan()
    run = lambda **kwargs: train(plan, loss_fn, params, data, **kwargs)[0].params  # noqa: E731
    chex.assert_trees_all_equal(run(noise_key=key), run(noise_key=key))
    a, b, c = run(), run(), run(noise_key=key)
    for other in (b, c):
        assert float(jnp.abs(a["first"]["kernel"] - other["first"]["kernel"]).max()) > 1e-3


def test_every_step_draws_new_noise(params, loss_fn, data):
    """Two empty steps of plain SGD move the parameters by two different noises."""
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(1.0), make_plan())
    batch, empty = jax.tree.map(lambda x: x[:16], data), np.ones(16, bool)
    states = [init(params)]
    history = [np.asarray(states[0].params["first"]["kernel"]).copy()]
    state = states[0]
    for _ in range(3):
        state, _ = step(state, batch, empty)
        history.append(np.asarray(state.params["first"]["kernel"]).copy())
    moves = np.diff(np.stack(history), axis=0)
    assert np.abs(moves[0] - moves[1]).max() > 1e-3
    assert np.abs(moves[1] - moves[2]).max() > 1e-3


def test_a_printed_state_does_not_show_its_key(params, loss_fn, key):
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), make_plan())
    for state in (init(params, noise_key=key), jaxdp.dp_aggregate(make_plan(), key).init(params)):
        assert str(int(jax.random.key_data(key)[1])) not in repr(state)


def test_init_copies_and_the_callers_arrays_survive(params, loss_fn, data, key):
    before = jax.tree.map(np.array, params)
    state, _ = train(make_plan(), loss_fn, params, data, noise_key=key)
    chex.assert_trees_all_equal(params, before)  # neither donated nor changed
    assert jax.random.key_data(key).shape == (2,)
    assert float(jnp.abs(state.params["first"]["kernel"] - before["first"]["kernel"]).max()) > 0


@pytest.mark.unoptimized(False)  # donation
@pytest.mark.usefixtures("standard_promotion")
def test_the_state_is_donated(params, loss_fn, data):
    init, step = jaxdp.make_dp_step(loss_fn, optax.adam(0.1), make_plan())
    state = init(params)
    old = state.params["first"]["kernel"]
    step(state, jax.tree.map(lambda x: x[:16], data), np.zeros(16, bool))
    assert old.is_deleted()


def test_a_step_past_the_plan_is_refused_and_leaves_the_state_usable(params, loss_fn, data):
    plan = make_plan(num_steps=3)
    state, step = train(plan, loss_fn, params, data)
    batch = jax.tree.map(lambda x: x[:16], data), np.zeros(16, bool)
    with pytest.raises(jaxdp.BudgetExhaustedError, match="num_steps"):
        step(state, *batch)
    chex.assert_tree_all_finite(state.params)
    longer = plan.replace(num_steps=4)
    _, longer_step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), longer)
    state, _ = longer_step(state, *batch)
    assert state.step == 4
    assert state.ledger.epsilon(delta=1e-3, neighboring_relation=ADD_REMOVE) == longer.epsilon() > plan.epsilon()


def test_the_ledger_follows_a_changed_plan(params, loss_fn, data):
    first, second = make_plan(1.0), make_plan(2.0)
    state, _ = train(first, loss_fn, params, data, num_steps=6)
    state, _ = train(second, loss_fn, params, data, num_steps=2, state=state)
    assert [int(entry.num_steps) for entry in state.ledger.entries] == [6, 2]
    assert (
        first.epsilon(num_steps=6)
        < state.ledger.epsilon(delta=1e-3, neighboring_relation=ADD_REMOVE)
        < first.epsilon(num_steps=8)
    )


def test_metrics_are_reported_and_the_noise_std_is_true(params, loss_fn, data):
    plan = make_plan(1.5, jaxdp.per_layer({"first": 0.3, "second": 0.4}, noise_allocation="equal_budget"))
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    batch, mask = jax.tree.map(lambda x: x[:16], data), np.arange(16) >= 10
    _, info = step(init(params), batch, mask)
    np.testing.assert_allclose(info.noise_stddevs, 1.5 * np.sqrt(2) * np.array([0.3, 0.4]), rtol=1e-6)
    np.testing.assert_allclose(info.clip_norms, [0.3, 0.4], rtol=1e-6)
    assert info.not_private.loss.shape == (16,)
    losses = jax.vmap(loss_fn, (None, 0))(params, batch)
    assert float(info.not_private.mean_loss()) == pytest.approx(float(losses[:10].mean()), rel=1e-5)


def test_quantile_clipping_moves_the_clip_norm(params, loss_fn, data):
    plan = make_plan(0.5, jaxdp.quantile(0.01, count_stddev=1.0))
    state, _ = train(plan, loss_fn, params, data)
    assert float(state.clip_norms[0]) > 0.02


def test_low_precision_parameters_keep_their_dtype(loss_fn, params, data):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss(p, example):
        return loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), p), example)

    state, _ = train(make_plan(), loss, low, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.bfloat16.dtype}
    chex.assert_tree_all_finite(state.params)


@pytest.mark.usefixtures("standard_promotion")
def test_replicas_add_the_same_noise_and_sharding_changes_only_rounding(params, loss_fn, data, key):
    """S7, S22: the batch split over two devices gives the parameters of one device, equal on both. Step by step from the same bits,
    since noise follows them."""
    plan = make_plan()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    init, step = jaxdp.make_dp_step(loss_fn, optax.adam(0.01), plan)
    alone = shared = init(params, noise_key=key)
    for batch, mask in jaxdp.poisson_batches(data, plan, np.random.SeedSequence(2)):
        arrays = jax.device_get((alone.params, alone.opt_state, alone.clip_norms)), jax.random.clone(alone.noise_key)
        (copied, noise_key) = jax.device_put(arrays, everywhere)
        shared = training.TrainingState(*copied, noise_key, ledger=alone.ledger)
        alone, _ = step(alone, batch, mask)
        shared, _ = step(shared, *jax.device_put((batch, mask), rows))
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, alone.params), jax.tree.map(np.asarray, shared.params), rtol=1e-4, atol=1e-5
        )
    kernel = shared.params["first"]["kernel"]
    copies = [np.asarray(shard.data) for shard in kernel.addressable_shards]
    assert len(copies) == 2
    np.testing.assert_array_equal(copies[0], copies[1])


# Noise belongs to one step of one state with one batch (S8).

WIDTH = 4000


def linear(w, example):
    """Its gradient is the example, wherever w is."""
    return jnp.vdot(w, example)


def rows_of(seed, num_rows=6, width=WIDTH):
    return np.random.default_rng(seed).normal(size=(num_rows, width)).astype(np.float32)


@functools.cache
def wide(noise_multiplier=1.0, learning_rate=1.0, sampling_prob=1.0):
    """A step of `WIDTH` parameters, which change by minus its release times the learning rate; and its plan."""
    settings = {"num_examples": 6, "sampling_prob": sampling_prob, "num_steps": 9, "padded_batch_size": 6}
    plan = jaxdp.plan(clipping=jaxdp.flat(1.0), noise_multiplier=noise_multiplier, target_delta=1e-5, **settings)
    return *jaxdp.make_dp_step(linear, optax.sgd(learning_rate), plan), plan


def copy_of(state):
    return jax.tree.map(jnp.copy, state)


def releases_of(state, batch, mask=None, num_steps=1, **options):
    """The noised sums of steps, `[num_steps, WIDTH]`, from a copy of the state; without noise: the clipped sums."""
    _, step, plan = wide(**options)
    state, found = copy_of(state), []
    for _ in range(num_steps):
        before = np.asarray(state.params, np.float64)
        state, _ = step(state, batch, np.zeros(6, bool) if mask is None else mask)
        found.append((before - np.asarray(state.params)) / options.get("learning_rate", 1.0) * plan.expected_batch_size)
    return np.array(found)


def assert_two_draws(difference, of_sums):
    """A difference of releases is that of the sums and of two independent draws: it hides the sums as each does."""
    assert np.max(np.abs(of_sums)) > 1e-3
    found = (np.asarray(difference) - of_sums).ravel()
    assert stats.kstest(found, stats.norm(0, np.sqrt(2)).cdf).pvalue > 1e-3
    assert np.std(found) == pytest.approx(np.sqrt(2), rel=5 / np.sqrt(2 * found.size))


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_copied_state_stepped_with_another_batch_draws_other_noise(num_steps, key):
    """Equal noise would cancel, and the difference of two releases be that of two sums, in the clear."""
    init, step, _ = wide()
    state = init(jnp.zeros(WIDTH), noise_key=key)
    for _ in range(num_steps):
        state, _ = step(state, rows_of(9), np.zeros(6, bool))
    one, other = (releases_of(state, rows_of(seed))[0] for seed in (0, 1))
    sums = [releases_of(state, rows_of(seed), noise_multiplier=0.0)[0] for seed in (0, 1)]
    assert_two_draws(one - other, sums[0] - sums[1])
    np.testing.assert_array_equal(one, releases_of(state, rows_of(0))[0])  # the same work is the same release


def test_a_mask_is_a_draw_where_examples_are_drawn(key):
    """At q below 1 two masks of a batch are two draws, each with its noise; at q = 1 the noise stays, and sensitivity shows."""
    batch, mask = rows_of(0), np.arange(6) == 2
    state = wide()[0](jnp.zeros(WIDTH), noise_key=key)
    sums = [releases_of(state, batch, m, noise_multiplier=0.0)[0] for m in (None, mask)]
    drawn = [releases_of(state, batch, m, sampling_prob=0.5)[0] for m in (None, mask)]
    assert_two_draws(drawn[0] - drawn[1], sums[0] - sums[1])
    fixed = [releases_of(state, batch, m)[0] for m in (None, mask)]
    np.testing.assert_allclose(fixed[0] - fixed[1], sums[0] - sums[1], atol=1e-5)
    assert np.linalg.norm(fixed[0] - fixed[1]) <= 1 + 1e-4


def test_the_same_batch_at_other_parameters_is_noised_afresh(key):
    """As when a run is resumed with another learning rate: its sum is another, though here, for once, it is the same."""
    state = wide()[0](jnp.zeros(WIDTH), noise_key=key)
    slow, fast = (releases_of(state, rows_of(0), num_steps=2, learning_rate=rate) for rate in (1.0, 0.5))
    np.testing.assert_allclose(slow[0], fast[0], atol=1e-4)
    assert stats.kstest(slow[1] - fast[1], stats.norm(0, np.sqrt(2)).cdf).pvalue > 1e-3


def test_another_noise_multiplier_draws_other_noise(key):
    """S + n and S + 2 n would be two equations for S."""
    state = wide()[0](jnp.zeros(WIDTH), noise_key=key)
    one, other = (releases_of(state, rows_of(0), noise_multiplier=sigma)[0] for sigma in (1.0, 2.0))
    assert stats.kstest(one - other, stats.norm(0, np.sqrt(5)).cdf).pvalue > 1e-3


@pytest.mark.usefixtures("standard_promotion")
def test_another_program_draws_noise_of_its_own(params, loss_fn, data, key):
    """The sums of two methods differ by more than rounding for a record whose gradient cancels: under one noise they would show."""
    plan, batch, mask = make_plan(), jax.tree.map(lambda x: x[:16], data), np.arange(16) > 11
    found = []
    for options in ({"method": "vmap"}, {"method": "two_pass"}, {"method": "two_pass", "microbatch_size": 4}):
        init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(1.0), plan, **options)
        found.append(step(init(params, noise_key=key), batch, mask)[0].params)
    again = step(init(params, noise_key=key), batch, mask)[0].params
    chex.assert_trees_all_equal(again, found[-1])
    for one, other in itertools.combinations(found, 2):
        apart = [np.max(np.abs(a - b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
        assert max(apart) > 1e-3


def test_an_example_that_carries_a_key_is_part_of_the_digest(key):
    """As for dropout: of two batches that differ in their keys alone, the noise differs."""
    plan = make_plan(num_examples=6, sampling_prob=1.0, padded_batch_size=6)
    init, step = jaxdp.make_dp_step(lambda w, e: jnp.vdot(w, e["x"]), optax.sgd(1.0), plan)
    found = [
        step(
            init(jnp.zeros(3), noise_key=key),
            {"x": rows_of(0, 6, 3), "key": jax.random.split(jax.random.key(k), 6)},
            None,
        )
        for k in (0, 0, 1)
    ]
    one, same, other = (np.asarray(state.params) for state, _ in found)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_a_run_is_not_started_inside_a_transformation(key):
    """Its key would be one constant for all calls."""
    init, _, _ = wide()
    for start in (
        jax.jit(init),
        jax.vmap(init),
        lambda w: jax.eval_shape(init, w),
        jax.jit(lambda w: init(np.zeros(3, "f4"))),
        jax.vmap(lambda w: init(np.zeros(3, "f4"))),  # maps what init does not see
    ):
        with pytest.raises(
            TypeError, match=r"init was called inside a JAX transformation .* Call it outside; then replicate"
        ):
            start(jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="inside a JAX transformation"):
        jax.vmap(lambda k: init(jnp.zeros(3), noise_key=k))(jax.random.split(key, 2))
