"""The noise by itself, which is what steps release for empty batches: of the claimed size, and no two draws alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from jaxdp.auditing.checks import Case, Check
from jaxdp.auditing.ways import MakeStep, Way, last_release, make_step
from jaxdp.clipping import ClippingPolicy, Quantile, automatic, flat, per_layer, quantile
from jaxdp.mechanism import PrivacyPlan, plan as make_plan
from jaxdp.noise import allocate_stddevs
from jaxdp.zeroth_order import BlockModel, BlockParams, Sgd, Steps, TwoSided, make_step as make_zeroth_order_step

#: The probability, at most, that noise of the claim fails in either law; the tests of a law have equal shares.
SIGNIFICANCE = 1e-6
_SIZE = 1000  # entries of each leaf
_SHAPES = {"dense": {"kernel": (25, 40), "bias": (_SIZE,)}, "layers": (2, 500)}
_BATCH, _STEPS, _RUNS, _DIRECTIONS = 8, 20, 2, 64


def _policies(noise_multiplier: float) -> list[tuple[str, ClippingPolicy, Way, int]]:
    """Name, policy, way, and steps of a run: the count of quantile clipping is one number a step."""

    def layers(allocation: Any) -> ClippingPolicy:
        return per_layer(1.0, split="dimension", noise_allocation=allocation, stacked="layers")

    few, many = _STEPS, 4 * _STEPS
    return [
        ("flat", flat(0.5), "book_keeping", few),
        ("per-layer, global", layers("global"), "per_layer", few),
        ("per-layer, equal budget", layers("equal_budget"), "dp_aggregate", few),
        ("per-layer, least energy", layers("least_energy"), "per_layer", few),
        ("automatic", automatic(1.0), "two_pass", few),
        ("quantile", quantile(1.0, count_stddev=2 * noise_multiplier), "vmap", many),
    ]


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Noise in units of its claimed std: under the claim, independent standard normal numbers.

    Attributes:
        name: What drew them.
        vectors: `[draws, n]`.
        labels: One for each draw.
        groups: Which draws share a claimed std, by name.
    """

    name: str
    vectors: np.ndarray
    labels: list[str]
    groups: dict[str, np.ndarray]


def noise_check(noise_multiplier: float, *, make_step: MakeStep = make_step, rng: np.random.Generator) -> list[Check]:
    """Noise of DP-SGD by every policy, allocation and way: sizes, and correlations between steps, leaves, streams and runs.

    Args:
        noise_multiplier: Of the claim.
        make_step: Of one way; `broken_step` gives others.
        rng: Draws the noise keys.
    """
    draws = []
    for name, policy, way, num_steps in _policies(noise_multiplier):
        plan = make_plan(
            num_examples=2 * _BATCH,
            sampling_prob=0.5,
            num_steps=num_steps,
            clipping=policy,
            noise_multiplier=noise_multiplier,
            padded_batch_size=_BATCH,
        )
        draws += _of_gradients(f"{name}, {way}", plan, way, make_step, rng)
    return _checks(draws, {"noise of": tuple(dict.fromkeys(row[0] for row in _policies(noise_multiplier)))})


def zeroth_order_noise_check(
    noise_multiplier: float,
    *,
    make_step: Callable[..., Steps] = make_zeroth_order_step,
    rng: np.random.Generator,
) -> list[Check]:
    """Noise of the numbers of zeroth-order steps along 64 directions: sizes, and correlations between steps and runs.

    Args:
        noise_multiplier: Of the claim.
        make_step: `zeroth_order.make_step`, or what `broken_zeroth_order_step` gives.
        rng: Draws the keys.
    """
    K = _DIRECTIONS
    plan = make_plan(
        num_examples=2 * _BATCH,
        sampling_prob=0.5,
        num_steps=_STEPS,
        clipping=flat(1.0),
        noise_multiplier=noise_multiplier,
        padded_batch_size=_BATCH,
    )
    steps = make_step(_MODEL, Sgd(1e-9), plan=plan, estimator=TwoSided(K))
    vectors, labels = [], []
    for run in range(_RUNS):
        params = BlockParams({"unused": jnp.zeros(1)}, jnp.zeros((2, 4)))
        state: Any = steps.init(params, direction_key=_key(rng), noise_key=_key(rng))
        for step in range(_STEPS):
            state, info = steps.step(state, np.zeros(_BATCH, np.float32), np.ones(_BATCH, bool))
            sums = plan.expected_batch_size / K * np.asarray(info.scalars.projected_gradients, np.float64)
            vectors.append(sums / noise_multiplier)
            labels.append(f"run {run}, step {step}")
    draws = _Draws("zeroth order", np.stack(vectors), labels, {"numbers": np.stack(vectors)})
    return _checks([draws], {"noise of": (f"{K} directions",)})


_MODEL = BlockModel(
    embed=lambda resident, example: example,
    block=lambda weights, hidden, example: hidden + jnp.sum(weights),
    loss=lambda resident, hidden, example: hidden,
)


def _key(rng: np.random.Generator) -> jax.Array:
    """A key for noise that hides nobody's data."""
    return jax.random.key(int(rng.integers(2**63)), impl="threefry2x32")


def _loss(params: Any, example: jax.Array) -> jax.Array:
    total = jnp.sum(example @ params["dense"]["kernel"] + params["dense"]["bias"][:40])
    return total + jnp.sum(params["layers"]) * example[0]


def _of_gradients(
    name: str, plan: PrivacyPlan, way: Way, make_step: MakeStep, rng: np.random.Generator
) -> list[_Draws]:
    init, step = make_step(_loss, last_release(), plan, way=way)
    params = jax.tree.map(jnp.zeros, _SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    groups = plan.clipping.groups(params)
    start = plan.clipping.clip_norms(groups)
    batch, mask = np.zeros((_BATCH, 25), np.float32), np.ones(_BATCH, bool)
    # A second run of one key: for `dp_aggregate` one transformation, which must tell them apart; else a key of its own.
    key = _key(rng)
    vectors, labels, counts = [], [], []
    by_group: dict[str, list[np.ndarray]] = {group: [] for group in groups.names}
    is_adaptive = isinstance(plan.clipping, Quantile)
    stddevs = _stddevs(plan, start, groups.sizes)
    for run in range(_RUNS):
        state = init(params, noise_key=key if way == "dp_aggregate" else _key(rng))
        clip_norms = start
        for t in range(plan.num_steps):
            state, _ = step(state, batch, mask)
            if is_adaptive:
                stddevs = _stddevs(plan, clip_norms, groups.sizes)
            released = jax.device_get(state.opt_state)
            for (path, leaf), group in zip(jax.tree.leaves_with_path(released), groups.leaf_groups, strict=True):
                noise = plan.expected_batch_size * np.asarray(leaf, np.float64)
                scale = stddevs[np.asarray(group)]
                noise = noise / scale.reshape(scale.shape + (1,) * (noise.ndim - scale.ndim))
                vectors.append(noise.ravel())
                labels.append(f"{jax.tree_util.keystr(path)} of step {t} of run {run}")
                for index, row in [(group, noise)] if isinstance(group, int) else zip(group, noise, strict=True):
                    by_group[groups.names[index]].append(row.ravel())
            if is_adaptive:
                following = np.array(state.clip_norms)  # a copy: the state is donated
                counts.append(_count_noise(plan, float(clip_norms[0]), float(following[0])))
                clip_norms = following
    stacked = {f"{name}, {group}": np.concatenate(rows) for group, rows in by_group.items()}
    draws = [_Draws(name, np.stack(vectors), labels, stacked)]
    if counts:
        # The series of the counts, beside the series of the first entries of each leaf.
        first = np.stack(vectors)[:, :4].reshape(len(counts), -1).T
        series = np.concatenate([np.asarray(counts)[None], first])
        names = ["count", *(f"entry {index}" for index in range(len(first)))]
        draws.append(_Draws(f"{name}, by step", series, names, {f"{name}, count": np.asarray(counts)}))
    return draws


def _stddevs(plan: PrivacyPlan, clip_norms: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    allocation = plan.clipping.noise_allocation
    sigma = plan.gradient_noise_multiplier
    return np.asarray(
        allocate_stddevs(jnp.asarray(clip_norms), sizes, noise_multiplier=sigma, allocation=allocation), float
    )


def _count_noise(plan: PrivacyPlan, before: float, after: float) -> float:
    """The noise of the count of an empty batch, in claimed stds, from the clip norms that it leads from and to."""
    policy = plan.clipping
    assert isinstance(policy, Quantile)
    fraction = policy.target_quantile - math.log(after / before) / policy.learning_rate
    return (fraction - 0.5) * plan.expected_batch_size / plan.count_stddev


def _checks(draws: list[_Draws], covered: dict[str, tuple[str, ...]]) -> list[Check]:
    return [_sizes(draws, covered), _correlations(draws, covered)]


def _sizes(draws: list[_Draws], covered: dict[str, tuple[str, ...]]) -> Check:
    """|Z|^2 of n standard normal numbers is chi-square with n degrees of freedom: as a normal deviate of equal probability."""
    groups = [(name, numbers.ravel()) for one in draws for name, numbers in one.groups.items()]
    allowed = -float(special.ndtri(SIGNIFICANCE / len(groups) / 2))
    cases, seen = [], []
    for name, numbers in groups:
        n = len(numbers)
        total = float(np.sum(numbers**2))
        deviate = max(_deviate(float(tail(total, n))) for tail in (stats.chi2.logcdf, stats.chi2.logsf))
        cases.append(Case(f"noise of {name}: std {math.sqrt(total / n):.4f} of the claim", deviate, allowed))
        # Noise of std s is below the lower bound with probability 0.9.
        lowest = stats.chi2.ppf(special.ndtr(-allowed), n)
        seen.append(math.sqrt(lowest / stats.chi2.ppf(0.9, n)))
    # Numbers that a step has one of are few: they have a statement of their own.
    found: dict[bool, list[float]] = {False: [], True: []}
    for fraction, (_, numbers) in zip(seen, groups, strict=True):
        found[len(numbers) < _SIZE].append(fraction)
    statements = [
        f"a noise std below {_down(min(fractions))} of the claim{' where a step draws one number' if is_few else ''}"
        for is_few, fractions in found.items()
        if fractions
    ]
    power = "with probability 0.9, " + ", and ".join(statements)
    return Check("size of the noise", "normal deviates", tuple(cases), covered, power)


def _down(fraction: float) -> str:
    return f"{math.floor(fraction * 100) / 100:.2f}"


def _deviate(log_probability: float) -> float:
    """The normal deviate with this upper tail; 38 for what is rarer than any that float64 can tell."""
    return -float(special.ndtri_exp(max(log_probability, -720.0)))


def _correlations(draws: list[_Draws], covered: dict[str, tuple[str, ...]]) -> Check:
    """<z, z'> / |z| of two independent normal vectors is standard normal, whatever z."""
    pairs = sum(math.comb(len(one.vectors), 2) for one in draws)
    allowed = -float(special.ndtri(SIGNIFICANCE / pairs / 2))
    cases = []
    for one in draws:
        lengths = np.linalg.norm(one.vectors, axis=1)
        deviates = np.abs(one.vectors @ one.vectors.T) / np.maximum(lengths[:, None], 1e-30)
        deviates[lengths == 0] = np.inf  # no noise at all is the same noise
        # Each pair once, divided by the norm of the earlier draw.
        deviates = np.where(np.triu(np.ones_like(deviates, bool), 1), deviates, 0.0)
        i, j = np.unravel_index(int(np.argmax(deviates)), deviates.shape)
        name = f"noise of {one.name}: {one.labels[i]} and {one.labels[j]}"
        cases.append(Case(name, float(deviates[i, j]), allowed))
    smallest = draws[0].vectors.shape[1]
    needed = min(1.0, (allowed - float(special.ndtri(0.1))) / math.sqrt(smallest))
    power = f"with probability 0.9, a correlation above {needed:.2f} of two draws of {smallest} numbers"
    return Check("correlation of the noise", "normal deviates", tuple(cases), covered, power)
