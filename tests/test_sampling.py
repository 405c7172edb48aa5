"""Laws of Poisson sampling: inclusion rate, independence, truncation, resumption, sources."""

import collections
import types

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxdp
from jaxdp.sampling import poisson_indices


def numbers(num_examples=50, sampling_prob=0.2, padded_batch_size=32, num_steps=10):
    return types.SimpleNamespace(
        num_examples=num_examples,
        sampling_prob=sampling_prob,
        padded_batch_size=padded_batch_size,
        num_steps=num_steps,
    )


def draw_masks(plan, steps, seed=0):
    """Bool `[steps, N]`: who was in which batch."""
    masks = np.zeros((steps, plan.num_examples), bool)
    for step in range(steps):
        indices = poisson_indices(plan, np.random.SeedSequence(seed), step)
        masks[step, indices[indices >= 0]] = True
    return masks


def test_every_example_is_included_with_the_sampling_prob():
    plan, steps = numbers(padded_batch_size=50), 20_000
    included = draw_masks(plan, steps).sum(0)
    # Each count is Binomial(steps, q): a chi-square over the examples, and none of them far off.
    z = (included - steps * 0.2) / np.sqrt(steps * 0.2 * 0.8)
    assert stats.chi2(50).sf(np.sum(z**2)) > 1e-4
    assert np.abs(z).max() < 5


def test_batch_sizes_are_binomial_and_examples_and_steps_independent():
    plan, steps = numbers(padded_batch_size=50), 20_000
    masks = draw_masks(plan, steps, seed=1)
    sizes = masks.sum(1)
    assert sizes.mean() == pytest.approx(10, abs=5 * np.sqrt(8 / steps))
    assert sizes.var() == pytest.approx(8, rel=0.06)  # shuffled epochs have variance 0
    correlation = np.corrcoef(masks.T.astype(float)) - np.eye(50)
    assert np.abs(correlation).max() < 6 / np.sqrt(steps)
    assert abs(np.corrcoef(masks[1:].ravel(), masks[:-1].ravel())[0, 1]) < 5 / np.sqrt(masks.size)


def test_truncation_keeps_a_uniformly_random_subset():
    """S10: with q = 1 and a cap of 10 of 50, each example is kept with probability 1/5, the first as the last."""
    plan, steps = numbers(sampling_prob=1.0, padded_batch_size=10), 5_000
    masks = draw_masks(plan, steps, seed=2)
    assert set(masks.sum(1)) == {10}
    z = (masks.sum(0) - steps * 0.2) / np.sqrt(steps * 0.2 * 0.8)
    assert np.abs(z).max() < 5


def test_no_example_appears_twice_and_padding_is_last():
    plan = numbers()
    for step in range(200):
        indices = poisson_indices(plan, np.random.SeedSequence(5), step)
        assert indices.shape == (32,)
        chosen = indices[indices >= 0]
        assert len(set(chosen)) == len(chosen)
        assert np.all(indices[len(chosen) :] == -1)


def test_any_step_can_be_drawn_again():
    plan, source = numbers(), np.arange(50)
    whole = list(jaxdp.poisson_batches(source, plan, np.random.SeedSequence(9)))
    resumed = list(jaxdp.poisson_batches(source, plan, np.random.SeedSequence(9), start_step=6))
    assert len(whole) == 10
    assert len(resumed) == 4
    for (a, mask_a), (b, mask_b) in zip(whole[6:], resumed, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(mask_a, mask_b)
    again = list(jaxdp.poisson_batches(source, plan, np.random.default_rng(3)))
    same = list(jaxdp.poisson_batches(source, plan, np.random.default_rng(3)))
    np.testing.assert_array_equal(np.stack([b for b, _ in again]), np.stack([b for b, _ in same]))


def test_fresh_generators_draw_different_batches():
    plan, source = numbers(), np.arange(1, 51)
    a, b = (np.stack([x for x, _ in jaxdp.poisson_batches(source, plan, np.random.default_rng())]) for _ in range(2))
    assert not np.array_equal(a, b)


Point = collections.namedtuple("Point", ["x", "y"])


class Source:
    """A random-access source, as grain's and Hugging Face's."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": int(self.y[index])}


class ManyAtOnce(Source):
    def __getitems__(self, indices):
        return [Source.__getitem__(self, i) for i in indices]


@pytest.mark.parametrize("kind", ["array", "jax", "tuple", "dict", "namedtuple", "list", "source", "many"])
def test_every_kind_of_source_gives_the_same_examples(kind):
    plan = numbers()
    x, y = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), np.arange(50, dtype=np.int32)
    source = {
        "array": x,
        "jax": jnp.asarray(x),
        "tuple": (x, y),
        "dict": {"x": x, "y": y},
        "namedtuple": Point(x, y),
        "list": [{"x": list(map(float, row)), "y": int(label)} for row, label in zip(x, y, strict=True)],
        "source": Source(x, y),
        "many": ManyAtOnce(x, y),
    }[kind]
    for step, (batch, is_padding) in enumerate(jaxdp.poisson_batches(source, plan, np.random.SeedSequence(4))):
        indices = poisson_indices(plan, np.random.SeedSequence(4), step)
        np.testing.assert_array_equal(is_padding, indices < 0)
        got = batch if kind in ("array", "jax") else batch["x"] if isinstance(batch, dict) else batch[0]
        assert got.shape == (32, 3)
        np.testing.assert_allclose(got[~is_padding], x[indices[indices >= 0]], rtol=1e-7)
        np.testing.assert_array_equal(got[is_padding], 0)


def test_an_empty_draw_is_a_batch_of_padding():
    plan = numbers(sampling_prob=1e-6)
    for source in (np.arange(50.0), [{"x": 1.0}] * 50, ManyAtOnce(np.arange(50.0), np.arange(50))):
        for batch, is_padding in jaxdp.poisson_batches(source, plan, np.random.SeedSequence(0)):
            assert is_padding.all()
            assert all(leaf.shape == (32,) for leaf in ([batch] if isinstance(batch, np.ndarray) else batch.values()))
