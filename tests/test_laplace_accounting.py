"""Laplace noise on one number: epsilon against closed forms, enumerated mechanisms and dp_accounting."""

import dataclasses
import itertools
import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats

import jaxdp
from jaxdp import NeighboringRelation, accounting
from jaxdp.accounting import SampledRelease, laplace

ADD_REMOVE, REPLACE_ONE, REPLACE_SPECIAL = (
    NeighboringRelation.ADD_OR_REMOVE_ONE,
    NeighboringRelation.REPLACE_ONE,
    NeighboringRelation.REPLACE_SPECIAL,
)
DELTA = 1e-5


def release_of(q=1.0, b=10.0, steps=1, num_examples=1000, padded=None):
    return SampledRelease("laplace", num_examples, q, num_examples + 1 if padded is None else padded, b, steps)


def epsilon(release, delta=DELTA, relation=ADD_REMOVE):
    return accounting.epsilon([release], delta, neighboring_relation=relation, accountant="pld")


def plan_of(q=0.05, steps=100, num_examples=1000, **options):
    settings = {"clipping": jaxdp.flat(1.0), "noise": "laplace", "target_delta": 0}
    return jaxdp.plan(num_examples=num_examples, sampling_prob=q, num_steps=steps, **(settings | options))


# Pure epsilon.


@pytest.mark.parametrize(("b", "steps"), [(0.5, 1), (10.0, 1000), (3000.0, 20_000)])
def test_steps_on_all_examples_cost_one_over_b_each(b, steps):
    assert plan_of(1.0, steps, noise_multiplier=b).epsilon() == pytest.approx(steps / b, rel=1e-12)
    replaced = plan_of(1.0, steps, noise_multiplier=b, neighboring_relation=REPLACE_ONE)
    assert replaced.epsilon() == pytest.approx(2 * steps / b, rel=1e-12)  # S1: twice the sensitivity


@pytest.mark.parametrize("q", [1e-4, 0.064, 0.5])
@pytest.mark.parametrize("b", [0.05, 1.0, 700.0])
def test_sampled_steps_cost_their_closed_form(q, b):
    t = math.exp(1 / b)
    for relation in (ADD_REMOVE, REPLACE_SPECIAL):
        found = plan_of(q, 50, noise_multiplier=b, padded_batch_size=1001, neighboring_relation=relation).epsilon()
        assert found == pytest.approx(50 * math.log(1 + q * (t - 1)), rel=1e-9)
    replaced = plan_of(q, 50, noise_multiplier=b, padded_batch_size=1000, neighboring_relation=REPLACE_ONE).epsilon()
    assert replaced == pytest.approx(50 * math.log((1 - q + q * t) / (1 - q + q / t)), rel=1e-9)


def densities(values, q, cap, b, grid):
    """Of y = the sum of a truncated Poisson sample of `values`, plus Laplace noise of scale b: by enumeration."""
    n, found = len(values), np.zeros_like(grid)
    for size in range(n + 1):
        batches = list(itertools.combinations(values, min(size, cap)))
        chance = stats.binom.pmf(size, n, q) / len(batches)
        for batch in batches:
            found += chance * stats.laplace.pdf(grid, loc=sum(batch), scale=b)
    return found


def largest_loss(values, x, other, q, cap, b):
    """The largest privacy loss between `values` with record x and with `other` in its place, or without it for None."""
    grid = np.concatenate([np.linspace(-len(values) - 2, len(values) + 2, 201), [-50.0, 50.0]])
    with_x = densities([*values, x], q, cap, b, grid)
    without = densities(values if other is None else [*values, other], q, cap, b, grid)
    return np.max(np.abs(np.log(with_x / without)))


VALUES = st.lists(st.sampled_from([-1.0, -0.6, 0.0, 0.5, 1.0]), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    values=VALUES,
    x=st.sampled_from([-1.0, 1.0, 0.3]),
    replaced_by=st.sampled_from([None, 0.0, -1.0, 1.0]),
    q=st.sampled_from([0.05, 0.3, 0.7, 0.95]),
    cap=st.integers(1, 6),
    b=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_no_outcome_of_a_truncated_sample_shows_more_than_the_pure_epsilon(values, x, replaced_by, q, cap, b):
    """S10: what `laplace` proves, on every mechanism that is small enough to enumerate."""
    relations = {None: [ADD_REMOVE], 0.0: [REPLACE_SPECIAL, REPLACE_ONE]}.get(replaced_by, [REPLACE_ONE])
    found = largest_loss(values, x, replaced_by, q, cap, b)
    for relation in relations:
        n = len(values) + (relation != ADD_REMOVE)  # the data set: without x, which is added to it, or with it
        release = release_of(q, b, num_examples=n, padded=min(cap, n + 1))
        assert found <= epsilon(release, 0, relation) * (1 + 1e-9) + 1e-12


def test_truncation_can_show_more_than_sampling_alone_and_is_charged_for():
    """Full batches of -1 in which +1 takes a place: the sum moves by 2."""
    values, q, cap, b = [-1.0] * 6, 0.9, 2, 0.5
    found = largest_loss(values, 1.0, None, q, cap, b)
    assert found > 1.2 * epsilon(release_of(q, b), 0)
    assert found <= epsilon(release_of(q, b, num_examples=6, padded=cap), 0)


def test_a_batch_of_all_records_truncates_a_neighbor_with_one_more():
    """The same where a batch has as many rows as there are records; with one row more nothing is truncated."""
    found = largest_loss([-1.0] * 4, 1.0, None, 0.9, 4, 0.5)
    roomy = epsilon(release_of(0.9, 0.5, num_examples=4, padded=5), 0)
    assert roomy < found <= epsilon(release_of(0.9, 0.5, num_examples=4, padded=4), 0)
    assert roomy == pytest.approx(math.log(1 + 0.9 * math.expm1(2)), rel=1e-9)
    plan = plan_of(0.9, 1, num_examples=4, noise_multiplier=0.5)
    assert (plan.padded_batch_size, plan.epsilon()) == (5, roomy)


@pytest.mark.parametrize("q", [0.2, 1.0])
def test_the_pure_epsilon_without_truncation_is_reached(q):
    for x, other, relation in ((1.0, None, ADD_REMOVE), (1.0, -1.0, REPLACE_ONE)):
        assert largest_loss([0.0, 0.0], x, other, q, 9, 2.0) == pytest.approx(
            epsilon(release_of(q, 2.0), 0, relation), rel=1e-9
        )


@pytest.mark.parametrize("delta", [0, 1e-5])
@pytest.mark.parametrize("relation", NeighboringRelation)
def test_default_truncation_costs_nothing_visible(relation, delta):
    plan = plan_of(0.064, 1000, target_epsilon=8.0, target_delta=delta, neighboring_relation=relation)
    assert plan.padded_batch_size <= 136
    untruncated = plan.release(1000).without_truncation()
    assert plan.epsilon() == pytest.approx(epsilon(untruncated, delta, relation), rel=1e-3)
    given = plan_of(0.064, 1000, noise_multiplier=plan.noise_multiplier, target_delta=delta)
    assert given.padded_batch_size <= 136


# The epsilon at a delta.


@pytest.mark.parametrize(("b", "delta"), [(0.5, 1e-5), (1.0, 0.1), (4.0, 1e-3)])
@pytest.mark.parametrize("q", [1.0, 0.3, 0.01])
def test_one_step_has_the_epsilon_of_its_curve(b, delta, q):
    """delta(eps) = 1 - e^((eps - 1/b) / 2) without sampling; with it, (log(1 + q (e^eps - 1)), q delta) (Balle et al. 2018)."""
    inner = 1 / b + 2 * math.log1p(-min(delta / q, 1 - 1e-12))
    exact = max(0.0, math.log1p(q * math.expm1(inner)))
    found = epsilon(release_of(q, b), delta)
    assert exact * (1 - 1e-9) <= found <= exact + 2e-3


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE_SPECIAL])
@pytest.mark.parametrize("q", [1.0, 0.05])
def test_many_steps_are_what_the_accountant_makes_of_the_event(relation, q):
    """To the last bit, where it is less than the pure epsilon."""
    release = release_of(q, 4.0, 60)
    ledger = dp_accounting.pld.PLDAccountant(relation, 1e-3)
    ledger.compose(release.dp_event(relation))
    assert epsilon(release, DELTA, relation) == ledger.get_epsilon(DELTA) < epsilon(release, 0, relation)


@pytest.mark.parametrize(("epsilon_0", "steps"), [(0.01, 1000), (0.5, 40), (2.0, 3)])
def test_two_point_losses_compose_to_the_optimum_of_pure_steps(epsilon_0, steps):
    """Kairouz, Oh, Viswanath: delta(eps) = sum_k Bin(T, p)(k) (1 - e^(eps - (2k - T) eps_0))_+."""
    total = laplace._two_point_loss(epsilon_0, 1e-3 * min(1.0, epsilon_0)).self_compose(steps)
    k = np.arange(steps + 1)
    chance = stats.binom.pmf(k, steps, special.expit(epsilon_0))
    for eps in (0.0, 0.3 * steps * epsilon_0, 0.8 * steps * epsilon_0):
        exact = np.sum(chance * -np.expm1(np.minimum(0.0, eps - (2 * k - steps) * epsilon_0)))
        assert exact * (1 - 1e-7) - 1e-15 <= total.get_delta_for_epsilon(eps) <= exact * 1.01 + 1e-12


@pytest.mark.parametrize(("q", "b"), [(0.3, 1.0), (0.05, 0.4), (0.9, 8.0)])
def test_one_replaced_record_is_covered(q, b):
    """By direct integration over the two densities; and the charge is below the pure epsilon of many steps."""
    eps = epsilon(release_of(q, b), 0.01, REPLACE_ONE)
    grid = np.linspace(-60 * b - 2, 60 * b + 2, 800_001)
    one, other = (
        (1 - q) * stats.laplace.pdf(grid, scale=b) + q * stats.laplace.pdf(grid, loc, b) for loc in (1.0, -1.0)
    )
    assert integrate.trapezoid(np.maximum(one - math.exp(eps) * other, 0), grid) <= 0.01 * (1 + 1e-3)
    many = release_of(q, 50 * b, 1000)
    assert epsilon(many, DELTA) < epsilon(many, DELTA, REPLACE_ONE) < epsilon(many, 0, REPLACE_ONE)


def test_without_sampling_a_replaced_record_is_one_of_half_the_noise():
    found = epsilon(release_of(1.0, 8.0, 20), DELTA, REPLACE_ONE)
    assert found == pytest.approx(epsilon(release_of(1.0, 4.0, 20), DELTA), rel=1e-6)


def test_truncation_is_charged_to_delta():
    """(eps, delta' + (1 + e^eps) eta)-DP; where that leaves nothing, the pure epsilon holds."""
    whole = release_of(0.064, 8.0, 1000)
    assert epsilon(dataclasses.replace(whole, padded_batch_size=160)) == pytest.approx(epsilon(whole), rel=1e-6)
    middle = dataclasses.replace(whole, padded_batch_size=116)
    eta, found = math.exp(middle.log_overflow_prob()), epsilon(middle)
    assert found > 1.001 * epsilon(whole)
    assert epsilon(whole, DELTA - (1 + math.exp(found)) * eta) == pytest.approx(found, rel=1e-6)
    likely = dataclasses.replace(whole, padded_batch_size=96)
    assert epsilon(likely) == epsilon(likely, 0)


def test_a_pure_epsilon_holds_at_every_delta():
    few = release_of(0.5, 0.2, 2)
    assert epsilon(few, 1e-12) <= epsilon(few, 0)
    assert epsilon(few, 1e-30) == epsilon(few, 0)  # where a PLD with its tails cut would say infinity


@pytest.mark.parametrize("b", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("relation", NeighboringRelation)
def test_tiny_noise_has_a_huge_epsilon_in_bounded_time_and_memory(b, relation):
    value = epsilon(release_of(0.1, b, 10), DELTA, relation)
    assert 0.5 / b < value <= epsilon(release_of(0.1, b, 10), 0, relation) <= 20 / b


def test_no_noise_is_infinite_and_no_step_is_free():
    for delta in (0, DELTA):
        assert epsilon(release_of(b=0.0), delta) == math.inf
        assert epsilon(release_of(b=0.0, steps=0), delta) == 0.0
        assert epsilon(release_of(steps=0), delta) == 0.0


# Goals.


@pytest.mark.parametrize("delta", [0, 1e-5])
@pytest.mark.parametrize("relation", NeighboringRelation)
@pytest.mark.parametrize(("q", "target"), [(0.064, 4.0), (1.0, 0.5)])
def test_the_goal_is_met_and_less_noise_misses_it(q, target, relation, delta):
    plan = plan_of(q, 200, target_epsilon=target, target_delta=delta, neighboring_relation=relation)
    assert 0.998 * target < plan.epsilon() <= target
    assert dataclasses.replace(plan, noise_multiplier=0.998 * plan.noise_multiplier).epsilon() > target


@pytest.mark.parametrize(("target", "steps"), [(1e-3, 1000), (300.0, 3), (2000.0, 1)])
def test_extreme_pure_goals_are_met(target, steps):
    plan = plan_of(0.05, steps, target_epsilon=target)
    assert plan.epsilon() <= target
    if plan.noise_multiplier > 0.011:
        assert plan.epsilon() > 0.998 * target


def test_a_goal_out_of_reach_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"no noise multiplier .* epsilon=1e-09 at delta=0"):
        plan_of(1.0, 1000, target_epsilon=1e-9)


# Gaussian and Laplace steps of one run.


def test_the_law_of_the_noise_is_part_of_what_was_released():
    """S20: the same numbers under the other law cost something else, and none is taken for the other by a cache."""
    one = release_of(0.05, 4.0, 50)
    other = dataclasses.replace(one, noise="gaussian")
    assert one != other
    assert epsilon(one) != epsilon(other)
    assert epsilon(one) == epsilon(dataclasses.replace(other, noise="laplace"))


def test_both_laws_compose():
    one = release_of(0.05, 4.0, 50)
    other = dataclasses.replace(one, noise="gaussian", noise_multiplier=2.0)
    both = accounting.epsilon([one, other], DELTA, neighboring_relation=ADD_REMOVE, accountant="pld")
    ledger = dp_accounting.pld.PLDAccountant(ADD_REMOVE, 1e-3)
    for release in (one, other):
        ledger.compose(release.dp_event(ADD_REMOVE))
    assert both == ledger.get_epsilon(DELTA) > max(epsilon(one), epsilon(other))
    with pytest.raises(ValueError, match="delta=0 asks for pure"):
        accounting.epsilon([one, other], 0, neighboring_relation=ADD_REMOVE, accountant="pld")


def test_rdp_has_no_answer():
    with pytest.raises(ValueError, match="use accountant='pld'"):
        accounting.epsilon([release_of()], DELTA, neighboring_relation=ADD_REMOVE, accountant="rdp")


def test_a_truncated_event_is_refused_rather_than_charged_too_little():
    plan = plan_of(0.05, 10, noise_multiplier=10.0)
    with pytest.raises(ValueError, match="padded_batch_size=1001"):
        plan.dp_event()
    event = plan_of(0.05, 10, noise_multiplier=10.0, padded_batch_size=1001).dp_event()
    assert event == dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.LaplaceDpEvent(10.0)), 10
    )
