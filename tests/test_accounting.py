"""Epsilon against known numbers, and calibration against epsilon."""

import dataclasses
import math
import time

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, stats

import jaxdp
from jaxdp import NeighboringRelation, accounting
from jaxdp.accounting import SampledRelease

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
DELTA = 1e-5


def gaussian(num_examples, sampling_prob, padded_batch_size, noise_multiplier, num_steps):
    return SampledRelease("gaussian", num_examples, sampling_prob, padded_batch_size, noise_multiplier, num_steps)


def epsilon(release, delta=DELTA, relation=ADD_REMOVE, accountant="pld"):
    return accounting.epsilon([release], delta, neighboring_relation=relation, accountant=accountant)


def plan_of(q, sigma, steps, num_examples=60_000, **kwargs):
    """A plan without truncation, as the published tables assume."""
    settings = {"noise_multiplier": sigma, "target_delta": DELTA} | kwargs
    return jaxdp.plan(
        num_examples=num_examples,
        sampling_prob=q,
        num_steps=steps,
        clipping=jaxdp.flat(1.0),
        padded_batch_size=num_examples,
        **settings,
    )


@pytest.mark.parametrize(
    ("sigma", "pld", "rdp"), [(0.5, 9.9973, None), (1, 4.3772, 4.7285), (2, 1.9931, 2.1657), (4, 0.9263, None)]
)
def test_one_gaussian_release(sigma, pld, rdp):
    assert plan_of(1.0, sigma, 1).epsilon() == pytest.approx(pld, abs=2e-4)
    if rdp is not None:
        assert plan_of(1.0, sigma, 1, accountant="rdp").epsilon() == pytest.approx(rdp, abs=2e-4)


@pytest.mark.parametrize(("sigma", "pld"), [(1, 9.9973), (2, 4.3772)])
def test_replace_one_is_charged_for_twice_the_sensitivity(sigma, pld):
    assert plan_of(1.0, sigma, 1, neighboring_relation=NeighboringRelation.REPLACE_ONE).epsilon() == pytest.approx(
        pld, abs=2e-4
    )


TABLE = [  # q, sigma, steps, PLD, RDP: algorithms.md section 5
    (0.01, 1, 1000, 1.8289, 2.1014),
    (0.01, 2, 1000, 0.6238, 0.6862),
    (0.02, 1, 500, 2.7737, 3.1443),
    (256 / 60000, 1, 1000, 0.7290, 1.0979),
    (1 / 16, 4.84, 10000, 5.9982, 6.4637),
    (1 / 24, 2.769, 1000, 1.9991, 2.1796),
    (1 / 24, 1.246, 1000, 6.0002, 6.5436),
    (0.008, 1.097, 20000, 5.9911, 6.4728),
    (0.008, 2.387, 20000, 1.9997, 2.1592),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "pld", "rdp"), TABLE)
def test_poisson_subsampled_gaussian(q, sigma, steps, pld, rdp):
    assert plan_of(q, sigma, steps).epsilon() == pytest.approx(pld, abs=2e-4)
    assert plan_of(q, sigma, steps, accountant="rdp").epsilon() == pytest.approx(rdp, abs=2e-4)


def test_the_first_row_under_other_relations():
    assert plan_of(0.01, 1, 1000, neighboring_relation=NeighboringRelation.REPLACE_ONE).epsilon() == pytest.approx(
        2.844, abs=1e-3
    )
    special = NeighboringRelation.REPLACE_SPECIAL
    assert plan_of(0.01, 1, 1000, neighboring_relation=special).epsilon() == pytest.approx(1.8289, abs=2e-4)
    assert plan_of(0.01, 1, 1000, neighboring_relation=special, accountant="rdp").epsilon() == pytest.approx(
        2.1014, abs=2e-4
    )


TRUNCATION = [  # N, q, steps, sigma, cap, epsilon: S10
    (1000, 0.008, 20000, 1.097, 12, 13.40),
    (1000, 0.008, 20000, 1.097, 16, 7.284),
    (1000, 0.008, 20000, 1.097, 20, 6.052),
    (1000, 0.008, 20000, 1.097, 24, 5.992),
    (1000, 0.016, 20000, 1.872, 24, 7.454),
    (1000, 0.016, 20000, 1.872, 28, 6.172),
    (1000, 0.016, 20000, 1.872, 32, 6.009),
    (1000, 0.016, 20000, 1.872, 40, 5.997),
    (1000, 0.064, 10000, 4.84, 80, 7.310),
    (1000, 0.064, 10000, 4.84, 96, 6.172),
    (1000, 0.064, 10000, 4.84, 128, 6.168),
    (60000, 256 / 60000, 1000, 1.0, 256, 6.061),
    (60000, 256 / 60000, 1000, 1.0, 320, 0.770),
    (60000, 256 / 60000, 1000, 1.0, 384, 0.729),
]


@pytest.mark.parametrize(("num_examples", "q", "steps", "sigma", "cap", "expected"), TRUNCATION)
def test_truncation_is_charged_for(num_examples, q, steps, sigma, cap, expected):
    """The published N counts the record that differs; ours is the data set that a neighbor may have one more than."""
    assert epsilon(gaussian(num_examples - 1, q, cap, sigma, steps)) == pytest.approx(expected, rel=1e-3)


def test_an_added_record_may_be_the_one_that_overflows():
    release = gaussian(20, 0.5, 12, 2.0, 50)
    event = release.dp_event()
    assert isinstance(event, dp_accounting.SelfComposedDpEvent)
    assert event.event.dataset_size == 21  # type: ignore[attr-defined]
    assert epsilon(release) == pytest.approx(20.67, abs=0.02)


CALIBRATION = [(0.5, 7.0318), (1, 3.7306), (2, 1.9938), (3, 1.3906), (4, 1.0812), (6, 0.7636), (8, 0.6002)]


@pytest.mark.parametrize(("target", "sigma"), CALIBRATION)
def test_calibration_of_one_release(target, sigma):
    start = time.perf_counter()
    plan = jaxdp.plan(
        num_examples=100,
        sampling_prob=1.0,
        num_steps=1,
        clipping=jaxdp.flat(1.0),
        target_epsilon=target,
        target_delta=DELTA,
    )
    print(f"calibrated in {time.perf_counter() - start:.2f} s")
    assert plan.noise_multiplier == pytest.approx(sigma, rel=3e-4)
    assert plan.epsilon() <= target


@pytest.mark.parametrize(("q", "sigma", "steps", "pld", "rdp"), TABLE)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_calibration_inverts_epsilon(q, sigma, steps, pld, rdp, accountant):
    """Asking for the published epsilon gives the published sigma, and never exceeds the target."""
    target = pld if accountant == "pld" else rdp
    plan = jaxdp.plan(
        num_examples=60_000,
        sampling_prob=q,
        num_steps=steps,
        clipping=jaxdp.flat(1.0),
        target_epsilon=target,
        target_delta=DELTA,
        accountant=accountant,
    )
    assert plan.noise_multiplier == pytest.approx(sigma, rel=2e-3)
    assert plan.epsilon() <= target


def test_the_published_calibration():
    kwargs = dict(num_examples=60_000, sampling_prob=0.01, num_steps=1000, clipping=jaxdp.flat(1.0))  # noqa: C408
    goal = {"target_epsilon": 2.0, "target_delta": DELTA}
    assert jaxdp.plan(**kwargs, **goal).noise_multiplier == pytest.approx(0.9592, abs=3e-4)
    assert jaxdp.plan(**kwargs, **goal, accountant="rdp").noise_multiplier == pytest.approx(1.0223, abs=3e-4)


@pytest.mark.parametrize(
    ("q", "sigma", "delta"), [(0.3, 1.0, 1e-5), (0.01, 0.7, 1e-6), (1.0, 2.0, 1e-5), (0.9, 5.0, 1e-7)]
)
def test_one_step_against_direct_integration(q, sigma, delta):
    """One subsampled step by the definition of delta(epsilon), integrated over the density, both directions."""
    eps = epsilon(gaussian(10**6, q, 10**6, sigma, 1), delta)

    def hockey_stick(p, r, e):
        grid = sigma * np.linspace(-12, 12, 400_001) + 0.5
        return integrate.trapezoid(np.maximum(p(grid) - np.exp(e) * r(grid), 0), grid)

    base = stats.norm(0, sigma).pdf
    mixed = lambda x: (1 - q) * stats.norm(0, sigma).pdf(x) + q * stats.norm(1, sigma).pdf(x)  # noqa: E731
    exact = max(hockey_stick(mixed, base, eps), hockey_stick(base, mixed, eps))
    assert exact <= delta * (1 + 1e-6)
    assert max(hockey_stick(mixed, base, eps - 2e-2), hockey_stick(base, mixed, eps - 2e-2)) > delta


@pytest.mark.parametrize(("num_examples", "q"), [(60_000, 256 / 60_000), (1000, 0.008), (1437, 0.3563), (50, 0.5)])
@pytest.mark.parametrize("log_prob", [math.log(1e-8), math.log(1e-18), -300.0])
def test_the_smallest_padded_batch_size_is_the_smallest(num_examples, q, log_prob):
    size = accounting.smallest_padded_batch_size(num_examples, q, log_prob)
    assert size == num_examples or size % 8 == 0
    assert stats.binom.logsf(size, num_examples, q) <= log_prob
    assert stats.binom.logsf(size - 8, num_examples, q) > log_prob


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("sigma", "delta", "steps"), [(1.0, 1e-5, 1000), (1.0, 1e-12, 1000), (0.3, 1e-5, 1000), (2.0, 1e-6, 50_000)]
)
def test_default_truncation_costs_nothing_visible(accountant, sigma, delta, steps):
    plan = jaxdp.plan(
        num_examples=10_000,
        sampling_prob=0.01,
        num_steps=steps,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=sigma,
        target_delta=delta,
        accountant=accountant,
    )
    assert plan.padded_batch_size < 400
    untruncated = epsilon(
        dataclasses.replace(plan.release(steps), padded_batch_size=10_000), delta, accountant=accountant
    )
    assert plan.epsilon() == pytest.approx(untruncated, rel=0.01 if delta < 1e-11 else 0.002)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "near"),
    [(256 / 60_000, 6.84, 100_000, 0.7189), (0.01, 1.0, 1000, 1.8282), (4096 / 10**6, 18.6, 10**6, 0.8076)],
)
def test_the_grid_is_fine_enough_for_weak_mechanisms_and_many_steps(q, sigma, steps, near):
    release = gaussian(10**6, q, 10**6, sigma, steps)
    assert epsilon(release) == pytest.approx(near, rel=0.01)
    assert epsilon(release) <= epsilon(release, accountant="rdp")


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.1])
def test_tiny_noise_has_a_huge_epsilon_in_bounded_time_and_memory(sigma):
    value = epsilon(gaussian(1000, 0.1, 1000, sigma, 10))
    assert value >= 0.5 / sigma**2


@pytest.mark.parametrize("target", [(0.01, 1e-5), (50.0, 1e-5), (1.0, 1e-12), (2.0, 0.4)])
def test_extreme_goals_are_met(target):
    goal_epsilon, goal_delta = target
    plan = jaxdp.plan(
        num_examples=1,
        sampling_prob=0.05,
        num_steps=300,
        clipping=jaxdp.flat(1.0),
        target_epsilon=goal_epsilon,
        target_delta=goal_delta,
    )
    assert plan.epsilon() <= goal_epsilon
    assert dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 0.99).epsilon() > goal_epsilon


def test_a_goal_out_of_reach_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"no noise multiplier .* epsilon=1e-09 at delta=1e-09"):
        plan_of(0.5, None, 1000, target_epsilon=1e-9, target_delta=1e-9)


def test_rdp_charges_truncation_to_delta():
    whole = gaussian(1000, 0.064, 1000, 4.84, 1000)
    unlikely, likely = (
        dataclasses.replace(whole, padded_batch_size=160),
        dataclasses.replace(whole, padded_batch_size=96),
    )
    assert epsilon(unlikely, accountant="rdp") == pytest.approx(epsilon(whole, accountant="rdp"), rel=1e-9)
    assert epsilon(likely, accountant="rdp") == math.inf  # overflow of 3e-5 in 1000 steps: above delta
    middle = dataclasses.replace(whole, padded_batch_size=128)
    assert epsilon(whole, accountant="rdp") < epsilon(middle, accountant="rdp") < math.inf


def test_rdp_charges_the_overflow_of_every_step():
    release = gaussian(1000, 0.064, 120, 4.84, 1000)
    one_step = stats.binom.logsf(120, 1001, 0.064)
    assert release.log_overflow_prob() == pytest.approx(one_step + math.log(1000))


def test_rdp_has_no_answer_under_replace_one():
    """S11: without sampling, dp_accounting's RDP would answer for half the sensitivity, 4.73 instead of 10.0."""
    plan = plan_of(1.0, 1, 1, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(ValueError, match="REPLACE_ONE"):
        dataclasses.replace(plan, accountant="rdp").epsilon()
    with pytest.raises(ValueError, match="REPLACE_ONE"):
        jaxdp.Ledger().record(plan).epsilon(
            delta=DELTA, neighboring_relation=plan.neighboring_relation, accountant="rdp"
        )


def test_a_goal_that_any_noise_meets_gets_the_least():
    plan = jaxdp.plan(
        num_examples=8,  # as many as a padded batch has: truncation takes PLD several times as long, and changes nothing here
        sampling_prob=1e-7,
        num_steps=2,
        clipping=jaxdp.flat(1.0),
        target_epsilon=1.0,
        target_delta=1e-4,
    )
    assert plan.noise_multiplier == pytest.approx(0.01, rel=1e-3)
    assert plan.epsilon() <= 1.0


def test_epsilon_of_several_releases_composes():
    one = gaussian(60_000, 0.01, 60_000, 1.0, 500)
    both = accounting.epsilon([one, one], DELTA, neighboring_relation=ADD_REMOVE, accountant="pld")
    assert both == pytest.approx(epsilon(dataclasses.replace(one, num_steps=1000)), abs=1e-3)
    louder = dataclasses.replace(one, noise_multiplier=2.0)
    mixed = accounting.epsilon([one, louder], DELTA, neighboring_relation=ADD_REMOVE, accountant="pld")
    assert epsilon(one) < mixed < both


ONE_BY_ONE = [  # sampled and truncated, sampled alone, neither
    gaussian(1000, 0.05, 90, 2.0, 50),
    gaussian(1000, 0.05, 1000, 2.0, 50),
    gaussian(1000, 1.0, 1000, 8.0, 7),
]


@pytest.mark.parametrize("relation", NeighboringRelation)
@pytest.mark.parametrize(
    "releases", [*([each] for each in ONE_BY_ONE), ONE_BY_ONE], ids=["truncated", "sampled", "full", "all"]
)
def test_one_step_composed_with_itself_is_what_the_accountants_make_of_the_event(releases, relation):
    """To the last bit: `epsilon` takes a shortcut past the work that dp_accounting's accountants do again for every answer."""
    releases = [
        dataclasses.replace(release, num_steps=steps) for release in releases for steps in (1, release.num_steps)
    ]
    if relation != NeighboringRelation.REPLACE_ONE:
        ledger = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
        whole = [dataclasses.replace(release, padded_batch_size=release.num_examples) for release in releases]
        for release in whole:
            ledger.compose(release.dp_event())
        ours = accounting.epsilon(whole, DELTA, neighboring_relation=relation, accountant="rdp")
        assert ours == pytest.approx(ledger.get_epsilon(DELTA), rel=1e-12)
    ledger = dp_accounting.pld.PLDAccountant(relation, 1e-3)
    for release in releases:
        ledger.compose(release.dp_event())
    assert accounting.epsilon(releases, DELTA, neighboring_relation=relation, accountant="pld") == ledger.get_epsilon(
        DELTA
    )


def test_no_noise_is_infinite_and_no_step_is_free():
    assert epsilon(gaussian(100, 0.5, 100, 0.0, 1)) == math.inf
    assert epsilon(gaussian(100, 0.5, 100, 0.0, 0)) == 0.0
    assert epsilon(gaussian(100, 0.5, 100, 1.0, 0)) == 0.0


def test_the_event_is_the_accountants():
    plan = jaxdp.plan(
        num_examples=1000, sampling_prob=0.01, num_steps=7, clipping=jaxdp.flat(1.0), noise_multiplier=1.5
    )
    event = plan.dp_event(5)
    assert isinstance(event, dp_accounting.SelfComposedDpEvent)
    assert event.count == 5
    assert event.event == dp_accounting.TruncatedSubsampledGaussianDpEvent(1001, 0.01, plan.padded_batch_size, 1.5)


@pytest.mark.parametrize(
    ("value", "text"), [(2.99996, "3"), (3.00001, "3.001"), (0.12341, "0.1235"), (math.inf, "inf"), (0.0, "0")]
)
def test_a_printed_epsilon_never_understates(value, text):
    assert accounting.format_epsilon(value) == text
    assert float(accounting.format_epsilon(value)) >= value
