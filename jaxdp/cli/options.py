"""What the options of several subcommands share."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, Protocol, TypeAlias

import tyro
from dp_accounting import NeighboringRelation

from jaxdp.accounting import AccountantName, NoiseName
from jaxdp.clipping import ClippingPolicy, automatic, flat, per_layer, quantile
from jaxdp.clipping.policies import NoiseAllocation
from jaxdp.mechanism import PrivacyPlan, plan

Flag = tyro.conf.FlagCreatePairsOff
RelationName: TypeAlias = Literal["add-or-remove-one", "replace-one", "replace-special"]
ClippingName: TypeAlias = Literal["flat", "per-layer", "automatic", "quantile"]


class PlanOptions(Protocol):
    """The options of a subcommand that decide its plan; each declares them with defaults and help of its own."""

    @property
    def target_epsilon(self) -> float | None: ...
    @property
    def noise_multiplier(self) -> float | None: ...
    @property
    def no_privacy(self) -> bool: ...
    @property
    def sampling_prob(self) -> float | None: ...
    @property
    def clipping(self) -> ClippingName: ...
    @property
    def noise_allocation(self) -> NoiseAllocation: ...
    @property
    def neighboring_relation(self) -> RelationName: ...
    @property
    def padded_batch_size(self) -> int | None: ...
    @property
    def accountant(self) -> AccountantName: ...


def make_plan(
    options: PlanOptions,
    *,
    num_examples: int,
    num_steps: int,
    expected_batch_size: float | None,
    l2_clip_norm: float,
    target_delta: float,
    stacked: tuple[str, ...] = (),
    noise: NoiseName = "gaussian",
) -> PrivacyPlan:
    """The plan that the options describe, with the numbers whose defaults differ between subcommands.

    Raises:
        ValueError: the options contradict each other, a number is out of range, or the goal cannot be reached.
    """
    with warnings.catch_warnings():
        # What is weak about a plan is said by `cost`, in terms of the run's unit.
        warnings.filterwarnings("ignore", "delta=.* exceeds 1/num_examples", UserWarning)
        return plan(
            num_examples=num_examples,
            num_steps=num_steps,
            expected_batch_size=expected_batch_size,
            sampling_prob=options.sampling_prob,
            clipping=_clipping(options, l2_clip_norm, stacked),
            target_delta=target_delta,
            neighboring_relation=relation(options.neighboring_relation),
            padded_batch_size=options.padded_batch_size,
            accountant=options.accountant,
            noise=noise,
            **privacy_goal(options),
        )


def privacy_goal(options: PlanOptions) -> dict[str, float | None]:
    """The goal of the plan: epsilon 3 by default.

    Raises:
        ValueError: two goals.
    """
    given = {"noise_multiplier": options.noise_multiplier, "target_epsilon": options.target_epsilon}
    if options.no_privacy:
        if given != dict.fromkeys(given):
            raise ValueError("--no-privacy contradicts --target-epsilon and --noise-multiplier; leave one out.")
        return {"noise_multiplier": 0.0}
    if given == dict.fromkeys(given):
        return {"target_epsilon": 3.0}
    if None not in given.values():
        raise ValueError(
            "give exactly one of --target-epsilon and --noise-multiplier, which follow from each other; got "
            f"{options.target_epsilon} and {options.noise_multiplier}."
        )
    return given


def _clipping(options: PlanOptions, l2_clip_norm: float, stacked: tuple[str, ...]) -> ClippingPolicy:
    if options.no_privacy:
        return flat(math.inf)
    if options.clipping == "per-layer":
        return per_layer(l2_clip_norm, noise_allocation=options.noise_allocation, stacked=stacked)
    return {"flat": flat, "automatic": automatic, "quantile": quantile}[options.clipping](l2_clip_norm)


def relation(name: RelationName) -> NeighboringRelation:
    return NeighboringRelation[name.replace("-", "_").upper()]


def hint(text: str, metavar: str | None = None) -> Any:
    """Shows `(text)` in the help of an option, in the place of its default."""
    return tyro.conf.arg(help_behavior_hint=f"({text})", metavar=metavar)
