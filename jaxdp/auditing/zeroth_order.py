"""Canaries in a private zeroth-order run: the step, the clipping, the noise and the sampler of every other run."""

from __future__ import annotations

import functools
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
from jaxdp.zeroth_order import BlockModel, BlockParams, Placement, Rademacher, Sgd, TwoSided, directions, make_step

_NUM_BLOCKS = 2


def zeroth_order_run(
    plan: PrivacyPlan,
    *,
    num_directions: int,
    canary_norm: float,
    rng: np.random.Generator,
    noise_key: Key | None = None,
    placement: Placement | None = None,
) -> Run:
    """A run of the zeroth-order `make_step(..., plan=plan)` over batches of `poisson_batches` whose records are canaries.

        loss(w, canary i) = a_i w[i],    so that    D_ik = a_i z_k[i]    and clipped    v_i = C z[i] / sqrt(K)

    with signs z for directions; a_i = sqrt(K) canary_norm if i takes part, else 0. The directions are public, so the clipped
    vector of every canary in every step is known. All canaries share the K numbers of a step: their coins s are told apart by the
    linear estimate of least mean squared error from all released noisy sums y,

        y_t = q sum_i s_i v_ti + noise;    scores = (A^T A + 4 N I)^-1 A^T (y - A 1/2),    row (t, k) of A: q v_tik

    where N is the variance of the noise and of the sampling in one number. It takes num_steps K well above the number of canaries,
    or noise well above what the canaries do to one another, C sqrt(m / 4K), for such scores to be as good as any.

    Args:
        plan: What the run does. It may differ from the plan that is audited: that is how an audit is tried out.
        num_directions: K.
        canary_norm: Norm of a canary's vector of projected gradients before the clip.
        rng: Draws the batches and the directions.
        noise_key: Of the noise; fresh entropy by default.
        placement: Where the blocks wait.
    """
    norm = _validate.positive("canary_norm", canary_norm)
    K = _validate.positive_integer("num_directions", num_directions)

    def run(is_included: np.ndarray) -> np.ndarray:
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
        signs = np.concatenate([_signs(root, np.uint32(step), K, width) for step in range(plan.num_steps)])
        return _estimate(sums.reshape(-1), signs[:, :m], plan, K)

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


def _estimate(sums: np.ndarray, signs: np.ndarray, plan: PrivacyPlan, K: int) -> np.ndarray:
    """The coins minus 1/2 from the sums `[T K]` and the signs `[T K, m]`, by least mean squared error."""
    m, q, C = signs.shape[1], plan.sampling_prob, plan.clipping.total_l2_clip_norm
    scale = q * C / np.sqrt(K)
    centered = sums - scale / 2 * signs.sum(axis=1, dtype=np.float64)
    noise = (plan.noise_multiplier * C) ** 2 if plan.noise == "gaussian" else 2 * (plan.noise_multiplier * C) ** 2
    variance = noise + m / 2 * q * (1 - q) * C**2 / K
    gram = (signs.T @ signs).astype(np.float64)  # of integers below 2^24: exact in float32
    # Without noise the ridge only keeps the equations solvable.
    ridge = max(4 * variance / scale**2, 1e-6 * len(sums))
    return linalg.solve(gram + ridge * np.eye(m), signs.T @ centered / scale, assume_a="pos")
