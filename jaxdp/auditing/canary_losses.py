"""Losses and records that try a clip: every route at every size, and gradients that cancel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Trial:
    """A loss, its parameters, and the records to try as number 0 of a batch.

    Attributes:
        name: A word for reports.
        loss: `loss(params, example) -> scalar`.
        params: Pytree of arrays.
        others: The batch `[B, ...]`; its first record is a placeholder.
        canaries: Records by name, without batch axis.
        rounding: What may be added to the movement by rounding of the release, relative to the sensitivity.
    """

    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    others: Any
    canaries: Mapping[str, Any]
    rounding: float

    def batch(self, name: str) -> Any:
        """The batch with a canary in it."""

        def put(row: Any, rest: np.ndarray) -> np.ndarray:
            out = np.array(rest)
            out[0] = row
            return out

        return jax.tree.map(put, self.canaries[name], self.others)


# float32 sums of a few numbers near the clip norm; releases in bfloat16 round once more.
_ROUNDING, _ROUNDING_OF_BFLOAT16 = 2.0**-12, 2.0**-5

#: The leaf of each route of `clipped_grad`, in the parameters of `every_route`.
LEAVES = ("dense", "embedding", "copy", "joint", "scanned", "conv")
_T, _D = 3, 4


def every_route(rng: np.random.Generator, *, size: int, canary_norm: float) -> Trial:
    """One leaf of each route, and records that say how much of each leaf's gradient they have.

    Args:
        rng: Draws parameters and data.
        size: B.
        canary_norm: Least gradient norm of an ordinary canary.
    """
    shapes = {
        "dense": (_D, 5),
        "embedding": (6, _D),
        "copy": (_D,),
        "joint": (6, _D),
        "scanned": (2, _D, _D),
        "conv": (2, _D, 3),
    }
    params = {name: np.asarray(0.5 * rng.normal(size=shape), np.float32) for name, shape in shapes.items()}

    def record(amplitudes: Any) -> dict[str, np.ndarray]:
        x = rng.normal(size=(_T, _D)).astype(np.float32)
        return {"a": np.asarray(amplitudes, np.float32), "x": x, "id": rng.integers(0, 6, _T).astype(np.int32)}

    others = [record(0.01 * rng.random(len(LEAVES))) for _ in range(size)]
    unit = np.eye(len(LEAVES))
    # Each leaf's gradient at amplitude 1 has a norm above 1/20.
    canaries = {f"in {name} alone": record(20 * canary_norm * unit[number]) for number, name in enumerate(LEAVES)}
    everywhere = np.ones(len(LEAVES))
    canaries |= {
        "in all leaves": record(canary_norm * everywhere),
        "below the clip norm": record(0.01 * everywhere),
        "huge": record(1e12 * everywhere),
        "of a squared norm beyond float32": record(1e25 * everywhere),
        "not finite": record(np.nan * everywhere),
    }
    batch = jax.tree.map(lambda *rows: np.stack(rows), *others)
    return Trial("every route", _loss_of_every_route, params, batch, canaries, _ROUNDING)


def _loss_of_every_route(params: Any, example: Any) -> jax.Array:
    a, x, ids = example["a"], example["x"], example["id"]
    total = a[0] * jnp.sum(x @ params["dense"])
    total += a[1] * jnp.sum(params["embedding"][ids] * x)
    total += a[2] * jnp.sum(jnp.broadcast_to(params["copy"], x.shape) * x)
    total += a[3] * (jnp.sum(params["joint"][ids] * x) + jnp.sum(x @ params["joint"].T))
    hidden, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["scanned"])
    total += a[4] * jnp.sum(hidden)
    out = lax.conv_general_dilated(x.T[None], params["conv"], (1,), "SAME")
    return total + a[5] * jnp.sum(out)


def cancelling(rng: np.random.Generator, *, size: int) -> list[Trial]:
    """Losses of f = x y - z, and a record with z = x y as stored: f is 0, or a rounding of 1e10, as the compiler likes (S4e).

    If a norm is taken of the one and a sum of the other, the record is not clipped.
    """
    f4, bf16 = np.dtype(np.float32), jnp.dtype(jnp.bfloat16)

    def trial(name: str, loss: Callable[..., Any], params: Any, dtype: Any = f4) -> Trial:
        def record(scale: float) -> tuple[np.ndarray, ...]:
            x, y = (np.asarray(scale * rng.normal(size=_D), dtype) for _ in "xy")
            return x, y, np.asarray(x * y, dtype)

        others = jax.tree.map(lambda *rows: np.stack(rows), *(record(1.0) for _ in range(size)))
        canaries = {f"of {scale:g}": record(scale) for scale in (1e3, 1e5, 1e7)}
        params = jax.tree.map(lambda shape: np.asarray(rng.normal(size=shape), dtype), params, is_leaf=_is_shape)
        return Trial(name, loss, params, others, canaries, _ROUNDING if dtype == f4 else _ROUNDING_OF_BFLOAT16)

    w = {"dense": (_D, _D)}
    trials = [
        trial("input of a dense layer", _cancelling_input, w),
        trial("output of a dense layer", _cancelling_output, w),
    ]
    if size > 1:  # alone, the others were never seen to differ
        trials += [
            trial(
                "scaled bias and embedding", _cancelling_copies, {"bias": (_D,), "dense": (_D, _D), "table": (3, _D)}
            ),
        ]
    if size > 4:  # once is enough
        trials += [trial("dense layer in bfloat16", _cancelling_input, w, bf16)]
    return trials


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def _cancelling_input(params: Any, example: Any) -> jax.Array:
    x, y, z = example
    out = ((x * y - z) * jnp.asarray(100, x.dtype)) @ params["dense"]
    return jnp.sum(out.astype(jnp.float32))


def _cancelling_output(params: Any, example: Any) -> jax.Array:
    x, y, z = example
    q = x * y
    return jnp.sum((x * 1e-3 + (q @ params["dense"]) * 0.1) * (q - z))


def _cancelling_copies(params: Any, example: Any) -> jax.Array:
    x, y, z = example
    f = x * y - z
    ids = (jnp.abs(x) > 1).astype(jnp.int32)
    total = jnp.sum((f + params["bias"]) * f * 100.0) + jnp.sum(f @ params["dense"])
    return total + jnp.sum(params["table"][ids] * f[:, None] * 10.0)
