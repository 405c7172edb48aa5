"""The ledger charges what was released, whatever happens to the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp

ADD_REMOVE = jaxdp.NeighboringRelation.ADD_OR_REMOVE_ONE

SETTINGS = {"num_examples": 1000, "expected_batch_size": 50, "clipping": jaxdp.flat(1.0), "target_delta": 1e-5}


def test_early_stop_is_charged_for_what_ran():
    plan = jaxdp.plan(**SETTINGS, num_steps=100, noise_multiplier=1.0)
    ledger = jaxdp.Ledger()
    for _ in range(40):
        ledger = ledger.record(plan)
    assert ledger.num_steps == 40
    assert ledger.epsilon(delta=1e-5, neighboring_relation=ADD_REMOVE) == plan.epsilon(num_steps=40) < plan.epsilon()


def test_a_changed_plan_is_charged_for_both_parts():
    loud = jaxdp.plan(**SETTINGS, num_steps=100, noise_multiplier=2.0)
    quiet = jaxdp.plan(**SETTINGS, num_steps=100, noise_multiplier=0.8)
    ledger = jaxdp.Ledger().record(quiet, 30).record(loud, 20).record(quiet, 5)
    assert [int(entry.num_steps) for entry in ledger.entries] == [30, 20, 5]
    assert ledger.num_steps_of(quiet) == 35
    spent = ledger.epsilon(delta=1e-5, neighboring_relation=ADD_REMOVE)
    assert quiet.epsilon(num_steps=35) < spent < quiet.epsilon(num_steps=55)


def test_the_step_past_the_plan_is_refused_with_the_way_out():
    plan = jaxdp.plan(**SETTINGS, num_steps=3, noise_multiplier=1.0)
    ledger = jaxdp.Ledger().record(plan, 3)
    with pytest.raises(jaxdp.BudgetExhaustedError, match=r"plan.replace\(num_steps"):
        ledger.check_budget(plan)
    ledger.check_budget(plan.replace(num_steps=4))
    # A plan that differs in its goal alone is the same mechanism and spends the same steps.
    with pytest.raises(jaxdp.BudgetExhaustedError):
        ledger.check_budget(dataclasses.replace(plan, target_epsilon=9.0))


def test_the_ledger_survives_json_and_a_trip_through_float32():
    plan = jaxdp.plan(**SETTINGS, num_steps=10, noise_multiplier=1.2345678)
    ledger = jaxdp.Ledger().record(plan, 4)
    assert jaxdp.Ledger.from_json(ledger.to_json()) == ledger
    through_jax = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if "float" in str(x.dtype) else jnp.int32), ledger)
    assert through_jax.num_steps_of(plan) == 4
    assert through_jax.record(plan).num_steps == 5
    assert len(through_jax.record(plan).entries) == 1


def test_a_change_of_law_is_a_change_of_mechanism():
    """The same numbers with Laplace noise are another release: not merged, counted apart, and charged as what it is."""
    settings = {**SETTINGS, "num_steps": 30, "noise_multiplier": 2.0, "padded_batch_size": 1000}
    gaussian, laplace = jaxdp.plan(**settings), jaxdp.plan(**settings, noise="laplace")
    ledger = jaxdp.Ledger().record(gaussian, 30).record(laplace, 20).record(laplace, 10)
    assert [(entry.noise, int(entry.num_steps)) for entry in ledger.entries] == [("gaussian", 30), ("laplace", 30)]
    assert ledger.num_steps_of(laplace) == 30
    with pytest.raises(jaxdp.BudgetExhaustedError):
        ledger.check_budget(laplace)
    both = ledger.epsilon(delta=1e-5, neighboring_relation=ADD_REMOVE)
    assert max(gaussian.epsilon(), laplace.epsilon()) < both < gaussian.epsilon() + laplace.epsilon()
    assert jaxdp.Ledger.from_json(ledger.to_json()) == ledger
    assert jax.tree.map(lambda x: x, ledger) == ledger
    assert all(isinstance(leaf, np.generic) for leaf in jax.tree.leaves(ledger))


def test_a_pure_epsilon_of_a_ledger_needs_laplace_noise_in_every_step():
    settings = {**SETTINGS, "num_steps": 30, "noise_multiplier": 2.0}
    gaussian, laplace = jaxdp.plan(**settings), jaxdp.plan(**settings | {"target_delta": 0}, noise="laplace")
    ledger = jaxdp.Ledger().record(laplace, 10)
    assert laplace.epsilon_so_far(ledger) == pytest.approx(laplace.epsilon(num_steps=10))
    with pytest.raises(ValueError, match="pure differential privacy"):
        ledger.record(gaussian).epsilon(delta=0, neighboring_relation=ADD_REMOVE)
