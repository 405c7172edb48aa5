"""What the methods promise beside the sum itself: routes, memory, errors, and cases that once went wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxdp

pytestmark = pytest.mark.unoptimized
METHODS = ["two_pass", "book_keeping", "per_layer"]


def agree(loss, params, batch, *, tolerance=1e-5, **kwargs):
    """Every method with the definition of its policy, in one program: compiling takes most of the time."""
    flat, by_leaf = jaxdp.flat(0.5), jaxdp.per_layer(0.5, group_by="leaf")
    pairs = [(flat, "vmap"), (by_leaf, "vmap"), *((by_leaf if m == "per_layer" else flat, m) for m in METHODS)]
    grad_fns = [jaxdp.clipped_grad(loss, clipping=policy, method=method) for policy, method in pairs]
    of_flat, of_leaves, *found = jax.jit(lambda *args: [grad_fn(*args, **kwargs) for grad_fn in grad_fns])(
        params, batch
    )
    for method, (got, rows) in zip(METHODS, found, strict=True):
        want, definition = of_leaves if method == "per_layer" else of_flat
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * np.max(np.abs(b), initial=1e-30), err_msg=method)
        assert rows.contributed.tolist() == definition.contributed.tolist(), method


def stack_loss(params, x):
    def block(x, layer):
        hidden = jnp.tanh(x @ layer["kernel"] + jnp.broadcast_to(layer["bias"], x.shape))
        return x + hidden, None

    x, _ = lax.scan(jax.checkpoint(block), x, params["blocks"])
    return jnp.sum(jnp.square(x @ params["head"]))


@pytest.fixture
def stack():
    rng = np.random.default_rng(0)
    blocks = {"kernel": jnp.asarray(rng.normal(size=(4, 8, 8)), jnp.float32) / 3, "bias": jnp.zeros((4, 8))}
    params = {"blocks": blocks, "head": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}
    return params, jnp.asarray(rng.normal(size=(6, 3, 8)), jnp.float32)


@pytest.mark.parametrize("noise_allocation", ["global", "equal_budget", "least_energy"])
def test_stacked_layers_are_clipped_one_by_one(stack, noise_allocation):
    params, batch = stack
    policy = jaxdp.per_layer(0.5, stacked="blocks", noise_allocation=noise_allocation)
    groups = policy.groups(params)
    assert groups.names == ("blocks[0]", "blocks[1]", "blocks[2]", "blocks[3]", "head")
    assert groups.sizes == (72, 72, 72, 72, 40)
    grad_fns = [jaxdp.clipped_grad(stack_loss, clipping=policy, method=method) for method in METHODS]
    found = jax.jit(lambda *args: [grad_fn(*args) for grad_fn in grad_fns])(params, batch)

    clip_norms = np.float64(policy.clip_norms(groups))
    expected = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    gradient = jax.jit(jax.grad(stack_loss))
    for i, example in enumerate(batch):
        grads = jax.tree.map(np.float64, gradient(params, example))
        for k in range(4):
            norm = np.sqrt(np.sum(grads["blocks"]["kernel"][k] ** 2) + np.sum(grads["blocks"]["bias"][k] ** 2))
            for _, rows in found:
                np.testing.assert_allclose(rows.l2_norms[i, k], norm, rtol=2e-5)
            for name in ("kernel", "bias"):
                expected["blocks"][name][k] += grads["blocks"][name][k] * min(1, clip_norms[k] / norm)
        norm = np.linalg.norm(grads["head"])
        expected["head"] += grads["head"] * min(1, clip_norms[4] / norm)
    for method, (total, _) in zip(METHODS, found, strict=True):
        for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5 * np.max(np.abs(want)), err_msg=method)


def test_a_group_in_one_scope_finishes_inside_the_backward_pass(stack):
    params, batch = stack
    stacked = jaxdp.clipped_grad(stack_loss, clipping=jaxdp.per_layer(1.0, stacked="blocks")).explain(params, batch[0])
    assert stacked.method == "per_layer"
    assert {leaf.finishes for leaf in stacked.leaves} == {"backward"}
    whole = jaxdp.clipped_grad(stack_loss, clipping=jaxdp.per_layer(1.0)).explain(params, batch[0])
    assert [leaf.finishes for leaf in whole.leaves] == ["after", "after", "backward"]  # one norm for all four slices


def test_auto_follows_the_policy_and_the_function(stack):
    params, batch = stack
    method = jaxdp.clipped_grad(stack_loss, clipping=jaxdp.flat(1.0)).explain(params, batch[0]).method
    assert method == "two_pass"  # its author trades time for memory
    plain = jaxdp.clipped_grad(lambda w, x: jnp.sum(x @ w), clipping=jaxdp.flat(1.0))
    assert plain.explain(jnp.zeros((3, 2)), jnp.zeros(3)).method == "book_keeping"


def test_ghost_refuses_to_copy_a_matrix_and_names_it():
    def loss(params, x):
        return jnp.sum((x @ params["kernel"]) * params["scale"]) + jnp.sum(jnp.square(params["table"]))

    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(2), "table": jnp.ones((4, 5))}
    grad_fn = jaxdp.clipped_grad(loss, clipping=jaxdp.flat(1.0), method="ghost")
    with pytest.raises(
        ValueError, match=r"'table' \(4, 5\): it enters `square`|'table' \(4, 5\): it enters `integer_pow`"
    ):
        grad_fn(params, jnp.ones((2, 3)))
    del params["table"]
    grad_fn = jaxdp.clipped_grad(
        lambda p, x: jnp.sum((x @ p["kernel"]) * p["scale"]), clipping=jaxdp.flat(1.0), method="ghost"
    )
    grad_fn(params, jnp.ones((2, 3)))


@pytest.mark.unoptimized(False)  # memory
def test_no_method_but_the_definition_holds_per_example_gradients():
    """XLA's own account, on a model with 96 MiB of per-example gradients and 1.5 MiB of activations."""

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    params, batch = [jnp.zeros((256, 256))] * 6, jnp.zeros((64, 4, 256))

    def temporary_bytes(function):
        return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    sizes = {}
    for method in ("vmap", *METHODS):
        policy = jaxdp.per_layer(1.0, group_by="leaf") if method == "per_layer" else jaxdp.flat(1.0)
        grad_fn = jaxdp.clipped_grad(loss, clipping=policy, method=method)
        sizes[method] = temporary_bytes(lambda p, b, grad_fn=grad_fn: grad_fn(p, b)[0])
    assert sizes["vmap"] > 96 * 2**20
    assert all(sizes[method] < 4 * 2**20 for method in METHODS), sizes


@pytest.mark.unoptimized(False)  # XLA's plain emitters look narrow ids up wrongly
@pytest.mark.parametrize("vocabulary", [256, 257, 300])
def test_ids_narrower_than_the_vocabulary(vocabulary):
    """The number of rows itself overflows uint8: such ids once lost their gradient."""
    ids = jnp.array([[1, 99], [3, 127], [0, 255]], jnp.uint8)
    params = jnp.linspace(0.0, 1.0, 2 * vocabulary).reshape(vocabulary, 2)
    agree(lambda p, i: jnp.sum(jnp.take(p, i, axis=0) ** 2 * jnp.arange(2.0)[None]), params, ids)
    agree(lambda p, i: jnp.sum(lax.dynamic_index_in_dim(p, i[0], 0) ** 2), params, ids)


def test_a_recurrent_network_of_stacked_layers():
    """A scan over layers inside a scan over time: stacked within repeated."""

    def loss(params, x):
        def step(h, x):
            h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h + x, params)
            return h, None

        return jnp.sum(lax.scan(step, jnp.zeros(3), x)[0])

    rng = np.random.default_rng(0)
    params, batch = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 3, 3), (4, 5, 3)))
    agree(loss, params, batch, tolerance=1e-4)


def test_layers_of_a_recurrent_network_are_clipped_one_by_one():
    """As many steps as layers, and layers of very different norms: a factor of the wrong layer would fit in shape."""

    def loss(params, x):
        def step(h, x):
            h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h + x, params)
            return h, None

        return jnp.sum(lax.scan(step, jnp.zeros(24), x)[0] ** 2)

    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(3, 24, 24)) * np.array([0.02, 0.3, 0.05])[:, None, None], jnp.float32)
    batch = jnp.asarray(rng.normal(size=(4, 3, 24)), jnp.float32)
    policy = jaxdp.per_layer(0.05, stacked="<root>")
    grad_fns = [jaxdp.clipped_grad(loss, clipping=policy, method=method) for method in ("vmap", *METHODS)]
    want, *found = jax.jit(lambda *args: [grad_fn(*args)[0] for grad_fn in grad_fns])(params, batch)
    for method, got in zip(METHODS, found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.max(np.abs(want)), err_msg=method)


def test_the_second_pass_clips_again():
    """S4e: the compiler may round two passes differently."""

    def flops(method):
        grad_fn = jaxdp.clipped_grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)), clipping=jaxdp.flat(1.0), method=method)
        return grad_fn.explain(jnp.zeros((64, 64)), jnp.zeros((4, 64))).flops

    assert flops("two_pass") == 2 * flops("book_keeping")


def test_the_branch_not_taken_leaves_no_nan():
    def loss(params, x):
        def divided(x):
            return jnp.sum((jnp.array([1.0, 2.0]) / jnp.maximum(x[0], 0.0)) @ params["v"])

        return lax.cond(x[0] > 0, divided, lambda x: jnp.sum(x @ params["w"]), x)

    params = {"v": jnp.ones((2, 2)), "w": jnp.ones((3, 2))}
    batch = jnp.array([[1.0, 2, 3], [-1, 2, 3], [0, 1, 1], [2, 1, 1]])
    agree(loss, params, batch)


def test_padding_stays_silent_under_a_derivative_that_ignores_its_cotangent():
    @jax.custom_vjp
    def total(z):
        return jnp.sum(z)

    total.defvjp(lambda z: (jnp.sum(z), z), lambda z, g: (jnp.sign(z),))
    agree(
        lambda p, x: total(x @ p["w"]), {"w": jnp.ones((3, 2))}, jnp.ones((2, 3)),
        is_padding_example=jnp.array([True, True]),
    )  # fmt: skip


@pytest.mark.unoptimized(False)  # bits
@pytest.mark.parametrize("method", METHODS)
def test_one_bad_example_changes_no_bit_of_the_others(stack, method):
    params, batch = stack
    policy = jaxdp.per_layer(0.5, stacked="blocks") if method == "per_layer" else jaxdp.flat(0.5)
    grad_fn = jax.jit(jaxdp.clipped_grad(stack_loss, clipping=policy, method=method))
    without, _ = grad_fn(params, batch, is_padding_example=jnp.arange(6) == 2)
    for bad in (jnp.nan, jnp.inf, 1e30):
        got, rows = grad_fn(params, batch.at[2].set(bad), is_padding_example=jnp.zeros(6, bool))
        assert not rows.contributed[2]
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(without), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.unoptimized(False)  # rounding
def test_bfloat16_contributions_stay_within_the_clip_norm():
    """S4 with operands that round: each row alone, every method, on tokens that nearly cancel."""
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(128) % 2, 1.0, -1.0)[None, :, None]
    x = jnp.asarray(rng.normal(size=(3, 1, 64)) * signs * (1 + rng.normal(size=(3, 128, 64)) / 64), jnp.bfloat16)

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w["first"]) @ w["second"]).astype(jnp.float32)

    params = {"first": jnp.ones((64, 32), jnp.bfloat16) / 8, "second": jnp.ones((32, 16), jnp.bfloat16)}
    for method in ("two_pass", "book_keeping"):
        grad_fn = jax.jit(jaxdp.clipped_grad(loss, clipping=jaxdp.flat(0.1), method=method))
        for row in range(3):
            total, _ = grad_fn(params, x, is_padding_example=np.arange(3) != row)
            norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(total)))
            assert 0.05 < norm <= 0.1 * (1 + 1e-6)
