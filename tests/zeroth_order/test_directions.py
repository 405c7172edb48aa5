"""Directions are functions of their address, have unit covariance, and are the same bits everywhere (S17)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdp.zeroth_order import Gaussian, LowRank, Rademacher, directions

LAWS = [Rademacher(), Gaussian(), LowRank(rank=2, refresh_every=3)]
SHAPES = {
    "kernel": jax.ShapeDtypeStruct((40, 70), jnp.float32),
    "bias": jax.ShapeDtypeStruct((70,), jnp.float32),
    "stack": jax.ShapeDtypeStruct((3, 5, 7), jnp.float32),
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "empty": jax.ShapeDtypeStruct((0, 4), jnp.float32),
}


def program(law, shapes):
    return jax.jit(
        lambda root, *at: directions.leaf_directions(law, root, step=at[0], k=at[1], block=at[2], shapes=shapes)
    )


program_of_all_shapes = functools.cache(functools.partial(program, shapes=SHAPES))


def draw(law, *, step=0, k=0, block=0, by=None, seed=7):
    by = program_of_all_shapes(law) if by is None else by
    return by(jax.random.key_data(jax.random.key(seed)), jnp.uint32(step), jnp.uint32(k), jnp.uint32(block))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """The published cipher (SC 2011), on Python integers."""
    mask, (x, y) = 2**32 - 1, counter
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (x + keys[0]) & mask, (y + keys[1]) & mask
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = (x + y) & mask
            y = ((y << rotation | y >> (32 - rotation)) & mask) ^ x
        x, y = (x + keys[(group + 1) % 3]) & mask, (y + keys[(group + 2) % 3] + group + 1) & mask
    return x, y


def key_at(*path: int) -> tuple[int, int]:
    key = (0, 7)
    for index in path:
        key = threefry(key, (0, index))
    return key


def test_the_cipher_is_the_published_one():
    assert threefry((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == (0xC4923A9C, 0x483DF7A0)


def test_signs_are_the_bits_of_the_cipher():
    """The test vector of the stream: leaf by leaf in the order of the tree, entry e of a leaf is bit e of its counters."""
    z = draw(Rademacher(), step=5, k=2, block=9)
    key, first = key_at(5, 2, 9), 0
    for name in sorted(SHAPES):
        n = math.prod(SHAPES[name].shape)
        blocks = [threefry(key, (0, first + i)) for i in range(-(-n // 64))]
        words = [word for block in blocks for word in block]
        expected = [1 - 2 * (words[e // 32] >> (e % 32) & 1) for e in range(n)]
        np.testing.assert_array_equal(np.asarray(z[name]).ravel(), expected)
        first += len(blocks)


def test_normals_are_integers_of_the_cipher_scaled_once():
    z = draw(Gaussian(), step=5, k=2, block=9)
    key, first = key_at(5, 2, 9), 0
    for name in sorted(SHAPES):
        n = math.prod(SHAPES[name].shape)
        expected = []
        for i in range(n):
            high, low = threefry(key, (0, first + i))
            units = (high.bit_count() + (low >> 16).bit_count()) * 2**16 + (low & 0xFFFF)
            odd = np.float32(2 * units + 1 - 2 * (24 * 2**16 + 2**15))
            expected.append(odd * np.float32(0.5 * np.float32(1 / math.sqrt((12 + 1 / 12) * 2**32))))
        np.testing.assert_array_equal(np.asarray(z[name]).ravel(), np.asarray(expected, np.float32))
        first += n


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_every_part_of_the_address_matters_and_nothing_else(law):
    base = flat(draw(law))
    for address in ({"step": 1}, {"k": 1}, {"block": 1}, {"seed": 8}):
        other = flat(draw(law, **address))
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.25, address
    np.testing.assert_array_equal(base, flat(draw(law)))
    eager = directions.leaf_directions(
        law,
        jax.random.key_data(jax.random.key(7)),
        step=jnp.uint32(0),
        k=jnp.uint32(0),
        block=jnp.uint32(0),
        shapes=SHAPES,
    )
    np.testing.assert_array_equal(base, flat(eager))  # in one program, or operation by operation


@pytest.mark.unoptimized
def test_small_and_large_blocks_have_one_stream(monkeypatch):
    """A block is drawn in one run of the cipher or leaf by leaf: the same bits."""
    for law in LAWS:
        at_once = flat(draw(law))
        with monkeypatch.context() as patch:
            patch.setattr(directions, "_AT_ONCE", 0)
            np.testing.assert_array_equal(at_once, flat(draw(law, by=program(law, SHAPES))))


def test_counters_go_on_beyond_32_bits():
    key = jnp.asarray(key_at(3), jnp.uint32)
    high, low = directions._words(key, 2**32 - 2, 4)
    expected = [threefry(key_at(3), divmod(2**32 - 2 + i, 2**32)) for i in range(4)]
    np.testing.assert_array_equal(np.stack([high, low], 1), np.asarray(expected, np.uint32))


@pytest.mark.unoptimized
@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_the_covariance_is_the_identity(law):
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    root = jax.random.key_data(jax.random.key(0))

    def one(step):
        z = directions.leaf_directions(law, root, step=step, k=jnp.uint32(0), block=jnp.uint32(1), shapes=shapes)
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(z)])

    law_steps = jnp.arange(20_000, dtype=jnp.uint32) * jnp.uint32(3)  # a fresh subspace every time
    z = np.asarray(jax.vmap(one)(law_steps), np.float64)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(8), atol=0.08)


@pytest.mark.unoptimized
def test_gaussian_is_nearly_normal():
    shapes = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
    z = flat(draw(Gaussian(), by=program(Gaussian(), shapes)))
    assert stats.kstest(z, "norm").statistic < 1.8e-3 + 1.63 / math.sqrt(z.size)
    assert abs(stats.kurtosis(z) + 0.04) < 0.05
    assert stats.kstest(z / 1.02, "norm").pvalue < 1e-6  # and would show 2 % of the std


@pytest.mark.unoptimized
def test_low_rank_has_its_rank_and_keeps_its_subspace():
    law = LowRank(rank=2, refresh_every=3)
    steps = [np.asarray(draw(law, step=t)["kernel"]) for t in range(4)]
    assert np.linalg.matrix_rank(np.concatenate(steps[:1]), tol=1e-4) == 2
    assert np.linalg.matrix_rank(np.concatenate(steps[:3]), tol=1e-4) == 2  # one row space until the refresh
    assert np.linalg.matrix_rank(np.concatenate(steps), tol=1e-4) == 4
    other = np.asarray(draw(law, k=1)["kernel"])
    assert np.linalg.matrix_rank(np.concatenate([steps[0], other]), tol=1e-4) == 2  # shared by all directions


def test_rounded_products_are_not_fused():
    """w + rounded(c z) has one value, whether or not a compiler may fuse a product into a sum."""
    rng = np.random.default_rng(0)
    w, z = (rng.normal(size=10_000).astype(np.float32) for _ in range(2))
    c = np.float32(0.1234567)
    fused = jax.jit(lambda w, z, c: w + directions.rounded(c * z))(w, z, c)
    apart = w + np.asarray(jax.jit(directions.rounded)(np.asarray(c * z)))
    np.testing.assert_array_equal(fused, apart)
    assert np.abs(np.asarray(fused) - (w + c * z)).max() <= 2**-22


def test_bad_addresses_are_refused():
    with pytest.raises(ValueError, match="step must be between 0 and 4294967293"):
        directions.check_step(2**32 - 2)
    with pytest.raises(ValueError, match="rank"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="threefry2x32"):
        directions.words_of(jax.random.key(0, impl="rbg"))
