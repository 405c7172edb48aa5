"""What an epsilon and a delta mean to a person in the data, where they promise next to nothing: said in one place."""

from __future__ import annotations

import math

from jaxdp.accounting.accountants import format_epsilon

#: Above it an epsilon bounds next to nothing: from even odds, an attacker may become surer than 1 - 2e-9.
_LARGEST_EPSILON = 20.0
#: Above it the guarantee fails too often for a person to count on, however few the others are.
_LARGEST_DELTA = 1e-3


def judge(epsilon: float, delta: float, num_examples: int, *, unit: str = "record") -> tuple[str, ...]:
    """Says in plain words what is weak about an (epsilon, delta), and the remedy: one sentence or two each; nothing if it is not.

    Weak are an epsilon above 20, a delta above 1e-3 and one above 1 / num_examples. An infinite epsilon is no guarantee, and
    whoever states it says so: of it, the delta alone is judged.

    Args:
        epsilon: Of the run.
        delta: The delta that it holds at; 0 for a pure one.
        num_examples: N, the number of units in the data: public.
        unit: What is protected, a noun: `"record"`, `"privacy unit"`.
    """
    return tuple(
        sentence for sentence in (_of_epsilon(epsilon, unit), judge_delta(delta, num_examples, unit=unit)) if sentence
    )


def judge_delta(delta: float, num_examples: int, *, unit: str = "record") -> str:
    """Says what is weak about a delta, or nothing: an empty string."""
    remedy = f"Use a delta such as {min(1e-5, num_examples**-1.1):.0e}, at the price of more noise, or train on more {unit}s."
    if delta > 1 / num_examples:
        return (
            f"delta={delta:.3g} exceeds 1/num_examples={1 / num_examples:.3g}: releasing one {unit} in the clear, drawn at "
            f"random, would satisfy it, so nobody is promised that it is not theirs. {remedy}"
        )
    if delta > _LARGEST_DELTA:
        return (
            f"delta={delta:.3g} exceeds {_LARGEST_DELTA:g}: with a chance of up to 1 in {1 / delta:.0f} the run may show anything "
            f"about the person behind a {unit}, whatever epsilon is. {remedy}"
        )
    return ""


def _of_epsilon(epsilon: float, unit: str) -> str:
    if not _LARGEST_EPSILON < epsilon < math.inf:
        return ""
    shown = format_epsilon(epsilon)
    return (
        f"epsilon={shown} exceeds {_LARGEST_EPSILON:g} and bounds next to nothing: what is released may be e^{shown} times "
        f"likelier with a {unit} in the data than without it, so that whoever sees it may become all but certain that it was "
        "there, and of what it says. Use more noise, fewer steps or a smaller sampling probability: up to 10 is a usual goal, 1 a "
        "strong one."
    )
