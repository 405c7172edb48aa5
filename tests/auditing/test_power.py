"""What an audit says that it would have seen, held against runs of less noise."""

import math

import jax
import numpy as np
import pytest

import jaxdp
from jaxdp.auditing import audit, dp_sgd_run, is_rejected, plan_curve, power
from jaxdp.auditing.bounds import guess
from jaxdp.auditing.curves import with_noise

pytestmark = pytest.mark.once  # statistics of runs
SHARE = 0.04


def plan_of(*, num_steps, sampling_prob, noise_multiplier):
    return jaxdp.plan(
        num_examples=1000,
        sampling_prob=sampling_prob,
        num_steps=num_steps,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=noise_multiplier,
        target_delta=1e-5,
    )


FULL = plan_of(num_steps=8, sampling_prob=1.0, noise_multiplier=math.sqrt(8))
SAMPLED = plan_of(num_steps=20, sampling_prob=0.25, noise_multiplier=1.5)


def refuted(plan, fraction, tries, rng):
    """How often runs with a fraction of the noise are refuted: sums of all steps, or sampled log-likelihood ratios."""
    curve, m, q, sigma = plan_curve(plan), plan.num_examples, plan.sampling_prob, plan.noise_multiplier
    verdicts = {}
    count = 0
    for _ in range(tries):
        coins = rng.random(m) < 0.5
        sampled = coins & (rng.random((plan.num_steps, m)) < q)
        steps = sampled + fraction * sigma * rng.normal(size=sampled.shape)
        scores = np.log(1 - q + q * np.exp((2 * steps - 1) / (2 * sigma**2))).sum(axis=0)
        found = guess(scores, coins, 300)
        if found not in verdicts:
            verdicts[found] = is_rejected(found, curve, significance=SHARE)
        count += verdicts[found]
    return count / tries


@pytest.mark.parametrize("plan", [FULL, SAMPLED], ids=["full", "sampled"])
def test_the_noise_that_is_said_to_be_refuted_is_refuted_nine_times_in_ten(plan):
    rng = np.random.default_rng(0)
    fraction = power.refuted_noise(plan, power.dp_sgd_runs(plan, rng), significance=SHARE)
    assert 0.4 < fraction < 0.8
    tries = 200
    assert refuted(plan, fraction, tries, rng) >= 0.9 - 3 * math.sqrt(0.09 / tries)
    assert refuted(plan, fraction + 0.12, tries, rng) < 0.9


@pytest.mark.unoptimized
def test_a_real_run_with_this_noise_is_refuted():
    rng = np.random.default_rng(1)
    fraction = power.refuted_noise(FULL, power.dp_sgd_runs(FULL, rng), significance=SHARE)
    really = with_noise(FULL, 0.5 * fraction * FULL.noise_multiplier)  # seen in any run, not in nine of ten
    run = dp_sgd_run(really, canary_norm=10.0, rng=rng, noise_key=jax.random.key(0), ways=("book_keeping",))
    assert not audit(FULL, run, rng=rng).passed


def test_simulated_zeroth_order_runs_are_refuted_with_less_noise_alone():
    plan = plan_of(num_steps=150, sampling_prob=1.0, noise_multiplier=math.sqrt(150))
    fraction = power.refuted_noise(
        plan, power.zeroth_order_runs(plan, 16, np.random.default_rng(0)), significance=SHARE
    )
    assert 0.3 < fraction < 0.8


def test_an_audit_that_sees_nothing_says_so():
    """A claim so large that 300 right guesses are not enough."""
    plan = plan_of(num_steps=1, sampling_prob=1.0, noise_multiplier=0.05)
    assert power.refuted_noise(plan, power.dp_sgd_runs(plan, np.random.default_rng(0)), significance=SHARE) == 0
