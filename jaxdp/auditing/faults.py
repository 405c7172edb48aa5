"""Ways to break a run on purpose, to see that an audit of it fails."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

from jaxdp.clipping import flat
from jaxdp.mechanism import PrivacyPlan

Fault: TypeAlias = Literal["none", "no-noise", "half-noise", "no-sampling", "no-clip"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def broken(plan: PrivacyPlan, fault: Fault, *, canary_norm: float) -> PrivacyPlan:
    """The plan that a run with the fault really follows, while `plan` is what it claims.

    Args:
        plan: The claim.
        fault: "no-noise"; "half-noise", half the standard deviation; "no-sampling", every example in every step; "no-clip", no
            clipping below `canary_norm` and the noise as it was; or "none".
        canary_norm: Of the canaries.
    """
    if fault == "no-noise":
        return dataclasses.replace(plan, noise_multiplier=0.0)
    if fault == "half-noise":
        return dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    if fault == "no-sampling":
        if plan.sampling_prob == 1:
            raise ValueError("fault 'no-sampling' changes nothing: the plan's sampling_prob is 1 already; lower it.")
        return dataclasses.replace(plan, sampling_prob=1.0, padded_batch_size=plan.num_examples)
    if fault == "no-clip":
        allowed = canary_norm / plan.clipping.total_l2_clip_norm
        return dataclasses.replace(plan, clipping=flat(canary_norm), noise_multiplier=plan.noise_multiplier / allowed)
    return plan
