r"""What K directions and privacy cost a streamed zeroth-order step: time, and bytes over the link.

    python -m benchmarks.zeroth_order_cost --json benchmarks/results/zeroth_order_cost_cpu.json

For every K a step under a plan and one without take turns; both stream, from the same parameters and on the same batch. Ratios
are medians over the rounds. Link bytes are counted at the transfers of one step. On a CPU the link is a copy in memory.

The other table is arithmetic, not a measurement: for OPT models and rates of a device that are given,

    link         bytes of all blocks / rate of the link, which works both ways at once
    computation  2K (matmul FLOPs of a forward pass / FLOP rate + 3 x bytes of the parameters / rate of the memory)
    step         max(link, computation) + one block over the link

where each perturbed pass reads a parameter, writes its perturbed value and reads that. The draws of the directions are left out.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

import jaxdp
from benchmarks import harness
from benchmarks.harness import Spread
from benchmarks.zeroth_order_contenders import Run
from benchmarks.zeroth_order_memory import MODELS
from benchmarks.zeroth_order_problems import PROBLEMS, Problem
from jaxdp import _validate
from jaxdp.zeroth_order import Placement

Save = Callable[[dict[str, Any]], None]
_BYTES_OF_BFLOAT16 = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure steps with and without a plan on the default device, and model larger ones."""

    problem: str = "cpu"
    """The model, as in benchmarks.zeroth_order."""
    batch: int = 8
    """Examples."""
    length: int = 32
    """Tokens of an example."""
    num_directions: tuple[int, ...] = (1, 4, 16, 64)
    """Values of K."""
    rounds: int = 9
    """Turns of each contender."""
    turn_seconds: float = 0.5
    """A turn repeats its step for about this long."""
    link_rate: float = 50e9
    """Assumed for the model: bytes a second over the link, each way."""
    flop_rate: float = 500e12
    """Assumed for the model: bfloat16 FLOPs a second in matrix products."""
    memory_rate: float = 4e12
    """Assumed for the model: bytes a second from the device's memory."""
    modelled_batch: int = 8
    """Examples of the modelled step."""
    modelled_length: int = 256
    """Tokens of an example of the modelled step."""
    json: Path | None = None
    """File to write the record to, after each K."""

    def __post_init__(self) -> None:
        _validate.one_of("problem", self.problem, tuple(PROBLEMS))
        for name in ("batch", "length", "rounds", "modelled_batch", "modelled_length"):
            _validate.positive_integer(name, getattr(self, name))
        for name in ("link_rate", "flop_rate", "memory_rate"):
            _validate.positive(name, getattr(self, name))
        for value in self.num_directions:
            _validate.positive_integer("num_directions", value)


@dataclasses.dataclass(frozen=True)
class Counting(Placement):
    """Blocks on the host, and the bytes that went each way since `counted` was last cleared."""

    is_streamed: bool = True
    counted: dict[str, int] = dataclasses.field(default_factory=dict, hash=False, compare=False)

    def store(self, block: Any) -> Any:
        """Counts what leaves for the host."""
        self._count("to_host", block)
        return super().store(block)

    def fetch(self, block: Any) -> Any:
        """Counts what arrives."""
        self._count("to_device", block)
        return super().fetch(block)

    def _count(self, way: str, block: Any) -> None:
        self.counted[way] = self.counted.get(way, 0) + sum(leaf.nbytes for leaf in jax.tree.leaves(block))


def measure(config: Config, save: Save = lambda _: None) -> dict[str, Any]:
    """Measures every K, and returns the result with the modelled table."""
    problem = dataclasses.replace(PROBLEMS[config.problem], batch=config.batch, length=config.length)
    result: dict[str, Any] = {
        "problem": {"name": config.problem, **dataclasses.asdict(problem)},
        "block_bytes": problem.block_bytes,
        "link_is_simulated": jax.default_backend() == "cpu",
        "directions": {},
        "modelled": [row for name in MODELS for row in modelled(name, config)],
    }
    for K in config.num_directions:
        result["directions"][str(K)] = of_directions(problem, K, config)
        save(result)
        gc.collect()  # the blocks of this K before those of the next
    return result


def plan_for(problem: Problem) -> jaxdp.PrivacyPlan:
    """All examples in every step, and more steps than will be run."""
    return jaxdp.plan(
        num_examples=problem.batch,
        sampling_prob=1.0,
        num_steps=10**6,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=1.0,
    )


def of_directions(problem: Problem, num_directions: int, config: Config) -> dict[str, Any]:
    """A step of K directions with a plan and without, in turns, and what crosses the link in one."""
    placements = {"not_private": Counting(), "private": Counting()}
    plans = {"not_private": None, "private": plan_for(problem)}
    runs = {name: Run(problem, num_directions, placements[name], plan=plans[name]) for name in placements}
    link = {}
    for name, run in runs.items():
        run.step()
        placements[name].counted.clear()
        run.step()
        link[name] = dict(placements[name].counted)
    steps = {name: run.step for name, run in runs.items()}
    times, counts = harness.alternate(steps, rounds=config.rounds, turn_seconds=config.turn_seconds)
    ratios = [private / free for private, free in zip(times["private"], times["not_private"], strict=True)]
    return {
        "seconds": times,
        "steps_in_a_turn": counts,
        "spread": {name: dataclasses.asdict(Spread.of(found)) for name, found in times.items()},
        "private_over_not_private": dataclasses.asdict(Spread.of(ratios)),
        "link_bytes": link,
    }


def modelled(name: str, config: Config) -> list[dict[str, Any]]:
    """The rows of an OPT model, one for each K: seconds of link, computation and step, by the equations of this module."""
    num_blocks, width, *_ = MODELS[name]
    matrices = 12 * width**2  # of a block: 4 of the attention, 8 of the feed-forward layer
    tokens, length = config.modelled_batch * config.modelled_length, config.modelled_length
    flops = num_blocks * (2 * matrices * tokens + 4 * tokens * length * width)
    num_bytes = num_blocks * matrices * _BYTES_OF_BFLOAT16
    link = num_bytes / config.link_rate
    rows = []
    for K in config.num_directions:
        computation = 2 * K * (flops / config.flop_rate + 3 * num_bytes / config.memory_rate)
        step = max(link, computation) + link / num_blocks
        rows.append(
            {
                "model": name,
                "num_directions": K,
                "link_seconds": link,
                "computation_seconds": computation,
                "step_seconds": step,
                "step_over_computation": step / computation,
            }
        )
    return rows


def summary(result: dict[str, Any]) -> str:
    """One line for each K, and one for each modelled step."""
    lines = []
    for K, found in result["directions"].items():
        spread, ratio = found["spread"], found["private_over_not_private"]
        bytes_both_ways = {name: sum(ways.values()) for name, ways in found["link_bytes"].items()}
        lines.append(
            f"K = {K}: private {spread['private']['median'] * 1e3:.1f} ms, not private "
            f"{spread['not_private']['median'] * 1e3:.1f} ms, ratio {ratio['median']:.3f} [{ratio['q25']:.3f}, "
            f"{ratio['q75']:.3f}], link bytes {bytes_both_ways['private']} and {bytes_both_ways['not_private']}"
        )
    lines += [
        f"modelled {row['model']}, K = {row['num_directions']}: {row['step_seconds']:.2f} s (link "
        f"{row['link_seconds']:.2f}, computation {row['computation_seconds']:.2f})"
        for row in result["modelled"]
    ]
    return "\n".join(lines)


def run(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures, and returns the record that is written."""
    assumed = ("link_rate", "flop_rate", "memory_rate", "modelled_batch", "modelled_length")
    header = {
        "benchmark": "streamed zeroth-order steps of K directions, private and not",
        "command": harness.command("benchmarks.zeroth_order_cost", arguments),
        "assumed_for_the_model": {name: getattr(config, name) for name in assumed},
    }
    return harness.recorded(header, config.json, lambda save: measure(config, save))


if __name__ == "__main__":
    harness.let_idle_threads_sleep()
    print(summary(run(tyro.cli(Config, prog="python -m benchmarks.zeroth_order_cost"), sys.argv[1:])["result"]))
