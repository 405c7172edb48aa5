"""Estimators see the directional derivative; the lifted parts are the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.block_model import loss_fn
from jaxdp.zeroth_order import BlockParams, ForwardMode, Gaussian, OneSided, Rademacher, Sgd, TwoSided, make_step
from jaxdp.zeroth_order.directions import leaf_directions
from jaxdp.zeroth_order.estimators import shifted
from tests.zeroth_order.models import bits, toy, toy_batch, toy_params

pytestmark = pytest.mark.unoptimized


@functools.partial(jax.jit, static_argnums=0)
def direction(law, params: BlockParams, key, step, k) -> BlockParams:
    """The whole direction of (step, k), block by block."""
    root = jax.random.key_data(key)

    def at(block, shapes):
        return leaf_directions(
            law, root, step=jnp.uint32(step), k=jnp.uint32(k), block=jnp.uint32(block), shapes=shapes
        )

    first = jax.tree.map(lambda leaf: leaf[0], params.blocks)
    numbers = 1 + jnp.arange(len(jax.tree.leaves(params.blocks)[0]))
    return BlockParams(at(0, params.resident), jax.lax.map(lambda number: at(number, first), numbers))


@jax.jit
def mean_loss(params, batch):
    return jnp.mean(jax.vmap(lambda example: loss_fn(toy(), params, example))(batch))


def first_scalars(estimator, law, params=None, batch=None, key=None):
    params = toy_params() if params is None else params
    steps = make_step(toy(), Sgd(1e-3), estimator=estimator, law=law)
    _, info = steps.step(steps.init(params, direction_key=key), toy_batch() if batch is None else batch)
    return np.asarray(info.scalars.projected_gradients), float(info.not_private.mean_loss())


@pytest.mark.parametrize("law", [Rademacher(), Gaussian()], ids=lambda law: type(law).__name__)
def test_spsa_is_its_equation(law, key):
    """g_k = (L(w + mu z_k) - L(w - mu z_k)) / 2 mu, with the whole model in memory."""
    params, batch, scale = toy_params(), toy_batch(), 1e-2
    found, loss = first_scalars(TwoSided(3, scale), law, key=key)
    whole = jax.tree.map(jnp.asarray, params)
    for k in range(3):
        z = direction(law, params, key, 0, k)
        plus, minus = (mean_loss(shifted(whole, z, sign * scale), batch) for sign in (1, -1))
        np.testing.assert_allclose(found[k], (plus - minus) / (2 * scale), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(loss, mean_loss(whole, batch), rtol=0.1)


def test_one_sided_is_its_equation(key):
    params, batch, scale = toy_params(), toy_batch(), 1e-2
    found, loss = first_scalars(OneSided(2, scale), Rademacher(), key=key)
    whole = jax.tree.map(jnp.asarray, params)
    center = mean_loss(whole, batch)
    np.testing.assert_allclose(loss, center, rtol=1e-5)
    for k in range(2):
        z = direction(Rademacher(), params, key, 0, k)
        np.testing.assert_allclose(found[k], (mean_loss(shifted(whole, z, scale), batch) - center) / scale, rtol=1e-3)


def test_forward_mode_is_the_directional_derivative(key):
    params, batch = toy_params(), toy_batch()
    found, loss = first_scalars(ForwardMode(3), Gaussian(), key=key)
    whole = jax.tree.map(jnp.asarray, params)
    value, grad = jax.jit(jax.value_and_grad(mean_loss))(whole, batch)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for k in range(3):
        z = direction(Gaussian(), params, key, 0, k)
        inner = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(z), strict=True))
        np.testing.assert_allclose(found[k], inner, rtol=1e-4, atol=1e-4)


def test_spsa_tends_to_the_directional_derivative(key):
    """Its error falls with the square of the scale, until rounding takes over."""
    exact, _ = first_scalars(ForwardMode(2), Rademacher(), key=key)
    errors = [
        np.abs(first_scalars(TwoSided(2, scale), Rademacher(), key=key)[0] - exact).max() for scale in (0.05, 0.0125)
    ]
    assert errors[1] < errors[0] / 8


def test_forward_mode_is_exact_where_differences_vanish_in_bfloat16(key):
    """mu below half a unit in the last place: both perturbed losses are equal, the derivative is not zero."""
    params, batch = toy_params(dtype=jnp.bfloat16), toy_batch(dtype=jnp.bfloat16)
    wide = toy_params()
    wide = jax.tree.map(lambda leaf, narrow: np.asarray(narrow, np.float32), wide, params)
    exact, _ = first_scalars(ForwardMode(4), Rademacher(), wide, toy_batch(), key)
    difference, _ = first_scalars(TwoSided(4, 1e-5), Rademacher(), params, batch, key)
    derivative, _ = first_scalars(ForwardMode(4), Rademacher(), params, batch, key)
    assert np.abs(difference - exact).max() > 0.5 * np.abs(exact).max()
    np.testing.assert_allclose(derivative, exact, rtol=0.1, atol=0.05 * np.abs(exact).max())


def test_perturbing_leaves_the_parameters_alone_in_bfloat16(key):
    """S18: w + e z - 2 e z + e z is not w in bfloat16; a visit without updates gives back the very bits."""
    params = toy_params(dtype=jnp.bfloat16)
    z = direction(Gaussian(), params, key, 0, 0)
    there = shifted(jax.tree.map(jnp.asarray, params), z, 1e-3)
    back = shifted(shifted(there, z, -2e-3), z, 1e-3)
    assert bits(back) != bits(params)  # what published code does
    steps = make_step(toy(), Sgd(1e-30), law=Gaussian())
    state = steps.init(params, direction_key=key)
    for _ in range(3):
        state, _ = steps.step(state, toy_batch(dtype=jnp.bfloat16))
    assert bits(steps.flush(state).params()) == bits(params)


@pytest.mark.parametrize("bad", [0.0, -1e-3, float("nan"), float("inf")])
def test_bad_scales_are_refused(bad):
    with pytest.raises(ValueError, match="perturbation_scale"):
        TwoSided(1, bad)
