"""The throughput items of `benchmarks.gpu_check`: DP over non-private, and peak memory, for large language models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks import harness
from benchmarks.models import Model, Transformer
from benchmarks.peers import NON_PRIVATE, OTHERS, Contender, Problem, Settings, Trainer, jaxdp_contender
from pallas_kernels import support

Save = Callable[[dict[str, Any]], None]

_SETTINGS = Settings(l2_clip_norm=1.0, noise_multiplier=1.0, learning_rate=1e-4)

# What comes first is what is left if the item is interrupted.
METHOD_STAGES = (("auto", "per_layer"), ("book_keeping", "two_pass"))
KERNEL_METHODS = ("book_keeping", "two_pass")

# One gradient per example, in bfloat16 and once more in float32, must leave room for the rest.
_BYTES_PER_PARAM, _MATERIALIZED_BYTES = 6, 40e9


def methods(model: Model, rows: int, save: Save, **pace: Any) -> dict[str, Any]:
    """jaxdp by its methods that keep no gradient per example; then with a kernel for every leaf that one can serve.

    Where the steps with kernels are faster, `pallas_kernels.blocks.FASTER_FROM` may say so.
    """
    stages = [[jaxdp_contender(method) for method in stage] for stage in METHOD_STAGES]
    reason = support.why_not_here("mosaic_gpu")
    if reason is None:
        stages.append([with_kernels(jaxdp_contender(method)) for method in KERNEL_METHODS])
    result = measure(Problem(model, rows, seed=0), stages, save, **pace)
    return result if reason is None else result | {"without_kernels": reason}


def with_kernels(contender: Contender, implementation: support.Implementation = "mosaic_gpu") -> Contender:
    """A contender of jaxdp that takes norms and sums by kernels; the update is the same to rounding."""
    options = (*contender.options, ("implementation", implementation))
    return dataclasses.replace(contender, name=f"{contender.name}_kernels", options=options)


def materializing(model: Model, rows: int, save: Save, **pace: Any) -> dict[str, Any]:
    """One gradient per example: jax_privacy, and jaxdp's definition, at the largest microbatch that surely fits.

    jax_privacy sums in the dtype of the gradients, its default; jaxdp in float32.
    """
    problem = Problem(model, rows, seed=0)
    fitting = _MATERIALIZED_BYTES / _BYTES_PER_PARAM / problem.num_params()
    size = max([size for size in range(1, rows + 1) if rows % size == 0 and size <= fitting], default=1)
    wanted = [other for other in OTHERS if other.peer == "jax_privacy" and other.why_skipped() is None]
    wanted.append(jaxdp_contender("vmap"))
    return measure(problem, [[one.with_microbatch_size(size if size < rows else None)] for one in wanted], save, **pace)


def measure(
    problem: Problem,
    stages: Sequence[Sequence[Contender]],
    save: Save,
    *,
    settings: Settings = _SETTINGS,
    rounds: int = 5,
    turn_seconds: float = 0.3,
) -> dict[str, Any]:
    """Times each stage's contenders in turns with the non-private step, and reads both meters of memory.

    The updates of these contenders are compared by `gpu_numerics.updates_against_definition`, at a smaller size.

    Args:
        problem: What all of them train.
        stages: Contenders that are compiled and timed together; what a stage found is saved before the next one starts.
        save: Keeps what is known so far.
        settings: The numbers of DP-SGD.
        rounds: Turns of each contender.
        turn_seconds: Length of a turn.
    """
    model: Any = problem.model
    result: dict[str, Any] = {
        "model": {"name": type(model).__name__, **dataclasses.asdict(model)},
        "num_params": problem.num_params(),
        "batch": problem.rows,
        "tokens_per_step": problem.rows * model.length,
        "rounds": rounds,
        "contenders": {},
    }
    entries = result["contenders"]
    trainers: dict[str, Trainer] = {}
    for index, stage in enumerate(stages):
        stage = [NON_PRIVATE, *stage] if index == 0 else list(stage)
        compiled = _compile_together(stage, problem, settings)
        # In the order of what they reserve, so that each one's peak is a new one and can be told from the last.
        for contender in sorted(stage, key=lambda one: compiled[one.name][1].get("xla_bytes", 0)):
            trainer, entry = compiled[contender.name]
            entries[contender.name] = entry
            if trainer is not None:
                entry |= _first_step(trainer)
                if "error" not in entry:
                    trainers[contender.name] = trainer
            save(result)
        if NON_PRIVATE.name not in trainers:
            return result
        times, _ = harness.alternate(
            {name: trainer.step for name, trainer in trainers.items()}, rounds=rounds, turn_seconds=turn_seconds
        )
        base = times[NON_PRIVATE.name]
        for name in trainers.keys() if index == 0 else trainers.keys() - {NON_PRIVATE.name}:
            entries[name] |= _speed(times[name], base, result["tokens_per_step"])
        trainers = {NON_PRIVATE.name: trainers[NON_PRIVATE.name]}
        _memory_ratios(entries)
        save(result)
    return result


def _compile_together(
    stage: Sequence[Contender], problem: Problem, settings: Settings
) -> dict[str, tuple[Trainer | None, dict[str, Any]]]:
    """Compiles at once what the compiler would otherwise do one after the other, and most of a lease with it."""

    def compile_one(contender: Contender) -> tuple[Trainer | None, dict[str, Any]]:
        start = time.perf_counter()
        entry: dict[str, Any] = {"microbatch_size": contender.microbatch_size}
        try:
            trainer = contender.make(problem, settings)
            assert trainer.xla_memory is not None
            memory = trainer.xla_memory()
        except Exception as error:  # the others may still run
            return None, entry | {"error": f"{type(error).__name__}: {error}"[:2000]}
        entry |= {"xla_bytes": memory["bytes"], "xla_temp_bytes": memory["temp_bytes"]}
        return trainer, entry | {"compile_seconds": time.perf_counter() - start}

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(compile_one, stage))
    return {contender.name: pair for contender, pair in zip(stage, done, strict=True)}


def _first_step(trainer: Trainer) -> dict[str, Any]:
    """Runs the first step, which makes the contender's arrays; the device's own count of its peak, where it has one.

    The allocator's peak is that of the whole process. It says something about this step if the step raised it, and then
    the difference to what was in use before is this contender's: its state and what its step needed.
    """
    before = jax.local_devices()[0].memory_stats()
    try:
        trainer.step()
    except Exception as error:  # out of memory, most likely
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    after = jax.local_devices()[0].memory_stats()
    if not before or not after or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        return {"device_peak_bytes": None}
    return {"device_peak_bytes": after["peak_bytes_in_use"] - before["bytes_in_use"]}


def _speed(seconds: list[float], base: list[float], tokens: int) -> dict[str, Any]:
    ratios = [theirs / own for own, theirs in zip(seconds, base, strict=True)]
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": dataclasses.asdict(harness.Spread.of([tokens / value for value in seconds])),
        "throughput_over_non_private": dataclasses.asdict(harness.Spread.of(ratios)),
    }


def _memory_ratios(entries: dict[str, dict[str, Any]]) -> None:
    base = entries[NON_PRIVATE.name]
    for entry in entries.values():
        for name in ("xla_bytes", "device_peak_bytes"):
            if entry.get(name) and base.get(name):
                entry[f"{name}_over_non_private"] = entry[name] / base[name]


def opacus_ghost(model: Transformer, rows: int, save: Save, *, dtype: str = "bfloat16", **pace: Any) -> dict[str, Any]:
    """Opacus' ghost clipping against PyTorch without privacy, on this device, in a model of the same sizes.

    Opacus cannot tie the head to the embedding, so it trains the untied model of `benchmarks.models`.
    """
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(model, rows, seed=0)
    result: dict[str, Any] = {"model": dataclasses.asdict(model), "batch": rows, "device": device, "dtype": dtype}
    result["versions"] = harness.versions(["torch", "opacus"])
    entries: dict[str, dict[str, Any]] = {"torch_non_private": {}, "opacus_ghost": {}}
    trainers: dict[str, Trainer] = {}
    for contender in OTHERS:
        if contender.name not in entries:
            continue
        on_device = dataclasses.replace(contender, options=(("device", device), ("dtype", dtype)))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        trainers[contender.name] = on_device.make(problem, _SETTINGS)
        trainers[contender.name].step()
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
        entries[contender.name]["device_peak_bytes"] = peak
        save(result | {"contenders": entries})
    times, _ = harness.alternate({name: trainer.step for name, trainer in trainers.items()}, **_paced(pace))
    for name, entry in entries.items():
        entry |= _speed(times[name], times["torch_non_private"], rows * model.length)
    return result | {"contenders": entries}


def _paced(pace: Mapping[str, Any]) -> dict[str, Any]:
    return {"rounds": 5, "turn_seconds": 0.3} | dict(pace)


def summary(result: Mapping[str, Any]) -> str:
    """One line: throughput over non-private and, in brackets, memory over non-private."""
    parts = []
    for name, entry in result.get("contenders", {}).items():
        ratio = entry.get("throughput_over_non_private", {}).get("median")
        if ratio is not None:
            memory = entry.get("device_peak_bytes_over_non_private") or entry.get("xla_bytes_over_non_private")
            parts.append(f"{name} {ratio:.2f}" + (f" [{memory:.2f}]" if memory else ""))
        elif "error" in entry:
            parts.append(f"{name} {entry['error'][:40]!r}")
    return ", ".join(parts)
