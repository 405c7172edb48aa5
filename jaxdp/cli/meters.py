"""Memory and versions: what a report says about the machine of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from pathlib import Path

import jax

import jaxdp

_PACKAGES = ("jax", "jaxlib", "optax", "dp-accounting", "orbax-checkpoint", "numpy")


def versions(*more: str) -> dict[str, str]:
    """Python, jaxdp and the packages below it that decide what a run computes, and `more` of them."""
    found = {"python": platform.python_version(), "jaxdp": jaxdp.__version__}
    return found | {name: importlib.metadata.version(name) for name in (*_PACKAGES, *more)}


def peak_host_memory() -> tuple[int, str]:
    """The peak resident set of this process in bytes, and the name of its meter."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would start at the peak of the parent process on Linux
        return _kilobytes(status, "VmHWM"), "VmHWM of the process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss of the process"


def host_memory() -> int:
    """The resident set of this process in bytes; its peak where nothing tells."""
    status = Path("/proc/self/status")
    return _kilobytes(status, "VmRSS") if status.exists() else peak_host_memory()[0]


def peak_device_memory() -> tuple[int, str] | None:
    """The peak allocation on the first device in bytes, and the name of its meter; None on a CPU, which has no meter."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in statistics:
        return None
    return statistics["peak_bytes_in_use"], "peak_bytes_in_use of jax.Device.memory_stats"


def available_memory() -> tuple[int, str] | None:
    """The bytes that a run may still allocate on its device, and the name of the meter; None where nothing tells."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
        return free, "bytes_limit of jax.Device.memory_stats"
    return available_host_memory() if jax.devices()[0].platform == "cpu" else None


def available_host_memory() -> tuple[int, str] | None:
    """The bytes that this process may still allocate on the host, and the name of the meter; None where nothing tells."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    free, meter = _kilobytes(meminfo, "MemAvailable"), "MemAvailable"
    left = _left_in_container(Path("/sys/fs/cgroup"))
    return (free, meter) if left is None or left > free else (left, "memory.max of the container")


def _left_in_container(group: Path) -> int | None:
    """What a container may still allocate, which can be less than its machine has; None outside of one."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
    return limit - used + int(statistics.get("inactive_file", 0))  # the kernel takes back what it has cached


def _kilobytes(path: Path, field: str) -> int:
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
