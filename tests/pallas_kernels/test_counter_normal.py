"""Laws of the generator: its bits are the published cipher's, by position alone; its normals are normal, tails included."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p
from scipy import special, stats

from pallas_kernels import counter_normal

# Random123 1.14, examples/kat_vectors, "threefry2x32 20": counter, key, result.
PUBLISHED = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_the_cipher_reproduces_its_published_vectors(counter, key, expected):
    words = counter_normal.threefry2x32(*(jnp.uint32(word) for word in (*key, *counter)))
    assert tuple(int(word) for word in words) == expected


def numpy_threefry(key, high, low):
    """The definition in Python integers' arithmetic, modulo 2^32."""
    mask = 2**32 - 1
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (high + keys[0]) & mask, (low + keys[1]) & mask
    for r in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[r % 8]
        x = (x + y) & mask
        y = (((y << rotation) | (y >> (32 - rotation))) & mask) ^ x
        if r % 4 == 3:
            s = r // 4 + 1
            x, y = (x + keys[s % 3]) & mask, (y + keys[(s + 1) % 3] + s) & mask
    return x, y


WORD = st.integers(0, 2**32 - 1)


@hypothesis.given(key=st.tuples(WORD, WORD), high=WORD, low=WORD)
def test_the_cipher_is_the_definition_and_the_primitive_of_jax(key, high, low):
    words = [jnp.full(1, word, jnp.uint32) for word in (*key, high, low)]
    ours = [int(word[0]) for word in counter_normal.threefry2x32(*words)]
    assert ours == list(numpy_threefry(key, high, low))
    assert ours == [int(word[0]) for word in threefry2x32_p.bind(*words)]


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (4, 130), (2, 3, 200), (2, 3, 4)])
def test_the_bits_of_an_entry_depend_on_its_flat_index_alone(shape, key_data):
    high, low = counter_normal.bits(key_data, shape)
    flat_high, flat_low = counter_normal.bits(key_data, (int(np.prod(shape)),))
    assert np.array_equal(np.ravel(high), flat_high)
    assert np.array_equal(np.ravel(low), flat_low)
    # JAX folds the two words of a block to one.
    assert np.array_equal(high ^ low, jax.random.bits(jax.random.wrap_key_data(key_data), shape, jnp.uint32))
    draw = counter_normal.standard_normal(key_data, shape)
    assert draw.shape == shape
    np.testing.assert_allclose(np.ravel(draw), counter_normal.normal_of_bits(flat_high, flat_low), rtol=2e-6)


@hypothesis.given(
    row=WORD, num_columns=st.integers(1, 2**32 - 1), data=st.data(), size=st.sampled_from([2**32 + 1, 2**63])
)
def test_the_index_is_right_above_two_to_the_32(row, num_columns, data, size):
    column = data.draw(st.integers(0, num_columns - 1))
    high, low = counter_normal.flat_index(jnp.uint32(row), jnp.uint32(column), num_columns, size)
    assert (int(high) << 32) + int(low) == row * num_columns + column


def test_entries_that_lie_two_to_the_32_apart_differ(key_data):
    """An index that wraps would add the same noise twice in a large matrix: its difference would be released in clear."""
    row = jnp.asarray([0, 65_536, 131_072], jnp.uint32)
    place = {"num_columns": 65_536, "size": 2**34}
    draws = counter_normal.normal_at((key_data[0], key_data[1]), row, jnp.zeros_like(row), **place)
    assert len(set(np.asarray(draws).tolist())) == 3
    again = counter_normal.normal_at((key_data[0], key_data[1]), row[:1], row[:1], num_columns=7, size=7)
    assert again[0] == draws[0]


def test_the_quantile_is_exact_to_one_in_a_million_out_to_nine_standard_deviations():
    p = np.concatenate([2.0 ** -np.linspace(1, 65, 200_001), np.linspace(0.2, 0.5, 100_001)]).astype(np.float32)
    p = np.unique(p[(p < 0.5) & (p >= 2.0**-65)])
    quantile = np.asarray(jax.jit(counter_normal.lower_tail_quantile)(p), np.float64)
    np.testing.assert_allclose(quantile, special.ndtri(p.astype(np.float64)), rtol=1e-6)
    assert quantile.min() < -9.1
    assert np.all(np.diff(quantile) >= -1e-6 * np.abs(quantile[1:]))  # it does not step back by more than rounding
    assert counter_normal.lower_tail_quantile(jnp.float32(0.5)) == 0


@pytest.mark.parametrize("tail", [0.3, 1e-3, 1e-6, 1e-10, 1e-15])
def test_all_63_bits_reach_the_tail(tail):
    high, low = divmod(int(tail * 2**64), 2**32)
    words = jnp.asarray([[(high << 1) & 0xFFFFFFFE, (high << 1) | 1], [low, low]], jnp.uint32)
    below, above = np.asarray(counter_normal.normal_of_bits(words[0], words[1]), np.float64)
    assert below == pytest.approx(special.ndtri(tail), rel=1e-6)
    assert above == -below
    if tail < 2**-32:  # the whole tail hangs on the low word
        assert counter_normal.normal_of_bits(words[0], words[1] // 2)[0] < below


def test_the_extremes_are_finite_and_beyond_nine_standard_deviations():
    words = jnp.asarray([[0, 1, 2**32 - 1, 2**32 - 2], [0, 0, 2**32 - 1, 2**32 - 1]], jnp.uint32)
    least, most, *middle = np.asarray(counter_normal.normal_of_bits(words[0], words[1]))
    assert least < -9 < 9 < most < np.inf
    assert np.abs(middle).max() == 0


def test_the_draw_is_normal_in_its_body_and_its_tails(key_data):
    draw = np.asarray(counter_normal.standard_normal(key_data, (4_000_000,)))
    assert stats.kstest(draw, stats.norm.cdf).pvalue > 1e-3
    for threshold in (3.0, 4.0, 4.7):
        expected = 2 * len(draw) * stats.norm.sf(threshold)
        assert abs(np.sum(np.abs(draw) > threshold) - expected) < 5 * np.sqrt(expected)
    pairs = np.corrcoef(draw[:-1], draw[1:])[0, 1]
    assert abs(pairs) < 5 / np.sqrt(len(draw))


def test_another_key_gives_another_draw(key_data):
    one = counter_normal.standard_normal(key_data, (100_000,))
    other = counter_normal.standard_normal(key_data ^ jnp.asarray([0, 1], jnp.uint32), (100_000,))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(100_000)


def test_a_key_of_another_generator_is_refused():
    with pytest.raises(ValueError, match=r"key_data must be uint32\[2\]"):
        counter_normal.standard_normal(jax.random.key_data(jax.random.key(0, impl="rbg")), (3,))
