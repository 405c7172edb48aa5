"""S4e: a record whose gradient cancels moves no sum by more than its bound, whatever the compiler makes of the program.

`benchmarks.cancelling_records` does the same with thousands of random programs, and reads the compiled programs of the whole zoo.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdp
from jaxdp.gradients.methods import Problem
from jaxdp.zeroth_order import aggregation
from tests.compiled_program import faults
from tests.gradients.cancelling import Program, draw, movement
from tests.gradients.test_zoo import METHODS, strictness, transformed
from tests.gradients.zoo import CASES

POLICIES = {
    "flat": jaxdp.flat(1.0),
    "per_layer": jaxdp.per_layer(1.0, group_by="leaf"),
    "automatic": jaxdp.automatic(1.0),
}


def product_in_the_input(params, example):
    x, y, z = example["x"], example["y"], example["z"]
    return jnp.sum(((x * y - z) * 100.0) @ params["w"])


def product_in_the_cotangent(params, example):
    x, y, z = example["x"], example["y"], example["z"]
    q = x * y
    return jnp.sum((x * 1e-3 + (q @ params["w"]) * 0.1) * (q - z))


def scaled_bias(params, example):
    x, y, z = example["x"], example["y"], example["z"]
    return jnp.sum(((x * y - z) + params["w"][0]) * (x * y - z) * 3.0)


STRUCTURES = (
    "mlp_of_one_token",
    "embedding_by_take_fill",
    "one_weight_in_two_layers",
    "embedding_used_twice",
    "scan_over_layers_of_checkpoints",
    "convolution_valid",
)
LOSSES = (product_in_the_input, product_in_the_cotangent, scaled_bias)


@functools.cache
def program(loss, size, width=4):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(size, width)).astype(np.float32) for _ in "xy")
    x[0], y[0] = x[0] * 1e5, y[0] * 1e5
    params = {"w": jnp.asarray(rng.normal(size=(width, width)), jnp.float32)}
    return Program(loss.__name__, loss, params, {"x": x, "y": y, "z": x * y})


def check(program, policy, method, *, microbatch_size=None, place=lambda batch: batch):
    grad_fn = jaxdp.clipped_grad(program.loss, clipping=policy, method=method, microbatch_size=microbatch_size)
    compiled = jax.jit(lambda params, batch, mask: grad_fn(params, batch, is_padding_example=mask)[0])
    moved = movement(lambda params, batch, mask: compiled(params, place(batch), mask), program)
    size = len(program.batch["x"])
    assert moved <= grad_fn.sensitivity() * (1 + 1e-5 * size), (program.name, method, microbatch_size)


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("method", ["vmap", *METHODS])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_record_that_cancels_moves_the_sum_by_no_more_than_the_bound(loss, method, microbatch_size):
    policy = POLICIES["per_layer" if method == "per_layer" else "flat"]
    check(program(loss, 64), policy, method, microbatch_size=microbatch_size)


@pytest.mark.parametrize("size", [1, 4])
def test_so_it_does_in_small_batches(size):
    for loss in LOSSES[:2]:
        check(program(loss, size), POLICIES["automatic"], "auto")


@pytest.mark.parametrize("seed", [6, 35, 1006, 1017])  # 6 and 35 moved the sum by 5e3 and 4e7
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: jnp.dtype(dtype).name)
def test_so_it_does_in_random_programs(seed, dtype):
    drawn = draw(seed, dtype=dtype, remat=seed % 7 == 0)
    for method in ("two_pass", "book_keeping"):
        check(drawn, POLICIES["flat"], method)
    check(drawn, POLICIES["per_layer"], "per_layer")


def test_a_second_pass_that_finds_another_gradient_is_clipped_to_what_the_first_found(monkeypatch):
    """As a compiler may make it, here by force: a thousand times the data."""
    after = Problem.after

    def elsewhere(self, *known):
        later = after(self, *known)
        later.__dict__["batch"] = jax.tree.map(lambda x: 1000 * x, later.batch)
        return later

    monkeypatch.setattr(Problem, "after", elsewhere)
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    batch = rng.normal(size=(2, 5, 4)).astype(np.float32)
    grad_fn = jaxdp.clipped_grad(
        lambda p, x: jnp.sum(jnp.square(x @ p["w"] + p["b"][None])), clipping=jaxdp.flat(1e9), method="two_pass"
    )
    total, found = jax.jit(grad_fn)(params, batch, is_padding_example=np.array([False, True]))
    moved = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(total)))
    np.testing.assert_allclose(moved, found.l2_norms[0, 0], rtol=1e-4)


def test_so_it_does_on_several_devices():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    for method in ("vmap", "two_pass", "book_keeping"):
        check(program(LOSSES[0], 64), POLICIES["flat"], method, place=lambda batch: jax.device_put(batch, sharding))


def quiet(size):
    return jaxdp.plan(num_examples=size, sampling_prob=1.0, num_steps=9, clipping=jaxdp.flat(1.0), noise_multiplier=0.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_so_it_does_before_an_optimizer(loss):
    drawn = program(loss, 64)
    tx = jaxdp.dp_aggregate(quiet(64), jaxdp.secret_key())
    state = tx.init(drawn.params)

    @jax.jit
    def update(params, batch, mask):
        grads = jax.vmap(jax.grad(drawn.loss), (None, 0))(params, batch)
        return jax.tree.map(lambda x: 64 * x, tx.update(grads, state, params, is_padding_example=mask)[0])

    assert movement(update, drawn) <= 1 + 1e-3


def test_so_it_does_in_a_zeroth_order_step():
    """The losses of an example feed a factor and a sum there, too."""
    drawn = program(LOSSES[0], 64)

    @jax.jit
    def released(params, batch, mask):
        rows = jax.vmap(lambda example: (example["x"] * example["y"] - example["z"]) * 100.0)(batch)  # [B, K]
        return 64 * aggregation.private_mean(rows, ~mask, quiet(64), key=jax.random.key(0), step=0) / rows.shape[1]

    assert movement(released, drawn) <= 1 + 1e-3
    assert faults(released.lower(drawn.params, drawn.batch, np.zeros(64, bool)).compile().as_text()) == []


# ---- by structure


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_sum_reads_the_buffers_that_a_norm_was_taken_of(name):
    case = CASES[name]
    with strictness(case):
        for method in ("vmap", *METHODS):
            policy = POLICIES["per_layer" if method == "per_layer" else "flat"]
            compiled = jax.jit(transformed(case, policy, method)).lower(case.params, case.batch).compile()
            assert faults(compiled.as_text()) == [], method


@pytest.mark.parametrize("method", ["vmap", "book_keeping"])
def test_a_first_gradient_that_is_a_constant_leaves_the_wall_standing(method):
    """Of an unused leaf: what the compiler knows must not decide how often the loop runs."""
    case = program(scaled_bias, 4)

    def loss(params, example):
        return case.loss(params["used"], example) + params["a"]

    params = {"a": jnp.zeros(()), "unused": jnp.zeros(3), "used": case.params}
    for order in (params, {"0": jnp.zeros(3), **params}):
        grad_fn = jaxdp.clipped_grad(loss, clipping=POLICIES["flat"], method=method)
        text = jax.jit(lambda *args, f=grad_fn: f(*args)[0]).lower(order, case.batch).compile().as_text()
        assert faults(text) == []
        assert " while(" in text


def test_a_gradient_computed_in_two_kernels_is_found():
    """What all of JAX does without a wall: the check of structure can fail."""

    @jax.jit
    def clipped_sum(x, y, z):
        rows = (x * y - z) * 100.0
        with jax.named_scope("jaxdp_norm"):
            squares = jnp.sum(rows * rows, axis=1)
        with jax.named_scope("jaxdp_factors"):
            factors = jnp.minimum(1.0, 1.0 / jnp.sqrt(squares))
        with jax.named_scope("jaxdp_sum"):
            return jnp.sum(factors[:, None] * rows, axis=0)

    found = faults(clipped_sum.lower(*(jnp.ones((64, 4)),) * 3).compile().as_text())
    assert any("is computed inside the kernel" in fault for fault in found)
    with pytest.raises(ValueError, match="nothing to check"):
        faults(jax.jit(jnp.sin).lower(1.0).compile().as_text())
