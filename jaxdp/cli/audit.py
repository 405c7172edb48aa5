"""`jaxdp audit`: what an attack on one run shows about its epsilon, for the package as it is installed."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from typing import Annotated, Literal, TypeAlias

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

import jaxdp
from jaxdp import _validate
from jaxdp.accounting import format_epsilon
from jaxdp.auditing import AuditReport, Fault, Run, audit, broken, check_claim, dp_sgd_run, zeroth_order_run
from jaxdp.cli import options

MethodName: TypeAlias = Literal["dp-sgd", "dpzero", "dp-aggzo"]
# The canaries' norm before the clip, in clip norms: a clip that is skipped shows.
_CANARY_NORM = 10.0
_DIRECTIONS = 16


@dataclasses.dataclass(frozen=True)
class _Defaults:
    canaries: int
    steps: int
    sampling_prob: float


# The canaries of zeroth-order runs share the few numbers of a step: more steps, and every canary in every one.
_DEFAULTS: dict[MethodName, _Defaults] = {
    "dp-sgd": _Defaults(2000, 200, 0.25),
    "dpzero": _Defaults(1000, 2000, 1.0),
    "dp-aggzo": _Defaults(1000, 200, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Audit:
    """Attacks runs of the installed package and compares what they leak with the epsilon they claim.

    Canaries are records that nothing else resembles. Fair coins put each into a run or leave it out, a run releases its noisy sums,
    and the coins are guessed from them. Too many right guesses refute the claimed epsilon: `fail`, and exit status 1. A lower
    bound is wrong with probability 5% at most; the estimate is no bound.

      jaxdp audit
      jaxdp audit --method dp-sgd --target-epsilon 1 --canaries 5000
      jaxdp audit --method dp-aggzo --fault half-noise
    """

    method: Annotated[tuple[MethodName, ...], options.hint("default: all", "{dp-sgd,dpzero,dp-aggzo} [...]")] = tuple(
        _DEFAULTS
    )
    """What to audit: DP-SGD, or private zeroth-order steps along 1 direction or along 16."""
    target_epsilon: Annotated[float | None, options.hint("default: 4", "FLOAT")] = None
    """The claim."""
    noise_multiplier: Annotated[float | None, options.hint("or --target-epsilon", "FLOAT")] = None
    """Noise std over clip norm; the claim is its epsilon."""
    delta: float = 1e-5
    """The delta of every epsilon."""
    canaries: Annotated[int | None, options.hint("default: 2000 for dp-sgd, else 1000", "INT")] = None
    """Canaries, at least 1000; more of them refute smaller leaks."""
    num_steps: Annotated[int | None, options.hint("default: 2000 for dpzero, else 200", "INT")] = None
    """Steps of each run."""
    sampling_prob: Annotated[float | None, options.hint("default: 0.25 for dp-sgd, else 1", "FLOAT")] = None
    """Probability of each record to enter a batch; 1 for full batches."""
    fault: Fault = "none"
    """Break the runs on purpose, to see the audit fail: they claim what they no longer keep."""
    seed: Annotated[int | None, options.hint("default: fresh entropy", "INT")] = None
    """Repeats an audit: its coins, batches, directions and noise. Canaries are nobody's data."""


def run(config: Audit) -> None:
    """Prints a column for each method and a verdict; exits 1 if a claim is refuted.

    Raises:
        ValueError, TypeError: bad input, before anything is run.
    """
    if config.seed is not None and _validate.nonnegative_integer("seed", config.seed) >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {config.seed}.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        plans = _plans(config)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}", file=sys.stderr)
    broken_plans = {name: broken(plan, config.fault, canary_norm=_CANARY_NORM) for name, plan in plans.items()}
    reports = {}
    console = rich.console.Console(stderr=True)  # silent without a terminal
    for name, plan in plans.items():
        rng = np.random.default_rng(config.seed)
        with console.status(f"auditing {name}"):
            reports[name] = audit(plan, _run(name, broken_plans[name], rng, config.seed), rng=rng)
    _print_table(config, plans, reports)
    refuted = [name for name, report in reports.items() if not report.passed]
    if refuted:
        print(f"fail: {', '.join(refuted)} leaked more than the claimed epsilon allows.", flush=True)
        raise SystemExit(1)
    print("pass: no run leaked more than its claim allows, as far as this attack can see.", flush=True)


def _plans(config: Audit) -> dict[MethodName, jaxdp.PrivacyPlan]:
    if config.target_epsilon is not None and config.noise_multiplier is not None:
        raise ValueError(
            "give at most one of --target-epsilon and --noise-multiplier, which follow from each other; got "
            f"{config.target_epsilon} and {config.noise_multiplier}."
        )
    if not config.method:
        raise ValueError("--method names nothing to audit; leave it out for all.")
    target_epsilon = config.target_epsilon
    if target_epsilon is None and config.noise_multiplier is None:
        target_epsilon = 4.0
    plans: dict[MethodName, jaxdp.PrivacyPlan] = {}
    for name in dict.fromkeys(config.method):
        defaults = _DEFAULTS[name]
        plan = jaxdp.plan(
            num_examples=defaults.canaries if config.canaries is None else config.canaries,
            num_steps=defaults.steps if config.num_steps is None else config.num_steps,
            sampling_prob=defaults.sampling_prob if config.sampling_prob is None else config.sampling_prob,
            clipping=jaxdp.flat(1.0),  # epsilon does not depend on it
            target_epsilon=target_epsilon,
            target_delta=config.delta,
            noise_multiplier=config.noise_multiplier,
        )
        check_claim(plan)
        plans[name] = plan
    return plans


def _run(name: MethodName, plan: jaxdp.PrivacyPlan, rng: np.random.Generator, seed: int | None) -> Run:
    noise_key = None if seed is None else jax.random.key(seed)
    if name == "dp-sgd":
        return dp_sgd_run(plan, canary_norm=_CANARY_NORM, rng=rng, noise_key=noise_key)
    directions = 1 if name == "dpzero" else _DIRECTIONS
    return zeroth_order_run(plan, num_directions=directions, canary_norm=_CANARY_NORM, rng=rng, noise_key=noise_key)


def _print_table(
    config: Audit, plans: dict[MethodName, jaxdp.PrivacyPlan], reports: dict[MethodName, AuditReport]
) -> None:
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE, header_style=None)  # plain, to paste into a report
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    columns = [_column(plans[name], report) for name, report in reports.items()]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    relation = next(iter(plans.values())).neighboring_relation.name
    lines = [
        f"Every canary is in the run with probability 1/2; delta {config.delta:g}, neighboring relation {relation}",
        *([f"fault put in on purpose: {config.fault}"] if config.fault != "none" else []),
        table,
        "Each lower bound holds with confidence 95%: the first, from the plan's whole trade-off curve, decides; the second needs "
        "the pair (epsilon, delta) alone. The estimate takes the scores for normal and bounds nothing.",
    ]
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), markup=False)


def _column(plan: jaxdp.PrivacyPlan, report: AuditReport) -> dict[str, str]:
    return {
        "canaries": f"{plan.num_examples}",
        "steps": f"{plan.num_steps}",
        "sampling probability": f"{plan.sampling_prob:.6g}",
        "noise multiplier": f"{plan.noise_multiplier:.5g}",
        "guessed right": f"{report.guesses.num_correct} of {report.guesses.num_guesses}",
        "claimed epsilon": format_epsilon(report.claimed_epsilon),
        "lower bound": _rounded_down(report.epsilon_lower_bound),
        "lower bound by the pair": _rounded_down(report.pair_lower_bound),
        "estimate, no bound": "above 100" if report.epsilon_estimate > 100 else f"{report.epsilon_estimate:.2f}",
        "verdict": "pass" if report.passed else "fail",
    }


def _rounded_down(epsilon: float) -> str:
    """Two decimals: a printed lower bound never overstates."""
    return f"{math.floor(epsilon * 100) / 100:.2f}"
