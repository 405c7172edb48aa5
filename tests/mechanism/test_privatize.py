"""Laws of the mechanism: noise scale through the whole release, divisor, keys, quantile clipping, an audit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxdp
from jaxdp.clipping import ClippedSum

pytestmark = pytest.mark.unoptimized


def plan(noise_multiplier=1.3, clipping=None, **kwargs):
    settings = {"num_examples": 1000, "expected_batch_size": 50, "num_steps": 100, "target_delta": 1e-5} | kwargs
    return jaxdp.plan(clipping=clipping or jaxdp.flat(2.0), noise_multiplier=noise_multiplier, **settings)


def release(the_plan, template, key, step=0, value=None):
    groups = the_plan.clipping.groups(template)
    value = jax.tree.map(jnp.zeros_like, template) if value is None else value
    clipped = ClippedSum(value, jnp.zeros(len(groups.names)))
    clip_norms = jnp.asarray(the_plan.clipping.clip_norms(groups))
    return jaxdp.privatize(clipped, groups, the_plan, clip_norms, key=key, step=step)


def test_the_released_mean_has_std_sigma_c_over_expected_batch_size(key):
    mean = release(plan(), jnp.zeros(20_000), key).mean
    s = 1.3 * 2.0 / 50
    assert stats.kstest(mean, stats.norm(0, s).cdf).pvalue > 1e-3
    assert stats.kstest(mean, stats.norm(0, 2 * s / 3).cdf).pvalue < 1e-6
    assert stats.kstest(mean, stats.norm(0, 3 * s / 2).cdf).pvalue < 1e-6


@pytest.mark.parametrize("allocation", ["global", "equal_budget", "least_energy"])
def test_grouped_noise_is_one_mechanism(allocation, key):
    """S5, measured on the draws: sum_k C_k^2 / s_k^2 = 1 / sigma^2."""
    policy = jaxdp.per_layer({"a": 1.0, "b": 2.0, "c": 2.0}, noise_allocation=allocation)
    template = {"a": jnp.zeros(5_000), "b": jnp.zeros((100, 60)), "c": jnp.zeros(50_000)}
    the_plan = plan(clipping=policy)
    result = release(the_plan, template, key)
    measured = {name: float(np.std(leaf)) * the_plan.expected_batch_size for name, leaf in result.mean.items()}
    np.testing.assert_allclose(list(measured.values()), result.stddevs, rtol=0.04)
    total = sum(c**2 / measured[name] ** 2 for name, c in {"a": 1.0, "b": 2.0, "c": 2.0}.items())
    assert total == pytest.approx(1 / 1.3**2, rel=0.04)


def test_the_sum_is_divided_by_the_declared_constant(key):
    value = jnp.array([50.0, -100.0])
    mean = release(plan(noise_multiplier=0.0), jnp.zeros(2), key, value=value).mean
    chex.assert_trees_all_close(mean, jnp.array([1.0, -2.0]))


def test_steps_keys_and_leaves_are_independent_and_reproducible(key):
    template = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000)}
    runs = [release(plan(), template, k, step).mean for k in (key, jax.random.key(7)) for step in (0, 1)]
    draws = np.stack([leaf for mean in runs for leaf in mean.values()])
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 5 / np.sqrt(20_000)
    chex.assert_trees_all_equal(runs[0], release(plan(), template, key, 0).mean)


def test_noise_is_float32_for_low_precision_parameters(key):
    """bfloat16 noise would take at most 256 values between 1 and 2; the release keeps float32."""
    loss = lambda w, x: jnp.sum(w * x)  # noqa: E731
    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(2.0))
    params = jnp.zeros(5_000, jnp.bfloat16)
    clipped, _ = grad_fn.clipped_sum(params, jnp.zeros((1, 5_000), jnp.bfloat16))
    groups = jaxdp.flat(2.0).groups(params)
    mean = jaxdp.privatize(clipped, groups, plan(), jnp.array([2.0]), key=key, step=0).mean
    assert mean.dtype == jnp.float32
    assert len(np.unique(np.asarray(mean))) > 4_900


# algorithms.md section 1.6
@pytest.mark.parametrize(("z", "s_b", "expected"), [(1.0, 2.0, 1.03280)])
def test_the_count_of_quantile_clipping_is_paid_for(z, s_b, expected):
    the_plan = plan(z, clipping=jaxdp.quantile(0.1, count_stddev=s_b))
    assert the_plan.gradient_noise_multiplier == pytest.approx(expected, abs=1e-5)
    joint = the_plan.gradient_noise_multiplier**-2 + (0.5 / s_b) ** 2  # gradient and count: one Gaussian
    assert joint == pytest.approx(z**-2)


def test_quantile_clipping_finds_the_quantile():
    """On norms uniform in [0, 2] the clip norm settles at the target quantile, from either side."""
    for target, start in ((0.5, 0.1), (0.8, 10.0)):
        policy = jaxdp.quantile(start, target_quantile=target)
        the_plan = jaxdp.plan(
            num_examples=20_000, expected_batch_size=1_000, num_steps=300, clipping=policy, noise_multiplier=1.0
        )
        norms = np.random.default_rng(0).uniform(0, 2, (1_000, 1)).astype(np.float32)
        groups = policy.groups(jnp.zeros(1))
        grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=policy)

        @jax.jit
        def one(clip_norms, step, grad_fn=grad_fn, norms=norms, groups=groups, the_plan=the_plan):
            clipped, _ = grad_fn.clipped_sum(jnp.zeros(1), norms, clip_norms=clip_norms)
            return jaxdp.privatize(
                clipped, groups, the_plan, clip_norms, key=jax.random.key(1), step=step
            ).next_clip_norms

        clip_norms = jnp.asarray(policy.clip_norms(groups))
        for step in range(300):
            clip_norms = one(clip_norms, step)
        assert float(clip_norms[0]) == pytest.approx(2 * target, abs=0.15)


def test_the_count_has_sensitivity_one_half_and_padding_counts_zero():
    policy = jaxdp.quantile(1.0)
    grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(w * x), clipping=policy)
    x = jnp.array([[0.5], [3.0], [np.nan], [0.1]])

    def count(is_padding):
        return float(grad_fn.clipped_sum(jnp.zeros(1), x, is_padding_example=is_padding)[0].centered_count[0])

    assert count(np.array([True] * 4)) == 0.0
    assert count(np.array([False, True, True, True])) == 0.5
    assert count(np.array([True, False, True, True])) == -0.5
    assert count(np.array([True, True, False, True])) == 0.0
    assert count(np.zeros(4, bool)) == 0.5


def test_the_count_of_quantile_clipping_is_noised_with_its_std(key):
    """log C moves by -rate * noise / m around its noiseless value: the noise is N(0, s_b^2), independent of the gradient's."""
    policy = jaxdp.quantile(1.0, count_stddev=3.0, learning_rate=0.2)
    the_plan = plan(1.0, clipping=policy)
    groups, template = policy.groups(jnp.zeros(1)), jnp.zeros(1)

    def one(step):
        clipped = ClippedSum(template, jnp.array([7.0]))
        result = jaxdp.privatize(clipped, groups, the_plan, jnp.array([1.0]), key=key, step=step)
        return jnp.log(result.next_clip_norms[0]), result.mean[0]

    moves, means = map(np.asarray, jax.vmap(one)(jnp.arange(20_000)))
    noise = -moves / 0.2 * 50 - 7.0
    assert stats.kstest(noise, stats.norm(0, 3.0).cdf).pvalue > 1e-3
    assert stats.kstest(noise, stats.norm(0, 2.0).cdf).pvalue < 1e-6
    assert abs(np.corrcoef(noise, means)[0, 1]) < 5 / np.sqrt(20_000)


def test_an_adaptive_clip_norm_stays_where_float32_norms_are_exact(key):
    policy = jaxdp.quantile(1e-9, count_stddev=3.0)
    groups = policy.groups(jnp.zeros(1))
    for count, start in ((1e9, 1e-9), (-1e9, 1e15)):
        clipped = ClippedSum(jnp.zeros(1), jnp.array([count]))
        result = jaxdp.privatize(clipped, groups, plan(1.0, clipping=policy), jnp.array([start]), key=key, step=0)
        assert float(result.next_clip_norms[0]) == pytest.approx(start)


def test_an_audit_of_one_release_stays_below_epsilon_and_catches_too_little_noise(key):
    """A threshold attack on one canary. From its error rates (99.9 % Clopper-Pearson) follows a lower bound on the mu of
    Gaussian DP, so on epsilon (arXiv 1905.02383): below the plan's epsilon, and above it with 2/3 of the noise."""
    one_shot = {"num_examples": 1, "expected_batch_size": None, "sampling_prob": 1.0, "num_steps": 1}
    the_plan = plan(1.0, clipping=jaxdp.flat(2.0), **one_shot)
    trials = 40_000

    def scores(present):
        def one(step):
            return release(the_plan, jnp.zeros(1), key, step, jnp.array([2.0 * present])).mean[0]

        return np.asarray(jax.vmap(one)(jnp.arange(trials) + trials * present))

    def audited_epsilon(out, inside):
        false_alarms, hits = np.sum(out > 1.0), np.sum(inside > 1.0)
        most_false = stats.beta.ppf(0.9995, false_alarms + 1, trials - false_alarms)
        fewest_hits = stats.beta.ppf(0.0005, hits, trials - hits + 1)
        mu = stats.norm.ppf(fewest_hits) - stats.norm.ppf(most_false)
        return plan(1 / mu, clipping=jaxdp.flat(2.0), **one_shot).epsilon()

    out, inside = scores(0), scores(1)
    assert 4.0 < audited_epsilon(out, inside) <= the_plan.epsilon()
    assert audited_epsilon(out * 2 / 3, (inside - 2.0) * 2 / 3 + 2.0) > the_plan.epsilon()


# Laplace noise, of one number a step (DP-ZO, arXiv 2401.04343).


def test_a_laplace_plan_releases_laplace_noise_of_scale_b_c_once_a_step(key):
    """S7: the mean absolute deviation of the release is b C / (q N), its law Laplace and no other."""
    the_plan = plan(1.3, noise="laplace")
    value = jnp.array([4.0])
    draws = jax.vmap(lambda step: release(the_plan, jnp.zeros(1), key, step, value).mean[0])(jnp.arange(20_000))
    noise, b = np.asarray(draws) - 4.0 / 50, 1.3 * 2.0 / 50
    assert np.mean(np.abs(noise)) == pytest.approx(b, rel=5 / np.sqrt(20_000))
    assert stats.kstest(noise, stats.laplace(0, b).cdf).pvalue > 1e-3
    for other in (
        stats.laplace(0, b / 2),
        stats.laplace(0, 2 * b / 3),
        stats.norm(0, np.sqrt(2) * b),
        stats.norm(0, b),
    ):
        assert stats.kstest(noise, other.cdf).pvalue < 1e-6
    np.testing.assert_allclose(release(the_plan, jnp.zeros(1), key).stddevs, [np.sqrt(2) * 1.3 * 2.0], rtol=1e-6)


def test_a_laplace_plan_without_noise_releases_the_sum(key):
    silent = plan(0.0, noise="laplace", clipping=jaxdp.flat(np.inf))
    found = release(silent, jnp.zeros(1), key, value=jnp.array([50.0]))
    assert found.mean.tolist() == [1.0]
    assert found.stddevs.tolist() == [0.0]


@pytest.mark.parametrize(
    "template", [jnp.zeros(2), {"a": jnp.zeros(()), "b": jnp.zeros(())}, jnp.zeros((1, 3))], ids=str
)
def test_laplace_noise_is_refused_for_more_than_one_number(template, key):
    """Their L1 sensitivity is larger than the clip norm, which the plan charges for."""
    with pytest.raises(ValueError, match=r"for one number a step, and this sum has [23] .*noise='gaussian'"):
        release(plan(1.3, noise="laplace"), template, key)


@pytest.mark.parametrize("clipping", [jaxdp.per_layer(1.0), jaxdp.quantile(1.0)], ids=["per_layer", "quantile"])
def test_laplace_noise_is_refused_where_a_plan_was_changed_behind_its_back(clipping, key):
    changed = dataclasses.replace(plan(1.3, noise="laplace"), clipping=clipping)
    with pytest.raises(ValueError, match="flat or automatic clipping"):
        release(changed, jnp.zeros(1), key)


def test_an_audit_of_one_laplace_release_stays_below_epsilon_and_catches_too_little_noise(key):
    """The likeliest outcomes to show a canary are those beyond it: log(P[y > C] / P[y > C without it]) is 1/b at most."""
    one_shot = {"num_examples": 1, "expected_batch_size": None, "sampling_prob": 1.0, "num_steps": 1, "target_delta": 0}
    the_plan, trials = plan(1.0, noise="laplace", **one_shot), 40_000

    def scores(present):
        def one(step):
            return release(the_plan, jnp.zeros(1), key, step, jnp.array([2.0 * present])).mean[0]

        return np.asarray(jax.vmap(one)(jnp.arange(trials) + trials * present))

    def audited_epsilon(out, inside):
        """By Clopper-Pearson, 99.9 %."""
        false_alarms, hits = np.sum(out > 2.0), np.sum(inside > 2.0)
        most_false = stats.beta.ppf(0.9995, false_alarms + 1, trials - false_alarms)
        return np.log(stats.beta.ppf(0.0005, hits, trials - hits + 1) / most_false)

    out, inside = scores(0), scores(1)
    assert the_plan.epsilon() == 1.0
    assert 0.9 < audited_epsilon(out, inside) <= 1.0
    assert audited_epsilon(out / 2, (inside - 2.0) / 2 + 2.0) > 1.0
