"""One DP-SGD step of this checkout against that of another, in turns on one machine: what a change costs.

    git worktree add ../before REVISION
    python -m benchmarks.before_after --before ../before --preset mlp_small --json results.json

Each checkout runs in a process of its own, by its own code, and the two take turns, so that a disturbance of the machine hits
both. Ratios are of neighbors in time.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import harness
from benchmarks.harness import Spread
from benchmarks.peers import METHODS, NON_PRIVATE, Contender, Problem, Settings, jaxdp_contender, parse_names
from benchmarks.presets import PRESETS

_SETTINGS = Settings(l2_clip_norm=1.0, noise_multiplier=1.0, learning_rate=0.01)


@dataclasses.dataclass(frozen=True)
class Config:
    """Time one step of two checkouts in turns.

    Attributes:
        before: The other checkout.
        preset: A named problem.
        methods: Comma-separated: the methods of jaxdp.
        rounds: Turns of each.
        turn_seconds: A turn runs at least one step, however long that is.
        json: File to write the record to.
    """

    before: Path
    preset: str = "mlp_small"
    methods: str = "vmap,book_keeping,two_pass,per_layer"
    rounds: int = 15
    turn_seconds: float = 0.5
    json: Path | None = None


def contenders(methods: str) -> dict[str, Contender]:
    chosen = [
        jaxdp_contender(name, adds_noise=noise)
        for name in parse_names(methods, METHODS, "method")
        for noise in (False, True)
    ]
    return {each.name: each for each in [NON_PRIVATE, *chosen]}


def serve(preset: str, methods: str) -> None:
    """A process that answers each line `name steps` with the seconds of a step."""
    model, rows = PRESETS[preset]
    problem = Problem(model, rows, seed=0)
    trainers = {name: each.make(problem, _SETTINGS) for name, each in contenders(methods).items()}
    memory = {}
    for name, trainer in trainers.items():
        trainer.step()
        memory[name] = (trainer.xla_memory or dict)()["temp_bytes"]
    print(json.dumps(memory), flush=True)
    for line in sys.stdin:
        name, steps = line.split()
        start = time.perf_counter()
        for _ in range(int(steps)):
            trainers[name].step()
        print((time.perf_counter() - start) / int(steps), flush=True)


class _Server:
    """`serve` in a checkout."""

    def __init__(self, checkout: Path, config: Config):
        # This file may be younger than the checkout: its text is run on the other's packages.
        code = (
            f"import sys; sys.path.insert(0, {str(checkout.resolve())!r})\n"
            f"sys.modules['served'] = type(sys)('served'); exec(open({__file__!r}).read(), sys.modules['served'].__dict__)\n"
            f"sys.modules['served'].serve({config.preset!r}, {config.methods!r})\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout
        )
        self.memory: dict[str, int] = json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self.process.wait()}.")
        return line

    def seconds(self, name: str, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name} {steps}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(config: Config) -> dict[str, Any]:
    """Times all contenders, and returns the rows of the record."""
    servers = {"before": _Server(config.before, config), "after": _Server(Path(__file__).parent.parent, config)}
    rows = []
    for name in contenders(config.methods):
        steps = max(1, int(config.turn_seconds / max(servers["before"].seconds(name, 2), 1e-9)))
        times: dict[str, list[float]] = {"before": [], "after": []}
        for turn in range(config.rounds):
            for side in ("before", "after") if turn % 2 == 0 else ("after", "before"):
                times[side].append(servers[side].seconds(name, steps))
        ratios = [after / before for before, after in zip(times["before"], times["after"], strict=True)]
        rows.append(
            {
                "contender": name,
                "steps": steps,
                "seconds": {side: dataclasses.asdict(Spread.of(values)) for side, values in times.items()},
                "after_over_before": dataclasses.asdict(Spread.of(ratios)),
                "temp_bytes": {side: server.memory[name] for side, server in servers.items()},
            }
        )
        spread = Spread.of(ratios)
        print(
            f"{name:32s} {spread.median:.3f} ({spread.q25:.3f} to {spread.q75:.3f})", rows[-1]["temp_bytes"], flush=True
        )
    for server in servers.values():
        server.close()
    return {"rows": rows}


def main() -> None:
    config = tyro.cli(Config)
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=config.before, capture_output=True, text=True, check=True
    ).stdout.strip()
    header = {
        "benchmark": "before_after",
        "command": harness.command("benchmarks.before_after", sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "before": revision,
        "preset": config.preset,
    }
    record = harness.recorded(header, None, lambda save: run(config))
    if config.json is not None:
        harness.write_json(config.json, record | {"device": harness.device()})


if __name__ == "__main__":
    main()
