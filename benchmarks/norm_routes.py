"""Which way to a dense layer's norms and clipped sum is the fastest, and whether `auto`'s time rule finds it.

    python -m benchmarks.norm_routes --json benchmarks/results/norm_routes_cpu.json

For each shape of a layer, the routes (Gram matrices, per-example gradients, and those stored for the sum) run in turns. The
record holds their times, the rates of `jaxdp.gradients.cost_model` that fit them best, and the *regret*: the time of the route
that the rule chooses over that of the fastest, with the committed rates and with the fitted ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy import optimize

from benchmarks import harness
from jaxdp.clipping import squared_norms, sum_rows
from jaxdp.gradients import cost_model, norms
from jaxdp.gradients.cost_model import RATES, Rates
from jaxdp.gradients.factors import Factoring

LENGTHS = (8, 32, 128, 512)
LAYERS = ((64, 64), (256, 256), (784, 256), (512, 512), (512, 2048), (1024, 1024))  # (I, J)
# For a GPU, where small ones tell the time of a launch.
LARGE_LENGTHS = (128, 512, 1024, 2048)
LARGE_LAYERS = ((768, 768), (1024, 4096), (4096, 4096))


@dataclasses.dataclass(frozen=True)
class NormRoutes:
    """Times the routes to the norms and the clipped sum of one dense layer.

    Attributes:
        rows: Examples.
        rounds: Turns of each route.
        turn_seconds: A turn repeats its route for about this long.
        dtype: Of the operands.
        is_large: Shapes for a GPU.
        tiny: Two small shapes, to see that everything runs.
        json: File to write the record to.
    """

    rows: int = 16
    rounds: int = 5
    turn_seconds: float = 0.05
    dtype: str = "float32"
    is_large: bool = False
    tiny: bool = False
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One dense layer: left `[B, 1, T, I]`, right `[B, 1, T, J]`."""

    rows: int
    tokens: int
    inputs: int
    outputs: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return 1, self.inputs, self.outputs

    def predicted(self, rates: Rates) -> dict[str, float]:
        return cost_model.predicted_seconds(self.sizes, self.tokens, self.rows, rates)


def routes(case: Case, dtype: str) -> dict[str, Callable[[], Any]]:
    """Route -> one compiled and warm call that returns when it has finished."""
    shapes = [(case.rows, 1, case.tokens, size) for size in case.sizes[1:]]
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    weight = case.sizes[1:]
    factoring = Factoring("dense", ((), (0,), (1,)), weight, case.tokens, False, lambda x, g: {"left": x, "right": g})
    keep = jnp.ones(case.rows, bool)

    def factors(square: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, jax.lax.rsqrt(square))

    def from_factors(route: norms.NormRoute) -> Callable[..., jax.Array]:
        def clipped(left: jax.Array, right: jax.Array) -> jax.Array:
            payload = {"left": left, "right": right}
            square = norms.squared_norm([factoring], [payload], route)
            return norms.weighted_sum(factoring, payload, factors(square), keep)

        return clipped

    def stored(left: jax.Array, right: jax.Array) -> jax.Array:
        gradient = norms.gradient_of(factoring, {"left": left, "right": right})
        return sum_rows(gradient, factors(squared_norms(gradient)), keep)

    def ready(function: Callable[..., jax.Array]) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(left, right).compile()
        jax.block_until_ready(compiled(left, right))
        return lambda: jax.block_until_ready(compiled(left, right))

    functions = {"gram": from_factors("gram"), "direct": from_factors("direct"), "spill": stored}
    return {name: ready(function) for name, function in functions.items()}


def fitted(cases: Sequence[Case], seconds: Sequence[dict[str, float]], start: Rates) -> Rates:
    """The rates whose predictions are off by the smallest mean square of the logarithm."""

    def rates_of(logarithms: np.ndarray) -> Rates:
        return Rates(*(float(rate) for rate in np.exp(logarithms)))

    def errors(logarithms: np.ndarray) -> list[float]:
        rates = rates_of(logarithms)
        return [
            np.log(case.predicted(rates)[route] / measured)
            for case, found in zip(cases, seconds, strict=True)
            for route, measured in found.items()
        ]

    return rates_of(optimize.least_squares(errors, np.log(dataclasses.astuple(start))).x)


def regrets(cases: Sequence[Case], seconds: Sequence[dict[str, float]], rates: Rates) -> list[float]:
    """Time of the route that the rule chooses over that of the fastest, for each case."""
    return [
        found[cost_model.fastest(case.sizes, case.tokens, case.rows, rates)] / min(found.values())
        for case, found in zip(cases, seconds, strict=True)
    ]


def measure(config: NormRoutes, save: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
    """Runs all shapes; `save` gets the record as it stands after each."""
    lengths, layers = (LARGE_LENGTHS, LARGE_LAYERS) if config.is_large else (LENGTHS, LAYERS)
    shapes = [(4, 8, 8), (16, 8, 12)] if config.tiny else [(t, i, j) for i, j in layers for t in lengths]
    cases = [Case(config.rows, *shape) for shape in shapes]
    committed = RATES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    record: dict[str, Any] = {"dtype": config.dtype, "committed_rates": dataclasses.asdict(committed), "cases": []}
    medians: list[dict[str, float]] = []
    for case in cases:
        times, _ = harness.alternate(routes(case, config.dtype), rounds=config.rounds, turn_seconds=config.turn_seconds)
        spreads = {name: harness.Spread.of(values) for name, values in times.items()}
        medians.append({name: spread.median for name, spread in spreads.items()})
        record["cases"].append(
            dataclasses.asdict(case) | {"seconds": {name: dataclasses.asdict(s) for name, s in spreads.items()}}
        )
        save(record)
    best = fitted(cases, medians, committed)
    record["fitted_rates"] = dataclasses.asdict(best)
    for name, rates in (("committed", committed), ("fitted", best)):
        found = regrets(cases, medians, rates)
        record[f"regret_of_{name}"] = {
            "geometric_mean": float(np.exp(np.mean(np.log(found)))),
            "largest": max(found),
            "each": found,
        }
    return record


def main() -> None:
    config = tyro.cli(NormRoutes, prog="python -m benchmarks.norm_routes")
    harness.let_idle_threads_sleep()
    record = {
        "benchmark": "norm_routes",
        "command": harness.command("benchmarks.norm_routes", sys.argv[1:]),
        "machine": harness.machine(),
        "device": harness.device(),
        "versions": harness.versions(["jax", "jaxlib", "jaxdp", "numpy", "scipy"]),
        "jaxdp_source_digest": harness.source_digest("jaxdp"),
    } | measure(config)
    for row in record["cases"]:
        shape = "B{rows} T{tokens} {inputs}x{outputs}".format(**row)
        print(f"{shape:24s}", {name: f"{1e3 * spread['median']:.3g} ms" for name, spread in row["seconds"].items()})
    for name in ("committed", "fitted"):
        regret = record[f"regret_of_{name}"]
        print(name, record[f"{name}_rates"], f"regret {regret['geometric_mean']:.3f}, at most {regret['largest']:.2f}")
    if config.json is not None:
        harness.write_json(config.json, record)


if __name__ == "__main__":
    main()
