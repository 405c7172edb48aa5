"""Audits: bounds that are wrong as rarely as they say, and that faults of the package exceed."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import special, stats

import jaxdp
from jaxdp import auditing, noise
from jaxdp.auditing import (
    Guesses,
    audit,
    broken,
    broken_step,
    broken_zeroth_order_step,
    dp_sgd_run,
    is_rejected,
    pair_curve,
    zeroth_order_run,
)
from jaxdp.auditing.bounds import fewest_rejected, guess, p_value_of_pair
from jaxdp.auditing.curves import with_noise
from jaxdp.auditing.dp_sgd import routes
from jaxdp.auditing.one_run import curve_lower_bound, report as report_of_scores, significances
from jaxdp.zeroth_order import Placement

pytestmark = [pytest.mark.unoptimized, pytest.mark.once]  # statistics of runs
CANARY_NORM = 10.0  # ten clip norms
SIGNIFICANCE = 0.05


def plan_of(*, mu=1.0, num_steps=8, sampling_prob=1.0, num_canaries=1000, noise_multiplier=None):
    """Full batches of mu = 1, which is epsilon 4.38 at delta 1e-5, unless said otherwise."""
    sigma = math.sqrt(num_steps) / mu if noise_multiplier is None else noise_multiplier
    return jaxdp.plan(
        num_examples=num_canaries,
        sampling_prob=sampling_prob,
        num_steps=num_steps,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=sigma,
        target_delta=1e-5,
    )


# The noise of a step is bound to the last bit of what it hides, which is another one on another CPU: a seed repeats a run on one
# machine alone. So what is asserted of a run must hold for any noise but one in some ten thousand.


def follows(plan, fault):
    """The plan that the sampler of a run with the fault follows: all other faults are in the steps."""
    return broken(plan, fault, canary_norm=CANARY_NORM) if fault == "no-sampling" else plan


def dp_sgd_report(plan, fault="none", *, seed=0, ways=("book_keeping",)):
    """By one way, unless all are asked for: each is a program to compile."""
    rng = np.random.default_rng(seed)
    really = follows(plan, fault)
    run = dp_sgd_run(
        really,
        canary_norm=CANARY_NORM,
        rng=rng,
        noise_key=jax.random.key(seed),
        ways=ways,
        make_step=broken_step(fault, canary_norm=CANARY_NORM),
    )
    return audit(plan, run, rng=rng)


def zeroth_order_report(plan, fault="none", *, num_directions=16, seed=0):
    rng = np.random.default_rng(seed)
    really = follows(plan, fault)
    run = zeroth_order_run(
        really,
        num_directions=num_directions,
        canary_norm=CANARY_NORM,
        rng=rng,
        noise_key=jax.random.key(seed),
        make_step=broken_zeroth_order_step(fault, canary_norm=CANARY_NORM),
    )
    return audit(plan, run, rng=rng)


# The bounds, on mechanisms whose law of right guesses is known.


@pytest.mark.parametrize(
    ("guesses", "delta", "published"),
    [(Guesses(1000, 100, 75), 1e-4, 0.673), (Guesses(100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_the_pair_bound_reproduces_the_published_numbers(guesses, delta, published):
    """arXiv 2305.08846, appendix D and section 7; the second is printed rounded down."""
    assert auditing.epsilon_lower_bound(guesses, delta=delta, significance=SIGNIFICANCE) == pytest.approx(
        published, abs=1e-3
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_pair_bound_without_delta_is_the_tail_of_randomized_response(epsilon):
    """The best mechanism for guessing under pure DP, so the bound is an equality."""
    for v in (0, 50, 70, 100):
        tail = stats.binom.sf(v - 1, 100, special.expit(epsilon))
        assert p_value_of_pair(Guesses(100, 100, v), epsilon, 0.0) == pytest.approx(tail, rel=1e-12)


def test_the_pair_bound_covers_a_run_that_leaks_everything_with_probability_delta():
    """(eps, delta)-DP in each coin: with probability delta all coins are shown, else each by randomized response."""
    m, epsilon, delta = 200, 1.0, 0.01
    for v in range(m + 1):
        chance = delta + (1 - delta) * stats.binom.sf(v - 1, m, special.expit(epsilon))
        assert p_value_of_pair(Guesses(m, m, v), epsilon, delta) >= chance * (1 - 1e-9)


@settings(max_examples=30)
@given(
    num_guesses=st.integers(1, 120),
    leak=st.floats(0.01, 1.0),
    accuracy=st.floats(0.5, 0.999),
    significance=st.sampled_from([0.01, 0.05, 0.3]),
)
def test_the_curve_bound_covers_runs_whose_guesses_are_right_together(num_guesses, leak, accuracy, significance):
    """With probability `leak` each coin is shown with `accuracy`, else none is: of all runs, about the best for guessing.

    One coin's tests obey y <= e^eps x, e^eps = accuracy / (1 - accuracy), and y <= x + leak (2 accuracy - 1).
    """
    curve = pair_curve(np.array([0.0, special.logit(accuracy)]), np.array([leak * (2 * accuracy - 1), 0.0]))
    for v in range(num_guesses + 1):
        chance = leak * stats.binom.sf(v - 1, num_guesses, accuracy) + (1 - leak) * stats.binom.sf(
            v - 1, num_guesses, 0.5
        )
        if is_rejected(Guesses(num_guesses, num_guesses, v), curve, significance=significance):
            assert chance < significance


def test_the_curve_bound_is_close_to_the_truth():
    """It is no vacuous bound: against the run above it rejects a count whose probability is 1 in 40."""
    m, leak, accuracy = 1000, 0.04, 0.8
    curve = pair_curve(np.array([0.0, special.logit(accuracy)]), np.array([leak * (2 * accuracy - 1), 0.0]))
    likely = int(stats.binom.ppf(0.4, m, accuracy))  # 1 - 0.4 of the leaks have as many
    assert is_rejected(Guesses(m, m, likely), curve, significance=SIGNIFICANCE)
    assert not is_rejected(Guesses(m, m, likely), curve, significance=0.6 * leak)


def count_of_alarms(curve, runs, num_guesses):
    """How many of the runs, pairs of scores and coins, are rejected."""

    @functools.cache
    def rejected(guesses):
        return is_rejected(guesses, curve, significance=SIGNIFICANCE)

    return sum(rejected(guess(scores, coins, num_guesses)) for scores, coins in runs)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("num_guesses", [100, 300, 1000])
def test_false_alarms_on_exact_gaussian_mechanisms_are_as_rare_as_stated(mu, num_guesses):
    """400 runs: more than 38 alarms would happen to a test of 5% once in 10^4 tries, and the seed is fixed."""
    rng, m = np.random.default_rng(7), 1000

    def run():
        coins = rng.random(m) < 0.5
        return mu * coins + rng.normal(size=m), coins

    alarms = count_of_alarms(auditing.gaussian_curve(mu), (run() for _ in range(400)), num_guesses)
    assert alarms <= stats.binom.isf(1e-4, 400, SIGNIFICANCE)


def test_false_alarms_on_runs_that_leak_all_at_once_are_as_rare_as_stated():
    """The worst case: one run in 22 shows nine coins in ten, which the curve of one canary allows, and many are refuted."""
    rng, m, leak, accuracy = np.random.default_rng(8), 1000, 0.045, 0.9

    def run():
        coins = rng.random(m) < 0.5
        shown = np.where(rng.random(m) < accuracy, coins, ~coins)
        scores = shown if rng.random() < leak else rng.random(m) < 0.5
        return scores + 1e-3 * rng.random(m), coins

    curve = pair_curve(np.array([0.0, special.logit(accuracy)]), np.array([leak * (2 * accuracy - 1), 0.0]))
    alarms = count_of_alarms(curve, (run() for _ in range(2000)), m)
    assert 0 < alarms <= stats.binom.isf(1e-4, 2000, SIGNIFICANCE)


def test_the_curve_of_sampled_steps_becomes_that_of_a_gaussian():
    """As q tends to 1. The grid of losses makes it permit more, never less."""
    exact = auditing.plan_curve(plan_of(num_steps=4))
    sampled = auditing.plan_curve(plan_of(num_steps=4, sampling_prob=1 - 1e-9))
    for y in (1e-3, 0.01, 0.1, 0.5, 0.9, 0.99):
        assert sampled(y) <= exact(y) * (1 + 1e-6) + 1e-12
        assert sampled(y) == pytest.approx(exact(y), rel=0.05)


def test_a_curve_bound_is_an_epsilon_of_the_plan_at_another_noise():
    plan = plan_of(num_steps=4)
    bound = curve_lower_bound(plan, Guesses(1000, 300, 280), significance=SIGNIFICANCE)
    at = lambda sigma: auditing.gaussian_curve(2 / sigma)  # noqa: E731
    sigmas = np.geomspace(0.5, 4, 200)
    refuted = [s for s in sigmas if is_rejected(Guesses(1000, 300, 280), at(s), significance=SIGNIFICANCE)]
    assert bound == pytest.approx(dataclasses.replace(plan, noise_multiplier=min(refuted)).epsilon(), rel=0.05)


def test_the_gaussian_estimate_is_the_accountants_epsilon():
    for mu in (0.5, 1.0, 4.0):
        plan = plan_of(mu=mu)
        assert auditing.gaussian_epsilon(mu, 1e-5) == pytest.approx(plan.epsilon(), rel=2e-3)
    assert auditing.gaussian_epsilon(0.0, 1e-5) == 0
    assert auditing.gaussian_epsilon(math.inf, 1e-5) == math.inf


def test_guesses_are_of_the_extremes_and_counted():
    coins = np.array([True, False, True, True, False, False])
    scores = np.array([5.0, 4.0, 3.0, -1.0, -2.0, -3.0])
    assert guess(scores, coins, 2) == Guesses(6, 2, 2)
    assert guess(scores, coins, 3) == Guesses(6, 3, 2)  # one more "took part"
    assert guess(scores, coins, 6) == Guesses(6, 6, 4)


# The package, intact and broken.

FULL = plan_of()
SAMPLED = plan_of(num_steps=20, sampling_prob=0.25, noise_multiplier=1.5)
SHARED = plan_of(num_steps=150)
SHARED_AND_SAMPLED = plan_of(num_steps=150, sampling_prob=0.25, noise_multiplier=3.4)
FAULTS_OF_A_FULL_BATCH = ("no-noise", "quarter-noise", "no-clip")


def test_an_intact_dp_sgd_run_passes_whatever_the_seed():
    """12 runs, of which more than 4 would be false alarms of a test of 5% once in 10^3 tries; and each sees something."""
    reports = [dp_sgd_report(FULL, seed=seed) for seed in range(12)]
    assert sum(not report.passed for report in reports) <= stats.binom.isf(1e-3, len(reports), SIGNIFICANCE)
    for report in reports:
        assert report.claimed_epsilon == FULL.epsilon()
        assert report.pair_lower_bound < report.claimed_epsilon
        assert report.epsilon_lower_bound > 0.3 * report.claimed_epsilon
        assert report.epsilon_estimate == pytest.approx(report.claimed_epsilon, rel=0.3)


@pytest.mark.parametrize("fault", FAULTS_OF_A_FULL_BATCH)
@pytest.mark.parametrize("report_of", [dp_sgd_report, zeroth_order_report])
def test_a_fault_exceeds_the_claim(report_of, fault):
    plan = FULL if report_of is dp_sgd_report else SHARED
    report = report_of(plan, fault)
    assert not report.passed
    assert report.epsilon_lower_bound > report.claimed_epsilon


@pytest.mark.parametrize("pipeline", ["dp-sgd", "zeroth-order"])
def test_a_sampler_that_takes_everyone_exceeds_the_claim(pipeline):
    report_of, plan = (dp_sgd_report, SAMPLED) if pipeline == "dp-sgd" else (zeroth_order_report, SHARED_AND_SAMPLED)
    assert report_of(plan).passed
    assert not report_of(plan, "no-sampling").passed


def test_intact_zeroth_order_runs_pass():
    for seed in range(2):
        report = zeroth_order_report(SHARED, seed=seed)
        assert report.passed
        assert report.epsilon_estimate == pytest.approx(report.claimed_epsilon, rel=0.3)


@pytest.mark.slow
def test_one_direction_is_enough():
    """DPZero: all canaries share one number a step."""
    plan = plan_of(num_steps=1500)
    assert zeroth_order_report(plan, num_directions=1).passed
    rng = np.random.default_rng(0)
    third = with_noise(plan, plan.noise_multiplier / 3)
    run = zeroth_order_run(third, num_directions=1, canary_norm=CANARY_NORM, rng=rng, noise_key=jax.random.key(0))
    assert not audit(plan, run, rng=rng).passed


@pytest.mark.parametrize("period", ["noise-reused", "noise-reused-every-other-step"])
@pytest.mark.parametrize("report_of", [dp_sgd_report, zeroth_order_report])
def test_noise_that_is_reused_cancels_in_differences_of_steps(report_of, period):
    """Scores of steps alone pass it: there one constant is as good as any noise."""
    plan = SAMPLED if report_of is dp_sgd_report else SHARED
    found = report_of(plan, period)
    assert not found.passed
    steps, *differences = found.scores
    assert steps.epsilon_lower_bound < found.claimed_epsilon
    # A canary whose batches are pairs of steps alike has no difference.
    assert max(score.guesses.num_correct for score in differences) > 0.95 * steps.guesses.num_guesses


def test_noise_that_is_reused_shows_where_every_record_is_in_every_step():
    """What a canary adds would cancel with the noise, if it were the same in each step: the public signs tell them apart."""
    assert dp_sgd_report(FULL).passed
    assert not dp_sgd_report(FULL, "noise-reused").passed


def test_a_run_takes_turns_of_all_ways_and_each_leaf_has_a_route_of_its_own():
    assert set(routes().values()) == {"dense", "embedding", "copy", "joint"}
    ways = ("vmap", "book_keeping", "two_pass", "dp_aggregate")
    assert dp_sgd_report(FULL, ways=ways).passed
    # A quarter of the steps is by this method.
    assert not dp_sgd_report(FULL, "no-clip-in-one-method", ways=ways).passed


def test_a_score_of_steps_is_the_log_likelihood_ratio_of_the_canary_alone():
    """Without noise, each step shows the canary's clipped norm, or nothing; and no other canary."""
    coins = np.arange(1000) % 3 == 0
    plan = dataclasses.replace(plan_of(num_steps=5), noise_multiplier=0.0)
    found = dp_sgd_run(plan, canary_norm=CANARY_NORM, rng=np.random.default_rng(0), ways=("book_keeping",))(coins)
    least = 1e-3  # noise below which the claim is not asked for more
    np.testing.assert_allclose(found["steps"], 5 * (2.0 * coins - 1) / (2 * least**2), rtol=1e-4)
    assert found["differences"][coins].min() > found["differences"][~coins].max()


def test_false_alarms_over_all_kinds_of_scores_are_as_rare_as_stated():
    """F kinds of scores of one exact mechanism, as unlike as scores can be: of F independent runs. Each has a share."""
    rng, m, count = np.random.default_rng(11), 1000, 400
    plan = plan_of()
    shares = significances(SIGNIFICANCE, 3)
    assert sum(shares) == pytest.approx(SIGNIFICANCE)
    assert significances(SIGNIFICANCE, 1) == [SIGNIFICANCE]
    # The worst case of a curve: with probability 0.045 nine coins in ten are shown, in one kind of scores at a time.
    leak, accuracy = 0.045, 0.9
    curve = pair_curve(np.array([0.0, special.logit(accuracy)]), np.array([leak * (2 * accuracy - 1), 0.0]))
    fewest = [fewest_rejected(m, m, curve, significance=share) for share in shares]
    alarms = 0
    for _ in range(count):
        coins = rng.random(m) < 0.5
        shown = np.where(rng.random(m) < accuracy, coins, ~coins)
        leaks = rng.random() < leak
        kinds = [(shown if leaks else rng.random(m) < 0.5) + 1e-3 * rng.random(m) for _ in shares]
        alarms += any(guess(kind, coins, m).num_correct >= least for kind, least in zip(kinds, fewest, strict=True))
    assert alarms <= stats.binom.isf(1e-4, count, SIGNIFICANCE)
    coins = rng.random(m) < 0.5
    found = report_of_scores(
        plan, {"a": coins + 0.0, "b": rng.random(m)}, coins, num_guesses=300, significance=SIGNIFICANCE
    )
    assert found.worst.name == "a"
    assert not found.passed
    assert found.scores[1].epsilon_lower_bound < found.claimed_epsilon


def test_the_fewest_guesses_that_are_rejected_are_the_fewest():
    curve = auditing.gaussian_curve(1.0)
    fewest = fewest_rejected(1000, 300, curve, significance=SIGNIFICANCE)
    assert is_rejected(Guesses(1000, 300, fewest), curve, significance=SIGNIFICANCE)
    assert not is_rejected(Guesses(1000, 300, fewest - 1), curve, significance=SIGNIFICANCE)
    assert fewest_rejected(1000, 3, curve, significance=1e-6) == 4


def test_zeroth_order_scores_undo_what_the_canaries_share():
    """Without noise, 80 * 16 sums of 1000 canaries have one solution: the coins. So the vectors taken for theirs are."""
    coins = np.arange(1000) % 3 == 0
    plan = dataclasses.replace(plan_of(num_steps=80), noise_multiplier=0.0)
    run = zeroth_order_run(plan, num_directions=16, canary_norm=CANARY_NORM, rng=np.random.default_rng(0))
    np.testing.assert_allclose(run(coins)["steps"], coins - 0.5, atol=0.01)


def test_a_streamed_run_is_audited_as_a_resident_one():
    plan, coins = plan_of(num_steps=3), np.arange(1000) % 2 == 0

    def scores(placement):
        run = zeroth_order_run(
            plan,
            num_directions=4,
            canary_norm=CANARY_NORM,
            rng=np.random.default_rng(0),
            noise_key=jax.random.key(0),
            placement=placement,
        )
        return run(coins)

    resident = scores(Placement(False))
    for name, found in scores(Placement(True)).items():
        np.testing.assert_array_equal(found, resident[name])


@pytest.mark.parametrize("report_of", [dp_sgd_report, zeroth_order_report])
def test_the_audit_sees_the_packages_own_noise_and_clip(report_of, monkeypatch):
    """Broken inside, where every pipeline passes; plans of their own, since compiled steps are kept by plan."""
    num_steps = 8 if report_of is dp_sgd_report else 150
    privatize = sys.modules["jaxdp.mechanism.privatize"]

    def with_a_quarter_of_the_noise(total, stddevs, groups, *, key):
        return noise.add_noise(total, stddevs / 4, groups, key=key)

    with monkeypatch.context() as patch:
        patch.setattr(privatize, "add_noise", with_a_quarter_of_the_noise)
        assert not report_of(plan_of(num_steps=num_steps, mu=0.99)).passed
    with monkeypatch.context() as patch:
        patch.setattr(jaxdp.clipping.Flat, "factors", lambda self, norms, bounds: jnp.ones_like(norms))
        assert not report_of(plan_of(num_steps=num_steps, mu=0.98)).passed


# Laplace noise.


def laplace_plan(*, b=4.0, num_steps=2000, **options):
    settings = {"sampling_prob": 1.0, "clipping": jaxdp.flat(1.0), "target_delta": 1e-5}
    return jaxdp.plan(num_examples=1000, num_steps=num_steps, noise_multiplier=b, noise="laplace", **settings | options)


def test_the_curve_of_a_laplace_step_is_its_own():
    """Least false positive rates: y / t below 1/2, 1 / (4 t (1 - y)) in the middle, 1 - t (1 - y) above 1 - 1 / 2t; t = e^(1/b)."""
    t = math.exp(1 / 0.7)
    curve = auditing.plan_curve(laplace_plan(b=0.7, num_steps=1))
    for y in (0.01, 0.2, 0.5, 0.6, 0.8, 0.9, 0.99):
        exact = y / t if y < 0.5 else 1 / (4 * t * (1 - y)) if y < 1 - 1 / (2 * t) else 1 - t * (1 - y)
        assert curve(y) <= exact * (1 + 1e-9)
        assert curve(y) == pytest.approx(exact, rel=0.1)  # its pairs are 0.1 apart in epsilon


def test_false_alarms_on_exact_laplace_mechanisms_are_as_rare_as_stated():
    rng, m, curve = np.random.default_rng(9), 1000, auditing.plan_curve(laplace_plan(b=0.7, num_steps=1))

    def run():
        coins = rng.random(m) < 0.5
        return coins + rng.laplace(scale=0.7, size=m), coins

    assert count_of_alarms(curve, (run() for _ in range(400)), 300) <= stats.binom.isf(1e-4, 400, SIGNIFICANCE)


@pytest.mark.parametrize("target_delta", [1e-5, 0])
def test_laplace_releases_are_refuted_with_half_their_noise_and_not_with_all_of_it(target_delta):
    """One number for each canary, with the noise of the claim and with half of it; at delta = 0 against the pure epsilon, 2."""
    plan, rng = laplace_plan(b=0.5, num_steps=1, target_delta=target_delta), np.random.default_rng(10)

    def with_scale(scale):
        return audit(plan, lambda coins: coins + rng.laplace(scale=scale, size=len(coins)), rng=rng)

    assert with_scale(0.5).passed
    assert not with_scale(0.25).passed
    assert math.isinf(with_scale(0.5).epsilon_estimate) == (target_delta == 0)


@pytest.mark.slow
def test_a_laplace_run_passes_and_one_without_noise_fails():
    """The steps of the package, one number each, which 1000 canaries share."""
    plan = laplace_plan(b=35.0, num_steps=1200)
    assert zeroth_order_report(plan, num_directions=1).passed
    assert not zeroth_order_report(plan, "no-noise", num_directions=1).passed


def test_a_run_of_gradients_is_refused_under_a_laplace_plan():
    with pytest.raises(ValueError, match="noise='laplace'"):
        dp_sgd_run(laplace_plan(), canary_norm=CANARY_NORM, rng=np.random.default_rng(0))(np.ones(1000, bool))


def test_scores_that_know_nothing_refute_nothing():
    rng = np.random.default_rng(3)
    report = audit(FULL, lambda coins: rng.normal(size=len(coins)), rng=rng)
    assert report.passed
    assert report.epsilon_lower_bound < 1


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 999, "padded_batch_size": 999}, "num_examples=999 is too few canaries"),
        ({"target_delta": None}, "the plan has no target_delta"),
        ({"noise_multiplier": 0.0}, "claims an infinite epsilon"),
        ({"neighboring_relation": jaxdp.NeighboringRelation.REPLACE_ONE}, "neighboring_relation is REPLACE_ONE"),
    ],
)
def test_a_claim_that_coins_cannot_refute_is_refused_before_the_run(changes, message):
    with pytest.raises(ValueError, match=message):
        audit(dataclasses.replace(FULL, **changes), lambda coins: pytest.fail("ran"), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_guesses": 1001}, "num_guesses=1001 exceeds the 1000 canaries"),
        ({"num_guesses": 0}, "num_guesses must be at least 1"),
        ({"significance": 1.0}, r"significance must lie in \(0, 1\)"),
    ],
)
def test_bad_options_are_refused_before_the_run(options, message):
    with pytest.raises(ValueError, match=message):
        audit(FULL, lambda coins: pytest.fail("ran"), rng=np.random.default_rng(0), **options)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"scores of shape \(3,\)"):
        audit(FULL, lambda coins: np.zeros(3), rng=np.random.default_rng(0))


def test_a_run_without_scores_is_refused():
    with pytest.raises(ValueError, match="run returned no scores"):
        audit(FULL, lambda coins: {}, rng=np.random.default_rng(0))


@pytest.mark.parametrize("fault", auditing.faults.FAULTS_OF_GRADIENTS)
def test_a_fault_of_gradients_is_refused_for_zeroth_order_steps(fault):
    with pytest.raises(ValueError, match="is one of DP-SGD"):
        broken_zeroth_order_step(fault, canary_norm=CANARY_NORM)


def test_impossible_guesses_are_refused():
    with pytest.raises(ValueError, match="num_correct=3 of num_guesses=2"):
        Guesses(10, 2, 3)


def test_a_fault_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match="sampling_prob is 1 already"):
        broken(FULL, "no-sampling", canary_norm=CANARY_NORM)
