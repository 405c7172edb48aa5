"""Epsilon against known numbers, and calibration against epsilon."""

import dataclasses
import itertools
import math
import time

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, optimize, stats

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
    """A plan without truncation that could be told from none, as the published tables assume."""
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
    event = release.dp_event(ADD_REMOVE)
    assert isinstance(event, dp_accounting.SelfComposedDpEvent)
    assert event.event.dataset_size == 21  # type: ignore[attr-defined]
    assert epsilon(release) == pytest.approx(20.67, abs=0.02)


def law_of_a_step(contributions, q, cap, sigma, grid):
    """Density of the sum of a truncated Poisson sample plus Gaussian noise: every draw, and every subset that is kept of it."""
    density = np.zeros_like(grid)
    for size in range(len(contributions) + 1):
        kept = [
            batch
            for draw in itertools.combinations(contributions, size)
            for batch in itertools.combinations(draw, min(size, cap))
        ]
        for batch in kept:
            density += (
                stats.binom.pmf(size, len(contributions), q) / len(kept) * stats.norm.pdf(grid, sum(batch), sigma)
            )
    return density


def exact_epsilon(others, q, cap, sigma, delta):
    """The epsilon at `delta` of one step on `others` and the same with a record of 1 more, by its definition, both ways round."""
    grid = np.linspace(-len(others) - 10 * sigma, len(others) + 10 * sigma, 8_001)
    without, with_one = (law_of_a_step(c, q, cap, sigma, grid) for c in (others, (*others, 1.0)))

    def excess(eps, p, r):
        return integrate.trapezoid(np.maximum(p - np.exp(eps) * r, 0.0), grid) - delta

    pairs = ((with_one, without), (without, with_one))
    return max(optimize.brentq(excess, 0.0, 100.0, pair) if excess(0.0, *pair) > 0 else 0.0 for pair in pairs)


FEW = {"num_examples": 4, "sampling_prob": 0.9, "num_steps": 1, "clipping": jaxdp.flat(1.0)}


@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_a_neighbor_with_one_more_record_may_overflow_a_batch_of_all_records(delta):
    """Five draws in a batch of four: the added record takes the place of one of -1. Without that the claim was 4.249 at 1e-5."""
    plan = jaxdp.plan(**FEW, noise_multiplier=1.0, target_delta=delta, padded_batch_size=4)
    plain = exact_epsilon((0.0,) * 4, 0.9, 5, 1.0, delta)
    others = ((0.0,) * 4, (-1.0,) * 4, (1.0,) * 4, (-1.0, 1.0, 1.0, 1.0), (-1.0, -1.0, 0.5, 0.0))
    shown = max(exact_epsilon(c, 0.9, 4, 1.0, delta) for c in others)
    if delta == 1e-5:
        assert (shown, plain) == (pytest.approx(4.8385, abs=1e-3), pytest.approx(4.2486, abs=1e-3))
    assert plain < shown <= plan.epsilon()
    assert max(exact_epsilon(c[1:], 0.9, 4, 1.0, delta) for c in others) <= plan.epsilon()  # a record less
    # With room for one more, no draw is truncated and none is charged for: what a plan has by default.
    for padded in (5, None):
        roomy = jaxdp.plan(**FEW, noise_multiplier=1.0, target_delta=delta, padded_batch_size=padded)
        assert roomy.padded_batch_size == 5
        assert max(exact_epsilon(c, 0.9, 5, 1.0, delta) for c in others) <= roomy.epsilon() + 1e-4  # the integral's
        assert roomy.epsilon() == pytest.approx(plain, abs=2e-3)


def test_a_record_less_may_show_more_than_a_record_more():
    """At a delta near the probability of being kept, which is 0.9 for one of four records and 0.78 for one of five."""
    plan = jaxdp.plan(**FEW, noise_multiplier=0.2, target_delta=1e-5, padded_batch_size=4)
    shown = exact_epsilon((0.0,) * 3, 0.9, 4, 0.2, 0.85)
    assert shown == pytest.approx(3.258, abs=1e-3)
    assert plan.epsilon(delta=0.85) == pytest.approx(shown, abs=2e-3)
    event = plan.dp_event()
    assert event.event.dataset_size == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("relation", [NeighboringRelation.REPLACE_ONE, NeighboringRelation.REPLACE_SPECIAL])
def test_where_no_record_is_added_all_records_fit(relation):
    plans = [
        jaxdp.plan(
            **FEW, noise_multiplier=1.0, target_delta=1e-5, padded_batch_size=padded, neighboring_relation=relation
        )
        for padded in (4, 5)
    ]
    assert plans[0].epsilon() == plans[1].epsilon()
    assert "truncated" not in plans[0].describe()


def test_a_full_batch_is_of_all_records_whatever_their_number():
    full = jaxdp.plan(**(FEW | {"sampling_prob": 1.0}), noise_multiplier=1.0, target_delta=1e-5)
    assert full.padded_batch_size == 4
    assert full.epsilon() == pytest.approx(exact_epsilon((0.0,) * 4, 1.0, 5, 1.0, 1e-5), abs=2e-3)
    assert (
        "each on all 4 examples, and of a training set with one more or less on all examples of it" in full.describe()
    )


def test_a_goal_is_met_with_few_records_by_both_accountants():
    goal = {"target_epsilon": 2.0, "target_delta": 1e-5}
    tight, loose = (jaxdp.plan(**FEW, **goal, accountant=name) for name in ("pld", "rdp"))
    assert tight.padded_batch_size == loose.padded_batch_size == 5
    assert 1.0 < tight.noise_multiplier < loose.noise_multiplier < 1.3 * tight.noise_multiplier
    charged = jaxdp.plan(**FEW, **goal, padded_batch_size=4)
    assert charged.noise_multiplier > 1.3 * tight.noise_multiplier
    assert charged.epsilon() <= 2.0
    assert "which a training set with one more has truncated at random to 4: that is charged for" in charged.describe()
    with pytest.raises(ValueError, match="a larger padded_batch_size if truncation is what costs"):
        jaxdp.plan(**FEW, **goal, padded_batch_size=4, accountant="rdp")


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
    untruncated = epsilon(plan.release(steps).without_truncation(), delta, accountant=accountant)
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
        num_examples=7,  # one less than a padded batch has: truncation takes PLD several times as long, and changes nothing here
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
        whole = [release.without_truncation() for release in releases]
        for release in whole:
            ledger.compose(release.dp_event(relation))
        ours = accounting.epsilon(whole, DELTA, neighboring_relation=relation, accountant="rdp")
        assert ours == pytest.approx(ledger.get_epsilon(DELTA), rel=1e-12)
    ledger = dp_accounting.pld.PLDAccountant(relation, 1e-3)
    for release in releases:
        ledger.compose(release.dp_event(relation))
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


@pytest.mark.parametrize(
    ("eps", "delta", "num_examples", "words"),
    [
        (20.0, 1e-3, 1000, []),
        (math.inf, 1e-5, 1000, []),  # no guarantee: said by whoever states it
        (300.0, 0.0, 1000, ["epsilon=300 exceeds 20", "may be e^300 times", "Use more noise, fewer steps or"]),
        (20.01, 1e-5, 1000, ["epsilon=20.01 exceeds 20"]),
        (1.0, 0.0052, 120, ["delta=0.0052 exceeds 0.001", "up to 1 in 192", "Use a delta such as 1e-05"]),
        (1.0, 2e-6, 10**6, ["delta=2e-06 exceeds 1/num_examples=1e-06", "one user in the clear", "such as 3e-07"]),
        (55.0, 0.05, 100, ["epsilon=55 exceeds 20", "delta=0.05 exceeds 1/num_examples=0.01"]),
    ],
)
def test_what_a_weak_guarantee_means_is_said_in_words(eps, delta, num_examples, words):
    found = accounting.judge(eps, delta, num_examples, unit="user")
    assert len(found) == sum("exceeds" in part for part in words)
    assert all(part in " ".join(found) for part in words)
    assert all("user" in sentence and "Use " in sentence for sentence in found)
