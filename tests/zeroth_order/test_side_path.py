"""Low-rank directions without perturbed matrices: the side path is the definition, and no copy of a matrix exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.zeroth_order import LowRank, Placement, Rademacher, Sgd, TwoSided, make_step
from jaxdp.zeroth_order.directions import Factors, leaf_directions
from jaxdp.zeroth_order.side_path import apply_along
from tests.zeroth_order.models import bits, language_model, token_batch, toy, toy_batch, toy_params

pytestmark = pytest.mark.unoptimized


def factors(rng, m, n, rank=2):
    return Factors(*(jnp.asarray(rng.normal(size=(side, rank)), jnp.float32) for side in (m, n)))


def moved(params, direction, scale):
    def one(leaf, z):
        return leaf + scale * (z.dense() if isinstance(z, Factors) else z)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(list(map(one, leaves, treedef.flatten_up_to(direction))))


READERS = {
    "right": lambda w, x: jnp.tanh(x @ w["a"]),
    "left": lambda w, x: w["a"].T @ x.T,
    "einsum": lambda w, x: jnp.einsum("dn,btd->tnb", w["a"], x[None]),
    "cast": lambda w, x: (x.astype(jnp.bfloat16) @ w["a"].astype(jnp.bfloat16)).astype(jnp.float32),
    "lookup": lambda w, x: w["a"][jnp.array([[0, 3], [2, 2]])],
    "tied": lambda w, x: jnp.tanh(w["a"][jnp.array([1, 0])]) @ w["a"].T,
    "elementwise": lambda w, x: jnp.sum(jnp.square(w["a"])) + x @ w["a"],
    "two matrices": lambda w, x: x @ (w["a"] @ w["b"]),
    "reshaped": lambda w, x: jnp.einsum("td,dhk->thk", x, w["a"].reshape(4, 2, 3)),
    "bias": lambda w, x: x @ w["a"] + w["c"][None],
    "jit": lambda w, x: jax.jit(lambda a, x: x @ a)(w["a"], x),
    "constant of a scan": lambda w, x: jax.lax.map(lambda row: row @ w["a"], x),
    "slices of a scan": lambda w, x: jax.lax.map(lambda row: row + x[:, 0].sum(), w["a"]),
    "checkpoint": lambda w, x: jax.checkpoint(lambda a: x @ a)(w["a"]),
    "output": lambda w, x: (w["a"], x @ w["a"]),
    "unused": lambda w, x: x,
}


@pytest.mark.parametrize("name", READERS)
def test_a_part_along_a_direction_is_the_part_at_the_moved_parameters(name):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params, x, scale = {"a": draw(4, 6), "b": draw(6, 4), "c": draw(6)}, draw(3, 4), jnp.float32(0.3)
    direction = {"a": factors(rng, 4, 6), "b": factors(rng, 6, 4), "c": draw(6)}
    fun = READERS[name]
    expected = fun(moved(params, direction, scale), x)
    found = apply_along(fun, params, direction, scale, x)
    tolerance = 0.05 if name == "cast" else 1e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_factors_are_the_direction(key):
    """The update moves along the matrices, the probe along their factors: up to rounding they are one direction."""
    root, at = jax.random.key_data(key), {"step": jnp.uint32(3), "k": jnp.uint32(1), "block": jnp.uint32(2)}
    shapes = {"kernel": np.zeros((5, 7)), "bias": np.zeros(7), "stack": np.zeros((2, 3, 4))}
    dense = leaf_directions(LowRank(3), root, **at, shapes=shapes)
    found = leaf_directions(LowRank(3), root, **at, shapes=shapes, is_factored=True)
    np.testing.assert_allclose(found["kernel"].dense(), dense["kernel"], rtol=1e-5, atol=1e-5)
    for name in ("bias", "stack"):
        np.testing.assert_array_equal(found[name], dense[name])


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_language_models_along_low_rank_directions(name, key):
    """The projected gradients are those of perturbed copies, however many directions pass at once."""
    _, model, params = language_model(name)
    params, batch = jax.tree.map(jnp.asarray, params), token_batch()
    shapes = {"root": jax.random.key_data(key), "step": jnp.uint32(0), "block": jnp.uint32(1)}
    block = jax.tree.map(lambda leaf: leaf[0], params.blocks)
    hidden = jax.vmap(lambda example: model.embed(params.resident, example))(batch)

    def part(block, hidden):
        return jax.vmap(lambda hidden, example: model.block(block, hidden, example))(hidden, batch)

    def lifted(estimator, *, is_factored):
        def direction(k):
            return leaf_directions(LowRank(), k=k, shapes=block, is_factored=is_factored, **shapes)

        streams = tuple(jnp.broadcast_to(hidden, (4, *hidden.shape)) for _ in range(2))
        return estimator.lift(part, block, direction, streams, is_factored=is_factored)

    expected = jax.jit(lambda: lifted(TwoSided(4, 1e-2), is_factored=False))()
    for at_once in (1, 4):
        found = jax.jit(lambda at_once=at_once: lifted(TwoSided(4, 1e-2, at_once), is_factored=True))()
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert not np.allclose(a, hidden)


def test_runs_stream_to_the_same_bits(key):
    found = []
    for placement in (Placement(), Placement(is_streamed=True)):
        steps = make_step(toy(), Sgd(1e-2), law=LowRank(), estimator=TwoSided(4, num_at_once=4), placement=placement)
        state = steps.init(toy_params(), direction_key=key)
        for _ in range(2):
            state, _ = steps.step(state, toy_batch())
        found.append(bits(steps.flush(state).params()))
    assert found[0] == found[1]


@pytest.mark.unoptimized(False)  # XLA's own account
def test_no_perturbed_copy_of_a_matrix_exists(key):
    """Eight directions and both signs at once in less than the memory of the matrix; another law takes a copy for one."""
    width, K = 512, 8

    def temp_bytes(law, estimator):
        is_factored = isinstance(law, LowRank)
        at = {"root": jax.random.key_data(key), "step": jnp.uint32(0), "block": jnp.uint32(1)}

        def lifted(w, streams):
            def direction(k):
                return leaf_directions(law, k=k, shapes=w, is_factored=is_factored, **at)

            return estimator.lift(lambda w, h: jnp.tanh(h @ w["a"]), w, direction, streams, is_factored=is_factored)

        streams = tuple(jnp.zeros((K, 2, width)) for _ in range(2))
        compiled = jax.jit(lifted).lower({"a": jnp.zeros((width, width))}, streams).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(LowRank(), TwoSided(K, num_at_once=K)) < 4 * width**2
    assert temp_bytes(Rademacher(), TwoSided(K)) >= 4 * width**2


def test_other_directions_do_not_pass_at_once(key):
    with pytest.raises(ValueError, match=r"num_at_once=4 needs low-rank directions"):
        make_step(toy(), Sgd(1e-2), estimator=TwoSided(4, num_at_once=4))
