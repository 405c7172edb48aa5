"""`jaxdp account`: epsilon for a noise multiplier, or the noise multiplier for an epsilon, by both accountants."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.box
import rich.console
import rich.table
import tyro

import jaxdp
from jaxdp import NeighboringRelation, _validate
from jaxdp.accounting import AccountantName, NoiseName, format_epsilon, judge
from jaxdp.cli import options
from jaxdp.mechanism import check_delta

ACCOUNTANTS: tuple[AccountantName, ...] = ("pld", "rdp")
PLOT_FORMATS = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True)
class Account:
    """Prices a private run before it is run: epsilon for a noise multiplier, or the noise multiplier for an epsilon.

    Exact (PLD) and Renyi (RDP) accounting side by side, for steps of Poisson sampling and Gaussian noise, or Laplace noise on one
    number a step, which has a pure epsilon: --delta 0.

      jaxdp account --num-examples 60000 --expected-batch-size 256 --num-steps 1000 --delta 1e-5 --noise-multiplier 0.8 1 2
      jaxdp account --num-examples 60000 --expected-batch-size 256 --epochs 10 --delta 1e-5 --target-epsilon 1 3 8
      jaxdp account --num-examples 1000 --sampling-prob 0.05 --num-steps 500 --delta 1e-6 --target-epsilon 2 --json
      jaxdp account --num-examples 1000 --sampling-prob 0.05 --num-steps 500 --delta 0 --noise laplace --target-epsilon 8
    """

    num_examples: int
    """Size of the training set."""
    delta: float
    """The delta of every epsilon; well below 1 / number of examples. 0 for pure epsilons of Laplace noise."""
    noise_multiplier: Annotated[tuple[float, ...], options.hint("or --target-epsilon", "SIGMA [SIGMA ...]")] = ()
    """Noise std over clip norm, of Laplace noise its scale over clip norm, one or several: prints their epsilon."""
    target_epsilon: Annotated[tuple[float, ...], options.hint("or --noise-multiplier", "EPSILON [EPSILON ...]")] = ()
    """Privacy goals, one or several: prints the noise multipliers that reach them."""
    expected_batch_size: Annotated[float | None, options.hint("or --sampling-prob", "FLOAT")] = None
    """Mean size of the Poisson batches."""
    sampling_prob: Annotated[float | None, options.hint("or --expected-batch-size", "FLOAT")] = None
    """Probability of each example to enter a batch; 1 for full batches."""
    num_steps: Annotated[int | None, options.hint("or --epochs", "INT")] = None
    """Number of steps."""
    epochs: Annotated[float | None, options.hint("or --num-steps", "FLOAT")] = None
    """Expected passes over the data, rounded up to whole steps."""
    noise: NoiseName = "gaussian"
    """The law of the noise. laplace: of private zeroth-order steps along one direction."""
    neighboring_relation: options.RelationName = "add-or-remove-one"
    """Which data sets the guarantee makes hard to tell apart."""
    padded_batch_size: Annotated[
        int | None, options.hint("default: chosen so that truncation costs nothing", "INT")
    ] = None
    """Rows of a padded batch; larger draws are truncated, and charged for."""
    json: Annotated[tyro.conf.FlagCreatePairsOff[bool], options.hint("default: a table")] = False
    """Print JSON to standard output, and nothing else."""
    plot: Annotated[Path | None, options.hint("default: none", "FILE")] = None
    """Also draw the noise multiplier against epsilon, as .png, .pdf or .svg."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The answers to one question, by accountant.

    Attributes:
        target_epsilon: The goal, or None if the noise multiplier was given.
        noise_multiplier: Given, or calibrated; None where an accountant has no answer.
        epsilon: What `noise_multiplier` costs; None where an accountant has no answer.
        notes: Why an accountant has no answer, or an infinite one.
    """

    target_epsilon: float | None
    noise_multiplier: dict[AccountantName, float | None]
    epsilon: dict[AccountantName, float | None]
    notes: dict[AccountantName, str]


def run(config: Account) -> None:
    """Prints the table or the JSON of `config`, and draws its plot.

    Raises:
        ValueError, TypeError, OSError: bad input, before anything is computed; or a goal out of reach.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        config = _resolved(config)
        bases: dict[AccountantName, jaxdp.PrivacyPlan] = {
            name: _plan(config, name, noise_multiplier=1.0)
            for name in ACCOUNTANTS
            if _unsupported(config, name) is None
        }
        if config.plot is not None:
            _check_plot(config, config.plot)
        status = rich.console.Console(stderr=True).status("accounting")  # silent without a terminal
        with status:
            rows = [_epsilon_row(config, value) for value in config.noise_multiplier]
            rows += [_goal_row(config, value) for value in config.target_epsilon]
            if config.noise == "laplace":  # padding follows the noise: that of the loudest question
                loudest = min(row.noise_multiplier["pld"] or 0.0 for row in rows)
                bases["pld"] = _plan(config, "pld", noise_multiplier=loudest)
        messages = list(dict.fromkeys([*(str(warning.message) for warning in caught), *_weak_points(config, rows)]))
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)
        if config.json:
            print(json.dumps(_as_json(config, bases, rows, messages), indent=2, allow_nan=False), flush=True)
        else:
            _print_table(config, bases, rows)
        if config.plot is not None:  # last: its curves take longer than its rows
            with status:
                _draw(config, rows, config.plot)
            print(f"plot: {config.plot}", file=sys.stderr)


def _resolved(config: Account) -> Account:
    """`config` with both ways of giving the sampling and the length filled in; refuses contradictions."""
    if bool(config.noise_multiplier) == bool(config.target_epsilon):
        raise ValueError(
            "give either --noise-multiplier, to learn its epsilon, or --target-epsilon, to learn its noise multiplier; "
            f"got {list(config.noise_multiplier)} and {list(config.target_epsilon)}."
        )
    if (config.expected_batch_size is None) == (config.sampling_prob is None):
        raise ValueError(
            "give either --expected-batch-size or --sampling-prob: epsilon depends on how often an example is seen; "
            f"got {config.expected_batch_size} and {config.sampling_prob}."
        )
    if (config.num_steps is None) == (config.epochs is None):
        raise ValueError(
            "give either --num-steps or --epochs: epsilon grows with the length of the run; "
            f"got {config.num_steps} and {config.epochs}."
        )
    check_delta("delta", config.delta, noise=config.noise)
    one_step = _plan(dataclasses.replace(config, num_steps=1), "pld", noise_multiplier=1.0)
    num_steps = config.num_steps
    if num_steps is None:
        # The inner rounding keeps 3 / 0.01 at 300 steps.
        num_steps = math.ceil(round(_validate.positive("epochs", config.epochs) / one_step.sampling_prob, 6))
    num_steps = _validate.positive_integer("num_steps", num_steps)
    for name, values in (("noise_multiplier", config.noise_multiplier), ("target_epsilon", config.target_epsilon)):
        for value in values:
            (_validate.nonnegative if name == "noise_multiplier" else _validate.positive)(name, value)
    return dataclasses.replace(
        config,
        num_steps=num_steps,
        epochs=num_steps * one_step.sampling_prob,
        sampling_prob=one_step.sampling_prob,
        expected_batch_size=one_step.expected_batch_size,
    )


def _plan(config: Account, accountant: AccountantName, **goal: float) -> jaxdp.PrivacyPlan:
    assert config.num_steps is not None
    return jaxdp.plan(
        num_examples=config.num_examples,
        num_steps=config.num_steps,
        clipping=jaxdp.flat(1.0),  # epsilon does not depend on it
        sampling_prob=config.sampling_prob,
        expected_batch_size=None if config.sampling_prob is not None else config.expected_batch_size,
        target_delta=config.delta,
        neighboring_relation=options.relation(config.neighboring_relation),
        padded_batch_size=config.padded_batch_size,
        accountant=accountant,
        noise=config.noise,
        **goal,
    )


def _unsupported(config: Account, accountant: AccountantName) -> str | None:
    """Why an accountant has no answer, if it has none."""
    if accountant == "rdp" and config.noise == "laplace":
        return "unsupported with Poisson sampling and Laplace noise"
    if accountant == "rdp" and options.relation(config.neighboring_relation) is NeighboringRelation.REPLACE_ONE:  # S11
        return "unsupported with Poisson sampling under REPLACE_ONE"
    return None


def _weak_points(config: Account, rows: Sequence[Row]) -> list[str]:
    """What is weak about the answers: about the largest finite epsilon of them, and about delta."""
    found = [value for row in rows for value in row.epsilon.values() if value is not None and math.isfinite(value)]
    return [*judge(max(found, default=0.0), config.delta, config.num_examples)]


_UNREACHABLE = "unreachable: "


def _epsilon_row(config: Account, noise_multiplier: float) -> Row:
    epsilon: dict[AccountantName, float | None] = {}
    notes: dict[AccountantName, str] = {}
    for name in ACCOUNTANTS:
        if (reason := _unsupported(config, name)) is not None:
            epsilon[name], notes[name] = None, reason
            continue
        value = epsilon[name] = _plan(config, name, noise_multiplier=noise_multiplier).epsilon()
        if math.isinf(value) and noise_multiplier == 0:
            notes[name] = "no noise, no privacy"
        elif math.isinf(value):
            notes[name] = "the charge for truncation exceeds delta; raise --padded-batch-size, or delta"
    return Row(None, dict.fromkeys(ACCOUNTANTS, noise_multiplier), epsilon, notes)


def _goal_row(config: Account, target_epsilon: float) -> Row:
    plans: dict[AccountantName, jaxdp.PrivacyPlan | None] = dict.fromkeys(ACCOUNTANTS)
    notes: dict[AccountantName, str] = {}
    for name in ACCOUNTANTS:
        if (reason := _unsupported(config, name)) is not None:
            notes[name] = reason
            continue
        try:
            plans[name] = _plan(config, name, target_epsilon=target_epsilon)
        except ValueError as error:
            # The input is sound, since a plan was made from it before: the goal is out of reach. Out of RDP's alone, it
            # is an answer (RDP pays more for truncation).
            if name == "pld":
                raise
            notes[name] = f"{_UNREACHABLE}{error}"
    return Row(
        target_epsilon,
        {name: plan and plan.noise_multiplier for name, plan in plans.items()},
        {name: plan and plan.epsilon() for name, plan in plans.items()},
        notes,
    )


def _as_json(
    config: Account, bases: dict[AccountantName, jaxdp.PrivacyPlan], rows: Sequence[Row], messages: Sequence[str]
) -> dict[str, Any]:
    def finite(values: dict[AccountantName, float | None]) -> dict[AccountantName, float | str | None]:
        # JSON has no infinity; both float("Infinity") and JavaScript's Number("Infinity") read this.
        return {name: "Infinity" if value == math.inf else value for name, value in values.items()}

    return {
        "num_examples": config.num_examples,
        "sampler": "truncated Poisson",
        "sampling_prob": config.sampling_prob,
        "expected_batch_size": config.expected_batch_size,
        "num_steps": config.num_steps,
        "epochs": config.epochs,
        "delta": config.delta,
        "noise": config.noise,
        "neighboring_relation": options.relation(config.neighboring_relation).name,
        "target_epsilon": list(config.target_epsilon),
        "noise_multiplier": list(config.noise_multiplier),
        "accountants": {
            name: {"padded_batch_size": bases[name].padded_batch_size if name in bases else None}
            for name in ACCOUNTANTS
        },
        "rows": [dataclasses.asdict(row) | {"epsilon": finite(row.epsilon)} for row in rows],
        "warnings": list(messages),
        "versions": {"jaxdp": jaxdp.__version__, "dp-accounting": importlib.metadata.version("dp-accounting")},
    }


def _print_table(config: Account, bases: dict[AccountantName, jaxdp.PrivacyPlan], rows: Sequence[Row]) -> None:
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE, header_style=None)  # plain, to paste into a report
    question, answer = (
        ("target epsilon", "noise multiplier") if config.target_epsilon else ("noise multiplier", "epsilon")
    )
    for heading in (question, *(f"{answer} ({name.upper()})" for name in ACCOUNTANTS)):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.target_epsilon is not None:
            # Calibrated multipliers have five digits, already rounded up.
            cells = [_cell(row, name, row.noise_multiplier[name], "{:.5g}".format) for name in ACCOUNTANTS]
            table.add_row(f"{row.target_epsilon:.12g}", *cells)
        else:
            cells = [_cell(row, name, row.epsilon[name], format_epsilon) for name in ACCOUNTANTS]
            table.add_row(f"{row.noise_multiplier['pld']:.12g}", *cells)
    padding = " and ".join(f"{plan.padded_batch_size} rows ({name.upper()})" for name, plan in bases.items())
    truncated = any(plan.release(1).truncates for plan in bases.values())
    lines = [
        f"{config.num_examples} examples, each in a batch with probability {config.sampling_prob:.6g} (expected batch size "
        f"{config.expected_batch_size:.6g}), {config.num_steps} steps ({config.epochs:.4g} epochs)",
        f"delta {config.delta:g}, neighboring relation {options.relation(config.neighboring_relation).name}",
        *(
            ["Laplace noise on one number a step, of scale noise multiplier times clip norm"]
            * (config.noise == "laplace")
        ),
        *(["PLD at delta 0 is basic composition of the pure epsilons of the steps"] * (config.delta == 0)),
        table,
        f"Batches padded to {padding}{'; larger draws are truncated, which is charged for' if truncated else ''}.",
        "Every epsilon is rounded up." if config.noise_multiplier else "Every noise multiplier is rounded up.",
        *dict.fromkeys(f"{name.upper()}: {note}." for row in rows for name, note in row.notes.items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), markup=False)


def _cell(row: Row, name: AccountantName, value: float | None, show: Any) -> str:
    if value is None:
        return "unreachable" if row.notes[name].startswith(_UNREACHABLE) else "unsupported"
    return show(value)


def _check_plot(config: Account, path: Path) -> None:
    """Refuses, before anything is computed, a file that could not be drawn or written."""
    if path.suffix.lower() not in PLOT_FORMATS:
        raise ValueError(f"--plot {path} has extension {path.suffix!r}; use one of {', '.join(PLOT_FORMATS)}.")
    if not config.target_epsilon and not any(config.noise_multiplier):
        raise ValueError("--plot has nothing to draw: every --noise-multiplier is 0; give a positive one.")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(
            f"--plot {path} cannot be written ({error.strerror}); name a file in a folder that exists."
        ) from None
    if not existed:
        path.unlink()


def _draw(config: Account, rows: Sequence[Row], path: Path) -> None:
    """Draws one curve for each accountant through the rows, on logarithmic axes."""
    from matplotlib import figure, ticker

    marks = {
        name: [
            (sigma, epsilon)
            for row in rows
            if (sigma := row.noise_multiplier[name]) and (epsilon := row.epsilon[name]) and math.isfinite(epsilon)
        ]
        for name in ACCOUNTANTS
    }
    sigmas = [sigma for points in marks.values() for sigma, _ in points]
    if not sigmas:
        raise ValueError(
            "--plot has nothing to draw: every epsilon above is infinite or zero; give other noise multipliers."
        )
    # A `Figure` without pyplot always draws with Agg, or the vector backend of its format: no display is needed.
    canvas = figure.Figure(figsize=(7, 4.5), layout="constrained")
    axis = canvas.subplots()
    grid = np.geomspace(min(sigmas) / 1.3, max(sigmas) * 1.3, 16)
    for name, style in zip(ACCOUNTANTS, ("-", "--"), strict=True):
        if not marks[name]:
            continue
        curve = dict(marks[name])
        curve.update((sigma, _plan(config, name, noise_multiplier=float(sigma)).epsilon()) for sigma in grid)
        points = [(sigma, value) for sigma, value in sorted(curve.items()) if 0 < value < math.inf]
        (line,) = axis.plot(*zip(*points, strict=True), style, label=name.upper())
        axis.plot(*zip(*marks[name], strict=True), "o", color=line.get_color(), markersize=5)
    axis.set(xscale="log", yscale="log", xlabel="noise multiplier", ylabel=f"epsilon at delta {config.delta:g}")
    for each in (axis.xaxis, axis.yaxis):
        low, high = each.get_view_interval()
        # Less than a decade has too few round logarithmic ticks.
        each.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 8 * low else ticker.MaxNLocator(7))
        each.set_major_formatter(ticker.FormatStrFormatter("%g"))
        each.set_minor_locator(ticker.NullLocator())
    axis.set_title(
        f"N={config.num_examples}, q={config.sampling_prob:.4g}, T={config.num_steps}, "
        f"{options.relation(config.neighboring_relation).name}",
        fontsize="medium",
    )
    axis.grid(True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    canvas.savefig(path, dpi=150)
