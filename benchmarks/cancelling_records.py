"""Records whose gradient cancels: random programs by every method, and the structure of every compiled program of the zoo (S4e).

    python -m benchmarks.cancelling_records --programs 500 --json benchmarks/results/cancelling_records.json

To run on every new JAX version. Each random program is compiled as a user compiles it, with a record whose gradient is zero or
rounding noise as the compiler likes, and the clipped sum must move by no more than `sensitivity` when the record leaves. Then each
loss of the zoo is compiled by each method, and each sum must read the buffers that a norm was taken of. `--without-wall` takes
`materialize` away, to see what both checks find then.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxdp
from benchmarks import harness
from jaxdp import _materialize
from tests.compiled_program import faults
from tests.gradients.cancelling import Program, draw, movement
from tests.gradients.test_zoo import METHODS, strictness, transformed
from tests.gradients.zoo import CASES

_DTYPES = (jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)
# Of a sum of B examples in float32, beyond the bound of one.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """Attack the clip with records that cancel, and read the compiled programs.

    Attributes:
        programs: Random programs; each runs by four methods and before an optimizer.
        first: The first seed.
        zoo: Cases of the zoo to compile, every method each; all by default.
        without_wall: Take the wall away, to see that the checks can fail.
        json: File to write the record to.
    """

    programs: int = 100
    first: int = 0
    zoo: int | None = None
    without_wall: bool = False
    json: Path | None = None


def _policy(rng: np.random.Generator, method: str) -> Any:
    layers = jaxdp.per_layer(1.0, group_by="leaf" if rng.integers(2) else "module")
    choices = [jaxdp.flat(1.0), jaxdp.automatic(1.0), jaxdp.quantile(1.0), layers]
    return layers if method == "per_layer" else choices[int(rng.choice(4, p=[0.6, 0.1, 0.1, 0.2]))]


def _sums(seed: int, drawn: Program) -> Iterator[tuple[str, float, Any]]:
    """Name, sensitivity and function of each way to the clipped sum of a program."""
    rng = np.random.default_rng([seed, 5])
    for method in ("vmap", *METHODS):
        policy, microbatch_size = _policy(rng, method), (None, 2)[int(rng.integers(2))]
        grad_fn = jaxdp.clipped_grad(drawn.loss, clipping=policy, method=method, microbatch_size=microbatch_size)

        def clipped(params: Any, batch: Any, mask: Any, grad_fn: Any = grad_fn) -> Any:
            return grad_fn(params, batch, is_padding_example=mask)[0]

        yield f"{method}, microbatch {microbatch_size}, {policy}", grad_fn.sensitivity(), jax.jit(clipped)

    size = len(drawn.batch["x"])
    plan = jaxdp.plan(num_examples=size, sampling_prob=1.0, num_steps=9, clipping=jaxdp.flat(1.0), noise_multiplier=0.0)
    tx = jaxdp.dp_aggregate(plan, jaxdp.secret_key())
    state = tx.init(drawn.params)

    def aggregated(params: Any, batch: Any, mask: Any) -> Any:
        grads = jax.vmap(jax.grad(drawn.loss), (None, 0))(params, batch)
        wide = jax.tree.map(lambda param: param.astype(jnp.float32), params)  # updates have the dtypes of params
        return jax.tree.map(lambda x: size * x, tx.update(grads, state, wide, is_padding_example=mask)[0])

    yield "dp_aggregate", 1.0, jax.jit(aggregated)


def attack(config: Config, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs the random programs; `save` is given the result so far every 20 of them."""
    violations: list[Any] = []
    pairs, quiet, largest = 0, 0, 0.0
    result: dict[str, Any] = {"programs": 0, "pairs": 0, "violations": violations}
    for seed in range(config.first, config.first + config.programs):
        drawn = draw(seed, dtype=_DTYPES[seed % len(_DTYPES)], remat=seed % 7 == 0)
        for name, sensitivity, compiled in _sums(seed, drawn):
            moved = movement(compiled, drawn) / sensitivity
            pairs, quiet, largest = pairs + 1, quiet + (moved == 0), max(largest, moved)
            if not moved <= 1 + _ROUNDING * len(drawn.batch["x"]):
                violations.append({"program": drawn.name, "by": name, "moved": moved})
                print(violations[-1], flush=True)
        result = {
            "programs": seed + 1 - config.first,
            "pairs": pairs,
            "of_which_move_nothing": quiet,
            "largest_movement": largest,
            "violations": violations,
        }
        if (seed + 1) % 20 == 0:
            save(result)
            print(f"{pairs} pairs, {len(violations)} violations, largest movement {largest:.9f}", flush=True)
    return result


def read_zoo(config: Config) -> dict[str, Any]:
    """Compiles the zoo and reads it."""
    found, counts = [], Counter()
    for name in list(CASES)[: config.zoo]:
        case = CASES[name]
        with strictness(case):
            for method in ("vmap", *METHODS):
                policy = jaxdp.per_layer(1.0) if method == "per_layer" else jaxdp.flat(1.0)
                compiled = jax.jit(transformed(case, policy, method)).lower(case.params, case.batch).compile()
                counts[method] += 1
                try:
                    wrong = faults(compiled.as_text() or "")
                except ValueError as error:  # of a program in which nothing is found to check
                    wrong = [str(error)]
                if wrong:
                    found.append({"case": name, "method": method, "faults": wrong[:3]})
                    print(found[-1], flush=True)
    return {"programs": dict(counts), "faulty": found}


def main() -> None:
    config = tyro.cli(Config)
    if config.without_wall:
        _materialize._materialize_all = lambda arrays: list(arrays)
    header = {
        "benchmark": "cancelling_records",
        "command": harness.command("benchmarks.cancelling_records", sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "jaxdp_source_digest": harness.source_digest("jaxdp"),
    }

    def measure(save: Any) -> dict[str, Any]:
        result = {"attack": attack(config, lambda found: save({"attack": found}))}
        save(result)
        result["zoo"] = read_zoo(config)
        save(result)
        return result

    result = harness.recorded(header, config.json, measure)["result"]
    print(
        f"{result['attack']['pairs']} programs and methods, {len(result['attack']['violations'])} violations; "
        f"{sum(result['zoo']['programs'].values())} programs of the zoo, {len(result['zoo']['faulty'])} faulty"
    )
    if not config.without_wall and (result["attack"]["violations"] or result["zoo"]["faulty"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
