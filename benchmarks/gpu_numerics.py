"""The numeric items of `benchmarks.gpu_check`: a fast wrong answer is worth nothing."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import jaxdp
from benchmarks import checks, harness
from benchmarks.gpu_throughput import with_kernels
from benchmarks.language_models import LanguageModel
from benchmarks.peers import METHODS, OTHERS, Problem, Settings, jaxdp_contender
from jaxdp.noise import standard_normal
from pallas_kernels import support

# Against float64. On a GPU a float32 product may run as TF32, with 10 bits; bfloat16 has 7.
_SUM_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
_UPDATE_TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}


def kernels(function: str) -> dict[str, Any]:
    """Calls `check` or `time` of `benchmarks.kernels`, the Pallas kernels by themselves."""
    if importlib.util.find_spec("benchmarks.kernels") is None:
        return {"absent": "there is no benchmarks.kernels"}
    found = getattr(importlib.import_module("benchmarks.kernels"), function, None)
    return {"absent": f"benchmarks.kernels has no {function}"} if found is None else found()


def clipped_sums_against_float64() -> dict[str, Any]:
    """S4: whatever the product's precision on this device, the stored sum keeps the clip norm, by every method."""
    record: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 16, 256)), rng.normal(size=(32, 16, 384))

    def loss(w: jax.Array, example: Any) -> jax.Array:
        return jnp.sum((example[0] @ w) * example[1])

    for dtype in (jnp.float32, jnp.bfloat16):
        batch = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
        params = jnp.zeros((256, 384), dtype)
        exact_x, exact_y = (np.asarray(part, np.float64) for part in batch)
        grads = np.einsum("bti,btj->bij", exact_x, exact_y)  # of the inputs as the device holds them
        norms = np.sqrt(np.sum(grads**2, axis=(1, 2)))
        clip_norm = float(np.median(norms))
        exact = np.einsum("b,bij->ij", np.minimum(1, clip_norm / norms), grads)
        for method in METHODS:
            # One leaf is one layer, so that clipping by layers and flat clipping are the same.
            policy = jaxdp.per_layer(clip_norm) if method == "per_layer" else jaxdp.flat(clip_norm)
            grad_fn = jax.jit(jaxdp.clipped_grad(loss, clipping=policy, method=method))
            total, _ = grad_fn(params, batch)
            alone = [grad_fn(params, batch, is_padding_example=np.arange(32) != i)[0] for i in range(32)]
            largest = max(float(np.linalg.norm(np.asarray(one, np.float64))) for one in alone) / clip_norm
            error = float(np.linalg.norm(np.asarray(total, np.float64) - exact) / np.linalg.norm(exact))
            name = jnp.dtype(dtype).name
            record[f"{name} {method}"] = {"relative_error": error, "largest_contribution_over_clip_norm": largest}
            assert largest <= 1 + 1e-6, record
            assert error < _SUM_TOLERANCE[name], record
    return record


def updates_against_definition(models: Sequence[LanguageModel], rows: int) -> dict[str, Any]:
    """Every method's noiseless update of a language model, and jax_privacy's, against one gradient per example."""
    contenders = [jaxdp_contender(method) for method in METHODS]
    if support.why_not_here("mosaic_gpu") is None:
        contenders.append(with_kernels(jaxdp_contender("book_keeping")))
    contenders += [other for other in OTHERS if other.peer == "jax_privacy" and other.why_skipped() is None]
    record: dict[str, Any] = {}
    for model in models:
        problem = Problem(model, rows, seed=0)
        settings = Settings(float(np.median(checks.gradient_norms(problem))), 0.0, 1.0)
        differences, _ = checks.update_differences(contenders, problem, settings)
        record[f"{type(model).__name__} {model.dtype}{' scan' if model.scan else ''}"] = differences
        worst = max(differences.values())
        assert worst < _UPDATE_TOLERANCE[model.dtype], record
    return record


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


def noise_time(size: int) -> dict[str, Any]:
    """Seconds for `size` draws, and for as many of `jax.random.normal`."""
    key = jax.random.key(0)
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
