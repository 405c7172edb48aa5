"""What every benchmark shares: alternating timings, medians with their spread, memory meters, and the record of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

XLA_METER = "XLA compiled memory_analysis"
PROCESS_METER = "VmHWM of a fresh process"

# What a record keeps of the environment: the variables that change speed or numbers.
_ENVIRONMENT = ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of repeated measurements and how far they lie apart."""

    median: float
    q25: float
    q75: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        quantiles = np.quantile(np.asarray(values, np.float64), [0.5, 0.25, 0.75, 0.0, 1.0])
        return Spread(*(float(value) for value in quantiles))


def alternate(
    steps: Mapping[str, Callable[[], Any]], *, rounds: int, turn_seconds: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Times all contenders in turns, so that a disturbance of the machine hits all of them alike.

    Every round gives each contender one turn of enough steps to last about `turn_seconds`. The starting contender moves on
    from round to round, so that none always runs in the wake of the same neighbor.

    Args:
        steps: Name -> a function that runs one step and returns when it has finished; already compiled.
        rounds: Turns of each contender.
        turn_seconds: A turn runs at least one step, however long that is.

    Returns:
        Name -> seconds of one step in each round, and name -> steps in a turn.
    """
    names = list(steps)
    counts = {name: max(1, math.ceil(turn_seconds / _seconds(steps[name], 2))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        start = round_index % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_seconds(steps[name], counts[name]))
    return times, counts


def _seconds(step: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def xla_memory(compiled: Any) -> dict[str, Any]:
    """What XLA reserves for one call: arguments, outputs and temporaries; donated arguments are counted once."""
    analysis = compiled.memory_analysis()
    parts = {
        f"{part}_bytes": getattr(analysis, f"{part}_size_in_bytes") for part in ("argument", "output", "temp", "alias")
    }
    total = parts["argument_bytes"] + parts["output_bytes"] + parts["temp_bytes"] - parts["alias_bytes"]
    return {"meter": XLA_METER, "bytes": total, **parts}


def process_memory(step: Callable[[], Any], *, steps: int = 3) -> dict[str, Any]:
    """How far the resident set of this process rises above its present size while it runs `steps` steps.

    Call it in a fresh process, with the model built and the step compiled, so that neither a compiler nor a neighbor's heap
    is in the number. It reads the kernel's high-water mark of this address space. `ru_maxrss` is no substitute: Linux starts
    it at the parent's peak, across `exec`, which for a large parent exceeds all that the child ever uses.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return {"meter": PROCESS_METER, "bytes": None, "reason": "needs /proc of Linux"}

    def read(field: str) -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    before = read("VmRSS")
    for _ in range(steps):
        step()
    peak = read("VmHWM")
    return {"meter": PROCESS_METER, "bytes": max(0, peak - before), "before_bytes": before, "peak_bytes": peak}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module-level function in a new interpreter that shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def let_idle_threads_sleep() -> None:
    """Asks OpenMP, in case a peer uses it, not to spin at its barriers; call it before the peer is imported.

    With spinning, one busy process beside the benchmark on a two-core machine slows PyTorch tenfold, and JAX not at all.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def recorded(
    header: Mapping[str, Any], path: Path | None, measure: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]]
) -> dict[str, Any]:
    """The record of a measurement: the header, where it ran, and its result. What `measure(save)` saves is written to `path`."""
    record = {
        **header,
        "machine": machine(),
        "environment": environment(),
        "versions": versions(["jax", "jaxlib", "jaxdp", "numpy"]),
    }

    def save(result: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, record | {"device": device(), "result": result})

    return record | {"result": measure(save)}


def machine() -> dict[str, Any]:
    """The machine, without names that would identify it."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        if "model name" in fields:  # ARM kernels give none
            family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
            return f"{fields['model name']} ({family})" if family else fields["model name"]
    return platform.processor() or platform.machine()


def device() -> dict[str, Any]:
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Python and the installed version of each distribution."""
    found = {"python": platform.python_version()}
    for name in sorted(set(distributions)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = getattr(importlib.import_module(name), "__version__", "unknown")
    return found


def source_digest(package: str) -> str:
    """A fingerprint of a package's Python files, since a version number does not change with every edit."""
    digest = hashlib.sha256()
    root = Path(str(importlib.import_module(package).__file__)).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def command(module: str, arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", module, *arguments])


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
