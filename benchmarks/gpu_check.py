"""Everything that only a GPU can show, in one call of under ten minutes; writes JSON after each item.

    python -m benchmarks.gpu_check --json benchmarks/results/gpu_check.json

First numerics against float64 on the host, then throughput and memory, most telling first: what an interruption leaves is
what matters most. Steps of DP-SGD come first, then zeroth-order steps that stream under a cap of 8 GB, then the rest. Each item
runs in a process of its own, so that a crash or a hang costs one item and no item sees the memory of another; inside,
contenders take turns in one process. `--items` picks some, as for a second call that goes on where the first one ended. On a
machine without a GPU it runs the same items on the CPU, and says so in the record; with `--tiny` they take minutes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks import gpu_numerics, gpu_throughput, harness, norm_routes, zeroth_order, zeroth_order_cost
from benchmarks.gpu_throughput import Save
from benchmarks.language_models import Gpt2, LanguageModel, Llama
from benchmarks.models import Transformer
from benchmarks.peers import parse_names

# The tokens of a step are the same at every length, so that its arithmetic outside attention is.
_TOKENS_PER_STEP = 8192
_LENGTHS = (1024, 512, 128, 2048)
# Of the device, for a streamed model; and pinned host memory for the largest of them, which JAX limits to 64 GB by default.
_STREAMING_GIGABYTES = 8.0
_PINNED_HOST = {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "110"}


@dataclasses.dataclass(frozen=True)
class GpuCheck:
    """Checks numerics on the default device, then measures DP steps there.

    Attributes:
        json: File to write the record to, after each item.
        seconds: Items that would start later than this are left out, and one that is running then is stopped.
        items: Comma-separated names; all by default.
        tiny: Small models, to see that everything runs.
        compilation_cache: Folder in which JAX keeps compiled programs, for the next item or call on the machine.
        only: Run this one item in this process; what each item's process is started with.
    """

    json: Path | None = None
    seconds: float = 540.0
    items: str = ""
    tiny: bool = False
    compilation_cache: Path | None = None
    only: str | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to find out.

    Attributes:
        run: Returns the result; what it saves on the way is kept if it is interrupted.
        seconds: It is stopped after this long.
        environment: Set for its process.
    """

    run: Callable[[Save], dict[str, Any]]
    seconds: float = 60.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def items(tiny: bool = False) -> dict[str, Item]:
    """All items, the most important first."""
    pace: dict[str, Any] = {"rounds": 2, "turn_seconds": 0.001} if tiny else {}
    if tiny:
        smallest: dict[str, Any] = {"num_blocks": 2, "width": 16, "num_heads": 2, "vocabulary": 31, "dtype": "bfloat16"}
        one_block: dict[str, Any] = smallest | {"num_blocks": 1}
        models: dict[str, LanguageModel] = {
            "gpt2_medium": Gpt2(**smallest, positions=2048),
            "llama": Llama(**smallest, feed_forward=24),
            "gpt2_small": Gpt2(**one_block, positions=2048),
        }
        checked = [dataclasses.replace(models[name], length=8, dtype="float32") for name in ("gpt2_medium", "llama")]
        lengths, tokens = {length: length // 64 for length in _LENGTHS}, 32
    else:
        models = {
            "gpt2_medium": Gpt2.of_size("medium", dtype="bfloat16", positions=2048),
            "llama": Llama(dtype="bfloat16"),
            "gpt2_small": Gpt2.of_size("small", dtype="bfloat16", positions=2048),
        }
        small: dict[str, Any] = {"num_blocks": 2, "width": 256, "num_heads": 4, "vocabulary": 1024, "length": 128}
        checked = [Gpt2(**small), Gpt2(**small, dtype="bfloat16"), Llama(**small, feed_forward=512, dtype="bfloat16")]
        lengths, tokens = {length: length for length in _LENGTHS}, _TOKENS_PER_STEP

    def throughput(function: Callable[..., dict[str, Any]], name: str, length: int) -> Item:
        model = dataclasses.replace(models[name], length=lengths[length])
        return Item(lambda save: function(model, max(1, tokens // lengths[length]), save, **pace), 110.0)

    def of_methods(name: str, length: int) -> dict[str, Item]:
        return {f"{name}_t{length}": throughput(gpu_throughput.methods, name, length)}

    def of_peers(name: str, length: int) -> dict[str, Item]:
        return {f"{name}_t{length}_per_example": throughput(gpu_throughput.materializing, name, length)}

    in_turns: dict[str, Any] = {"rounds": 5, "turn_seconds": 0.3} | pace

    def of_zeroth_order(name: str, num_directions: tuple[int, ...], seconds: float) -> dict[str, Item]:
        is_resident = name == "opt-1.3b"  # the others stream alone
        config = zeroth_order.Config(
            problem="tiny" if tiny else name,
            num_directions=(1,) if tiny else num_directions,
            is_resident=is_resident,
            torch=is_resident,
            max_device_gigabytes=None if is_resident else _STREAMING_GIGABYTES,
            **in_turns,
        )
        # PyTorch, where it runs, gets what JAX leaves.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} if is_resident else _PINNED_HOST
        return {
            f"zeroth_order_{name}": Item(lambda save: zeroth_order.measure(config, save), seconds, environment),
        }

    cost = zeroth_order_cost.Config(
        problem="tiny" if tiny else "opt-1.3b",
        batch=2 if tiny else 8,
        length=8 if tiny else 256,
        num_directions=(1,) if tiny else (1, 16, 64),
        **in_turns,
    )
    shapes = norm_routes.NormRoutes(
        dtype="bfloat16", is_large=True, tiny=tiny, rounds=in_turns["rounds"], turn_seconds=0.001 if tiny else 0.02
    )
    block_bytes = [2**12] if tiny else [100_716_544, 629_278_720, 1_233_311_744]  # of OPT-1.3B, 13B and 30B
    medium = models["gpt2_medium"]
    untied = Transformer(medium.num_blocks, medium.width, medium.num_heads, lengths[1024], medium.vocabulary)
    opacus_rows = tokens // lengths[1024]
    return {
        "kernels_check": Item(lambda save: gpu_numerics.kernels("check"), 90.0),
        "clipped_sums_against_float64": Item(lambda save: gpu_numerics.clipped_sums_against_float64()),
        "updates_against_definition": Item(lambda save: gpu_numerics.updates_against_definition(checked, 8), 90.0),
        **of_methods("gpt2_medium", 1024),
        **of_methods("llama", 512),
        "link": Item(lambda save: {"link": zeroth_order.bandwidths(block_bytes, **in_turns)}),
        **of_zeroth_order("opt-1.3b", (1, 4, 16), 150.0),
        **of_zeroth_order("opt-13b", (1,), 90.0),
        **of_zeroth_order("opt-30b", (1,), 110.0),
        "private_zeroth_order_opt-1.3b": Item(lambda save: zeroth_order_cost.measure(cost, save), 90.0),
        "kernels_time": Item(lambda save: gpu_numerics.kernels("time"), 90.0),
        **of_peers("gpt2_medium", 1024),
        **of_methods("gpt2_medium", 128),
        **of_methods("llama", 1024),
        **of_methods("gpt2_medium", 512),
        "opacus_ghost_t1024": Item(
            lambda save: gpu_throughput.opacus_ghost(untied, opacus_rows, save, **pace), 60.0, {"JAX_PLATFORMS": "cpu"}
        ),
        **of_zeroth_order("opt-6.7b", (1, 4, 16), 120.0),
        "noise_law": Item(lambda save: gpu_numerics.noise_law()),
        "noise_time": Item(lambda save: gpu_numerics.noise_time(10_000 if tiny else 100_000_000)),
        "norm_routes": Item(lambda save: norm_routes.measure(shapes, save)),
        **of_methods("gpt2_small", 1024),
        **of_methods("gpt2_medium", 2048),
        **of_methods("llama", 128),
        **of_methods("llama", 2048),
        **of_methods("gpt2_small", 128),
        **of_methods("gpt2_small", 512),
        **of_methods("gpt2_small", 2048),
        **of_peers("llama", 512),
        **of_peers("gpt2_medium", 128),
        **of_peers("gpt2_small", 1024),
    }


def run_here(item: Item, path: Path | None = None) -> dict[str, Any]:
    """Runs one item in this process; an error is recorded, beside what was saved before it."""
    outcome: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        outcome["partial"] = result
        if path is not None:
            harness.write_json(path, outcome)

    start = time.perf_counter()
    try:
        result = item.run(save)
        outcome.pop("partial", None)
        outcome["result"] = result
    except Exception as error:  # the next item may still tell something
        outcome["error"] = f"{type(error).__name__}: {error}"[:4000]
    outcome["seconds"] = time.perf_counter() - start
    outcome["device"] = harness.device()
    if path is not None:
        harness.write_json(path, outcome)
    return outcome


def run_apart(name: str, config: GpuCheck, item: Item, seconds: float) -> dict[str, Any]:
    """Runs one item in a process of its own, for at most `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--only", name, "--json", str(path)]
        command += ["--tiny"] if config.tiny else []
        # Most of the card for one process, taken at once: what an allocator asks the driver for during a step is slow.
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | dict(item.environment)
        if config.compilation_cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(config.compilation_cache)
        stopped: str | None = None
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
            if done.returncode != 0:
                stopped = f"exit status {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {seconds:.0f} s"
        outcome = json.loads(path.read_text()) if path.exists() else {}
        return outcome if stopped is None or "error" in outcome else outcome | {"error": stopped}


def run(config: GpuCheck, chosen: Mapping[str, Item] | None = None) -> dict[str, Any]:
    """Runs the items in order, and writes the record after each.

    Args:
        config: The settings of the run.
        chosen: Items to run in this process, instead of those of `config` in processes of their own.
    """
    start = time.perf_counter()
    known = items(config.tiny)
    names = parse_names(config.items, tuple(known), "item") or tuple(known)
    record: dict[str, Any] = {
        "benchmark": "gpu_check",
        "command": harness.command("benchmarks.gpu_check", sys.argv[1:]),
        "machine": harness.machine(),
        "environment": harness.environment(),
        "versions": harness.versions(["jax", "jaxlib", "jaxdp", "numpy", "optax"]),
        "jaxdp_source_digest": harness.source_digest("jaxdp"),
        "items": {},
    }
    for name, item in (chosen or {name: known[name] for name in names}).items():
        left = config.seconds - (time.perf_counter() - start)
        if left < 5:
            outcome: dict[str, Any] = {"left_out": f"more than {config.seconds:g} s had nearly passed"}
        elif chosen is not None:
            outcome = run_here(item)
        else:
            outcome = run_apart(name, config, item, min(item.seconds, left))
        device = outcome.pop("device", None)
        if device is not None and item.environment.get("JAX_PLATFORMS") is None:
            record.setdefault("device", device)
        record["items"][name] = outcome
        found = outcome.get("result") or outcome.get("partial") or {}
        told = zeroth_order.summary(found) if "directions" in found else gpu_throughput.summary(found)
        state = next((f"{word}: {outcome[word][-300:]}" for word in ("error", "left_out") if word in outcome), "ok")
        print(f"{name} ({outcome.get('seconds', 0.0):.0f} s) {state} {told}", flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    return record


def main() -> int:
    config = tyro.cli(GpuCheck, prog="python -m benchmarks.gpu_check")
    if config.only is not None:
        run_here(items(config.tiny)[config.only], config.json)
        return 0
    return int(any("error" in outcome for outcome in run(config)["items"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
