"""Clipped sums by the kernels of `pallas_kernels`, interpreted: the definition, the clip norm, and who decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
import pallas_kernels
from jaxdp.gradients import norms, plan
from jaxdp.gradients.factors import Factoring
from jaxdp.gradients.kernels import Kernels
from pallas_kernels import blocks, support

INTERPRETED = "mosaic_gpu_interpret"
needs_interpreter = pytest.mark.skipif(
    support.why_not_here(INTERPRETED) is not None, reason="the interpreter of Mosaic GPU needs jax 0.11"
)
B, T, WIDTH = 2, 9, 8  # tiny: each tile takes the interpreter a quarter of a second


@pytest.fixture(params=["gram", "direct"])
def route(request, monkeypatch):
    """Which one pays is a matter of shapes; both are to be right at all of them."""
    monkeypatch.setattr(plan, "norm_route", lambda uses, rows: (request.param, False))
    return request.param


def one_layer(params, x):
    """A dense layer, and a bias, which no kernel can serve."""
    hidden = jnp.tanh(x @ params["w"] + params["bias"][None])
    return jnp.sum(jnp.square(hidden.astype(jnp.float32)))


def stacked_layers(params, x):
    def layer(hidden, w):
        return jnp.tanh(hidden @ w), None

    hidden, _ = jax.lax.scan(layer, x, params)
    return jnp.sum(jnp.square(hidden.astype(jnp.float32)))


def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    return jnp.asarray(scale * rng.normal(size=(B, T, WIDTH)), jnp.bfloat16)


def params_of(loss):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(0.4 * rng.normal(size=shape), jnp.bfloat16)

    if loss is stacked_layers:
        return normal(2, WIDTH, WIDTH)
    return {"w": normal(WIDTH, 5), "bias": normal(5)}


def policy_of(method):
    return jaxdp.per_layer(0.5) if method == "per_layer" else jaxdp.flat(0.5)


@needs_interpreter
@pytest.mark.parametrize(
    ("loss", "method", "route"),
    [
        (one_layer, "book_keeping", "gram"),
        (one_layer, "per_layer", "direct"),
        (stacked_layers, "book_keeping", "direct"),
        (stacked_layers, "two_pass", "direct"),
    ],
    indirect=["route"],
)
def test_kernels_clip_and_sum_what_the_definition_does(loss, method, route):
    params, batch = params_of(loss), inputs()
    grad_fn = jaxdp.clipped_grad(loss, clipping=policy_of(method), method=method, implementation=INTERPRETED)
    total, not_private = jax.jit(grad_fn)(params, batch)
    definition = jaxdp.clipped_grad(loss, clipping=policy_of(method), method="vmap")
    expected, exact = jax.jit(definition)(params, batch)
    np.testing.assert_allclose(not_private.l2_norms, exact.l2_norms, rtol=4e-3)  # no charge for a sum by XLA
    for ours, theirs in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max())
    served = {leaf.path: (leaf.norm, leaf.norm_implementation, leaf.sum_implementation) for leaf in explained(grad_fn)}
    assert (route, INTERPRETED, INTERPRETED) in served.values()


def explained(grad_fn):
    loss = grad_fn.fun
    return grad_fn.explain(params_of(loss), jax.ShapeDtypeStruct((T, WIDTH), jnp.bfloat16)).leaves


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of the interpreter's NumPy
def test_a_non_finite_example_contributes_exactly_zero(monkeypatch):
    """S9: the kernel multiplies what the factor of zero belongs to, and must not add it."""
    monkeypatch.setattr(plan, "norm_route", lambda uses, rows: ("direct", False))
    params, batch = params_of(one_layer), inputs()
    grad_fn = jax.jit(jaxdp.clipped_grad(one_layer, clipping=jaxdp.flat(0.5), implementation=INTERPRETED))
    broken, not_private = grad_fn(params, batch.at[1, 2, 3].set(jnp.inf), is_padding_example=np.zeros(B, bool))
    without, _ = grad_fn(params, batch, is_padding_example=np.arange(B) == 1)
    assert not_private.contributed.tolist() == [True, False]
    jax.tree.map(np.testing.assert_array_equal, broken, without)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_an_example_that_is_not_kept_adds_nothing_whatever_its_factor():
    left, right = jnp.ones((2, 1, T, SIDE), jnp.bfloat16), jnp.ones((2, 1, T, SIDE), jnp.bfloat16)
    payload = {"left": left.at[0, 0, 3].set(jnp.nan), "right": right.at[0].set(jnp.inf)}
    total = norms.weighted_sum(dense(T), payload, jnp.ones(2), jnp.array([False, True]), kernels=BOTH)
    np.testing.assert_array_equal(total, np.full((1, SIDE, SIDE), T))


# ---- the clip norm holds for the kernels' order of summation

SIDE = 4


def dense(tokens):
    return Factoring("dense", ((), (0,), (1,)), (SIDE, SIDE), tokens, False, lambda x, g: {"left": x, "right": g})


def adversaries():
    """Tokens that cancel exactly but for a small rest, in two steps of 64.

    The scaled sums of the two steps of the first do not cancel; the Gram norm of the second comes out as zero.
    """
    rows = [np.repeat([v, -v, -2 * v, r], [64, 62, 1, 1]) for v, r in ((67 / 64, 2**-15), (75 / 64, 0.00531))]
    right = np.broadcast_to(np.stack(rows)[:, None, :, None], (len(rows), 1, 128, SIDE))
    return jnp.ones(right.shape, jnp.bfloat16), jnp.asarray(right, jnp.bfloat16)


BOTH, SUM = Kernels(INTERPRETED, INTERPRETED), Kernels("xla", INTERPRETED)


@functools.partial(jax.jit, static_argnames=("route", "choice"))
def norms_of(payload, *, route, choice):
    tokens = payload["left"].shape[2]
    return jnp.sqrt(norms.squared_norm([dense(tokens)], [payload], route, choice))


@functools.partial(jax.jit, static_argnames="by")
def added(payload, factor, *, by):
    keep = jnp.ones(1, bool)
    return norms.weighted_sum(dense(payload["left"].shape[2]), payload, factor[None], keep, kernels=Kernels(sum=by))


@needs_interpreter
@pytest.mark.parametrize(("route", "choice"), [("gram", BOTH), ("direct", BOTH), ("direct", SUM)])
def test_no_example_adds_more_than_the_clip_norm(route, choice):
    """S4: whatever takes the norm and whatever the sum, each in its own order of summation."""
    left, right = adversaries()
    estimates = norms_of({"left": left, "right": right}, route=route, choice=choice)
    true = np.linalg.norm(
        np.einsum("bhti,bhtj->bij", np.float64(left), np.float64(right)).reshape(len(left), -1), axis=1
    )
    policy = jaxdp.flat(1.0)
    for row, norm in enumerate(true):
        payload = {"left": left[row : row + 1], "right": right[row : row + 1]}
        for clip_norm in norm * np.array([0.11, 0.77], np.float32):
            factor = policy.factors(estimates[row] / clip_norm, jnp.float32(1.0))
            assert np.linalg.norm(np.float64(added(payload, factor, by=choice.sum))) <= clip_norm * (1 + 1e-6)


# ---- who decides


def test_nothing_measured_is_nothing_changed():
    """The automatic choice is XLA, bits included, while the table is empty."""
    assert blocks.FASTER_FROM == {}
    results = []
    for implementation in (None, "xla"):
        grad_fn = jaxdp.clipped_grad(one_layer, clipping=jaxdp.flat(0.5), implementation=implementation)
        results.append(jax.jit(grad_fn)(params_of(one_layer), inputs()))
        assert {leaf.sum_implementation for leaf in explained(grad_fn)} == {"xla"}
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_measurement_turns_a_kernel_on(monkeypatch, route):
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic on a GPU needs jax 0.11.2")
    kernel = {"gram": "gram_norms", "direct": "wgrad_norms"}[route]
    monkeypatch.setattr(blocks, "FASTER_FROM", {"NVIDIA H200": {kernel: 4}})
    monkeypatch.setattr(support, "target_device_kind", lambda: "NVIDIA H200")
    grad_fn = jaxdp.clipped_grad(one_layer, clipping=jaxdp.flat(0.5))
    chosen = {leaf.path: (leaf.norm_implementation, leaf.sum_implementation) for leaf in explained(grad_fn)}
    assert chosen == {"w": ("mosaic_gpu", "xla"), "bias": ("xla", "xla")}
    monkeypatch.setattr(blocks, "FASTER_FROM", {"NVIDIA H200": {kernel: T + 1, "clip_noise_dense": T}})
    chosen = {leaf.path: (leaf.norm_implementation, leaf.sum_implementation) for leaf in explained(grad_fn)}
    assert chosen == {"w": ("xla", "mosaic_gpu"), "bias": ("xla", "xla")}
    monkeypatch.setattr(support, "target_device_kind", lambda: "cpu")
    assert {leaf.sum_implementation for leaf in explained(grad_fn)} == {"xla"}


def every_kind(params, x):
    """Leaves that a kernel can serve, `dense` and `conv`, and one for each reason why it cannot."""
    wide = x.astype(jnp.float32)
    outputs = [
        x @ params["dense"],
        wide @ params["float32"],
        jnp.einsum("thi,hij->thj", x.reshape(T, 2, WIDTH // 2), params["side_by_side"]),
        params["embedding"][jnp.arange(3)],
        x @ params["twice"] + jnp.tanh(x) @ params["twice"],
        x[0] @ params["one_token"],
        x * params["copy"][None],
        jax.lax.conv_general_dilated(x.T[None], params["conv"], (1,), "VALID"),
    ]
    return sum(jnp.sum(jnp.square(output.astype(jnp.float32))) for output in outputs)


@needs_interpreter
def test_a_named_implementation_takes_every_leaf_that_it_can_serve(monkeypatch):
    shapes = {
        "dense": (WIDTH, 5),
        "side_by_side": (2, WIDTH // 2, 5),
        "embedding": (7, 5),
        "twice": (WIDTH, 5),
        "one_token": (WIDTH, 5),
        "copy": (WIDTH,),
        "conv": (5, WIDTH, 3),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    params["float32"] = jax.ShapeDtypeStruct((WIDTH, 5), jnp.float32)
    grad_fn = jaxdp.clipped_grad(every_kind, clipping=jaxdp.flat(1.0), implementation=INTERPRETED)

    def served():
        explanation = grad_fn.explain(params, jax.ShapeDtypeStruct((T, WIDTH), jnp.bfloat16))
        assert all(leaf.norm_implementation == leaf.sum_implementation for leaf in explanation.leaves)
        return {leaf.path for leaf in explanation.leaves if leaf.sum_implementation == INTERPRETED}, str(explanation)

    monkeypatch.setattr(plan, "norm_route", lambda uses, rows: ("gram", False))
    names, table = served()
    assert names == {"dense", "conv"}
    assert "norm by" in table.splitlines()[0]
    monkeypatch.setattr(plan, "norm_route", lambda uses, rows: ("direct", True))
    names, table = served()
    assert names == set()  # stored gradients
    assert "norm by" not in table


def test_a_norm_charges_for_the_kernel_that_sums():
    """A norm and a sum that decided apart would leave the rounding of one of them out."""
    if support.why_not_here(INTERPRETED) is not None:
        pytest.skip("roundings are those of the kernels, which need jax 0.11")
    payload = {"left": jnp.ones((1, 1, 193, SIDE), jnp.bfloat16), "right": jnp.ones((1, 1, 193, SIDE), jnp.bfloat16)}
    scale = 193 * SIDE
    square = norms.squared_norm([dense(193)], [payload], "direct", Kernels("xla", INTERPRETED))
    chain = 193 + 2 + pallas_kernels.roundings("clip_noise_dense", (1, 193, SIDE), (1, 193, SIDE))
    np.testing.assert_allclose(np.sqrt(square) / scale - 1, chain * 2.0**-23, rtol=0.02)
    stored = norms.squared_norm([dense(193)], [payload], "direct")
    np.testing.assert_allclose(np.sqrt(stored) / scale - 1, 2.0**-8, rtol=0.02)


def test_names_are_checked_when_the_function_is_made(key):
    with pytest.raises(ValueError, match=r"implementation must be one of 'xla', 'mosaic_gpu', .* got 'triton'"):
        jaxdp.clipped_grad(one_layer, clipping=jaxdp.flat(1.0), implementation="triton")
    with pytest.raises(ValueError, match=r"method='vmap' .* calls no kernel"):
        jaxdp.clipped_grad(one_layer, clipping=jaxdp.flat(1.0), method="vmap", implementation="mosaic_gpu")
    the_plan = jaxdp.plan(
        num_examples=100, num_steps=1, expected_batch_size=4, clipping=jaxdp.flat(1.0), noise_multiplier=1.0
    )
    with pytest.raises(ValueError, match="got 'triton'"):
        jaxdp.make_dp_step(one_layer, optax.sgd(1.0), the_plan, implementation="triton")


def test_an_implementation_that_cannot_run_here_raises_before_the_function_is_traced():
    if support.why_not_here("mosaic_gpu") is None:
        pytest.skip("this machine has the GPU")

    def never(params, x):
        raise AssertionError("traced")

    grad_fn = jaxdp.clipped_grad(never, clipping=jaxdp.flat(1.0), implementation="mosaic_gpu")
    for call in (grad_fn, grad_fn.explain):
        with pytest.raises(NotImplementedError, match=r"implementation='mosaic_gpu' cannot run: .*'xla'"):
            call(jnp.zeros((WIDTH, 5), jnp.bfloat16), inputs())
