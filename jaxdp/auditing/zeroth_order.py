"""Canaries in a private zeroth-order run: the step, the clipping, the noise and the sampler of every other run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.auditing.one_run import Run
from jaxdp.mechanism import PrivacyPlan
from jaxdp.sampling import poisson_batches
from jaxdp.zeroth_order import (
    BlockModel,
    BlockParams,
    Placement,
    Rademacher,
    Sgd,
    Steps,
    TwoSided,
    directions,
    make_step,
)

_NUM_BLOCKS = 2


def zeroth_order_run(
    plan: PrivacyPlan,
    *,
    num_directions: int,
    canary_norm: float,
    rng: np.random.Generator,
    noise_key: Key | None = None,
    placement: Placement | None = None,
    make_step: Callable[..., Steps] = make_step,
) -> Run:
    """A run of the zeroth-order `make_step(..., plan=plan)` over batches of `poisson_batches` whose records are canaries.

        loss(w, canary i) = a_i w[i],    so that    D_ik = a_i z_k[i]    and clipped    v_i = C z[i] / sqrt(K)

    with signs z for directions; a_i = sqrt(K) canary_norm if i takes part, else 0. The directions are public, so the clipped
    vector of every canary in every step is known. All canaries share the K numbers of a step: their coins s are told apart by the
    linear estimate of least mean squared error from all released noisy sums y,

        y_t = q sum_i s_i v_ti + noise;    scores = (A^T A + 4 N I)^-1 A^T (y - A 1/2),    row (t, k) of A: q v_tik

    where N is the variance of the noise and of the sampling in one number. It takes num_steps K well above the number of canaries,
    or noise well above what the canaries do to one another, C sqrt(m / 4K), for such scores to be as good as any. These are the
    scores "steps". Three more are of differences of steps, in which noise that is reused cancels: "differences from all" takes from
    each step the mean of all, "differences two apart" that of all even or all odd steps, and "differences in pairs" that of steps
    2j and 2j + 1; v alike, and N is that of the sampling alone.

    Args:
        plan: What the run does. It may differ from the plan that is audited: that is how an audit is tried out.
        num_directions: K.
        canary_norm: Norm of a canary's vector of projected gradients before the clip.
        rng: Draws the batches and the directions.
        noise_key: Of the noise; fresh entropy by default.
        placement: Where the blocks wait.
        make_step: `zeroth_order.make_step`, or what `broken_zeroth_order_step` gives.
    """
    norm = _validate.positive("canary_norm", canary_norm)
    K = _validate.positive_integer("num_directions", num_directions)

    def run(is_included: np.ndarray) -> dict[str, np.ndarray]:
        m = len(is_included)
        width = -(-m // _NUM_BLOCKS)
        direction_key = jax.random.key(int(rng.integers(2**63)), impl="threefry2x32")
        source = {
            "index": np.arange(m, dtype=np.int32),
            "norm": np.where(is_included, norm * np.sqrt(K), 0).astype(np.float32),
        }
        # The loss is linear: wherever the parameters are, the scalars are the same but for rounding, so they move little.
        steps = make_step(_MODEL, Sgd(1e-9), plan=plan, estimator=TwoSided(K), law=Rademacher(), placement=placement)
        params = BlockParams({"unused": jnp.zeros(1)}, jnp.zeros((_NUM_BLOCKS, width)))
        state: Any = steps.init(params, direction_key=direction_key, noise_key=noise_key)
        released = []
        for batch, is_padding_example in poisson_batches(source, plan, rng):
            state, info = steps.step(state, batch, is_padding_example)
            released.append(info.scalars.projected_gradients)
        sums = plan.expected_batch_size / K * np.asarray(jax.device_get(released), np.float64)  # [T, K]
        root = directions.words_of(direction_key)
        signs = np.stack([_signs(root, np.uint32(step), K, width) for step in range(plan.num_steps)])
        return _scores(sums, signs[:, :, :m], plan)

    return run


def _block(weights: jax.Array, hidden: Any, canary: dict[str, jax.Array]) -> Any:
    total, first = hidden
    place = canary["index"] - first
    is_here = (place >= 0) & (place < len(weights))
    here = jnp.where(is_here, canary["norm"] * weights[jnp.clip(place, 0, len(weights) - 1)], 0.0)
    return total + here, first + jnp.int32(len(weights))


_MODEL = BlockModel(
    embed=lambda resident, canary: (jnp.float32(0), jnp.int32(0)),
    block=_block,
    loss=lambda resident, hidden, canary: hidden[0],
)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _signs(root: jax.Array, step: jax.Array, K: int, width: int) -> jax.Array:
    """z of one step, for all directions and canaries, `[K, blocks * width]`."""
    shapes = jax.ShapeDtypeStruct((width,), jnp.float32)

    def one(k: jax.Array, block: jax.Array) -> jax.Array:
        return directions.leaf_directions(Rademacher(), root, step=step, k=k, block=1 + block, shapes=shapes)

    ks, blocks = jnp.arange(K, dtype=jnp.uint32), jnp.arange(_NUM_BLOCKS, dtype=jnp.uint32)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(ks, blocks).reshape(K, -1)


def _scores(sums: np.ndarray, signs: np.ndarray, plan: PrivacyPlan) -> dict[str, np.ndarray]:
    """All scores `[m]`, from the sums `[T, K]` and the signs `[T, K, m]`."""
    steps = np.arange(len(sums))
    scores = {"steps": Estimator(signs, plan)(sums)}
    for name, alike in (("from all", 0 * steps), ("two apart", steps % 2), ("in pairs", steps // 2)):
        estimate = Estimator(_centered(signs, alike), plan, has_noise=False)
        scores[f"differences {name}"] = estimate(_centered(sums, alike))
    return scores


def _centered(array: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """`[T, ...]` less the mean of the steps that are alike."""
    means = np.zeros((int(alike.max()) + 1, *array.shape[1:]), np.float32)
    np.add.at(means, alike, array)
    counts = np.bincount(alike).reshape((-1,) + (1,) * (array.ndim - 1)).astype(np.float32)
    return array - (means / counts)[alike]


class Estimator:
    """The coins minus 1/2 from sums, by least mean squared error; the equations are made once.

    Args:
        signs: `[T, K, m]`, of all steps, or differences of steps.
        plan: What the run does.
        has_noise: Whether the sums have the plan's noise, or that of the sampling alone.
    """

    def __init__(self, signs: np.ndarray, plan: PrivacyPlan, *, has_noise: bool = True):
        T, K, m = signs.shape
        q, C, sigma = plan.sampling_prob, plan.clipping.total_l2_clip_norm, plan.noise_multiplier
        self.rows = signs.reshape(T * K, m)
        self.scale = q * C / np.sqrt(K)
        noise = (sigma * C) ** 2 * (1 if plan.noise == "gaussian" else 2)
        variance = (noise if has_noise else 0.0) + m / 2 * q * (1 - q) * C**2 / K
        # Without noise the ridge only keeps the equations solvable.
        ridge = max(4 * variance / self.scale**2, (1e-6 if has_noise else 1e-3) * T * K)
        gram = (self.rows.T @ self.rows).astype(np.float64)  # of integers below 2^24: exact in float32
        self.factor = linalg.cho_factor(gram + ridge * np.eye(m), overwrite_a=True, check_finite=False)

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """`[m]` from `[T, K]`, or `[m, R]` from R runs `[T, K, R]`."""
        flat = sums.reshape(len(self.rows), *sums.shape[2:])
        middle = self.scale / 2 * self.rows.sum(axis=1, dtype=np.float64)
        centered = flat - middle.reshape((-1,) + (1,) * (flat.ndim - 1))
        return linalg.cho_solve(self.factor, self.rows.T @ centered.astype(np.float32) / self.scale, check_finite=False)


def simulated_scores(
    plan: PrivacyPlan, num_directions: int, rng: np.random.Generator, count: int
) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """Scores "steps" of `count` runs, of a model of the releases.

    Returns:
        A function from a fraction of the plan's noise to the coins and the scores, both `[m, count]`.
    """
    T, K, m = plan.num_steps, num_directions, plan.num_examples
    signs = rng.choice(np.array([-1, 1], np.float32), (T, K, m))
    estimate = Estimator(signs, plan)
    q, C = plan.sampling_prob, plan.clipping.total_l2_clip_norm

    def simulate(fraction: float) -> tuple[np.ndarray, np.ndarray]:
        coins = rng.random((m, count)) < 0.5
        sums = estimate.scale * (estimate.rows @ coins.astype(np.float32)).astype(np.float64)
        # The sampler's luck, of about m / 2 canaries in each sum, as if it were normal.
        sums += C * np.sqrt(m / 2 * q * (1 - q) / K) * rng.normal(size=sums.shape)
        noise = rng.normal if plan.noise == "gaussian" else rng.laplace
        sums += fraction * plan.noise_multiplier * C * noise(size=sums.shape)
        return coins, estimate(sums.reshape(T, K, count))

    return simulate
