r"""Time and device memory of a zeroth-order step: streamed, resident, its parts, plain forward passes, and MeZO in PyTorch.

    python -m benchmarks.zeroth_order --json benchmarks/results/zeroth_order_cpu.json
    python -m benchmarks.zeroth_order --problem cpu-512 --is-split --no-is-resident --num-directions 1 4 \
        --json benchmarks/results/zeroth_order_stages_cpu.json
    python -m benchmarks.zeroth_order --problem opt-13b --no-is-resident --max-device-gigabytes 8 --json opt-13b.json

For every K, these take turns:

    streamed       a step whose blocks wait in pinned host memory
    in_stages      the same with every block in stages (`split_block`), with --is-split
    transfers      its transfers alone: every block to the device and back
    computation    its computation alone: all blocks are one, which stays on the device
    resident       a step with all blocks on the device, where they fit
    by_blocks      the losses of a batch by the programs of single blocks, unperturbed; resident blocks
    forward        the loss of a batch by one program, a plain forward pass
    torch_mezo     MeZO in PyTorch, eager and in place, K = 1; torch_forward is its forward pass

Ratios are medians over the rounds, in which all ran. Step over bound is streamed / max(transfers, computation), link utilization
transfers / streamed, and the share of perturbations and updates 1 - 2K by_blocks / resident. Peak memory is the allocator's, of
the process up to the first streamed step of that K; of the first K it is the step's own.

On a CPU pinned host memory is memory, and a transfer is a copy in it: the link is simulated, and competes for the cores with
the computation that it should hide behind.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import harness, zeroth_order_contenders, zeroth_order_torch
from benchmarks.harness import Spread
from benchmarks.zeroth_order_contenders import Run
from benchmarks.zeroth_order_problems import PROBLEMS, Problem
from jaxdp import _validate
from jaxdp.zeroth_order import Placement

Save = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a zeroth-order step on the default device."""

    problem: str = "cpu"
    """The model: cpu, cpu-512, opt-1.3b, opt-6.7b, opt-13b, opt-30b, or tiny."""
    num_directions: tuple[int, ...] = (1, 4, 16)
    """Values of K."""
    is_resident: bool = True
    """Run the contenders for which all blocks must be on the device, too."""
    is_split: bool = False
    """Stream blocks in stages, too."""
    prefetch: int = 1
    """Blocks under way to the device while one computes."""
    torch: bool = False
    """Run PyTorch, too."""
    max_device_gigabytes: float | None = None
    """Cap on the memory of JAX's allocator; on an NVIDIA GPU only."""
    rounds: int = 7
    """Turns of each contender."""
    turn_seconds: float = 0.3
    """A turn repeats its step for about this long."""
    json: Path | None = None
    """File to write the record to, after each K."""

    def __post_init__(self) -> None:
        _validate.one_of("problem", self.problem, tuple(PROBLEMS))
        _validate.positive_integer("rounds", self.rounds)
        _validate.nonnegative("turn_seconds", self.turn_seconds)
        for value in self.num_directions:
            _validate.positive_integer("num_directions", value)
        if self.max_device_gigabytes is not None:
            _validate.positive("max_device_gigabytes", self.max_device_gigabytes)


def measure(config: Config, save: Save = lambda _: None) -> dict[str, Any]:
    """Measures the link, then the contenders for every K, and returns the result.

    Args:
        config: The settings.
        save: Keeps what is known so far.
    """
    if config.max_device_gigabytes is not None:
        cap_device_memory(config.max_device_gigabytes)
    problem = PROBLEMS[config.problem]
    pace: dict[str, Any] = {"rounds": config.rounds, "turn_seconds": config.turn_seconds}
    result: dict[str, Any] = {
        "problem": {"name": config.problem, **dataclasses.asdict(problem)},
        "num_params": problem.num_params,
        "block_bytes": problem.block_bytes,
        "device_bytes_limit": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        "link_is_simulated": jax.default_backend() == "cpu",
        "link": bandwidths([problem.block_bytes], **pace),
        "directions": {},
    }
    save(result)
    for K in config.num_directions:
        found = result["directions"][str(K)] = {}
        for part in _steps(problem, K, config, pace):
            found |= part
            save(result)
        gc.collect()  # the blocks of this K before those of the next
    return result


def bandwidths(sizes: Sequence[int], **pace: Any) -> list[dict[str, Any]]:
    """Of the link between host and device, in bytes a second and each direction, for arrays of some sizes."""
    rows = []
    for size in sizes:
        transfers = zeroth_order_contenders.link(size)
        for transfer in transfers.values():
            transfer()
        times, _ = harness.alternate(transfers, **pace)
        spreads = {name: Spread.of([size / one for one in found]) for name, found in times.items()}
        rows.append({"bytes": size} | {name: dataclasses.asdict(spread) for name, spread in spreads.items()})
    return rows


def _steps(problem: Problem, num_directions: int, config: Config, pace: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What is known of one K, bit by bit: the peak of a streamed step is there before anything else takes memory."""
    streamed = Run(problem, num_directions, Placement(is_streamed=True, prefetch=config.prefetch))
    contenders = {"streamed": streamed.step}
    streamed.step()
    memory = jax.local_devices()[0].memory_stats() or {}
    yield {"device_peak_bytes": memory.get("peak_bytes_in_use")}
    if config.is_split:
        staged = Placement(is_streamed=True, prefetch=config.prefetch)
        contenders["in_stages"] = Run(problem, num_directions, staged, is_split=True).step
    contenders["transfers"] = streamed.transfers
    contenders["computation"] = zeroth_order_contenders.computation(problem, num_directions)
    peers: dict[str, Any] = {}
    if config.is_resident:
        contenders["resident"] = Run(problem, num_directions, Placement()).step
        unperturbed = Run(problem, num_directions, Placement())
        contenders |= {
            "by_blocks": unperturbed.forward_by_blocks,
            "forward": zeroth_order_contenders.plain_forward(problem),
        }
    if config.torch and num_directions == 1:
        peers["torch"] = zeroth_order_torch.why_not() or "ran"
        if peers["torch"] == "ran":
            contenders["torch_mezo"], contenders["torch_forward"] = zeroth_order_torch.mezo(problem)
    for contender in contenders.values():
        contender()
    times, counts = harness.alternate(contenders, **pace)
    yield {
        "seconds": times,
        "steps_in_a_turn": counts,
        "spread": {name: dataclasses.asdict(Spread.of(found)) for name, found in times.items()},
        "tokens_per_second": {name: problem.tokens_per_step / Spread.of(found).median for name, found in times.items()},
        "ratios": ratios(times, num_directions),
        "peers": peers | ({"torch_peak_bytes": zeroth_order_torch.peak_bytes()} if "torch_mezo" in times else {}),
    }


def ratios(times: Mapping[str, Sequence[float]], num_directions: int) -> dict[str, Any]:
    """What the docstring of this module says, each round by itself.

    Args:
        times: Contender -> seconds of a step in every round.
        num_directions: K.
    """
    rounds = [dict(zip(times, found, strict=True)) for found in zip(*times.values(), strict=True)]
    of: dict[str, Callable[[dict[str, float]], float]] = {
        "step_over_bound": lambda t: t["streamed"] / max(t["transfers"], t["computation"]),
        "link_utilization": lambda t: t["transfers"] / t["streamed"],
    }
    if "in_stages" in times:
        of["in_stages_over_streamed"] = lambda t: t["in_stages"] / t["streamed"]
    if "resident" in times:
        of |= {
            "streamed_over_resident": lambda t: t["streamed"] / t["resident"],
            "resident_over_forward": lambda t: t["resident"] / t["forward"],
            "perturbation_and_update_share": lambda t: 1 - 2 * num_directions * t["by_blocks"] / t["resident"],
        }
    if "torch_mezo" in times:
        ours = "resident" if "resident" in times else "streamed"
        of |= {
            "torch_mezo_over_ours": lambda t: t["torch_mezo"] / t[ours],
            "torch_mezo_over_torch_forward": lambda t: t["torch_mezo"] / t["torch_forward"],
        }
    return {name: dataclasses.asdict(Spread.of([ratio(t) for t in rounds])) for name, ratio in of.items()}


def cap_device_memory(gigabytes: float) -> None:
    """Gives JAX's allocator so much of the first NVIDIA GPU and no more; call it before JAX finds its devices.

    Without such a GPU it does nothing.
    """
    if shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    mebibytes = float(subprocess.run(query, check=True, capture_output=True, text=True).stdout)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{gigabytes * 1e9 / (mebibytes * 2**20):.4f}"


def summary(result: Mapping[str, Any]) -> str:
    """One line for each K."""
    lines = []
    for K, found in result["directions"].items():
        parts = [f"{name} {spread['median'] * 1e3:.1f} ms" for name, spread in found.get("spread", {}).items()]
        parts += [f"{name} {spread['median']:.2f}" for name, spread in found.get("ratios", {}).items()]
        if found["device_peak_bytes"]:
            parts.append(f"peak {found['device_peak_bytes'] / 1e9:.2f} GB")
        lines.append(f"K = {K}: " + ", ".join(parts))
    return "\n".join(lines)


def run(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures, and returns the record that is written."""
    header = {
        "benchmark": "zeroth-order steps, streamed and resident",
        "command": harness.command("benchmarks.zeroth_order", arguments),
    }
    return harness.recorded(header, config.json, lambda save: measure(config, save))


if __name__ == "__main__":
    harness.let_idle_threads_sleep()
    print(summary(run(tyro.cli(Config, prog="python -m benchmarks.zeroth_order"), sys.argv[1:])["result"]))
