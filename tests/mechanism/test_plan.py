"""The plan owns every number, and says what it guarantees."""

import dataclasses
import math

import pytest

import jaxdp
from jaxdp import NeighboringRelation, accounting

SETTINGS = {"num_examples": 1000, "expected_batch_size": 50, "num_steps": 100, "clipping": jaxdp.flat(1.0)}


def test_a_plan_is_frozen_and_hashable():
    plan = jaxdp.plan(**SETTINGS, noise_multiplier=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.noise_multiplier = 0.1  # type: ignore[misc]
    assert hash(plan) == hash(jaxdp.plan(**SETTINGS, noise_multiplier=1.0))


def test_sampling_prob_and_expected_batch_size_are_one_number():
    by_size = jaxdp.plan(**SETTINGS, noise_multiplier=1.0)
    by_prob = jaxdp.plan(**{**SETTINGS, "expected_batch_size": None}, sampling_prob=0.05, noise_multiplier=1.0)
    assert by_size == by_prob
    assert by_size.sampling_prob == 0.05
    assert by_size.expected_batch_size == 50


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("relation", ["ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL", "REPLACE_ONE"])
def test_the_goal_is_met_and_not_by_much(accountant, relation):
    if (accountant, relation) == ("rdp", "REPLACE_ONE"):
        pytest.skip("unsound, and refused: test_bad_input")
    plan = jaxdp.plan(
        **SETTINGS,
        target_epsilon=2.0,
        target_delta=1e-5,
        accountant=accountant,
        neighboring_relation=NeighboringRelation[relation],
    )
    assert 1.998 < plan.epsilon() <= 2.0


def test_epsilon_grows_with_steps_and_shrinks_with_delta():
    plan = jaxdp.plan(**SETTINGS, noise_multiplier=1.0, target_delta=1e-5)
    values = [plan.epsilon(num_steps=steps) for steps in (0, 1, 10, 100)]
    assert values == sorted(values)
    assert values[0] == 0
    assert plan.epsilon(delta=1e-7) > plan.epsilon()


def test_more_steps_keep_the_noise_and_cost_more():
    plan = jaxdp.plan(**SETTINGS, target_epsilon=2.0, target_delta=1e-5)
    longer = plan.replace(num_steps=400)
    assert longer.noise_multiplier == plan.noise_multiplier
    assert longer.epsilon() > plan.epsilon()


def test_describe_states_the_guarantee_and_its_limits():
    text = jaxdp.plan(**SETTINGS, target_epsilon=2.0, target_delta=1e-5).describe()
    for part in (
        "(2, 1e-05)",
        "ADD_OR_REMOVE_ONE",
        "1000 examples",
        "Poisson",
        "100 steps",
        "PLD",
        "Not covered",
        "L2 norm 1",
    ):
        assert part in text
    assert "NOT differentially private" in jaxdp.plan(**SETTINGS, noise_multiplier=0.0, target_delta=1e-5).describe()


def test_no_noise_has_no_guarantee():
    assert jaxdp.plan(**SETTINGS, noise_multiplier=0.0, target_delta=1e-5).epsilon() == math.inf


def test_a_large_delta_is_warned_about():
    with pytest.warns(UserWarning, match="releasing one record in the clear"):
        plan = jaxdp.plan(**SETTINGS, noise_multiplier=1.0, target_delta=0.01)
    assert f"examples. {accounting.judge_delta(0.01, 1000)} Mechanism:" in plan.describe()


def test_what_is_weak_is_judged_beside_the_claim_and_nothing_else_is():
    few = {**SETTINGS, "num_examples": 120, "target_delta": 0.005}
    assert (
        "delta=0.005 exceeds 0.001: with a chance of up to 1 in 200"
        in jaxdp.plan(**few, noise_multiplier=1.0).describe()
    )
    loud = jaxdp.plan(**SETTINGS, noise_multiplier=0.4, target_delta=1e-5)
    assert loud.epsilon() > 20
    sentences = accounting.judge(loud.epsilon(), 1e-5, 1000)
    assert len(sentences) == 1
    assert f"examples. {sentences[0]} Mechanism:" in loud.describe()
    for sound in (
        jaxdp.plan(**SETTINGS, noise_multiplier=1.0, target_delta=1e-3),
        jaxdp.plan(**SETTINGS, noise_multiplier=0.4),  # its epsilon needs a delta
        jaxdp.plan(**SETTINGS, noise_multiplier=0.0, target_delta=1e-5),  # which says that it is not private
    ):
        assert "exceeds" not in sound.describe()


@pytest.mark.parametrize("relation", NeighboringRelation)
@pytest.mark.parametrize("clipping", [jaxdp.flat(1.0), jaxdp.per_layer(1.0), jaxdp.automatic(1.0), jaxdp.quantile(1.0)])
@pytest.mark.parametrize("more", [{}, {"sampling_prob": 1.0}, {"padded_batch_size": 64}, {"padded_batch_size": 200}])
def test_a_description_speaks_of_the_unit_that_it_is_told(relation, clipping, more):
    settings = {
        "num_examples": 200,
        "sampling_prob": 0.25,
        "num_steps": 3,
        "target_delta": 4e-3,
        "noise_multiplier": 0.3,
    }
    plan = jaxdp.plan(**(settings | more), clipping=clipping, neighboring_relation=relation)
    text = plan.describe(unit="user")
    for word in ("record", "example"):
        assert word not in text.replace("num_examples", "")
    for words in (
        "one user ",
        "in a training set of 200 users",
        "correlated users",
        "which users were sampled",
        "per-user gradient",
    ):
        assert words in text
    as_before = plan.describe()
    for words in (
        "one record ",
        "in a training set of 200 examples",
        "correlated records",
        "which examples were sampled",
    ):
        assert words in as_before


@pytest.mark.parametrize(("sampling_prob", "largest"), [(0.5, 11), (1.0, 10)])
def test_a_batch_has_no_more_rows_than_a_neighbor_has_records(sampling_prob, largest):
    settings = {"num_examples": 10, "sampling_prob": sampling_prob, "num_steps": 1, "noise_multiplier": 1.0}
    assert jaxdp.plan(**settings, clipping=jaxdp.flat(1.0), padded_batch_size=largest).padded_batch_size == largest
    with pytest.raises(ValueError, match=f"padded_batch_size={largest + 1} exceeds {largest}, .* leave it out"):
        jaxdp.plan(**settings, clipping=jaxdp.flat(1.0), padded_batch_size=largest + 1)


LAPLACE = {**SETTINGS, "noise": "laplace"}


def test_a_pure_goal_is_described_as_what_it_is():
    plan = jaxdp.plan(**LAPLACE, target_epsilon=2.0, target_delta=0)
    text = plan.describe()
    for part in (
        "is 2-differentially private, purely (delta = 0), with respect to",
        f"Laplace noise of scale {plan.noise_multiplier:g} times the clip norm (the noise multiplier)",
        "the one number that is summed",
        "Accountant: basic composition",
        "real-valued Laplace noise",
    ):
        assert part in text
    assert "Gaussian" not in text
    with_delta = jaxdp.plan(**LAPLACE, target_epsilon=2.0, target_delta=1e-5).describe()
    assert "(2, 1e-05)-differentially private" in with_delta
    assert "PLD" in with_delta
    given = jaxdp.plan(**LAPLACE, noise_multiplier=1.0)
    assert "is a Laplace mechanism of noise multiplier 1; epsilon needs a delta" in given.describe()
    assert given.epsilon(delta=0) > given.epsilon(delta=1e-5)
    assert given.epsilon(delta=0, num_steps=0) == 0.0


def test_a_pure_goal_needs_more_noise_than_one_with_a_delta():
    pure = jaxdp.plan(**LAPLACE, target_epsilon=2.0, target_delta=0)
    approximate = jaxdp.plan(**LAPLACE, target_epsilon=2.0, target_delta=1e-5)
    assert pure.noise_multiplier > approximate.noise_multiplier
    assert dataclasses.replace(pure, target_delta=1e-5).epsilon() < 2.0


def test_gaussian_noise_is_the_default():
    given = jaxdp.plan(**SETTINGS, noise_multiplier=1.0, target_delta=1e-5)
    assert given == jaxdp.plan(**SETTINGS, noise_multiplier=1.0, target_delta=1e-5, noise="gaussian")
    assert given != jaxdp.plan(
        **LAPLACE, noise_multiplier=1.0, target_delta=1e-5, padded_batch_size=given.padded_batch_size
    )
