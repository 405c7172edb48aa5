"""Private zeroth-order steps: one clipped vector of K numbers for each example, one draw of the noise, one event."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

import jaxdp
from jaxdp import noise_keys
from jaxdp.zeroth_order import (
    ForwardMode,
    Journal,
    LowRank,
    Placement,
    Sgd,
    TwoSided,
    aggregation,
    header_of,
    key_relations,
    loss_fn,
    make_resident_step,
    make_step,
    read_trajectory,
    replayed,
)
from tests.zeroth_order.models import bits, toy, toy_batch, toy_params

pytestmark = pytest.mark.unoptimized
B = 6
NOISE_KEY = jax.random.key(7, impl="threefry2x32")


def plan_of(*, noise_multiplier=1.0, clip_norm=1.0, num_steps=100, **options):
    """Every example in every step, so that a batch is the data set."""
    return jaxdp.plan(
        num_examples=B,
        sampling_prob=1.0,
        num_steps=num_steps,
        clipping=jaxdp.flat(clip_norm),
        noise_multiplier=noise_multiplier,
        **options,
    )


def first_step(key, plan, batch=None, *, noise_key=NOISE_KEY, estimator=None, mask=None, **options):
    steps = make_step(toy(), Sgd(1e-2), plan=plan, estimator=estimator, **options)
    state = steps.init(toy_params(), direction_key=key, noise_key=None if plan is None else noise_key)
    return steps.step(state, toy_batch() if batch is None else batch, mask)


def g_of(result):
    return np.asarray(result[1].scalars.projected_gradients)


@pytest.mark.parametrize("estimator", [TwoSided(1), TwoSided(4), ForwardMode(4)], ids=str)
def test_without_noise_and_clip_it_is_the_step_without_privacy(estimator, key):
    free = g_of(first_step(key, None, estimator=estimator))
    bound = g_of(first_step(key, plan_of(noise_multiplier=0.0, clip_norm=1e9), estimator=estimator))
    np.testing.assert_allclose(bound, free, rtol=1e-5)


def test_the_release_is_its_equation(key):
    """g = K / (q N) (sum_i v_i min(1, C / ||v_i||) + sigma C n), v = D / K: DP-AggZO, and DPZero for K = 1."""
    for K in (1, 4):
        C = 0.05
        _, info = first_step(key, plan_of(noise_multiplier=0.0, clip_norm=C), estimator=TwoSided(K))
        v = np.asarray(info.not_private.projected_gradients, np.float64) / K
        norms = np.linalg.norm(v, axis=1)
        assert np.all(norms > C), "the clip is at work"
        np.testing.assert_allclose(
            info.scalars.projected_gradients, K / B * np.sum(v * (C / norms)[:, None], axis=0), rtol=1e-4
        )


def test_the_noise_has_the_std_of_the_plan_and_is_drawn_once(key):
    """The difference to the run without noise is K sigma C / (q N) n, for steps with keys of their own (S7, S11)."""
    K, C, sigma, T = 4, 0.5, 3.0, 60
    draws = []
    noisy = make_step(toy(), Sgd(1e-9), plan=plan_of(noise_multiplier=sigma, clip_norm=C), estimator=TwoSided(K))
    exact = make_step(toy(), Sgd(1e-9), plan=plan_of(noise_multiplier=0.0, clip_norm=C), estimator=TwoSided(K))
    a = noisy.init(toy_params(), direction_key=key, noise_key=NOISE_KEY)
    b = exact.init(toy_params(), direction_key=key, noise_key=NOISE_KEY)
    for _ in range(T):
        a, one = noisy.step(a, toy_batch(), None)
        b, other = exact.step(b, toy_batch(), None)
        draws.append(np.asarray(one.scalars.projected_gradients) - np.asarray(other.scalars.projected_gradients))
    stds = np.array(draws) / (K * sigma * C / B)
    assert abs(np.std(stds) - 1) < 5 / np.sqrt(2 * stds.size)
    assert abs(np.mean(stds)) < 5 / np.sqrt(stds.size)
    assert np.unique(stds).size == stds.size
    assert a.ledger.num_steps == T
    assert len(a.ledger.entries) == 1


def test_noise_does_not_follow_from_the_directions(key):
    """S8: one direction key with two noise keys gives two releases; by default the operating system gives the key."""
    plan = plan_of()
    assert not np.allclose(g_of(first_step(key, plan)), g_of(first_step(key, plan, noise_key=jax.random.key(8))))
    assert not np.allclose(g_of(first_step(key, plan, noise_key=None)), g_of(first_step(key, plan, noise_key=None)))
    with pytest.raises(ValueError, match="noise_key is the direction key, which is public"):
        first_step(key, plan, noise_key=key)


fold_in, split = jax.random.fold_in, jax.random.split
DERIVED = {
    "itself": lambda key: key,
    "fold_in 0": lambda key: fold_in(key, 0),
    "fold_in 4095": lambda key: fold_in(key, 4095),
    "fold_in 2^31": lambda key: fold_in(key, 2**31),
    "split": lambda key: split(key)[1],
    "the last of 5000": lambda key: split(key, 5000)[-1],
    "fold_in twice": lambda key: fold_in(fold_in(key, 3), 4095),
    "split twice": lambda key: split(split(key, 9)[8], 4)[0],
    "a run's": lambda key: noise_keys.run_key(key, noise_keys.Domain.DP_STEP),
    "rbg": lambda key: jax.random.wrap_key_data(jnp.tile(jax.random.key_data(fold_in(key, 1)), 2), impl="rbg"),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_noise_key_that_follows_from_the_direction_key_is_refused(name):
    """S8: and one from which the direction key follows. The message says how."""
    key = jax.random.key(20201, impl="threefry2x32")
    related = DERIVED[name](key)
    start = functools.partial(aggregation.unrelated_noise_key, pipeline=noise_keys.Domain.RESIDENT)
    with pytest.raises(
        ValueError, match=r"noise_key is (derived from )?the direction key.* public: anyone .* jaxdp\.secret_key"
    ):
        start(related, key)
    if name not in ("itself", "rbg"):
        with pytest.raises(ValueError, match=r"direction_key, which is public, is derived from .* jaxdp\.secret_key"):
            start(key, related)
    siblings = fold_in(key, 17), fold_in(key, 18)
    for noise_key in (jaxdp.secret_key(), NOISE_KEY, jax.random.key(3, impl="rbg")):
        start(noise_key, key)
    start(*siblings)  # of a secret key that nobody was given


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_older_split_is_searched(partitionable):
    """Its keys are halves of two blocks: up to 4096 of them where it is the one in use, up to 256 elsewhere."""
    key = jax.random.key(20201, impl="threefry2x32")
    with jax.threefry_partitionable(False):
        found = {(n, j): split(key, n)[j] for n, j in ((2, 0), (2, 1), (7, 3), (256, 255), (4096, 4095), (4095, 2047))}
    with jax.threefry_partitionable(partitionable):
        for (n, j), child in found.items():
            expected = f"jax.random.split(parent, {n})[{j}], of the older kind"
            is_tried = n <= 256 or not partitionable
            assert key_relations.relation(child, key, name="parent") == (expected if is_tried else None)
        assert key_relations.relation(jax.random.key(4), key, name="parent") is None


def test_the_cipher_is_that_of_jax_and_runs_backwards():
    words = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint32)
    key, counter = tuple(words[:2]), tuple(words[2:])
    block = key_relations._encrypted(key, *counter)
    for i in range(50):
        expected = jax.extend.random.threefry_2x32(jnp.asarray(words[:2, i]), jnp.asarray(words[2:, i]))
        assert (int(block[0][i]), int(block[1][i])) == tuple(expected.tolist())
    np.testing.assert_array_equal(key_relations._decrypted(key, *block), counter)


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_one_key_and_step_with_two_batches_draw_two_noises(noise):
    """S8: equal noise would cancel, and the difference of two releases be that of two sums, in the clear."""
    K, num_steps = (4000, 1) if noise == "gaussian" else (1, 2000)
    batches = np.random.default_rng(4).normal(size=(2, B, K)).astype(np.float32)
    counts = jnp.ones(B, bool)

    def released(batch, noise_multiplier):
        plan = plan_of(noise_multiplier=noise_multiplier, noise=noise)
        one = lambda step: aggregation.private_mean(jnp.asarray(batch), counts, plan, key=NOISE_KEY, step=step)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(num_steps)), np.float64) * B / K

    noisy, exact = [[released(batch, sigma) for batch in batches] for sigma in (1.0, 0.0)]
    assert np.abs(exact[0] - exact[1]).max() > 1e-3
    found = ((noisy[0] - noisy[1]) - (exact[0] - exact[1])).ravel()
    assert found.std() == pytest.approx(2.0 if noise == "laplace" else np.sqrt(2), rel=0.1)
    assert stats.kstest(found, stats.norm(0, 1).cdf).pvalue < 1e-6
    np.testing.assert_array_equal(released(batches[0], 1.0), noisy[0])  # the same work is the same release


def test_runs_of_one_key_with_two_batches_draw_two_noises(key):
    """Through the steps; with the same batch, blocks and resident runs each repeat themselves."""
    C = 1e-3
    plan = plan_of(clip_norm=C, noise_multiplier=1e3)
    init, step = make_resident_step(functools.partial(loss_fn, toy()), optax.sgd(1e-2), plan=plan)
    other = jax.tree.map(lambda leaf: leaf + 1, toy_batch())

    def of_resident(batch):
        state = init(toy_params(), direction_key=key, noise_key=NOISE_KEY)
        return np.asarray(step(state, batch)[1].projected_gradients)

    def of_blocks(batch):
        return g_of(first_step(key, plan, batch))

    farthest = 2 * B * C / B  # that two sums can be apart
    for run in (of_resident, of_blocks):
        np.testing.assert_array_equal(run(toy_batch()), run(toy_batch()))
        assert np.abs(run(toy_batch()) - run(other)).max() > farthest
    assert np.abs(of_resident(toy_batch()) - of_blocks(toy_batch())).max() > farthest  # two pipelines, two domains


def test_a_private_run_is_not_started_inside_a_transformation(key):
    init, _ = make_resident_step(functools.partial(loss_fn, toy()), optax.sgd(1e-2), plan=plan_of())
    for noise_key in (None, NOISE_KEY):
        for transformed in (jax.jit, lambda f: functools.partial(jax.eval_shape, f)):
            with pytest.raises(TypeError, match="init of a private run was called inside a JAX transformation"):
                transformed(lambda params, k=noise_key: init(params, direction_key=key, noise_key=k))(toy_params())


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(
        np.float32, (5, 3), elements=st.floats(-(2.0**66), 2.0**66, width=32) | st.sampled_from([np.nan, np.inf])
    ),
    st.integers(0, 4),
)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(projected, removed):
    """S1, S9: whatever it holds. With sigma = 0 the release is K / (q N) times the sum."""
    C, K = 0.7, projected.shape[1]
    plan = plan_of(noise_multiplier=0.0, clip_norm=C)
    counts = jnp.all(jnp.isfinite(projected), axis=1)

    def total(counts):
        g = aggregation.private_mean(jnp.asarray(projected), counts, plan, key=NOISE_KEY, step=jnp.uint32(0))
        return np.asarray(g, np.float64) * B / K

    move = np.linalg.norm(total(counts) - total(counts.at[removed].set(False)))
    assert move <= C * (1 + 1e-5)


def test_non_finite_and_padding_contribute_nothing(key):
    """S9, S10: the release is that of the others, and of an empty batch it is the noise."""
    plan, poisoned = plan_of(clip_norm=0.1), jax.tree.map(np.copy, toy_batch())
    poisoned["x"][[1, 4]] = np.nan
    mask = np.isin(np.arange(B), [1, 4])
    np.testing.assert_array_equal(g_of(first_step(key, plan, poisoned)), g_of(first_step(key, plan, mask=mask)))
    empty = g_of(first_step(key, plan, mask=np.ones(B, bool)))
    assert np.all(np.isfinite(empty))
    assert np.all(empty != 0)


@pytest.mark.parametrize("law", [None, LowRank()], ids=["Rademacher", "LowRank"])
def test_streamed_resident_and_replayed_private_runs_are_the_same_bits(law, key, tmp_path):
    """The journal of a private run gives the private model without the noise key."""
    plan, options = plan_of(clip_norm=0.1), {"law": law, "estimator": TwoSided(4)}
    found = []
    for placement in (Placement(), Placement(is_streamed=True)):
        steps = make_step(toy(), Sgd(1e-2), plan=plan, placement=placement, **options)
        state = steps.init(toy_params(), direction_key=key, noise_key=NOISE_KEY)
        path = tmp_path / f"{placement.is_streamed}"
        with Journal.create(path, header_of(steps, toy_params(), key)) as journal:
            for t in range(3):
                state, info = steps.step(state, toy_batch(), None)
                journal.append(t, info.scalars)
        found.append(bits(steps.flush(state).params()))
        words = np.asarray(jax.random.key_data(NOISE_KEY)).tobytes()
        assert words not in path.read_bytes()
    assert found[0] == found[1] != bits(toy_params())
    trajectory = read_trajectory(path)
    assert trajectory.header.privacy is not None
    assert trajectory.header.privacy["noise_multiplier"] == 1.0
    public = make_step(toy(), Sgd(1.0), **options)
    again = replayed(public, public.init(toy_params(), direction_key=key), trajectory)
    assert bits(public.flush(again).params()) == found[0]
    resumed = make_step(toy(), Sgd(1e-2), plan=plan, **options)
    again = replayed(resumed, resumed.init(toy_params(), direction_key=key, noise_key=NOISE_KEY), trajectory)
    assert again.ledger.num_steps == 3
    other = make_step(toy(), Sgd(1e-2), plan=plan_of(noise_multiplier=2.0), **options)
    with pytest.raises(ValueError, match=r"another plan \(.*clipping"):
        replayed(other, other.init(toy_params(), direction_key=key), trajectory)


def test_the_epsilon_is_that_of_dp_sgd(key):
    """K numbers clipped as one vector are one event: the same (q, sigma, T) cost the same, whatever K (S11 v)."""
    plan = dataclasses.replace(plan_of(num_steps=3), target_delta=1e-5)
    steps = make_step(toy(), Sgd(1e-2), plan=plan, estimator=TwoSided(4))
    state = steps.init(toy_params(), direction_key=key)
    for _ in range(3):
        state, _ = steps.step(state, toy_batch(), None)
    assert plan.epsilon_so_far(state.ledger) == plan.epsilon()
    with pytest.raises(jaxdp.BudgetExhaustedError, match="step 4 was not run"):
        steps.step(state, toy_batch(), None)


def test_bad_private_steps_are_refused(key):
    for clipping, named in ((jaxdp.per_layer(1.0), "per-layer"), (jaxdp.quantile(1.0), "quantile")):
        plan = jaxdp.plan(num_examples=B, sampling_prob=1.0, num_steps=2, clipping=clipping, noise_multiplier=0.5)
        with pytest.raises(ValueError, match=rf"(?i){named}.*jaxdp.flat"):
            make_step(toy(), Sgd(1e-2), plan=plan)
    with pytest.raises(TypeError, match="plan must be a PrivacyPlan"):
        make_step(toy(), Sgd(1e-2), plan=1.0)
    with pytest.raises(ValueError, match=r"is_normalized .* num_directions above 1"):
        make_step(toy(), Sgd(1e-2, is_normalized=True))
    without = make_step(toy(), Sgd(1e-2)).init(toy_params(), direction_key=key)
    with pytest.raises(ValueError, match="made without a plan"):
        make_step(toy(), Sgd(1e-2), plan=plan_of()).step(without, toy_batch())
    poisson = jaxdp.plan(
        num_examples=60,
        expected_batch_size=3,
        num_steps=2,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=1.0,
        padded_batch_size=B,
    )
    with pytest.raises(ValueError, match="is_padding_example is missing"):
        first_step(key, poisson)


# Laplace noise: DP-ZO (arXiv 2401.04343).


def laplace_plan(**options):
    return plan_of(noise="laplace", **options)


def test_laplace_noise_is_drawn_once_a_step_with_the_scale_of_the_plan(key):
    """The mean absolute difference to the run without noise is b C / (q N), and its law is Laplace's (S7)."""
    C, b, T = 0.5, 3.0, 250
    noisy = make_step(toy(), Sgd(1e-9), plan=laplace_plan(noise_multiplier=b, clip_norm=C, num_steps=T))
    exact = make_step(toy(), Sgd(1e-9), plan=laplace_plan(noise_multiplier=0.0, clip_norm=C, num_steps=T))
    one, other = (steps.init(toy_params(), direction_key=key, noise_key=NOISE_KEY) for steps in (noisy, exact))
    draws = []
    for _ in range(T):
        one, info = noisy.step(one, toy_batch(), None)
        other, silent = exact.step(other, toy_batch(), None)
        draws.append(float(info.scalars.projected_gradients[0] - silent.scalars.projected_gradients[0]))
    found = np.array(draws) / (C / B)
    assert np.mean(np.abs(found)) == pytest.approx(b, rel=5 / np.sqrt(T))
    assert stats.kstest(found, stats.laplace(0, b).cdf).pvalue > 1e-3
    assert stats.kstest(found, stats.laplace(0, b / 2).cdf).pvalue < 1e-3
    assert np.unique(found).size == T
    assert [(entry.noise, int(entry.num_steps)) for entry in one.ledger.entries] == [("laplace", T)]


def test_a_laplace_run_is_pure_and_its_ledger_says_so(key):
    plan = laplace_plan(noise_multiplier=4.0, num_steps=3, target_delta=0)
    init, step = make_resident_step(functools.partial(loss_fn, toy()), optax.sgd(1e-2), plan=plan)
    state = init(toy_params(), direction_key=key)
    for _ in range(3):
        state, _ = step(state, toy_batch(), None)
    assert plan.epsilon_so_far(state.ledger) == pytest.approx(3 / 4)


def test_streamed_resident_and_replayed_laplace_runs_are_the_same_bits(key, tmp_path):
    plan, found = laplace_plan(clip_norm=0.1, target_delta=0), []
    for placement in (Placement(), Placement(is_streamed=True)):
        steps = make_step(toy(), Sgd(1e-2), plan=plan, placement=placement)
        state = steps.init(toy_params(), direction_key=key, noise_key=NOISE_KEY)
        path = tmp_path / f"{placement.is_streamed}"
        with Journal.create(path, header_of(steps, toy_params(), key)) as journal:
            for t in range(3):
                state, info = steps.step(state, toy_batch(), None)
                journal.append(t, info.scalars)
        found.append(bits(steps.flush(state).params()))
    assert found[0] == found[1] != bits(toy_params())
    trajectory = read_trajectory(path)
    assert trajectory.header.privacy is not None
    assert trajectory.header.privacy["noise"] == "laplace"
    assert trajectory.header.privacy["target_delta"] == 0
    public = make_step(toy(), Sgd(1.0))
    again = replayed(public, public.init(toy_params(), direction_key=key), trajectory)
    assert bits(public.flush(again).params()) == found[0]
    resumed = make_step(toy(), Sgd(1e-2), plan=plan)
    again = replayed(resumed, resumed.init(toy_params(), direction_key=key, noise_key=NOISE_KEY), trajectory)
    assert plan.epsilon_so_far(again.ledger) == pytest.approx(3.0)
    other = make_step(toy(), Sgd(1e-2), plan=plan_of(clip_norm=0.1, target_delta=1e-5))
    with pytest.raises(ValueError, match=r"another plan \(noise: 'laplace' there, 'gaussian' here"):
        replayed(other, other.init(toy_params(), direction_key=key), trajectory)


def test_laplace_noise_is_refused_for_more_than_one_direction():
    """K numbers clipped together have the L1 sensitivity sqrt(K) C, and the plan charges for C."""
    plan = laplace_plan()
    message = "num_directions=2 with noise='laplace'.*Use one direction, or plan with noise='gaussian'"
    with pytest.raises(ValueError, match=message):
        make_step(toy(), Sgd(1e-2), plan=plan, estimator=TwoSided(2))
    with pytest.raises(ValueError, match=message):
        make_resident_step(functools.partial(loss_fn, toy()), optax.sgd(1e-2), plan=plan, estimator=ForwardMode(2))
    with pytest.raises(ValueError, match="this sum has 2"):
        aggregation.private_mean(jnp.ones((B, 2)), jnp.ones(B, bool), plan, key=NOISE_KEY, step=jnp.uint32(0))
