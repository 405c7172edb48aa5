"""No record reaches another before the clip (S3): what a loss says about batches is not asked, or refused.

Every coupling here subtracts the mean over a batch, and is the identity for one example: the clipped sum must be the one of the
loss without it.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax import lax
from jax.experimental import io_callback
from jax.sharding import AxisType, PartitionSpec as P

import jaxdp
from jaxdp import _replicas, zeroth_order as zo
from jaxdp.gradients import clipped_grad, jaxprs
from tests.gradients.zoo import CASES

B, T, D = 5, 3, 4
RNG = np.random.default_rng(31)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(D, D)), jnp.float32), "b": jnp.zeros(D)}
X = RNG.normal(size=(B, D)).astype(np.float32) * np.linspace(0.2, 3, B, dtype=np.float32)[:, None]
C = 0.5
POLICIES = {
    "vmap": jaxdp.flat(C),
    "book_keeping": jaxdp.flat(C),
    "two_pass": jaxdp.flat(C),
    "per_layer": jaxdp.per_layer(C),
}


@jax.custom_batching.custom_vmap
def centered(x):
    return x


@centered.def_vmap
def _(size, in_batched, x):
    return x - jnp.mean(x, axis=0, keepdims=True), in_batched[0]


def same(x):
    return x


def called_back(vmap_method, x):
    def host(x):
        return np.asarray(x - np.mean(x, axis=0, keepdims=True) if x.ndim > 1 else x)

    x = lax.stop_gradient(x)
    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method=vmap_method)


def with_jvp_rule(coupled, x):
    @jax.custom_jvp
    def fun(x):
        return 2 * x

    fun.defjvp(lambda primals, tangents: (fun(*primals), 2 * tangents[0] * (1 + jnp.square(coupled(primals[0])))))
    return fun(x)


def with_vjp_rule(coupled, x):
    @jax.custom_vjp
    def fun(x):
        return 2 * x

    fun.defvjp(lambda x: (2 * x, x), lambda x, g: (2 * g * (1 + jnp.square(coupled(x))),))
    return fun(x)


def halved(coupled, x):
    times = jnp.where(x[0] > 0, 2, 1)  # so that it is no scan
    return lax.fori_loop(0, times, lambda _, c: coupled(c) / 2, x)


WHERE = {
    "straight": lambda coupled, x: coupled(x),
    "jit": lambda coupled, x: jax.jit(lambda x: coupled(x) + 1)(x),
    "scan": lambda coupled, x: lax.scan(lambda c, _: (jnp.tanh(coupled(c)), None), x, None, length=2)[0],
    "cond": lambda coupled, x: lax.cond(x[0] > 0, coupled, lambda x: 2 * x, x),
    "checkpoint": lambda coupled, x: jax.checkpoint(lambda x: jnp.sin(coupled(x)))(x),
    "custom_jvp": with_jvp_rule,
    "custom_vjp": with_vjp_rule,
    "while": lambda coupled, x: x + halved(coupled, lax.stop_gradient(x)),
}  # fmt: skip


def everywhere(places, coupled, params, x):
    """A loss with a coupling before, between and after what its parameters do, in every body that may hold one."""
    for place in places:
        x = jnp.tanh(WHERE[place](coupled, x) @ params["w"] + params["b"])
    x = WHERE["checkpoint"](coupled, lax.scan(lambda c, _: (coupled(c) @ params["w"], None), x, None, length=2)[0])
    return jnp.sum(jnp.square(coupled(x) - 0.3))


def everything(callback, coupled, params, x):
    hidden = functools.partial(everywhere, WHERE)(coupled, params, callback(x))
    return hidden + jnp.sum(callback(x @ params["w"]) * params["b"])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("method", POLICIES)
def test_what_a_loss_says_of_batches_is_not_asked(method):
    """In jit, scan, cond, checkpoint, while loops and the rules of custom derivatives."""
    callback = functools.partial(called_back, {"vmap": "broadcast_all", "two_pass": None}.get(method, "expand_dims"))
    coupled = functools.partial(everything, callback, centered)
    alone = functools.partial(everything, lax.stop_gradient, same)
    grad_fn = clipped_grad(coupled, clipping=POLICIES[method], method=method)
    program = jax.jit(lambda mask: grad_fn(PARAMS, X, is_padding_example=mask))
    total, not_private = program(np.zeros(B, bool))
    expected, theirs = jax.jit(clipped_grad(alone, clipping=POLICIES[method], method="vmap"))(PARAMS, X)
    np.testing.assert_allclose(not_private.l2_norms, theirs.l2_norms, rtol=1e-4)
    np.testing.assert_allclose(flat(total), flat(expected), rtol=0, atol=2e-5)
    without, _ = program(np.arange(B) == B - 1)
    assert np.linalg.norm(flat(total) - flat(without)) <= C * 1.0001
    batch_mean = jnp.mean(jax.vmap(centered)(jnp.asarray(X)))  # the rule is what it is elsewhere
    assert abs(float(batch_mean)) < 1e-6 < abs(float(X.mean()))


@pytest.mark.parametrize("vmap_method", ["broadcast_all", "expand_dims", "legacy_vectorized", None])
def test_the_definition_calls_back_for_one_example(vmap_method):
    def loss(callback, params, x):
        return jnp.sum(jnp.tanh(callback(x) @ params["w"]))

    def clipped(callback):
        return clipped_grad(functools.partial(loss, callback), clipping=jaxdp.flat(C), method="vmap")(PARAMS, X)[0]

    found, expected = clipped(functools.partial(called_back, vmap_method)), clipped(same)
    np.testing.assert_allclose(found["w"], expected["w"], atol=1e-5)


def test_what_is_called_in_another_language_is_not_shown_a_batch():
    def loss(vmap_method, w, x):
        call = jax.ffi.ffi_call("none", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method=vmap_method)
        return jnp.sum(call(x) * w)

    for vmap_method, is_apart in (("broadcast_all", True), ("expand_dims", True), (None, True), ("sequential", False)):
        traced = jaxprs.trace(functools.partial(loss, vmap_method), jnp.float32(2), jnp.ones(D))
        assert bool(jaxprs.find_couplings(traced.body, derivative=None).apart) == is_apart


def couplings_in(where, coupled):
    return jaxprs.trace(lambda w, x: jnp.sum(WHERE[where](coupled, w * x)), jnp.float32(2), jnp.ones(D)).couplings


@pytest.mark.parametrize("where", WHERE)
def test_a_coupling_is_found_in_every_body(where):
    for coupled in (centered, functools.partial(called_back, "legacy_vectorized")):
        assert couplings_in(where, coupled).apart
    for harmless in (same, functools.partial(called_back, "sequential")):
        assert not couplings_in(where, harmless).apart


def test_ordinary_code_is_not_slowed():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for case in CASES.values():
            example = jax.tree.map(lambda x: x[0], case.batch)
            couplings = jaxprs.trace(case.fun, case.params, example).couplings
            assert not any((couplings.apart, couplings.collectives, couplings.stateful)), (case.name, couplings)


@pytest.mark.parametrize("method", ["vmap", "book_keeping"])
def test_what_vmap_cannot_map_runs_one_example_after_the_other(method):
    sizes = jnp.array([1, 2], jnp.int32)

    def loss(params, x):
        return jnp.sum(jnp.tanh(lax.ragged_dot(x, params["w"], sizes)))

    def dense(params, x):
        return jnp.sum(jnp.tanh(x[:1] @ params["w"][0])) + jnp.sum(jnp.tanh(x[1:] @ params["w"][1]))

    params = {"w": jnp.stack([PARAMS["w"], -2 * PARAMS["w"]])}
    batch = RNG.normal(size=(B, T, D)).astype(np.float32)
    with pytest.raises(NotImplementedError):
        jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    grad_fn = clipped_grad(loss, clipping=jaxdp.flat(C), method=method)
    assert "one example after the other" in grad_fn.explain(params, batch[0]).leaves[0].reason
    total, _ = grad_fn(params, batch)
    expected, _ = clipped_grad(dense, clipping=jaxdp.flat(C), method="vmap")(params, batch)
    np.testing.assert_allclose(total["w"], expected["w"], atol=1e-5)


# ---- refusals

COLLECTIVES = {
    "psum": lambda x: lax.psum(x, "records"),
    "pmax": lambda x: lax.pmax(x, "records"),
    "all_gather": lambda x: lax.all_gather(x, "records")[0],
    "ppermute": lambda x: lax.ppermute(x, "records", [(0, 1), (1, 0)]),
    "all_to_all": lambda x: lax.all_to_all(x[:2], "records", 0, 0),
    "reduce_scatter": lambda x: lax.psum_scatter(x[:2], "records"),
    "batch norm": lambda x: nn.BatchNorm(use_running_average=False, axis_name="records").apply(NORM, x, mutable=["batch_stats"])[0],
}  # fmt: skip
NORM = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((T, D)))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_over_an_outer_axis_is_refused(name):
    def loss(params, x):
        return jnp.sum(jnp.tanh(COLLECTIVES[name](x * params["b"])))

    calls = []
    primitive = "psum" if name == "batch norm" else name

    def grouped(x):
        for method in ("vmap", "auto"):
            with pytest.raises(ValueError, match=f"`{primitive}` over axis 'records'"):
                clipped_grad(loss, clipping=jaxdp.flat(C), method=method)(PARAMS, x)
        with pytest.raises(ValueError, match="couples the records of that axis"):
            clipped_grad(loss, clipping=jaxdp.flat(C)).explain(PARAMS, x[0])
        calls.append(name)
        return x

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.vmap(grouped, axis_name="records")(np.stack([X, X]))
        assert calls
        with pytest.raises(ValueError, match=r"no batch axis.*records.*use_running_average=True"):
            clipped_grad(loss, clipping=jaxdp.flat(C))(PARAMS, X)


def test_a_collective_is_found_in_bodies_and_rules():
    def over(x):
        return lax.psum(x, "records")

    def grouped(x):
        for place in ("scan", "cond", "checkpoint", "custom_jvp", "custom_vjp", "while"):
            assert couplings_in(place, over).collectives == (("psum", "records"),), place
        assert not jaxprs.trace(
            lambda w, x: w * lax.axis_index("records").astype(x.dtype), jnp.float32(2), jnp.ones(D)
        ).couplings.collectives
        return x

    jax.vmap(grouped, axis_name="records")(np.ones(2, np.float32))


def test_a_collective_over_an_axis_of_the_example_is_none():
    mesh = jax.make_mesh((2,), ("tokens",), axis_types=(AxisType.Auto,))

    def by_vmap(params, x):
        normal = jax.vmap(lambda row: row - lax.pmean(row, "tokens") + lax.axis_index("tokens"), axis_name="tokens")(x)
        return jnp.sum(jnp.tanh(normal @ params["w"]))

    def by_hand(params, x):
        positions = jnp.arange(2, dtype=jnp.float32)[:, None]
        return jnp.sum(jnp.tanh((x - jnp.mean(x, axis=0, keepdims=True) + positions) @ params["w"]))

    def by_shard_map(params, x):
        summed = jax.shard_map(lambda x: lax.psum(x, "tokens"), mesh=mesh, in_specs=P("tokens"), out_specs=P())(x)
        return jnp.sum(jnp.tanh(summed @ params["w"]))

    assert not jaxprs.trace(by_shard_map, PARAMS, jnp.ones((2, D))).couplings.collectives
    batch = RNG.normal(size=(B, 2, D)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        total, _ = clipped_grad(by_vmap, clipping=jaxdp.flat(C))(PARAMS, batch)
        expected, _ = clipped_grad(by_hand, clipping=jaxdp.flat(C))(PARAMS, batch)
    np.testing.assert_allclose(flat(total), flat(expected), atol=1e-5)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("method", ["vmap", "book_keeping", "two_pass"])
def test_a_key_of_an_example_draws_what_it_draws_alone(method, implementation):
    """`jax.vmap` draws from the first such key for all: with another record 0 every record would have other draws."""

    def loss(w, example):
        kept = jax.random.bernoulli(jax.random.fold_in(example["key"], 3), 0.5, (D,))
        return jnp.sum(jnp.where(kept, example["x"] @ w["w"], 0.0))

    keys = jax.random.split(jax.random.key(5, impl=implementation), B)
    grad_fn = jax.jit(lambda *args: clipped_grad(loss, clipping=POLICIES["vmap"], method=method)(*args)[0])
    total = sum(np.asarray(grad_fn(PARAMS, {"x": X[i : i + 1], "key": keys[i : i + 1]})["w"]) for i in range(B))
    np.testing.assert_allclose(grad_fn(PARAMS, {"x": X, "key": keys})["w"], total, rtol=1e-4, atol=1e-5)


def test_bits_of_a_device_generator_are_those_of_an_example_alone():
    def loss(w, example):
        _, bits = lax.rng_bit_generator(example["words"], (D,))
        return jnp.sum((example["x"] * (bits % 2).astype(jnp.float32)) @ w["w"])

    batch = {"x": X, "words": RNG.integers(2**32, size=(B, 4), dtype=np.uint32)}
    grad_fn = jax.jit(lambda *args: clipped_grad(loss, clipping=POLICIES["vmap"])(*args)[0])
    total = sum(np.asarray(grad_fn(PARAMS, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))["w"]) for i in range(B))
    np.testing.assert_allclose(grad_fn(PARAMS, batch)["w"], total, rtol=1e-4, atol=1e-5)


def test_the_generator_without_a_key_is_refused():
    def loss(w, x):
        return jnp.sum(x @ w["w"]) * lax.rng_uniform(0.0, 1.0, ())

    with pytest.raises(ValueError, match="rng_uniform"):
        clipped_grad(loss, clipping=POLICIES["vmap"])(PARAMS, X)


def test_state_from_call_to_call_is_refused():
    seen = jax.new_ref(jnp.zeros(D))

    def by_callback(params, x):
        scale = io_callback(lambda x: x, jax.ShapeDtypeStruct((D,), jnp.float32), x)
        return jnp.sum(scale @ params["w"])

    def by_ref(params, x):
        seen[...] += x
        return jnp.sum(seen[...] @ params["w"])

    def looking(params, x):
        jax.debug.callback(lambda x: None, x)
        return jnp.sum(x @ params["w"])

    for loss in (by_callback, by_ref):
        for method in ("vmap", "auto"):
            with pytest.raises(ValueError, match="keeps state from call to call"):
                clipped_grad(loss, clipping=jaxdp.flat(C), method=method)(PARAMS, X)
    clipped_grad(looking, clipping=jaxdp.flat(C))(PARAMS, X)


# ---- batch statistics


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(x))


@pytest.mark.parametrize("method", ["vmap", "auto"])
def test_batch_norm_in_training_mode_is_of_one_example_or_refused(method):
    model, batch = Normalized(), RNG.normal(size=(B, T, D)).astype(np.float32)
    variables = model.init(jax.random.key(0), batch[0])

    def within(params, x):
        out, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.square(out))

    def immutable(params, x):
        return jnp.sum(model.apply({**variables, "params": params}, x))

    norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))
    graph, nnx_params, rest = nnx.split(norm, nnx.Param, ...)

    def merged(params, x):
        return jnp.sum(nnx.merge(graph, params, rest)(x))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grad_fn = clipped_grad(within, clipping=jaxdp.flat(C), method=method)
        program = jax.jit(grad_fn)
        total, not_private = program(variables["params"], batch)
        # Its statistics are over the tokens of an example: the others do not matter.
        moved, theirs = program(variables["params"], np.concatenate([batch[:-1], 1 + batch[-1:] ** 2]))
        np.testing.assert_array_equal(not_private.l2_norms[:-1], theirs.l2_norms[:-1])
        assert 1e-3 < np.linalg.norm(flat(total) - flat(moved)) <= 2 * C
        for loss, params in ((immutable, variables["params"]), (merged, nnx_params)):
            with pytest.raises((flax.errors.ModifyScopeVariableError, flax.errors.TraceContextError)) as caught:
                clipped_grad(loss, clipping=jaxdp.flat(C), method=method)(params, batch)
            assert "use_running_average=True" in "".join(caught.value.__notes__)


# ---- zeroth order


@pytest.mark.parametrize("estimator", [zo.TwoSided(2), zo.ForwardMode(2)], ids=["two sides", "forward mode"])
def test_zeroth_order_probes_see_one_example(estimator):
    def found(coupled, batch):
        loss = functools.partial(everywhere, ("straight", "scan", "custom_jvp"), coupled)
        probe = zo.projected_gradients(loss, estimator=estimator)
        return probe(PARAMS, batch, direction_key=jax.random.key(1), step=0)

    projected, expected = found(centered, X).projected_gradients, found(same, X).projected_gradients
    np.testing.assert_allclose(projected, expected, rtol=2e-2, atol=2e-2)
    moved = np.concatenate([X[:-1], 5 * X[-1:]])
    np.testing.assert_array_equal(found(centered, moved).projected_gradients[:-1], projected[:-1])

    def over(params, x):
        return jnp.sum(lax.psum(x * params["b"], "records"))

    def grouped(x):
        with pytest.raises(ValueError, match="`psum` over axis 'records'"):
            zo.projected_gradients(over, estimator=estimator)(PARAMS, x, direction_key=jax.random.key(1), step=0)
        return x

    jax.vmap(grouped, axis_name="records")(np.stack([X, X]))


def test_blocks_see_one_example():
    def model(coupled):
        return zo.BlockModel(
            lambda r, x: coupled(x * r),
            lambda w, h, x: jnp.tanh(coupled(h) @ w),
            lambda r, h, x: jnp.sum(jnp.square(coupled(h) - r)),
        )

    params = zo.BlockParams(jnp.full((D,), 0.5), PARAMS["w"][None])

    def losses_and_scalars(coupled, batch):
        steps = zo.make_step(model(coupled), zo.Sgd(1e-3))
        state = steps.init(params, direction_key=jax.random.key(1))
        losses = np.asarray(steps.losses(state, batch))
        return losses, np.asarray(steps.step(state, batch)[1].not_private.projected_gradients)

    for found, expected in zip(losses_and_scalars(centered, X), losses_and_scalars(same, X), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


# ---- devices of a manual axis


def on_two_devices(body, *, check_vma=True):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    in_specs = (P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=check_vma))


def device_loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) + x * params["b"])


ROWS = np.concatenate([X[:4], 3 * X[:4]])
MASK = np.arange(8) == 7


def clipped_by(method, *, cast=False):
    grad_fn = clipped_grad(device_loss, clipping=jaxdp.flat(C), method=method)

    def body(params, x, mask):
        if cast:
            params = jax.tree.map(lambda leaf: lax.pcast(leaf, "data", to="varying"), params)
        return lax.psum(grad_fn(params, x, is_padding_example=mask)[0], "data")

    return body


@pytest.mark.parametrize("method", ["vmap", "auto", "two_pass"])
def test_a_gradient_that_is_summed_over_devices_is_refused(method):
    """Under `check_vma=True` JAX sums gradients of what devices share: one record then moved the sum by more than C."""
    with pytest.raises(ValueError, match=r"varies along \['data'\] and a parameter along \[\].*pcast"):
        on_two_devices(clipped_by(method))(PARAMS, ROWS, MASK)
    if method != "vmap":
        with pytest.raises(ValueError, match="only method='vmap' runs"):
            on_two_devices(clipped_by(method, cast=True))(PARAMS, ROWS, MASK)


def test_axes_of_records_and_parameters_are_compared():
    def checked(is_cast, params, x, mask):
        params = jax.tree.map(lambda leaf: lax.pcast(leaf, "data", to="varying"), params) if is_cast else params
        _replicas.check_clipping(params, x, method="vmap")
        return lax.psum(jnp.sum(mask), "data")

    on_two_devices(functools.partial(checked, True))(PARAMS, ROWS, MASK)
    with pytest.raises(ValueError, match="sum gradients over devices before the clip"):
        on_two_devices(functools.partial(checked, False))(PARAMS, ROWS, MASK)


def test_what_each_device_clips_is_its_own():
    expected = flat(clipped_grad(device_loss, clipping=jaxdp.flat(C))(PARAMS, ROWS, is_padding_example=MASK)[0])
    casting = on_two_devices(clipped_by("vmap", cast=True))(PARAMS, ROWS, MASK)
    np.testing.assert_allclose(flat(casting), expected, atol=1e-5)
    for method in ("vmap", "auto"):
        unchecked = on_two_devices(clipped_by(method), check_vma=False)(PARAMS, ROWS, MASK)
        np.testing.assert_allclose(flat(unchecked), expected, atol=1e-5)
    mapped = jax.pmap(clipped_by("auto"), axis_name="data", in_axes=(None, 0, 0))
    both = mapped(PARAMS, ROWS.reshape(2, 4, D), MASK.reshape(2, 4))
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[0], both)), expected, atol=1e-5)


def test_noise_is_not_drawn_on_each_device():
    plan = jaxdp.plan(num_examples=8, expected_batch_size=8, num_steps=2, clipping=jaxdp.flat(C), noise_multiplier=1.0)
    groups, key = plan.clipping.groups(PARAMS), jax.random.key(3)
    grad_fn = clipped_grad(device_loss, clipping=plan.clipping, method="vmap")

    def noised(is_summed, is_cast, params, x, mask):
        cast = jax.tree.map(lambda leaf: lax.pcast(leaf, "data", to="varying"), params) if is_cast else params
        clipped, _ = grad_fn.clipped_sum(cast, x, is_padding_example=mask)
        clipped = jax.tree.map(lambda leaf: lax.psum(leaf, "data"), clipped) if is_summed else clipped
        mean = jaxdp.privatize(clipped, groups, plan, jnp.array([C]), key=key, step=0).mean
        return mean if is_summed else lax.pmean(mean, "data")

    with pytest.raises(ValueError, match=r"privatize was called on each device.*varies along \['data'\]"):
        on_two_devices(functools.partial(noised, False, True))(PARAMS, ROWS, MASK)
    for is_summed in (False, True):
        with pytest.raises(ValueError, match="nothing tells whether it varies"):
            on_two_devices(functools.partial(noised, is_summed, False), check_vma=False)(PARAMS, ROWS, MASK)
    found = on_two_devices(functools.partial(noised, True, True))(PARAMS, ROWS, MASK)
    quiet = flat(grad_fn(PARAMS, ROWS, is_padding_example=MASK)[0]) / 8
    assert np.std(flat(found) - quiet) > 0.2 * C / 8

    tx = jaxdp.dp_aggregate(plan, key)
    state = tx.init(PARAMS)

    def update(params, x, mask):
        grads = jax.vmap(jax.grad(device_loss), (None, 0))(params, x)
        return optax.tree.sum(tx.update(grads, state, params, is_padding_example=mask)[0])

    for check_vma in (True, False):
        with pytest.raises(ValueError, match="update of dp_aggregate was called on each device"):
            on_two_devices(update, check_vma=check_vma)(PARAMS, ROWS, MASK)
