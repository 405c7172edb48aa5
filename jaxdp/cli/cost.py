"""What a run costs, in the words that every subcommand has for it."""

from __future__ import annotations

from jaxdp.accounting import AccountantName, accountant_in_words, format_epsilon, judge
from jaxdp.mechanism import PrivacyPlan


def cost_in_words(epsilon: float, delta: float, *, relation: str, accountant: AccountantName, unit: str | None) -> str:
    """An epsilon at a delta, under which relation of what, and by which accountant; without the word before its number."""
    of_unit = "" if unit is None else f" {unit}"
    return f"{format_epsilon(epsilon)} at delta {delta:.3g} ({relation}{of_unit}, {accountant_in_words(accountant, delta)})"


def weak_points(epsilon: float, plan: PrivacyPlan, *, unit: str | None) -> list[str]:
    """What `jaxdp.accounting.judge` says of the epsilon of a plan; nothing of a run without privacy."""
    if plan.noise_multiplier == 0 or plan.target_delta is None:
        return []
    return [*judge(epsilon, plan.target_delta, plan.num_examples, unit=unit or "record")]


def say_weak_points(sentences: list[str]) -> None:
    """Prints them, each on a line of its own."""
    for sentence in sentences:
        print(f"weak guarantee: {sentence}", flush=True)
