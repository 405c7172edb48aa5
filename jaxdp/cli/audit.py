"""`jaxdp audit`: what an attack on one run shows about its epsilon, for the package as it is installed."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeAlias

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

import jaxdp
from jaxdp import _validate
from jaxdp.accounting import format_epsilon
from jaxdp.auditing import (
    AuditReport,
    Check,
    Fault,
    audit,
    broken,
    broken_step,
    broken_zeroth_order_step,
    cancelling_check,
    check_claim,
    dp_sgd_run,
    noise_check,
    ordinary_check,
    power,
    zeroth_order_check,
    zeroth_order_noise_check,
    zeroth_order_run,
)
from jaxdp.auditing.faults import FAULTS_OF_GRADIENTS
from jaxdp.auditing.one_run import significances
from jaxdp.cli import options

MethodName: TypeAlias = Literal["dp-sgd", "dpzero", "dp-aggzo"]
# The canaries' norm before the clip, in clip norms: a clip that is skipped shows.
_CANARY_NORM = 10.0
_RIGHT = "guessed right"  # a row for each kind of scores


_NUM_DIRECTIONS: dict[MethodName, int] = {"dpzero": 1, "dp-aggzo": 16}


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
    bound is wrong with probability 5% at most; the estimate is no bound. Beside the attack, direct checks measure how far one
    record moves a step, and whether draws of noise are of the claimed size and independent. About a minute.

      jaxdp audit
      jaxdp audit --method dp-sgd --target-epsilon 1 --canaries 5000
      jaxdp audit --method dp-aggzo --fault half-noise
      jaxdp audit --method dp-sgd --fault two-tensors
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
    results: dict[MethodName, _Result] = {name: _result(config, name, plan) for name, plan in plans.items()}
    _print_table(config, plans, results)
    _print_checks(plans, results)
    refuted = [name for name, result in results.items() if not result.report.passed]
    if refuted:
        print(f"fail: {', '.join(refuted)} leaked more than the claimed epsilon allows.", flush=True)
    for name, result in results.items():
        if failed := [check.law for check in result.checks if not check.passed]:
            print(f"fail: {name} broke its claim in a direct check: {'; '.join(failed)}.", flush=True)
    if not all(result.passed for result in results.values()):
        raise SystemExit(1)
    print("pass: no run leaked more than its claim allows, as far as this attack can see.", flush=True)


@dataclasses.dataclass(frozen=True)
class _Result:
    report: AuditReport
    refuted_noise: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return self.report.passed and all(check.passed for check in self.checks)


def _result(config: Audit, name: MethodName, plan: jaxdp.PrivacyPlan) -> _Result:
    def say(what: str) -> None:
        print(f"{name}: {what}", file=sys.stderr, flush=True)

    rng = np.random.default_rng(config.seed)
    # The sampler reads a plan of its own; all other faults are in the steps, which are given the claim.
    really = broken(plan, config.fault, canary_norm=_CANARY_NORM) if config.fault == "no-sampling" else plan
    noise_key = None if config.seed is None else jax.random.key(config.seed)
    options: dict[str, Any] = {"canary_norm": _CANARY_NORM, "rng": rng, "noise_key": noise_key}
    say(f"{plan.num_steps} steps with {plan.num_examples} canaries")
    if name == "dp-sgd":
        run = dp_sgd_run(really, make_step=broken_step(config.fault, canary_norm=_CANARY_NORM), **options)
        simulate = power.dp_sgd_runs(plan, rng)
    else:
        K = _NUM_DIRECTIONS[name]
        make = broken_zeroth_order_step(config.fault, canary_norm=_CANARY_NORM)
        run = zeroth_order_run(really, num_directions=K, make_step=make, **options)
        simulate = power.zeroth_order_runs(plan, K, rng)
    report = audit(plan, run, rng=rng)
    say("simulations of weaker noise, for the smallest fault that this attack sees")
    share = significances(report.significance, len(report.scores))[0]
    refuted_noise = power.refuted_noise(plan, simulate, significance=share)
    return _Result(report, refuted_noise, tuple(_checks(config, name, plan, rng, say)))


def _checks(
    config: Audit, name: MethodName, plan: jaxdp.PrivacyPlan, rng: np.random.Generator, say: Callable[[str], None]
) -> Iterator[Check]:
    if name == "dp-sgd":
        make = broken_step(config.fault, canary_norm=_CANARY_NORM)
        say("the clip, of canaries in every route")
        yield ordinary_check(canary_norm=_CANARY_NORM, make_step=make, rng=rng)
        say("the clip, of canaries whose gradient cancels")
        yield cancelling_check(make_step=make, rng=rng)
        say("the noise of empty batches")
        yield from noise_check(plan.noise_multiplier, make_step=make, rng=rng)
    else:
        steps = broken_zeroth_order_step(config.fault, canary_norm=_CANARY_NORM)
        say("the clip of projected gradients")
        yield zeroth_order_check(_NUM_DIRECTIONS[name], canary_norm=_CANARY_NORM, make_step=steps, rng=rng)
        say("the noise of empty batches")
        yield from zeroth_order_noise_check(plan.noise_multiplier, make_step=steps, rng=rng)


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
    zeroth_order = [name for name in config.method if name != "dp-sgd"]
    if config.fault in FAULTS_OF_GRADIENTS and zeroth_order:
        raise ValueError(
            f"fault {config.fault!r} is one of DP-SGD, and {', '.join(zeroth_order)} has no layers, methods or gradients to break; "
            "add --method dp-sgd."
        )
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


def _print_table(config: Audit, plans: dict[MethodName, jaxdp.PrivacyPlan], results: dict[MethodName, _Result]) -> None:
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE, header_style=None)  # plain, to paste into a report
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    columns = [_column(plans[name], result) for name, result in results.items()]
    kinds = dict.fromkeys(score.name for result in results.values() for score in result.report.scores)
    for label in columns[0]:
        if label == _RIGHT:
            for kind in kinds:
                table.add_row(f"right by {kind}", *(_right(result.report, kind) for result in results.values()))
        else:
            table.add_row(label, *(column[label] for column in columns))
    relation = next(iter(plans.values())).neighboring_relation.name
    lines = [
        f"Every canary is in the run with probability 1/2; delta {config.delta:g}, neighboring relation {relation}",
        *([f"fault put in on purpose: {config.fault}"] if config.fault != "none" else []),
        table,
        "Each lower bound holds with confidence 95%, over all scores of a run together: the first, from the plan's whole trade-off "
        "curve, decides; the second needs the pair (epsilon, delta) alone. Both are those of the scores that show most. The "
        "estimate takes these scores for normal and bounds nothing.",
    ]
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), markup=False)


def _column(plan: jaxdp.PrivacyPlan, result: _Result) -> dict[str, str]:
    report = result.report
    return {
        "canaries": f"{plan.num_examples}",
        "steps": f"{plan.num_steps}",
        "sampling probability": f"{plan.sampling_prob:.6g}",
        "noise multiplier": f"{plan.noise_multiplier:.5g}",
        _RIGHT: "",
        "claimed epsilon": format_epsilon(report.claimed_epsilon),
        "lower bound": _rounded_down(report.epsilon_lower_bound),
        "lower bound by the pair": _rounded_down(report.pair_lower_bound),
        "estimate, no bound": "above 100" if report.epsilon_estimate > 100 else f"{report.epsilon_estimate:.2f}",
        "scores": "pass" if report.passed else "fail",
        "direct checks": "pass" if all(check.passed for check in result.checks) else "fail",
        "verdict": "pass" if result.passed else "fail",
    }


def _print_checks(plans: dict[MethodName, jaxdp.PrivacyPlan], results: dict[MethodName, _Result]) -> None:
    print(
        "\nDirect checks: measurements, not guesses. Noise of the claim fails one of them with probability below 1e-5."
    )
    for name, result in results.items():
        for check in result.checks:
            worst = check.worst
            verdict = "pass" if check.passed else f"fail in {len(check.failed)}"
            print(
                f"  {name}, {check.law}: {verdict} of {len(check.cases)}; at worst {worst.measured:.5g} {check.unit}, allowed "
                f"{worst.allowed:.5g} ({worst.name})"
            )
    covered: dict[str, dict[str, None]] = {}
    for result in results.values():
        for check in result.checks:
            for kind, members in check.covered.items():
                covered.setdefault(kind, {}).update(dict.fromkeys(members))
    for kind, members in covered.items():
        print(f"  {kind}: {', '.join(members)}")
    print("\nSmallest faults that this audit would have seen:")
    for name, result in results.items():
        fraction, noise = result.refuted_noise, plans[name].noise_multiplier
        seen = (
            f"with probability 0.9 by simulation, a noise multiplier below {_rounded_down(fraction)} of the claimed {noise:.5g}; "
            "or noise that is the same in all steps, in every other step, or in pairs of steps"
        )
        print(f"  {name}, scores: {seen if fraction > 0 else 'not even a run without noise; use more canaries'}")
        for check in result.checks:
            print(f"  {name}, {check.law}: {check.power}")
    print()


def _right(report: AuditReport, kind: str) -> str:
    found = [score.guesses for score in report.scores if score.name == kind]
    return f"{found[0].num_correct} of {found[0].num_guesses}" if found else ""


def _rounded_down(epsilon: float) -> str:
    """Two decimals: a printed lower bound never overstates."""
    return f"{math.floor(epsilon * 100) / 100:.2f}"
