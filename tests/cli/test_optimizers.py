"""Optimizers by name: all that update from gradients alone, and a schedule without a wasted step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.cli import optimizers

pytestmark = pytest.mark.unoptimized
PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}


def updated(tx, gradients=None, num_steps=1):
    gradients = jax.tree.map(jnp.ones_like, PARAMS) if gradients is None else gradients
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(num_steps):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def names() -> list[str]:
    return optimizers._listing().split(", ")


def test_the_usual_names_are_there_and_those_that_need_the_loss_are_not():
    assert {"adam", "adamw", "sgd", "lion", "lamb", "lars", "adafactor", "rmsprop", "sm3", "yogi"} <= set(names())
    assert {"lbfgs", "polyak_sgd", "dpsgd", "MultiSteps"}.isdisjoint(names())


@pytest.mark.parametrize("name", names())
def test_every_listed_optimizer_is_optaxs_own_and_moves_every_leaf(name, standard_promotion):
    tx = optimizers.make_optimizer(name, 0.1)
    theirs = getattr(optax, name)(0.1)
    after = updated(tx, num_steps=2)  # rprop only looks in its first
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(after), strict=True))
    if "mask" not in inspect.signature(getattr(optax, name)).parameters:
        jax.tree.map(np.testing.assert_array_equal, after, updated(theirs, num_steps=2))


def test_weight_decay_is_for_matrices_alone(standard_promotion):
    tx = optimizers.make_optimizer("adamw", 0.1, weight_decay=0.5)
    after = updated(tx, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(after["dense"]["kernel"], 0.95)
    np.testing.assert_array_equal(after["dense"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)


def test_options_reach_the_optimizer(standard_promotion):
    tx = optimizers.make_optimizer("sgd", 0.1, options=["momentum=0.9", "nesterov=true"])
    jax.tree.map(np.testing.assert_array_equal, updated(tx), updated(optax.sgd(0.1, momentum=0.9, nesterov=True)))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_a_schedule_rises_to_its_peak_and_no_step_is_spent_at_zero(schedule, warmup):
    rate = optimizers.learning_rate_schedule(0.5, schedule=schedule, warmup_steps=warmup, num_steps=10)
    rates = np.array([float(rate(step)) for step in range(10)])
    assert np.all(rates > 0)
    assert rates.max() == 0.5
    np.testing.assert_allclose(rates[:warmup], 0.5 * (np.arange(warmup) + 1) / max(warmup, 1), rtol=1e-5)
    passed = (np.arange(warmup, 10) - warmup) / (10 - warmup)
    expected = {"constant": np.ones_like(passed), "linear": 1 - passed, "cosine": (1 + np.cos(np.pi * passed)) / 2}
    np.testing.assert_allclose(rates[warmup:], 0.5 * expected[schedule], rtol=1e-5)


def test_an_optimizer_that_takes_no_schedule_says_so():
    rate = optimizers.learning_rate_schedule(0.5, schedule="linear", num_steps=10)
    optimizers.make_optimizer("rprop", 0.5)
    with pytest.raises(ValueError, match="takes a constant learning rate only"):
        optimizers.make_optimizer("rprop", rate)


def test_a_refused_value_is_named():
    with pytest.raises(ValueError, match=r"optax\.sgd refuses momentum=0\.9, accumulator_dtype=7"):
        optimizers.make_optimizer("sgd", 0.1, options=["momentum=0.9", "accumulator_dtype=7"])
