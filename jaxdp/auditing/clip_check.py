"""How far one record moves what a step releases, measured: the same compiled step with a canary and without it, and no noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.auditing.canary_losses import LEAVES, Trial, cancelling, every_route
from jaxdp.auditing.checks import Case, Check
from jaxdp.auditing.ways import WAYS, MakeStep, Way, last_release, make_step, ways_of
from jaxdp.clipping import ClippingPolicy, automatic, flat, per_layer, quantile
from jaxdp.mechanism import PrivacyPlan, plan as make_plan
from jaxdp.zeroth_order import BlockModel, BlockParams, Sgd, Steps, TwoSided, make_step as make_zeroth_order_step

C = 1.0
POLICIES: dict[str, ClippingPolicy] = {
    "flat": flat(C),
    "per-layer": per_layer(C, group_by="leaf"),
    "automatic": automatic(C),
    "quantile": quantile(C, count_stddev=1.0),
}
# Each pair is a program of seconds to compile, and a policy's factors are the same code in every way. So flat clipping is tried by
# every way, and every other policy by those that share least with them.
_WAYS: dict[str, tuple[Way, ...]] = {
    "flat": ways_of(POLICIES["flat"]),
    "per-layer": ("two_pass", "per_layer"),
    "automatic": ("vmap",),
    "quantile": ("dp_aggregate",),
}
# Batch sizes and microbatches in which compilers were seen to round differently; not so alone.
BATCHES: tuple[tuple[int, int | None], ...] = ((4, 2), (64, None))


def ordinary_check(
    *,
    canary_norm: float,
    make_step: MakeStep = make_step,
    rng: np.random.Generator,
    ways: Sequence[Way] = WAYS,
) -> Check:
    """Canaries of `every_route`, by every policy and every way.

    Args:
        canary_norm: Least gradient norm of a canary, in clip norms.
        make_step: Of one way; `broken_step` gives others.
        rng: Draws parameters and data.
        ways: Ways to try.
    """
    trial = every_route(rng, size=4, canary_norm=canary_norm)
    cases = []
    for name, policy in POLICIES.items():
        for way in _WAYS[name]:
            if way not in ways:
                continue
            cases += _movements(trial, name, policy, way, None, make_step)
    covered = {"routes": LEAVES, "policies": tuple(POLICIES), "ways": tuple(ways)}
    power = (
        f"a clip that is off, by {canary_norm:g} times the clip norm, in any of these routes, policies and ways; any movement "
        f"beyond the clip norm by more than {trial.rounding:.2%} of it"
    )
    return Check("clip of ordinary canaries", "clip norms", tuple(cases), covered, power)


def cancelling_check(
    *,
    make_step: MakeStep = make_step,
    rng: np.random.Generator,
    ways: Sequence[Way] = WAYS,
    batches: Sequence[tuple[int, int | None]] = BATCHES,
) -> Check:
    """Canaries of `cancelling`: flat by every way, and per layer by the way of its own.

    Args:
        make_step: Of one way; `broken_step` gives others.
        rng: Draws parameters and data.
        ways: Ways to try.
        batches: Sizes of batches, each with the size of its microbatches, or None.
    """
    cases, names = [], []
    for size, microbatch_size in batches:
        for trial in cancelling(rng, size=size):
            names.append(trial.name)
            for way in ways:
                policy = "per-layer" if way == "per_layer" else "flat"
                rows = None if way == "dp_aggregate" else microbatch_size
                cases += _movements(trial, policy, POLICIES[policy], way, rows, make_step)
    covered = {
        "losses": tuple(dict.fromkeys(names)),
        "policies": ("flat", "per-layer"),
        "ways": tuple(ways),
        "batches": tuple(f"{size}" if rows is None else f"{size} by {rows}" for size, rows in batches),
    }
    power = "a norm taken of 0 where the sum has a rounding of up to 1e14, in these very programs; others may compile otherwise"
    return Check("clip of cancelling canaries", "clip norms", tuple(cases), covered, power)


def zeroth_order_check(
    num_directions: int,
    *,
    canary_norm: float,
    make_step: Callable[..., Steps] = make_zeroth_order_step,
    rng: np.random.Generator,
) -> Check:
    """Canaries in the K numbers of a zeroth-order step: ordinary, extreme, and with losses that cancel.

    Args:
        num_directions: K.
        canary_norm: Least norm of an ordinary canary's projected gradients, in clip norms.
        make_step: `zeroth_order.make_step`, or what `broken_zeroth_order_step` gives.
        rng: Draws parameters and data.
    """
    B, K, width = 4, num_directions, 6
    direction_key = jax.random.key(int(rng.integers(2**32)) + 2**32)
    blocks = rng.normal(size=(2, width)).astype(np.float32)

    def record(scale: float, amplitude: float) -> dict[str, Any]:
        x, y = (np.asarray(scale * rng.normal(size=width), np.float32) for _ in "xy")
        return {"x": x, "y": y, "z": x * y, "a": np.float32(amplitude)}

    others = [record(1.0, 0.01) for _ in range(B)]
    canaries = {
        "ordinary": record(1.0, 100 * canary_norm * np.sqrt(K)),
        "huge": record(1.0, 1e12),
        "of a squared norm beyond float32": record(1.0, 1e25),
        "not finite": record(1.0, np.nan),
        "cancelling of 1e5": record(1e5, 0.0),
        "cancelling of 1e7": record(1e7, 0.0),
    }
    cases = []
    for name, policy in (("flat", flat(C)), ("automatic", automatic(C))):
        plan = _silent(policy, B)
        steps = make_step(_ZEROTH_ORDER_MODEL, Sgd(1e-9), plan=plan, estimator=TwoSided(K))

        def release(batch: Any, mask: np.ndarray, steps: Steps = steps) -> np.ndarray:
            params = BlockParams({"unused": jnp.zeros(1)}, jnp.asarray(blocks))
            state: Any = steps.init(params, direction_key=direction_key, noise_key=jax.random.key(1))
            _, info = steps.step(state, batch, mask)
            return B / K * np.asarray(info.scalars.projected_gradients, np.float64)

        for canary, row in canaries.items():
            batch = jax.tree.map(lambda *rows: np.stack(rows), row, *others[1:])
            found = [release(batch, np.array([absent] + [False] * (B - 1))) for absent in (False, True)]
            moved = float(np.linalg.norm(found[0] - found[1]))
            cases.append(Case(f"{canary}, {name}, K = {K}", moved, C * (1 + 2.0**-12)))
    covered = {"policies": ("flat", "automatic"), "directions": (f"{K}",), "canaries": tuple(canaries)}
    power = f"a clip that is off, by {canary_norm:g} times the clip norm; any movement beyond it by more than 0.02%"
    return Check("clip of the projected gradients", "clip norms", tuple(cases), covered, power)


def _zeroth_order_block(weights: jax.Array, hidden: Any, example: Any) -> Any:
    x, y, z = example["x"], example["y"], example["z"]
    f = x * y - z
    return hidden + jnp.sum(f * weights) * 100.0 + example["a"] * jnp.sum(weights)


_ZEROTH_ORDER_MODEL = BlockModel(
    embed=lambda resident, example: jnp.float32(0),
    block=_zeroth_order_block,
    loss=lambda resident, hidden, example: hidden,
)


def _silent(policy: ClippingPolicy, size: int) -> PrivacyPlan:
    """One step without noise on all records, so that all that moves is the sum."""
    return make_plan(
        num_examples=size, sampling_prob=1.0, num_steps=1, clipping=policy, noise_multiplier=0.0, padded_batch_size=size
    )


def _movements(
    trial: Trial, policy_name: str, policy: ClippingPolicy, way: Way, microbatch_size: int | None, make_step: MakeStep
) -> Iterator[Case]:
    size = len(jax.tree.leaves(trial.others)[0])
    plan = _silent(policy, size)
    init, step = make_step(trial.loss, last_release(), plan, way=way, microbatch_size=microbatch_size)
    groups = policy.groups(trial.params)
    bounds = np.asarray(policy.clip_norms(groups), np.float64)
    key = jax.random.key(0)  # there is no noise

    def release(batch: Any, is_absent: bool) -> list[np.ndarray]:
        mask = np.zeros(size, bool)
        mask[0] = is_absent
        state, _ = step(init(trial.params, noise_key=key), batch, mask)
        return [size * np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(state.opt_state))]

    without = release(trial.others, True)
    rows = "" if microbatch_size is None else f" in microbatches of {microbatch_size}"
    for canary in trial.canaries:
        moved = [a - b for a, b in zip(release(trial.batch(canary), False), without, strict=True)]
        squares = np.zeros(len(bounds))
        for leaf, group in zip(moved, groups.leaf_groups, strict=True):
            assert isinstance(group, int)
            squares[group] += np.sum(leaf**2)
        # Of all groups the one that exceeds its own clip norm most, on the scale of the whole.
        moves = [*(np.sqrt(squares) / bounds * C), np.sqrt(squares.sum())]
        worst = float(np.max(moves)) if np.all(np.isfinite(moves)) else np.inf
        name = f"canary {canary}, {trial.name}, batch of {size}{rows}, {policy_name}, {way}"
        yield Case(name, worst, C * (1 + trial.rounding))
