"""Ways to break a run on purpose, to see that an audit of it fails."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp._typing import Key
from jaxdp.auditing.ways import MakeStep, Way, make_step
from jaxdp.clipping import ClippedSum, ClippingPolicy, clipping_factors, flat, per_layer, sum_rows
from jaxdp.clipping.aggregation import per_example_norms
from jaxdp.mechanism import PrivacyPlan, privatize
from jaxdp.noise import add_noise, allocate_stddevs, secret_key
from jaxdp.zeroth_order import Steps, make_step as make_zeroth_order_step

Fault: TypeAlias = Literal[
    "none",
    "no-noise",
    "half-noise",
    "quarter-noise",
    "no-sampling",
    "no-clip",
    "noise-reused",
    "noise-reused-every-other-step",
    "no-clip-in-one-layer",
    "no-clip-in-one-method",
    "two-tensors",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
#: Faults of gradients, which a zeroth-order step does not have.
FAULTS_OF_GRADIENTS: tuple[Fault, ...] = ("no-clip-in-one-layer", "no-clip-in-one-method", "two-tensors")

_OPEN_LAYER, _OPEN_WAY = "dense", "two_pass"
_BOUND_OF_AN_OPEN_LAYER = 1e6  # in clip norms: far above any canary


def broken(plan: PrivacyPlan, fault: Fault, *, canary_norm: float) -> PrivacyPlan:
    """The plan that a run with the fault really follows, while `plan` is what it claims.

    Args:
        plan: The claim.
        fault: "no-noise"; "half-noise" and "quarter-noise", that part of the standard deviation; "no-sampling", every example in
            every step; "no-clip", no clipping below `canary_norm` and the noise as it was; or "none". The other faults break a
            step under a plan that is intact: `broken_step`.
        canary_norm: Of the canaries.
    """
    if fault == "no-noise":
        return dataclasses.replace(plan, noise_multiplier=0.0)
    if fault in ("half-noise", "quarter-noise"):
        divisor = 2 if fault == "half-noise" else 4
        return dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / divisor)
    if fault == "no-sampling":
        if plan.sampling_prob == 1:
            raise ValueError("fault 'no-sampling' changes nothing: the plan's sampling_prob is 1 already; lower it.")
        return dataclasses.replace(plan, sampling_prob=1.0, padded_batch_size=plan.num_examples)
    if fault == "no-clip":
        allowed = canary_norm / plan.clipping.total_l2_clip_norm
        return dataclasses.replace(plan, clipping=flat(canary_norm), noise_multiplier=plan.noise_multiplier / allowed)
    return plan


def broken_step(fault: Fault, *, canary_norm: float) -> MakeStep:
    """`make_step` whose steps have the fault while they are given the plan of the claim; all faults but the sampler's.

    Args:
        fault: As of `broken`; or "noise-reused", one draw in all steps; "noise-reused-every-other-step", each draw in two steps;
            "no-clip-in-one-layer", parameters below `dense` are neither in the norm nor clipped; "no-clip-in-one-method", all
            factors of `two_pass` are 1; "two-tensors", the factors are those of a gradient, and what is summed is that gradient at
            inputs one rounding away.
        canary_norm: Of the canaries.
    """
    reused: dict[str, Any] = {}  # the noise of a run, whichever way a step takes

    def make(
        loss_fn: Callable[..., Any],
        tx: optax.GradientTransformation,
        plan: PrivacyPlan,
        *,
        way: Way,
        microbatch_size: int | None = None,
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        build = functools.partial(make_step, loss_fn, way=way, microbatch_size=microbatch_size)
        if fault in ("noise-reused", "noise-reused-every-other-step"):
            period = plan.num_steps if fault == "noise-reused" else 2
            return _with_reused_noise(build, tx, plan, reused, period=period)
        if fault == "no-clip-in-one-layer":
            return build(tx, _with_an_open_layer(plan))
        if fault == "no-clip" or (fault == "no-clip-in-one-method" and way == _OPEN_WAY):
            return build(tx, dataclasses.replace(plan, clipping=_open(plan.clipping)))
        if fault == "two-tensors":
            return _with_two_tensors(loss_fn, tx, plan)
        return build(tx, plan if fault == "no-sampling" else broken(plan, fault, canary_norm=canary_norm))

    return make


def broken_zeroth_order_step(fault: Fault, *, canary_norm: float) -> Callable[..., Steps]:
    """`zeroth_order.make_step` whose steps have the fault while they are given the plan of the claim, as `broken_step`.

    Raises:
        ValueError: the fault is one of gradients.
    """
    if fault in FAULTS_OF_GRADIENTS:
        raise ValueError(
            f"fault {fault!r} is one of DP-SGD: a zeroth-order step has no layers, methods or gradients to break."
        )

    def make(*args: Any, plan: PrivacyPlan, **options: Any) -> Steps:
        if fault not in ("noise-reused", "noise-reused-every-other-step"):
            really = plan if fault == "no-sampling" else broken(plan, fault, canary_norm=canary_norm)
            return make_zeroth_order_step(*args, plan=really, **options)
        period = plan.num_steps if fault == "noise-reused" else 2
        steps = make_zeroth_order_step(*args, plan=dataclasses.replace(plan, noise_multiplier=0.0), **options)
        keys: list[Key] = []

        def init(*args: Any, noise_key: Key | None = None, **options: Any) -> Any:
            keys[:] = [secret_key() if noise_key is None else noise_key]
            return steps.init(*args, noise_key=noise_key, **options)

        def step(state: Any, batch: Any, is_padding_example: Any = None) -> Any:
            draw_key = jax.random.fold_in(keys[0], state.step // period)
            state, info = steps.step(state, batch, is_padding_example)
            numbers = info.scalars.projected_gradients
            stddev = plan.noise_multiplier * plan.clipping.total_l2_clip_norm * len(numbers) / plan.expected_batch_size
            draw = jax.random.normal(draw_key, numbers.shape, numbers.dtype)
            scalars = dataclasses.replace(info.scalars, projected_gradients=numbers + stddev * draw)
            return state, dataclasses.replace(info, scalars=scalars)

        return steps._replace(init=init, step=step)

    return make


def _with_reused_noise(
    build: Callable[..., Any],
    tx: optax.GradientTransformation,
    plan: PrivacyPlan,
    reused: dict[str, Any],
    *,
    period: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The real steps without their noise; that of the plan is added before the optimizer, drawn anew after `period` steps."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        draw_key, inner = state
        groups = plan.clipping.groups(updates)
        stddevs = allocate_stddevs(
            jnp.asarray(plan.clipping.clip_norms(groups)),
            groups.sizes,
            noise_multiplier=plan.gradient_noise_multiplier,
            allocation=plan.clipping.noise_allocation,
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), updates)
        noise = add_noise(zeros, stddevs, groups.leaf_groups, key=draw_key)
        size = plan.expected_batch_size
        updates = jax.tree.map(lambda leaf, draw: leaf + (draw / size).astype(leaf.dtype), updates, noise)
        updates, inner = tx.update(updates, inner, params)
        return updates, (draw_key, inner)

    silent = dataclasses.replace(plan, noise_multiplier=0.0)
    first = lambda params: (jax.random.clone(reused["key"]), tx.init(params))  # noqa: E731
    init, step = build(optax.GradientTransformation(first, update), silent)

    def faulty_init(params: Any, *, noise_key: Key | None = None) -> Any:
        reused.update(key=secret_key() if noise_key is None else noise_key, steps=0)
        state = init(params, noise_key=noise_key)
        return dataclasses.replace(state, opt_state=state.opt_state[1])

    def faulty_step(state: Any, *args: Any) -> Any:
        draw_key = jax.random.fold_in(reused["key"], reused["steps"] // period)
        reused["steps"] += 1
        state, info = step(dataclasses.replace(state, opt_state=(draw_key, state.opt_state)), *args)
        return dataclasses.replace(state, opt_state=state.opt_state[1]), info

    return faulty_init, faulty_step


def _with_an_open_layer(plan: PrivacyPlan) -> PrivacyPlan:
    """One layer with a bound that no canary reaches, the others with the plan's, and the noise of the plan."""
    C = plan.clipping.total_l2_clip_norm
    bounds = {"open": _BOUND_OF_AN_OPEN_LAYER * C, "rest": C}
    by_layer = per_layer(bounds, group_by=lambda leaf: "open" if leaf.split("/")[0] == _OPEN_LAYER else "rest")

    def clip_norms(self: Any, groups: Any) -> np.ndarray:
        del self
        return np.array(
            [bounds[name] for name in groups.names], np.float32
        )  # where all parameters are in one of them, too

    policy = _with(by_layer, clip_norms=clip_norms)
    noise_multiplier = plan.gradient_noise_multiplier * C / policy.total_l2_clip_norm
    return dataclasses.replace(plan, clipping=policy, noise_multiplier=noise_multiplier)


def _open(policy: ClippingPolicy) -> Any:
    """The policy, but that all its factors are 1."""

    def factors(self: Any, norms: jax.Array, clip_norms: jax.Array) -> jax.Array:
        del self, clip_norms
        return jnp.ones_like(norms)

    return _with(policy, factors=factors)


def _with(policy: ClippingPolicy, **methods: Any) -> Any:
    """The policy with other methods: still of its kind, as far as a step can tell."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return type("Broken", (type(policy),), methods)(**fields)


def _with_two_tensors(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, plan: PrivacyPlan
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Each gradient twice, as if a compiler had rounded twice: once for the norm, and once, a rounding away, for the sum."""
    init, _ = make_step(loss_fn, tx, plan, way="vmap")

    def nudged(leaf: jax.Array) -> jax.Array:
        return leaf * (1 + jnp.finfo(leaf.dtype).eps) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    @jax.jit
    def released(state: Any, step: Any, batch: Any, mask: jax.Array, frozen: Any) -> Any:
        params = state.params
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0, *([] if frozen is None else [None])))
        rest = () if frozen is None else (frozen,)
        seen = gradients(params, batch, *rest)
        summed = gradients(params, jax.tree.map(nudged, jax.tree.map(jnp.asarray, batch)), *rest)
        groups = plan.clipping.groups(params)
        norms = per_example_norms(seen, groups)
        factors, keep, count = clipping_factors(norms, plan.clipping, state.clip_norms, counts=~mask)
        leaves, treedef = jax.tree.flatten(summed)
        columns = [np.asarray(group) for group in groups.leaf_groups]
        sums = [sum_rows(leaf, factors[:, k], keep[:, k]) for leaf, k in zip(leaves, columns, strict=True)]
        clipped = ClippedSum(treedef.unflatten(sums), count)
        release = privatize(clipped, groups, plan, state.clip_norms, key=state.noise_key, step=step)
        mean = jax.tree.map(lambda m, p: m.astype(p.dtype), release.mean, params)
        updates, opt_state = tx.update(mean, state.opt_state, params)
        return optax.apply_updates(params, updates), opt_state, release.next_clip_norms

    def step(state: Any, batch: Any, is_padding_example: Any, frozen: Any = None) -> tuple[Any, None]:
        arrays = dataclasses.replace(state, ledger=None)
        params, opt_state, clip_norms = released(arrays, np.uint32(state.step), batch, is_padding_example, frozen)
        ledger = state.ledger.record(plan)
        return dataclasses.replace(
            state, params=params, opt_state=opt_state, clip_norms=clip_norms, ledger=ledger
        ), None

    return init, step
