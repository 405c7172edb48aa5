"""The dense-layer kernels: correct against float64, timed against XLA, compiled for an H200 without one.

    python -m benchmarks.kernels --json kernels.json                # check, then time, on this machine's device
    .ci/aot python -m benchmarks.kernels --aot --json benchmarks/results/kernels_h200_aot.json

Without a GPU, check and time run at a reduced size: XLA, and the interpreted kernels for correctness alone. The times of a
GPU decide the tables of `pallas_kernels.blocks`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pallas_kernels
from benchmarks import harness
from pallas_kernels import blocks, counter_normal, support

LAYERS = [(768, 768), (768, 2304), (768, 3072), (1280, 1280), (1280, 5120), (4096, 4096), (4096, 11008)]  # (D, P)
LENGTHS = (128, 256, 512, 1024, 2048)
TOKENS = 8192  # of one batch, whatever T


@dataclasses.dataclass(frozen=True)
class Case:
    """One dense layer and batch: x `[B, T, D]`, g `[B, T, P]`, bfloat16."""

    batch: int
    num_tokens: int
    width: int
    out: int

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.num_tokens} {self.width}x{self.out}"

    def operands(self) -> tuple[jax.Array, jax.Array]:
        shapes = [(self.batch, self.num_tokens, size) for size in (self.width, self.out)]
        keys = jax.random.split(jax.random.key(0))
        x, g = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        return x, g


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def runnable() -> list[support.Implementation]:
    """The implementations that run on this machine."""
    operand = jnp.zeros((1, 1, 1), jnp.bfloat16)
    return [name for name in support.IMPLEMENTATIONS if support.why_not(name, operand, operand) is None]


def check(cases: Sequence[Case] | None = None) -> dict[support.Implementation, Any]:
    """Every kernel and implementation against float64 on the host, noise and awkward shapes included.

    Returns:
        Implementation -> case -> kernel -> relative error.

    Raises:
        AssertionError: an error is above 1e-5.
    """
    if cases is None:
        cases = [Case(3, 42, 129, 257), Case(2, 1, 64, 64), Case(2, 200, 70, 90)]
        cases += [Case(2, 77, 768, 2304), Case(2, 1024, 1280, 1280)] if on_gpu() else []
    errors: dict[support.Implementation, Any] = {name: {} for name in runnable()}
    for case in cases:
        x, g = case.operands()
        gradients = np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64), optimize=True)
        squares = np.sum(gradients**2, axis=(1, 2))
        factors = jnp.linspace(0.0, 1.0, case.batch + 1, dtype=jnp.float32)[1:]
        accumulator = jnp.ones((case.width, case.out))
        key_data = jax.random.key_data(jax.random.key(1))
        z = np.asarray(counter_normal.standard_normal(key_data, accumulator.shape), np.float64)
        total = 1.0 + np.einsum("b,bdp->dp", np.asarray(factors, np.float64), gradients) + 3.0 * z
        for name, found in errors.items():
            stored_norms, stored = pallas_kernels.wgrad_norms(x, g, store=True, implementation=name)
            results = {
                "gram_norms": (pallas_kernels.gram_norms(x, g, implementation=name), squares),
                "wgrad_norms": (pallas_kernels.wgrad_norms(x, g, implementation=name), squares),
                "wgrad_norms of the stored": (stored_norms, np.sum(np.asarray(stored, np.float64) ** 2, axis=(1, 2))),
                "stored gradients": (stored, gradients),
                "clip_noise_dense": (
                    pallas_kernels.clip_noise_dense(
                        x,
                        g,
                        factors,
                        accumulator=accumulator,
                        noise_stddev=3.0,
                        key_data=key_data,
                        implementation=name,
                    ),
                    total,
                ),
            }
            found[case.name] = {kernel: _relative_error(*pair) for kernel, pair in results.items()}
            assert max(found[case.name].values()) < 1e-5, {name: found}
    return errors


def _relative_error(result: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(result, np.float64) - expected) / np.linalg.norm(expected))


def contenders(case: Case, implementations: Sequence[support.Implementation]) -> Mapping[str, Callable[[], Any]]:
    """Name -> one compiled and warm call that returns when it has finished."""
    x, g = case.operands()
    factors = jnp.full(case.batch, 0.5)
    key_data = jax.random.key_data(jax.random.key(1))
    functions: dict[str, Callable[..., Any]] = {
        # What a step without privacy pays for this layer, and a private sum that rounds c G, which is not sound (S4c).
        "weight gradient, not private": lambda x, g, *_: _matmul(x, g),
        "weighted matmul and noise, rounded": _rounded_sum,
    }
    for name in implementations:
        norms = {"implementation": name}
        functions[f"gram_norms {name}"] = lambda x, g, *_, norms=norms: pallas_kernels.gram_norms(x, g, **norms)
        functions[f"wgrad_norms {name}"] = lambda x, g, *_, norms=norms: pallas_kernels.wgrad_norms(x, g, **norms)
        functions[f"clip_noise_dense {name}"] = functools.partial(_noised_sum, implementation=name)
    steps: dict[str, Callable[[], Any]] = {}
    for name, function in functions.items():
        jitted = jax.jit(function)

        def step(jitted: Callable[..., Any] = jitted) -> None:
            jax.block_until_ready(jitted(x, g, factors, key_data))

        step()
        steps[name] = step
    return steps


def _matmul(x: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.einsum("btd,btp->dp", x, g, preferred_element_type=jnp.float32)


def _rounded_sum(x: jax.Array, g: jax.Array, factors: jax.Array, key_data: jax.Array) -> jax.Array:
    total = _matmul(x, factors.astype(g.dtype)[:, None, None] * g)
    return total + counter_normal.standard_normal(key_data, total.shape)


def _noised_sum(
    x: jax.Array, g: jax.Array, factors: jax.Array, key_data: jax.Array, *, implementation: support.Implementation
) -> jax.Array:
    return pallas_kernels.clip_noise_dense(
        x, g, factors, noise_stddev=1.0, key_data=key_data, implementation=implementation
    )


def time(
    cases: Sequence[Case] | None = None, *, rounds: int = 5, turn_seconds: float = 0.02
) -> dict[str, dict[str, Any]]:
    """Seconds of every route on this device, in alternation; interpreted kernels are left out.

    Returns:
        Case -> contender -> median, quartiles and extremes over the rounds; an error instead where a contender fails.
    """
    if cases is None:
        lengths = LENGTHS if on_gpu() else (16,)
        layers = LAYERS if on_gpu() else [(64, 96)]
        tokens = TOKENS if on_gpu() else 64
        cases = [Case(tokens // length, length, *layer) for layer in layers for length in lengths]
    implementations: list[support.Implementation] = [n for n in runnable() if n != "mosaic_gpu_interpret"]
    record: dict[str, dict[str, Any]] = {}
    for case in cases:
        try:
            times, _ = harness.alternate(contenders(case, implementations), rounds=rounds, turn_seconds=turn_seconds)
        except Exception as error:  # out of memory, say: the other cases may still tell something
            record[case.name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            record[case.name] = {name: dataclasses.asdict(harness.Spread.of(t)) for name, t in times.items()}
    return record


def aot(shapes: Sequence[tuple[int, int]] | None = None, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """What the compiler says of every kernel on an H200: registers, spills, scratch memory; nothing is executed.

    Raises:
        RuntimeError: no compiler for CUDA is installed; the message says how to get one.
    """
    from tests.aot import h200, programs

    if (reason := h200.why_no_compiler()) is not None:
        raise RuntimeError(reason)
    rows = []
    for width, out in programs.SHAPES if shapes is None else shapes:
        for num_tokens in programs.LENGTHS if lengths is None else lengths:
            for name in programs.NAMES:
                row: dict[str, Any] = {"kernel": name, "B": programs.BATCH, "T": num_tokens, "D": width, "P": out}
                for implementation in ("mosaic_gpu", "xla"):
                    function, arguments = programs.program(name, num_tokens, width, out, implementation=implementation)
                    compiled = h200.compile_for_h200(function, *arguments)
                    row[f"{implementation}_temp_bytes"] = compiled.temp_bytes
                    if implementation == "mosaic_gpu":
                        (kernel,) = compiled.kernels
                        row |= {k: v for k, v in dataclasses.asdict(kernel).items() if k != "name"}
                rows.append(row)
    tables = {name: dataclasses.asdict(blocks.blocks_of(name, h200.DEVICE_KIND)) for name in blocks.SAFE}
    return {"target": h200.DEVICE_KIND, "blocks": tables, "kernels": rows}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Checks the kernels against float64 and times them, or compiles them for an H200."""

    json: Path | None = None
    """File to write the record to."""
    aot: bool = False
    """Compile for an H200 instead of running; needs the environment of .ci/aot."""


def run(config: Kernels) -> dict[str, Any]:
    record: dict[str, Any] = {
        "benchmark": "kernels of dense layers",
        "command": harness.command("benchmarks.kernels", sys.argv[1:]),
        "machine": harness.machine(),
        "versions": harness.versions(["jax", "jaxlib", "jaxdp", "numpy"]),
        "source": harness.source_digest("pallas_kernels"),
    }
    if config.aot:
        record["note"] = "compiled without a GPU; nothing was executed"
        record |= aot()
    else:
        record |= {"device": harness.device(), "check": check(), "time": time()}
    if config.json is not None:
        harness.write_json(config.json, record)
    return record


if __name__ == "__main__":
    outcome = run(tyro.cli(Kernels))
    for row in outcome.get("kernels", []):
        print(*(f"{key}={value}" for key, value in row.items()))
    for case, seconds in outcome.get("time", {}).items():
        print(case, {name: f"{spread['median'] * 1e6:.0f} us" for name, spread in seconds.items() if name != "error"})
