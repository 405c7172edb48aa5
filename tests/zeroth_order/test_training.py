"""Streamed, resident and replayed runs are one run, bit for bit; its updates are those of the equation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp import quantization
from jaxdp.block_model import BlockModel
from jaxdp.zeroth_order import (
    BlockParams,
    DeferredState,
    ForwardMode,
    Gaussian,
    LowRank,
    OneSided,
    Placement,
    Rademacher,
    Scalars,
    Sgd,
    TwoSided,
    directions,
    make_step,
)
from tests.zeroth_order.models import bits, language_model, token_batch, toy, toy_batch, toy_params
from tests.zeroth_order.test_estimators import direction

STREAMED = Placement(is_streamed=True)


def run(model, params, batch, key, *, num_steps=4, flush_at=(), sgd=None, frozen=None, **options):
    """Parameters after some steps, and what the steps reported."""
    steps = make_step(model, Sgd(1e-2) if sgd is None else sgd, **options)
    state, infos = steps.init(params, direction_key=key, frozen=frozen), []
    for t in range(num_steps):
        state, info = steps.step(state, batch)
        infos.append(info)
        if t in flush_at:
            state = steps.flush(state)
    return steps.flush(state).params(), infos


def replay(model, params, key, infos, **options):
    steps = make_step(model, Sgd(123.0), **options)  # the learning rate is that of the scalars
    state = steps.init(params, direction_key=key)
    for info in infos:
        state = steps.replay(state, info.scalars)
    return steps.flush(state).params()


@pytest.mark.parametrize(
    ("law", "num_directions"),
    [
        (Rademacher(), 1),
        (Rademacher(), 4),
        (LowRank(), 2),
        pytest.param(Gaussian(), 1, marks=pytest.mark.unoptimized),
        pytest.param(Gaussian(), 4, marks=pytest.mark.unoptimized),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_streamed_resident_and_replayed_are_the_same_bits(law, num_directions, key):
    params, batch = toy_params(), toy_batch()
    options = {"law": law, "estimator": TwoSided(num_directions)}
    resident, infos = run(toy(), params, batch, key, **options)
    assert bits(resident) != bits(params)
    streamed, _ = run(toy(), params, batch, key, placement=STREAMED, **options)
    assert bits(streamed) == bits(resident)
    deeper, _ = run(toy(), params, batch, key, placement=Placement(True, prefetch=3), flush_at=(0, 1), **options)
    assert bits(deeper) == bits(resident)
    leanest, _ = run(toy(), params, batch, key, placement=Placement(True, prefetch=0), **options)
    assert bits(leanest) == bits(resident)
    assert bits(replay(toy(), params, key, infos, **options)) == bits(resident)


@pytest.mark.parametrize("name", [pytest.param("opt", marks=pytest.mark.unoptimized), "llama"])
def test_language_models_stream_to_the_same_bits(name, key):
    _, model, params = language_model(name)
    batch = token_batch()
    resident, infos = run(model, params, batch, key, num_steps=3)
    streamed, _ = run(model, params, batch, key, num_steps=3, placement=STREAMED)
    assert bits(streamed) == bits(resident) != bits(params)
    assert bits(replay(model, params, key, infos)) == bits(resident)


@pytest.mark.unoptimized
@pytest.mark.parametrize(
    "sgd",
    [
        Sgd(1e-2),
        Sgd(optax.linear_schedule(1e-2, 1e-3, 4), weight_decay=0.5),
        Sgd(1e-2, momentum=0.5, momentum_window=3),
    ],
    ids=["plain", "schedule and decay", "momentum"],
)
def test_the_update_is_its_equation(sgd, key):
    """w <- (1 - lr wd) w - lr sum_h beta^h G_(t-h), G = mean_k g_k z_k; vectors do not decay."""
    params, batch, T, K = toy_params(), toy_batch(), 4, 2
    found, infos = run(toy(), params, batch, key, num_steps=T, sgd=sgd, estimator=TwoSided(K))
    w, estimates = jax.tree.map(np.asarray, params), []
    for t, info in enumerate(infos):
        lr = float(sgd.rate(jnp.int32(t)))
        np.testing.assert_allclose(float(info.scalars.learning_rate), lr, rtol=1e-6)
        g = np.asarray(info.scalars.projected_gradients)
        zs = [direction(Rademacher(), params, key, t, k) for k in range(K)]
        estimates.append(
            jax.tree.map(lambda *z, g=g: sum(c * np.asarray(d) for c, d in zip(g, z, strict=True)) / K, *zs)
        )
        reach = estimates[::-1][: sgd.num_terms]
        velocity = jax.tree.map(lambda *G: sum(sgd.momentum**h * part for h, part in enumerate(G)), *reach)

        def moved(path, leaf, v, lr=lr):
            is_block = path[0] == jax.tree_util.GetAttrKey("blocks")
            decays = leaf.ndim - is_block > 1
            return leaf * (1 - lr * sgd.weight_decay * decays) - lr * v

        w = jax.tree_util.tree_map_with_path(moved, w, velocity)
    for expected, leaf in zip(jax.tree.leaves(w), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=2e-5, atol=1e-5)


def test_the_last_update_is_not_lost(key):
    """S16: after one step the blocks do not have its update; `flush` gives it to them, and a second one changes nothing."""
    params = toy_params()
    steps = make_step(toy(), Sgd(1e-2), placement=STREAMED)
    state, _ = steps.step(steps.init(params, direction_key=key), toy_batch())
    assert isinstance(state, DeferredState)
    assert not hasattr(state, "params")
    with pytest.raises(TypeError, match="call flush"):
        steps.losses(state, toy_batch())
    flushed = steps.flush(state)
    assert bits(flushed.params()) != bits(params)
    assert steps.flush(flushed) is flushed


def test_a_deferred_update_has_the_learning_rate_of_its_own_step(key):
    """With a schedule that is zero from the second step on, all that happens is the first update, applied during the second."""
    sgd = Sgd(lambda step: jnp.where(step == 0, 1e-2, 0.0))
    one, _ = run(toy(), toy_params(), toy_batch(), key, num_steps=1, sgd=sgd)
    three, _ = run(toy(), toy_params(), toy_batch(), key, num_steps=3, sgd=sgd)
    assert bits(one) == bits(three) != bits(toy_params())


@pytest.mark.unoptimized
def test_a_tied_leaf_has_one_direction_and_one_decay(key):
    """The table is read by embed and loss: with a zero gradient it decays once, and both reads see one perturbation."""
    seen = []

    def embed(resident, example):
        return example["x"] @ resident["table"]

    def loss(resident, hidden, example):
        seen.append(resident["table"].shape)
        return 0.0 * jnp.sum(hidden) + jnp.sum(resident["table"] * 0.0)

    model = BlockModel(embed, toy().block, loss)
    params = toy_params()
    found, _ = run(model, params, toy_batch(), key, num_steps=1, sgd=Sgd(0.1, weight_decay=1.0))
    np.testing.assert_allclose(found.resident["table"], 0.9 * params.resident["table"], rtol=1e-5)

    def difference(resident, hidden, example):  # hidden is x @ table as embed saw it
        return jnp.sum(jnp.square(hidden - example["x"] @ resident["table"]))

    same = BlockModel(embed, lambda params, hidden, example: hidden, difference)
    _, infos = run(same, params, toy_batch(), key, num_steps=1)
    assert float(infos[0].not_private.mean_loss()) == 0.0


def test_non_finite_examples_count_as_absent(key):
    """S9: a NaN neither poisons the weights nor is it averaged in; without any finite example nothing moves."""
    params, batch = toy_params(), toy_batch()
    poisoned = jax.tree.map(np.copy, batch)
    poisoned["x"][[1, 4]] = np.nan
    mask = np.zeros(6, bool)
    mask[[1, 4]] = True
    steps = make_step(toy(), Sgd(1e-2))
    state, info = steps.step(steps.init(params, direction_key=key), poisoned)
    assert not np.any(info.not_private.contributed[np.array([1, 4])])
    assert int(np.sum(info.not_private.contributed)) == 4
    other, masked = steps.step(steps.init(params, direction_key=key), batch, mask)
    assert int(np.sum(masked.not_private.contributed)) == 4
    np.testing.assert_array_equal(info.scalars.projected_gradients, masked.scalars.projected_gradients)
    assert bits(steps.flush(state).params()) == bits(steps.flush(other).params())
    state, info = steps.step(steps.init(params, direction_key=key), jax.tree.map(lambda leaf: leaf * np.nan, batch))
    assert float(info.scalars.projected_gradients[0]) == 0.0
    assert bits(steps.flush(state).params()) == bits(params)


@pytest.mark.unoptimized
def test_fzoo_divides_by_the_spread(key):
    """arXiv 2506.09034: w - eta / (N s) sum_i (l_i - l_0) u_i, s the population std of the l_i; without spread, no step."""
    params, batch = toy_params(), toy_batch()
    options = {"estimator": OneSided(4, 1e-2)}
    _, raw = run(toy(), params, batch, key, num_steps=1, **options)
    _, found = run(toy(), params, batch, key, num_steps=1, sgd=Sgd(1e-2, is_normalized=True), **options)
    g = np.asarray(raw[0].scalars.projected_gradients)
    np.testing.assert_allclose(found[0].scalars.projected_gradients, g / g.std(), rtol=1e-4)
    flat = BlockModel(toy().embed, toy().block, lambda resident, hidden, example: jnp.float32(3.0) + 0.0 * hidden[0])
    _, found = run(flat, params, batch, key, num_steps=1, sgd=Sgd(1e-2, is_normalized=True), **options)
    np.testing.assert_array_equal(found[0].scalars.projected_gradients, np.zeros(4))


@pytest.mark.unoptimized
@pytest.mark.parametrize("estimator", [OneSided(3), ForwardMode(3)], ids=lambda estimator: type(estimator).__name__)
def test_other_estimators_stream_to_the_same_bits(estimator, key):
    options = {"estimator": estimator, "num_steps": 3}
    resident, _ = run(toy(), toy_params(), toy_batch(), key, **options)
    streamed, _ = run(toy(), toy_params(), toy_batch(), key, placement=STREAMED, **options)
    assert bits(streamed) == bits(resident)


def test_windowed_write_back_is_exact_in_float32(key):
    """Updates applied afresh at every visit and written every third: the same parameters."""
    every, infos = run(toy(), toy_params(), toy_batch(), key, num_steps=7)
    third, _ = run(toy(), toy_params(), toy_batch(), key, num_steps=7, write_every=3, placement=STREAMED)
    assert bits(every) == bits(third)
    assert bits(replay(toy(), toy_params(), key, infos, write_every=3)) == bits(every)


@pytest.mark.unoptimized
def test_small_updates_vanish_in_bfloat16_unless_rounded_stochastically_or_gathered(key):
    """S19: lr g z below half a unit in the last place is lost by rounding to nearest at every step."""
    params = toy_params(width=32, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

    def moves(base, **options):
        steps = make_step(toy(), Sgd(1e-2), **options)
        state = steps.init(base, direction_key=key)
        for t in range(60):
            state = steps.replay(state, Scalars(jnp.float32([(-1) ** (t // 20)]), jnp.float32(1e-4)))
        found = steps.flush(state).params()
        pairs = zip(jax.tree.leaves(found.blocks), jax.tree.leaves(wide.blocks), strict=True)
        return np.concatenate([(np.asarray(new, np.float32) - old).ravel() for new, old in pairs])

    exact = moves(wide)

    def arrived(**options):  # 1: the whole update
        return float(moves(params, **options) @ exact / (exact @ exact))

    nearest, gathered = arrived(), arrived(write_every=20)
    assert nearest < 0.4
    assert gathered > nearest + 0.1
    assert abs(arrived(rounding="stochastic") - 1) < 0.3


@pytest.mark.unoptimized
def test_frozen_parameters_are_joined_and_never_change(key):
    """A bias trained below frozen kernels is the run whose kernels are simply not perturbed."""
    params, batch = toy_params(), toy_batch()
    trained = BlockParams({"scale": params.resident["scale"]}, {"bias": params.blocks["bias"]})
    frozen = BlockParams({"table": params.resident["table"]}, {"kernel": params.blocks["kernel"]})
    resident, _ = run(toy(), trained, batch, key, frozen=frozen)
    streamed, _ = run(toy(), trained, batch, key, frozen=frozen, placement=STREAMED)
    assert bits(resident) == bits(streamed) != bits(trained)
    steps = make_step(toy(), Sgd(1e-2))
    state = steps.init(trained, direction_key=key, frozen=frozen)
    whole = steps.init(params, direction_key=key)
    np.testing.assert_array_equal(steps.losses(state, batch), steps.losses(whole, batch))


@pytest.mark.unoptimized
@pytest.mark.parametrize("format", ["int6", "int4"])
def test_frozen_blocks_may_be_quantized(format, key):
    """A run on packed weights is the run on the weights that they stand for, streamed or resident."""
    params, batch = toy_params(), toy_batch()
    trained = BlockParams({}, {"bias": params.blocks["bias"]})  # as adapters: nothing outside the blocks
    packed = quantization.quantize_matrices({"kernel": params.blocks["kernel"]}, format)
    meant = {"kernel": np.asarray(quantization.dequantize(packed["kernel"].arrays, packed["kernel"].spec, jnp.float32))}
    expected, _ = run(toy(), trained, batch, key, frozen=BlockParams(params.resident, meant))
    resident, _ = run(toy(), trained, batch, key, frozen=BlockParams(params.resident, packed))
    streamed, _ = run(toy(), trained, batch, key, frozen=BlockParams(params.resident, packed), placement=STREAMED)
    assert bits(resident) == bits(streamed) != bits(trained)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(resident), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    steps = make_step(toy(), Sgd(1e-2), placement=STREAMED)
    state = steps.init(trained, direction_key=key, frozen=BlockParams(params.resident, packed))
    assert {name: leaf.dtype.name for name, leaf in state.frozen.blocks[0].items()} == {"uint8": "uint8"}
    with pytest.raises(ValueError, match="only frozen ones can be"):
        steps.init(BlockParams(params.resident, packed), direction_key=key)


@pytest.mark.unoptimized
def test_losses_stream(key):
    _, model, params = language_model("opt")
    batch = token_batch()
    found = [make_step(model, Sgd(1e-2), placement=placement) for placement in (Placement(), STREAMED)]
    values = [np.asarray(steps.losses(steps.init(params, direction_key=key), batch)) for steps in found]
    np.testing.assert_array_equal(*values)
    assert values[0].shape == (3,)


def test_host_arrays_wait_on_the_host_and_are_given_up(key):
    """A streamed block lives in pinned host memory; a step consumes its state."""
    steps = make_step(toy(), Sgd(1e-2), placement=STREAMED)
    state = steps.init(toy_params(), direction_key=key)
    kinds = {leaf.sharding.memory_kind for bucket in state.blocks for leaf in jax.tree.leaves(bucket)}
    assert kinds == {"pinned_host"}
    state, _ = steps.step(state, toy_batch())
    after, _ = steps.step(state, toy_batch())
    assert all(leaf.is_deleted() for bucket in state.waiting.blocks for leaf in jax.tree.leaves(bucket))
    assert not any(leaf.is_deleted() for bucket in after.waiting.blocks for leaf in jax.tree.leaves(bucket))


@pytest.mark.unoptimized
def test_programs_do_not_grow_with_depth(key):
    """Twice the blocks: no further program is compiled."""
    from jaxdp.zeroth_order import programs

    sizes = []
    for num_blocks in (2, 4):
        run(toy(), toy_params(num_blocks=num_blocks, width=6), toy_batch(), key, num_steps=2)
        sizes.append([f._cache_size() for f in (programs.visit_and_keep, programs.visit_and_write, programs.settle)])
    assert sizes[0] == sizes[1]


@pytest.mark.unoptimized
def test_large_blocks_are_changed_leaf_by_leaf_to_the_same_bits(key, monkeypatch):
    """A block above a million entries is updated leaf by leaf, in place; a small one in one piece."""
    params = toy_params(dtype=jnp.bfloat16)

    def replayed():
        steps = make_step(toy(), Sgd(1.0), estimator=TwoSided(2), write_every=2, rounding="stochastic")
        state = steps.init(params, direction_key=key)
        for _ in range(3):
            state = steps.replay(state, Scalars(jnp.asarray([0.5, -2.0], jnp.float32), jnp.float32(0.1)))
        return bits(steps.flush(state).params())

    at_once = replayed()
    monkeypatch.setattr(directions, "_AT_ONCE", 0)
    jax.clear_caches()  # the threshold is read while tracing
    by_leaf = replayed()
    jax.clear_caches()
    assert at_once == by_leaf != bits(params)


def test_a_gpu_with_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    with pytest.raises(RuntimeError, match=r"jax 0\.11\.2 or newer, and this is 0\.10\.2"):
        make_step(toy(), Sgd(1e-2), placement=STREAMED)
    make_step(toy(), Sgd(1e-2))


def test_bad_input_is_refused(key):
    steps = make_step(toy(), Sgd(1e-2))
    params = toy_params()
    with pytest.raises(ValueError, match="stacked"):
        steps.init(
            BlockParams(params.resident, {**params.blocks, "bias": params.blocks["bias"][:2]}), direction_key=key
        )
    with pytest.raises(ValueError, match="frozen has 2 blocks and params 4"):
        steps.init(params, direction_key=key, frozen=BlockParams({}, {"more": np.zeros((2, 3), np.float32)}))
    with pytest.raises(TypeError, match="state must be"):
        steps.step(params, toy_batch())
    with pytest.raises(ValueError, match="momentum"):
        Sgd(1e-2, momentum=1.0)
    with pytest.raises(ValueError, match="learning_rate"):
        Sgd(-1.0)
    with pytest.raises(ValueError, match="rounding"):
        make_step(toy(), Sgd(1e-2), rounding="up")
    state = dataclasses.replace(steps.init(params, direction_key=key), step=2**32 - 1)
    with pytest.raises(ValueError, match="step must be between"):
        steps.step(state, toy_batch())
