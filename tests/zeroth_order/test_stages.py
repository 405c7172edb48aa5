"""A block in stages is the block: the same losses, the same updates bit for bit, and less of it on the device at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.block_model import BlockModel, BlockParams, loss_fn
from jaxdp.zeroth_order import (
    ForwardMode,
    Gaussian,
    LowRank,
    OneSided,
    Placement,
    Rademacher,
    Sgd,
    Stages,
    TwoSided,
    generate,
    make_step,
    split_block,
)
from jaxdp.zeroth_order.memory import step_memory
from tests.zeroth_order.models import bits, language_model, token_batch, toy, toy_batch, toy_params
from tests.zeroth_order.test_training import replay, run

STREAMED = Placement(is_streamed=True)


@functools.cache
def deep() -> BlockModel:
    """A block of two matrices with a scale between them, all in a `jit` and a `checkpoint`, and a leaf that nothing reads."""

    @jax.jit
    def first(params, hidden):
        return jnp.tanh(hidden @ params["in"].astype(jnp.float32)) * params["scale"]

    @jax.checkpoint
    def block(params, hidden, example):
        middle = first(params, hidden) * jnp.mean(example["x"])
        return hidden + middle @ params["out"].T

    return dataclasses.replace(toy(), block=block)


def deep_params() -> BlockParams:
    rng = np.random.default_rng(3)

    def draw(*shape):
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    blocks = {"in": draw(4, 8, 24), "out": draw(4, 8, 24), "scale": draw(4, 24), "unused": draw(4, 5)}
    return toy_params()._replace(blocks=blocks)


def one_of(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def case(name):
    """`(model, params, batch)`."""
    if name == "deep":
        return deep(), deep_params(), toy_batch()
    _, model, params = language_model(name)
    return model, params, token_batch()


@pytest.mark.parametrize(("name", "num_stages"), [("deep", 2), ("opt", 6), ("llama", 5)])
def test_stages_partition_the_leaves_in_the_order_of_their_use(name, num_stages):
    """Each matrix is in one stage, and stages are as small as the largest of them."""
    model, params, batch = case(name)
    stages = split_block(model, params, one_of(batch))
    leaves = jax.tree.leaves(params.blocks)
    assert sorted(sum(stages.groups, ())) == list(range(len(leaves)))
    sizes = [sum(leaves[number][0].nbytes for number in group) for group in stages.groups]
    assert max(sizes) < sum(sizes)
    assert len(sizes) == num_stages, sizes


def test_max_bytes_bounds_a_stage_where_the_block_can_be_cut():
    model, params, batch = case("llama")
    leaves = jax.tree.leaves(params.blocks)
    of_block = sum(leaf[0].nbytes for leaf in leaves)
    assert len(split_block(model, params, one_of(batch), max_bytes=of_block).groups) == 1
    half = split_block(model, params, one_of(batch), max_bytes=of_block // 2 + 1).groups
    assert all(sum(leaves[number][0].nbytes for number in group) <= of_block // 2 + 1 for group in half)
    finest = split_block(model, params, one_of(batch), max_bytes=1).groups
    assert len(finest) > len(split_block(model, params, one_of(batch)).groups)


def test_leaves_that_are_used_together_stay_together():
    model = dataclasses.replace(toy(), block=lambda params, hidden, example: hidden @ (params["a"] @ params["b"]))
    blocks = {"a": np.ones((2, 8, 3), np.float32), "b": np.ones((2, 3, 8), np.float32)}
    assert split_block(model, toy_params()._replace(blocks=blocks), one_of(toy_batch()), max_bytes=1) == Stages(
        ((0, 1),)
    )
    twice = dataclasses.replace(toy(), block=lambda params, h, example: (h @ params["a"] @ params["b"]) @ params["a"])
    blocks = {name: np.ones((2, 8, 8), np.float32) for name in "ab"}
    assert split_block(twice, toy_params()._replace(blocks=blocks), one_of(toy_batch()), max_bytes=1) == Stages(
        ((0, 1),)
    )


@pytest.mark.unoptimized
@pytest.mark.parametrize(
    ("name", "estimator"),
    [("deep", OneSided(2)), ("llama", ForwardMode())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_scalars_are_those_of_whole_blocks(name, estimator, key):
    """The same function along the same directions; the compiler may round a sum otherwise."""
    model, params, batch = case(name)
    stages = split_block(model, params, one_of(batch))
    _, expected = run(model, params, batch, key, num_steps=1, estimator=estimator)
    _, found = run(model, params, batch, key, num_steps=1, estimator=estimator, stages=stages, placement=STREAMED)
    np.testing.assert_allclose(found[0].not_private.loss, expected[0].not_private.loss, rtol=1e-5)
    tolerance = 1e-4 if isinstance(estimator, ForwardMode) else 2e-2  # a difference of two losses
    np.testing.assert_allclose(
        found[0].scalars.projected_gradients, expected[0].scalars.projected_gradients, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("law", "options"),
    [
        (Gaussian(), {"estimator": TwoSided(2)}),
        pytest.param(LowRank(), {"estimator": TwoSided(2, num_at_once=2)}, marks=pytest.mark.unoptimized),
        pytest.param(Rademacher(), {"write_every": 2}, marks=pytest.mark.unoptimized),
    ],
    ids=["gaussian", "low_rank", "write_every"],
)
def test_streamed_resident_and_replayed_in_whole_blocks_are_the_same_bits(law, options, key):
    """Directions are by leaf and position, whatever travels with what (S17)."""
    model, params, batch = case("deep")
    stages = split_block(model, params, one_of(batch))
    options = {"law": law, **options}
    resident, infos = run(model, params, batch, key, stages=stages, **options)
    assert bits(resident) != bits(params)
    for prefetch in (0, 1, 3):
        placement = Placement(True, prefetch)
        assert bits(run(model, params, batch, key, stages=stages, placement=placement, **options)[0]) == bits(resident)
    assert bits(replay(model, params, key, infos, **options)) == bits(resident)


@pytest.mark.unoptimized
def test_stochastic_rounding_is_that_of_whole_blocks(key):
    model, params, batch = case("deep")
    model = dataclasses.replace(
        model,
        block=lambda p, h, example: h + jnp.tanh(h @ p["in"].astype(jnp.float32)) @ p["out"].astype(jnp.float32).T,
    )
    params = params._replace(blocks=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params.blocks))
    stages = split_block(model, params, one_of(batch))
    found, infos = run(model, params, batch, key, stages=stages, rounding="stochastic")
    assert bits(replay(model, params, key, infos, rounding="stochastic")) == bits(found) != bits(params)


@pytest.mark.unoptimized
def test_losses_and_text_are_those_of_the_parameters(key):
    causal_lm, model, params = language_model("llama")
    batch = token_batch()
    steps = make_step(model, Sgd(1e-2), stages=split_block(model, params, one_of(batch)), placement=STREAMED)
    state = steps.init(params, direction_key=key)
    expected = [float(loss_fn(model, params, jax.tree.map(lambda leaf, i=i: leaf[i], batch))) for i in range(2)]
    np.testing.assert_allclose(steps.losses(state, batch)[:2], expected, rtol=1e-5)
    shorter = jax.tree.map(lambda leaf: leaf[:, :, :7], batch)  # the stages are cut anew for other lengths
    assert np.all(np.isfinite(steps.losses(state, shorter)))
    tokens = generate(causal_lm, state, [1, 2, 3], max_new_tokens=5)
    assert tokens == generate(causal_lm, params, [1, 2, 3], max_new_tokens=5)


def test_the_programs_do_not_grow_with_depth(key):
    from jaxdp.zeroth_order import programs

    sizes = []
    for num_blocks in (2, 4):
        params = deep_params()
        params = params._replace(blocks=jax.tree.map(lambda leaf, n=num_blocks: leaf[:n], params.blocks))
        run(deep(), params, toy_batch(), key, stages=split_block(deep(), params, one_of(toy_batch())))
        sizes.append(programs.visit_stage_and_write._cache_size())
    assert sizes[1] == sizes[0]


@pytest.mark.unoptimized
def test_predicted_memory_has_a_stage_where_it_had_a_block():
    model, params, batch = case("deep")
    stages = split_block(model, params, one_of(batch))
    options = {"plan": None, "estimator": TwoSided(), "law": Rademacher()}
    whole = step_memory(model, Sgd(1e-2), params, batch, **options)
    split = step_memory(model, Sgd(1e-2), params, batch, stages=stages, **options)
    assert len(split.parts) == len(split.visits) == len(stages.groups)
    assert split.block == whole.block
    assert split.link_bytes(STREAMED) == whole.link_bytes(STREAMED)
    # Three neighbors of a stage instead of three blocks.
    in_flight = whole.device_peak(STREAMED) - whole.device_peak(Placement(True, 0))
    assert in_flight == 2 * whole.block
    assert split.device_peak(STREAMED) - split.device_peak(Placement(True, 0)) <= 2 * max(split.parts)
    assert split.host_bytes(STREAMED) < whole.host_bytes(STREAMED)


def test_bad_stages_are_refused():
    model, params, batch = case("deep")
    frozen = BlockParams({}, {"base": np.ones((4, 3), np.float32)})
    with pytest.raises(ValueError, match="blocks with frozen leaves are not split"):
        split_block(model, params, one_of(batch), frozen=frozen)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        split_block(model, params, one_of(batch), max_bytes=0)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="not each of the block's 4 leaves once"):
        make_step(model, Sgd(1e-2), stages=Stages(((0,), (1,)))).init(params, direction_key=key)
    stages = split_block(model, params, one_of(batch))
    with pytest.raises(ValueError, match="leave stages out"):
        make_step(model, Sgd(1e-2), stages=stages).init(params, direction_key=key, frozen=frozen)
    backwards = Stages(stages.groups[::-1])
    steps = make_step(model, Sgd(1e-2), stages=backwards)
    with pytest.raises(ValueError, match="used outside its stage"):
        steps.step(steps.init(params, direction_key=key), batch)
