"""Laws of the noise: its scale, its independence, its division between groups, its dtype, its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxdp
from jaxdp.noise import (
    _laplace_of_bits,
    _wide_normal_of_bits,
    add_laplace_noise,
    add_noise,
    allocate_stddevs,
    standard_laplace,
    standard_normal,
)
from pallas_kernels import counter_normal

SIZE = 20_000


def test_noise_has_the_stated_std_and_no_other(key):
    """KS: accepts s, rejects 2s/3 and 3s/2."""
    s = 0.37
    draw = np.asarray(add_noise({"w": jnp.zeros(SIZE)}, jnp.array([s]), (0,), key=key)["w"])
    assert stats.kstest(draw, stats.norm(0, s).cdf).pvalue > 1e-3
    assert stats.kstest(draw, stats.norm(0, 2 * s / 3).cdf).pvalue < 1e-6
    assert stats.kstest(draw, stats.norm(0, 3 * s / 2).cdf).pvalue < 1e-6


def test_leaves_and_keys_draw_independently(key):
    zeros = {"a": jnp.zeros(SIZE), "b": jnp.zeros(SIZE)}
    one = add_noise(zeros, jnp.array([1.0]), (0, 0), key=key)
    two = add_noise(zeros, jnp.array([1.0]), (0, 0), key=jax.random.fold_in(key, 1))
    draws = [one["a"], one["b"], two["a"], two["b"]]
    correlation = np.abs(np.corrcoef(np.stack(draws)) - np.eye(4))
    assert correlation.max() < 5 / np.sqrt(SIZE)


def test_each_group_gets_its_own_std(key):
    sums = [jnp.zeros(SIZE), jnp.zeros((SIZE, 1)), jnp.zeros(SIZE)]
    noised = add_noise(sums, jnp.array([1.0, 3.0]), (0, 1, 0), key=key)
    np.testing.assert_allclose([np.std(x) for x in noised], [1.0, 3.0, 1.0], rtol=0.03)


def test_noise_is_not_drawn_below_float32(key):
    with pytest.raises(TypeError, match="float32 or wider"):
        add_noise(jnp.zeros(3, jnp.bfloat16), jnp.array([1.0]), (0,), key=key)
    assert add_noise(jnp.zeros(3), jnp.array([1.0]), (0,), key=key).dtype == jnp.float32


# algorithms.md section 5: sigma = 1, C = (1, 2, 2), d = (100, 400, 10000).
ALLOCATIONS = {
    "global": ((3.0, 3.0, 3.0), 94500),
    "equal_budget": ((1.7321, 3.4641, 3.4641), 125100),
    "least_energy": ((5.0, 5.0, 2.2361), 62500),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("noise_multiplier", [1.0, 0.6, 7.0])
def test_every_allocation_is_one_mechanism_of_the_noise_multiplier(name, noise_multiplier):
    """S5: sum C^2 / s^2 = 1 / sigma^2, and the stated vectors and energies."""
    clip_norms, sizes = jnp.array([1.0, 2.0, 2.0]), (100, 400, 10_000)
    s = np.float64(allocate_stddevs(clip_norms, sizes, noise_multiplier=noise_multiplier, allocation=name))
    assert np.sum(np.float64(clip_norms) ** 2 / s**2) == pytest.approx(noise_multiplier**-2, rel=1e-5)
    expected, energy = ALLOCATIONS[name]
    np.testing.assert_allclose(s, noise_multiplier * np.array(expected), rtol=1e-4)
    assert np.sum(np.array(sizes) * s**2) == pytest.approx(noise_multiplier**2 * energy, rel=1e-3)


def test_no_noise_even_for_an_infinite_clip_norm():
    s = allocate_stddevs(jnp.array([np.inf]), (3,), noise_multiplier=0.0, allocation="global")
    assert s.tolist() == [0.0]


def test_secret_keys_are_fresh_and_typed():
    words = {tuple(jax.random.key_data(jaxdp.secret_key()).tolist()) for _ in range(100)}
    assert len(words) == 100
    bits = np.unpackbits(np.array([w for pair in words for w in pair], np.uint32).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)  # all 64 bits are random
    assert jnp.issubdtype(jaxdp.secret_key().dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 300)])
def test_the_tails_of_the_noise_reach_nine_standard_deviations(shape, sign, monkeypatch, key):
    """A generator that ends at 5.2 would make every release beyond it a proof of membership: all bits must be used."""
    words = jnp.uint32(sign), jnp.uint32(0)
    monkeypatch.setattr(counter_normal, "bits", lambda _, shape: tuple(jnp.full(shape, word) for word in words))
    draw = np.asarray(standard_normal(key, shape, jnp.float32))
    assert draw.shape == shape
    assert np.all(np.isfinite(draw))
    assert np.all(draw > 9 if sign else draw < -9)


def test_noise_in_float64_inverts_the_same_bits(key):
    with jax.enable_x64(True):
        wide = standard_normal(key, (50, 200), jnp.float64)
        assert wide.dtype == jnp.float64
    np.testing.assert_allclose(standard_normal(key, (50, 200), jnp.float32), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-10, 1e-15])
def test_the_tails_of_the_float64_noise_are_the_normal_ones(tail):
    """The law at given random bits, against scipy, deep into the tail; float32 is tested with the generator."""
    high, low = divmod(int(tail * 2**64), 2**32)
    with jax.enable_x64(True):
        words = jnp.array([[high << 1, (high << 1) | 1], [low, low]], jnp.uint32)
        below, above = np.asarray(_wide_normal_of_bits(*words, jnp.float64))
    assert below == pytest.approx(stats.norm.ppf((2.0**32 * high + low + 0.5) * 2.0**-64), rel=1e-9)
    assert above == -below


def test_keys_of_other_generators_draw_too(key):
    other = jax.random.key(1, impl="rbg")
    draw = standard_normal(other, (SIZE,), jnp.float32)
    assert stats.kstest(np.asarray(draw), stats.norm.cdf).pvalue > 1e-3


def test_the_noise_is_normal_in_its_body_and_its_tails(key):
    draw = np.asarray(standard_normal(key, (4_000_000,), jnp.float32))
    assert stats.kstest(draw, stats.norm.cdf).pvalue > 1e-3
    for threshold in (3.0, 4.0, 4.7):
        expected = 2 * len(draw) * stats.norm.sf(threshold)
        assert abs(np.sum(np.abs(draw) > threshold) - expected) < 5 * np.sqrt(expected)
    assert abs(np.mean(draw > 0) - 0.5) < 5 * 0.5 / np.sqrt(len(draw))


def test_stacked_layers_are_noised_by_the_std_of_each(key):
    stddevs = jnp.array([1.0, 10.0, 100.0])
    noised = add_noise({"w": jnp.zeros((3, 40, 50))}, stddevs, ((2, 0, 1),), key=key)["w"]
    np.testing.assert_allclose(jnp.std(noised, axis=(1, 2)), [100.0, 1.0, 10.0], rtol=0.1)


# Laplace noise, of one number a step.


def test_laplace_noise_has_its_law_in_its_body_and_its_tails(key):
    """KS: accepts the law of scale 1, rejects 2/3 and 3/2 of it and the normal of its std."""
    draw = np.asarray(standard_laplace(key, (4_000_000,), jnp.float32))
    assert stats.kstest(draw, stats.laplace.cdf).pvalue > 1e-3
    for other in (stats.laplace(0, 2 / 3), stats.laplace(0, 3 / 2), stats.norm(0, np.sqrt(2))):
        assert stats.kstest(draw[:SIZE], other.cdf).pvalue < 1e-6
    for threshold in (5.0, 8.0, 11.0):
        expected = len(draw) * 2 * stats.laplace.sf(threshold)
        assert abs(np.sum(np.abs(draw) > threshold) - expected) < 5 * np.sqrt(expected)
    assert abs(np.mean(draw > 0) - 0.5) < 5 * 0.5 / np.sqrt(len(draw))
    # The sign tells nothing of the magnitude.
    assert stats.ks_2samp(draw[draw > 0], -draw[draw < 0]).pvalue > 1e-3


def words_of(tail):
    """The random words whose U is nearest to `tail`; U and 1 - U in float64."""
    integer = int(tail * 2**63)
    return *divmod(integer, 2**32), (integer + 0.5) * 2.0**-63, (2**63 - integer - 0.5) * 2.0**-63


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tail", [0.0, 1e-18, 1e-12, 1e-6, 1e-3, 0.3, 0.4999, 0.5, 0.51, 0.9, 1 - 1e-4, 1 - 1e-9])
def test_laplace_magnitudes_are_minus_the_log_of_their_tail(tail, dtype):
    """To a few units in the last place, from 1e-9 scales to the end at 44.4, for either sign."""
    high, low, exact, body = words_of(tail)
    with jax.enable_x64(dtype == "float64"):
        words = jnp.array([[high << 1, (high << 1) | 1], [low, low]], jnp.uint32)
        below, above = np.asarray(_laplace_of_bits(*words, jnp.dtype(dtype)))
    expected = -np.log1p(-body) if tail > 0.5 else -np.log(exact)
    assert above == pytest.approx(expected, rel=5e-7 if dtype == "float32" else 1e-9)
    assert below == -above


def test_the_ends_of_the_laplace_noise():
    """All bits are used: the largest magnitude is 64 log 2, and the smallest is not zero."""
    ends = [(0, 0), (2**32 - 1, 2**32 - 1)]
    largest, smallest = np.asarray(_laplace_of_bits(*jnp.array(ends, jnp.uint32).T, jnp.float32))
    assert -largest == pytest.approx(64 * np.log(2), rel=1e-6)
    assert 0 < smallest < 1e-18


# By the published cipher in integers, key (0, 7), counters 0 to 3, and logarithms of 50 digits.
LAPLACE_OF_KEY_7 = [0.16947608038088743, 3.0919660071940513, 1.4917232099317626, -2.742865192243506]


def test_laplace_noise_repeats_its_known_answers():
    draw = standard_laplace(jax.random.key(7, impl="threefry2x32"), (4,), jnp.float32)
    np.testing.assert_allclose(draw, LAPLACE_OF_KEY_7, rtol=1e-6)
    with jax.enable_x64(True):
        wide = standard_laplace(jax.random.key(7, impl="threefry2x32"), (4,), jnp.float64)
    np.testing.assert_allclose(wide, LAPLACE_OF_KEY_7, rtol=1e-9)


def test_laplace_noise_is_added_to_one_number_with_its_scale(key):
    """The mean absolute value of a Laplace law is its scale."""

    def one(step):
        return add_laplace_noise({"y": jnp.full(1, 7.0)}, jnp.float32(0.3), key=jax.random.fold_in(key, step))["y"][0]

    draw = np.asarray(jax.vmap(one)(jnp.arange(SIZE))) - 7.0
    assert stats.kstest(draw, stats.laplace(0, 0.3).cdf).pvalue > 1e-3
    assert np.mean(np.abs(draw)) == pytest.approx(0.3, rel=5 / np.sqrt(SIZE))


def test_laplace_noise_is_refused_for_more_numbers_and_in_narrow_ones(key):
    with pytest.raises(ValueError, match=r"\[\(2,\)\]; use Gaussian noise"):
        add_laplace_noise(jnp.zeros(2), jnp.float32(1.0), key=key)
    with pytest.raises(TypeError, match="float32 or wider"):
        add_laplace_noise(jnp.zeros(1, jnp.bfloat16), jnp.float32(1.0), key=key)


def test_keys_of_other_generators_draw_laplace_noise_too():
    draw = standard_laplace(jax.random.key(1, impl="rbg"), (SIZE,), jnp.float32)
    assert stats.kstest(np.asarray(draw), stats.laplace.cdf).pvalue > 1e-3
