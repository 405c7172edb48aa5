"""What a run will need and cost, known before it starts: the memory of the compiled step against that of the device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp.accounting import format_epsilon
from jaxdp.cli import cost, meters
from jaxdp.mechanism import PrivacyPlan


@dataclasses.dataclass(frozen=True)
class PlanCheck:
    """The figures of a run before it starts.

    Attributes:
        plan: The privacy numbers.
        step_bytes: What XLA reserves for one step: arguments, outputs and temporaries.
        available_bytes: What the device has left for it; None where nothing tells.
        meter: Where `available_bytes` comes from.
        num_trainable: Trainable parameters.
        num_frozen: The others.
        host_bytes: What the host's memory will reach, beside the compiler's own; None where it was not predicted.
        placement: In words, where its blocks wait.
        unit: What the plan's examples are, a noun; None for records.
    """

    plan: PrivacyPlan
    step_bytes: int
    available_bytes: int | None
    meter: str | None
    num_trainable: int
    num_frozen: int
    host_bytes: int | None = None
    placement: str | None = None
    unit: str | None = None

    def __str__(self) -> str:
        plan, total = self.plan, self.num_trainable + self.num_frozen
        epsilon = plan.epsilon() if plan.noise_multiplier > 0 else math.inf
        spent = "none: this run is not private" if math.isinf(epsilon) else f"{format_epsilon(epsilon)}"
        if plan.target_delta is not None and not math.isinf(epsilon):
            numbers: Any = {
                "relation": plan.neighboring_relation.name,
                "accountant": plan.accountant,
                "unit": self.unit,
            }
            spent = cost.cost_in_words(epsilon, plan.target_delta, **numbers)
        units = "" if self.unit is None else f" {self.unit}s"
        kind = "" if plan.noise == "gaussian" else f" ({plan.noise.capitalize()} scale over clip norm)"
        room = "" if self.available_bytes is None else f" of {gibibytes(self.available_bytes)} available ({self.meter})"
        return "\n".join(
            [
                "plan check",
                f"  epsilon     {spent}; noise multiplier {plan.noise_multiplier:.5g}{kind}",
                *(f"  weak        {sentence}" for sentence in cost.weak_points(epsilon, plan, unit=self.unit)),
                f"  steps       {plan.num_steps}, expected batch size {plan.expected_batch_size:.6g} of {plan.num_examples}"
                f"{units}, padded to {plan.padded_batch_size}",
                f"  parameters  {self.num_trainable:,} trainable of {total:,} ({self.num_trainable / total:.2%})",
                f"  memory      {gibibytes(self.step_bytes)}{room}",
                *([] if self.host_bytes is None else [f"  host        {gibibytes(self.host_bytes)} at the peak"]),
                *([] if self.placement is None else [f"  placement   {self.placement}"]),
            ]
        )

    def refuse_if_too_large(self, remedies: list[str]) -> None:
        """Raises ValueError, with `remedies`, if the step cannot fit."""
        if self.available_bytes is not None and self.step_bytes > self.available_bytes:
            raise ValueError(
                f"a step needs {gibibytes(self.step_bytes)} and the device has {gibibytes(self.available_bytes)} left "
                f"({self.meter}); to make it fit: {', '.join(remedies)}."
            )


def plan_check(
    step: Any,
    tx: optax.GradientTransformation,
    plan: PrivacyPlan,
    trainable: Any,
    frozen: Any,
    data: Any,
    *,
    unit: str | None = None,
) -> PlanCheck:
    """Compiles the step of `make_dp_step` and reads off what it needs; nothing is computed or put on the device.

    Args:
        step: The step function.
        tx: Its optimizer.
        plan: Its plan.
        trainable: The trainable parameters, arrays or shapes.
        frozen: The frozen ones.
        data: The training set, arrays `[n, ...]`.
        unit: What one row of it is, a noun; None for a record.
    """

    def shape(leaf: Any, *leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *np.shape(leaf)[len(leading) :]), leaf.dtype)

    rows = plan.padded_batch_size
    params = jax.tree.map(shape, trainable)
    arguments = (
        params,
        jax.eval_shape(tx.init, params),
        jax.ShapeDtypeStruct((len(plan.clipping.groups(params).names),), jnp.float32),
        jax.ShapeDtypeStruct((), jax.random.key(0, impl="threefry2x32").dtype),
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.tree.map(lambda leaf: shape(leaf, rows), data),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
        jax.tree.map(shape, frozen),
    )
    analysis = step.compiled.lower(*arguments).compile().memory_analysis()
    parts = {name: getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    available = meters.available_memory()
    return PlanCheck(
        plan,
        parts["argument"] + parts["output"] + parts["temp"] - parts["alias"],  # donated arguments count once
        None if available is None else available[0],
        None if available is None else available[1],
        num_parameters(trainable),
        num_parameters(frozen),
        unit=unit,
    )


def num_parameters(tree: Any) -> int:
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
