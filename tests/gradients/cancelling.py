"""Random losses whose gradient cancels for one record: what a compiler that computes a value twice gets wrong (S4e).

The features of a loss are made of x * y - z with z = x * y as stored: zero, unless product and difference are rounded once. For
record 0, a hundred thousand times the others, it is then a rounding of 1e10. So the norm of its gradient is 0, or of size 1e5
and more, as the compiler likes; a sum that reads another value than the norm is off by as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: How large x and y of record 0 are: their product must not overflow.
_LARGE = {jnp.dtype(jnp.float32): 1e5, jnp.dtype(jnp.bfloat16): 1e5, jnp.dtype(jnp.float16): 1e2}


@dataclasses.dataclass(frozen=True)
class Program:
    """A random loss and its arguments.

    Attributes:
        name: What was drawn, in words.
        loss: `loss(params, example) -> scalar`.
        params: Its parameters.
        batch: B examples, the first of which cancels.
    """

    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def draw(seed: int, *, dtype: Any = jnp.float32, size: int | None = None, remat: bool = False) -> Program:
    """A random program of 3 to 12 operations.

    Args:
        seed: Decides everything.
        dtype: Of the data and the parameters.
        size: B; 1, 4 or 64 by the seed.
        remat: Whether the features are computed under `jax.checkpoint`.
    """
    rng = np.random.default_rng([seed, 77])
    B = int(rng.choice([1, 4, 64])) if size is None else size
    D, T = int(rng.choice([1, 3, 4, 4, 5, 8, 17])), int(rng.choice([0, 0, 0, 3]))
    shape = (T, D) if T else (D,)
    large = _LARGE[jnp.dtype(dtype)]
    x, y = (rng.normal(size=(B, *shape)).astype(dtype) for _ in "xy")
    x[0], y[0] = x[0] * np.asarray(large, dtype), y[0] * np.asarray(large, dtype)
    batch = {"x": x, "y": y, "z": (x * y).astype(dtype), "id": rng.integers(5, size=(B, max(T, 1))).astype(np.int32)}
    params: dict[str, Any] = {}
    names: list[str] = []

    def parameter(kind: str, *size: int) -> str:
        name = f"{kind}{len(params)}"
        params[name] = jnp.asarray(rng.normal(size=size), dtype)
        return name

    steps = [
        (
            str(rng.choice(["scale", "residual", "square", "tanh", "mix", "times_x", "sum"])),
            float(10 ** rng.uniform(-2, 2)),
        )
        for _ in range(int(rng.choice([0, 1, 1, 2, 3, 5])))
    ]
    heads = []
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        kind = str(rng.choice(["dense", "dense_out", "bias", "embedding", "scaled_bias", "two_uses"]))
        names.append(kind)
        if kind in ("dense", "dense_out", "two_uses"):
            heads.append((kind, parameter("w", D, 4 if kind == "dense" else D), float(10 ** rng.uniform(-2, 2))))
        elif kind == "embedding":
            heads.append((kind, parameter("e", 5, D), float(10 ** rng.uniform(-2, 2))))
        else:
            heads.append((kind, parameter("b", D), float(10 ** rng.uniform(-2, 2))))

    def number(value: float) -> jax.Array:
        return jnp.asarray(value, dtype)

    def features(example: Any) -> tuple[jax.Array, jax.Array]:
        x, y, z = example["x"], example["y"], example["z"]
        q = x * y
        f = q - z
        for kind, scale in steps:
            if kind == "scale":
                f = f * number(scale)
            elif kind == "residual":
                f = f + (q - z) * number(scale)
            elif kind == "square":
                f = f * (q - z)
            elif kind == "tanh":
                f = f * jnp.tanh(x * number(scale))
            elif kind == "mix":
                f = f - (x * y - z) * y * number(min(scale, 1.0))
            elif kind == "times_x":
                f = f * x * number(min(scale, 1e-2))
            else:
                f = f + jnp.sum(q - z, axis=-1, keepdims=True) * number(scale)
        return f, q

    def loss(params: Any, example: Any) -> jax.Array:
        f, q = (jax.checkpoint(features) if remat else features)(example)
        total = jnp.float32(0)
        for kind, name, scale in heads:
            w = params[name]
            if kind == "dense":
                out = f @ w
            elif kind == "dense_out":  # the cotangent cancels, not the input
                out = (example["x"] * number(1e-3) + (q @ w) * number(0.1)) * f
            elif kind == "two_uses":
                out = jnp.tanh(example["x"] * number(1e-6) @ w) * f + f @ w
            elif kind == "embedding":
                out = w[example["id"]] * jnp.broadcast_to(f, (example["id"].shape[0], f.shape[-1]))
            elif kind == "bias":
                out = f * w * number(scale)
            else:
                out = (f + w) * f * number(scale)
            total = total + jnp.sum(out.astype(jnp.float32) * jnp.float32(scale))
        return total

    words = f"seed {seed}: B {B}, {shape}, {jnp.dtype(dtype).name}, {[kind for kind, _ in steps]} into {names}"
    return Program(words + (" in a checkpoint" if remat else ""), loss, params, batch)


def movement(clipped_sum: Callable[[Any, Any, Any], Any], program: Program) -> float:
    """How far the sum moves when record 0 leaves: `clipped_sum(params, batch, is_padding_example)`."""
    size = len(program.batch["x"])
    found = []
    for is_absent in (False, True):
        mask = np.zeros(size, bool)
        mask[0] = is_absent
        total = clipped_sum(program.params, program.batch, mask)
        found.append(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(total)]))
    return float(np.linalg.norm(found[0] - found[1]))
