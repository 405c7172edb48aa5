"""Everything that only a GPU can show, in one call of under ten minutes; writes JSON after each item.

    python -m benchmarks.gpu_check --json benchmarks/results/gpu_check.json

First numerics against float64 on the host, then time against peers: a fast wrong answer is worth nothing. On a machine
without a GPU it runs the same checks on the CPU, at the same sizes, and says so in the record.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy import stats

import jaxdp
from benchmarks import harness
from jaxdp.noise import standard_normal


@dataclasses.dataclass(frozen=True)
class GpuCheck:
    """Checks numerics on the default device, then times a DP step there."""

    json: Path | None = None
    """File to write the record to, after each item."""
    seconds: float = 540.0
    """Items that would start later than this are left out, and named in the record."""


def clipped_sums_against_float64() -> dict[str, Any]:
    """S4: on GPU a default-precision float32 product may run as TF32. The stored sum must keep the clip norm all the same."""
    worst: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 16, 256)), rng.normal(size=(32, 16, 384))

    def loss(w: jax.Array, example: Any) -> jax.Array:
        return jnp.sum((example[0] @ w) * example[1])

    for dtype in (jnp.float32, jnp.bfloat16):
        batch = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
        params = jnp.zeros((256, 384), dtype)
        grads = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, batch), np.float64)  # as the device forms them
        norms = np.sqrt(np.sum(grads**2, axis=(1, 2)))
        clip_norm = float(np.median(norms))
        grad_fn = jax.jit(jaxdp.clipped_grad(loss, clipping=jaxdp.flat(clip_norm)))
        total, _ = grad_fn(params, batch)
        exact = np.einsum("b,bij->ij", np.minimum(1, clip_norm / norms), grads)
        alone = [grad_fn(params, batch, is_padding_example=np.arange(32) != i)[0] for i in range(32)]
        largest = max(float(np.linalg.norm(np.asarray(one, np.float64))) for one in alone) / clip_norm
        error = float(np.linalg.norm(np.asarray(total, np.float64) - exact) / np.linalg.norm(exact))
        worst[jnp.dtype(dtype).name] = {"relative_error": error, "largest_contribution_over_clip_norm": largest}
        assert largest <= 1 + 1e-6, worst
        assert error < 1e-5, worst
    return worst


def noise_law() -> dict[str, Any]:
    """The noise of the device is normal, in its body and its tails, and repeats by key."""
    key = jax.random.key(1)
    draw = np.asarray(jax.jit(lambda k: standard_normal(k, (20_000_000,), jnp.float32))(key))
    again = np.asarray(jax.jit(lambda k: standard_normal(k, (20_000_000,), jnp.float32))(key))
    pvalue = float(stats.kstest(draw[:4_000_000], stats.norm.cdf).pvalue)
    expected = 2 * len(draw) * stats.norm.sf(4.5)
    beyond = int(np.sum(np.abs(draw) > 4.5))
    assert np.array_equal(draw, again)
    assert pvalue > 1e-4
    assert abs(beyond - expected) < 6 * np.sqrt(expected)
    return {"ks_pvalue": pvalue, "beyond_4.5": beyond, "expected_beyond_4.5": float(expected)}


def noise_time() -> dict[str, Any]:
    """Seconds for 1e8 draws, and for as many of `jax.random.normal`."""
    size, key = 100_000_000 if jax.default_backend() == "gpu" else 4_000_000, jax.random.key(0)
    ours = jax.jit(lambda k: jnp.sum(standard_normal(k, (size,), jnp.float32)))
    theirs = jax.jit(lambda k: jnp.sum(jax.random.normal(k, (size,))))
    steps: dict[str, Callable[[], Any]] = {
        "jaxdp": lambda: jax.block_until_ready(ours(key)),
        "jax.random.normal": lambda: jax.block_until_ready(theirs(key)),
    }
    for step in steps.values():
        step()
    times, _ = harness.alternate(steps, rounds=5, turn_seconds=0.2)
    spreads = {name: dataclasses.asdict(harness.Spread.of(values)) for name, values in times.items()}
    return {"draws": size, "seconds": spreads}


def dp_sgd(model: str) -> dict[str, Any]:
    """The peer benchmark on this device, with the peers that are installed."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = ["-m", "benchmarks.dp_sgd", "--model", model, "--no-process-memory", "--json", str(path)]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=240)
        return json.loads(path.read_text())


ITEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "clipped_sums_against_float64": clipped_sums_against_float64,
    "noise_law": noise_law,
    "noise_time": noise_time,
    "dp_sgd_mlp": lambda: dp_sgd("mlp"),
    "dp_sgd_transformer": lambda: dp_sgd("transformer"),
}


def run(config: GpuCheck, items: dict[str, Callable[[], dict[str, Any]]] | None = None) -> dict[str, Any]:
    """Runs the items in order; one that fails is recorded with its error, and the next one runs."""
    start = time.perf_counter()
    record: dict[str, Any] = {
        "command": harness.command("benchmarks.gpu_check", sys.argv[1:]),
        "machine": harness.machine(),
        "device": harness.device(),
        "versions": harness.versions(["jax", "jaxlib", "jaxdp", "numpy"]),
        "items": {},
    }
    for name, item in (ITEMS if items is None else items).items():
        if time.perf_counter() - start > config.seconds:
            record["items"][name] = {"left_out": f"more than {config.seconds:g} s had passed"}
        else:
            began = time.perf_counter()
            try:
                record["items"][name] = {"result": item(), "seconds": time.perf_counter() - began}
            except Exception as error:  # the next item may still tell something
                record["items"][name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, record["items"][name].get("error", "ok"), flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    return record


if __name__ == "__main__":
    outcome = run(tyro.cli(GpuCheck))
    raise SystemExit(any("error" in item for item in outcome["items"].values()))
