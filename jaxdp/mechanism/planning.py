"""`plan`: a privacy goal or a noise multiplier -> a `PrivacyPlan`, with all that contradicts itself refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

from dp_accounting import NeighboringRelation

from jaxdp import _validate, accounting
from jaxdp.accounting import AccountantName, NoiseName
from jaxdp.clipping import Automatic, ClippingPolicy, Flat, Quantile, check_policy
from jaxdp.mechanism.privacy_plan import PrivacyPlan, check_delta


def plan(
    *,
    num_examples: int,
    num_steps: int,
    clipping: ClippingPolicy,
    expected_batch_size: float | None = None,
    sampling_prob: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    noise_multiplier: float | None = None,
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    padded_batch_size: int | None = None,
    accountant: AccountantName = "pld",
    noise: NoiseName = "gaussian",
) -> PrivacyPlan:
    """Plans a private run: give a privacy goal, and get the noise; or give the noise, and ask for its epsilon.

    **Guarantee**: `num_steps` steps of `jaxdp.make_dp_step`, updates of `jaxdp.dp_aggregate`, or private zeroth-order steps, on
    batches from `jaxdp.poisson_batches`, all with this plan, are (epsilon, delta)-differentially private for
    `plan.epsilon(delta=delta)` under `neighboring_relation`. `plan.describe()` states it with its limits.

    Args:
        num_examples: N, the size of the training set (of the split trained on); public.
        num_steps: T.
        clipping: `jaxdp.flat(C)`, `per_layer(...)`, `automatic(...)` or `quantile(...)`.
        expected_batch_size: q * N, in examples; give this or `sampling_prob`.
        sampling_prob: q, in (0, 1]; 1 uses every example in every step.
        target_epsilon: The goal, with `target_delta`; give it or `noise_multiplier`.
        target_delta: In (0, 1), well below 1 / num_examples; or 0, a pure epsilon, with Laplace noise.
        noise_multiplier: The noise over the clip norm: std sigma of a Gaussian, scale b of a Laplace law; 0 for a run without
            privacy.
        neighboring_relation: Add-or-remove-one by default; replace-one doubles the sensitivity (S1).
        padded_batch_size: Rows of a padded batch. None for the smallest multiple of 8 that a draw exceeds with negligible
            probability, at most num_examples + 1, which holds any draw from a neighbor too; num_examples for full batches.
            Truncation is charged for (S10, arXiv 2508.15089), that of a neighbor with a record more included.
        accountant: `"pld"`, tight, or `"rdp"`, an upper bound that older papers report; Laplace noise needs `"pld"`.
        noise: `"gaussian"`; or `"laplace"`, which has a pure epsilon (DP-ZO, arXiv 2401.04343), for `make_step` and
            `make_resident_step` of `jaxdp.zeroth_order` with one direction and flat or automatic clipping. What is released there
            is one number a step: the L1 sensitivity of more, clipped together, is larger than what a plan charges for.

    Raises:
        ValueError: a number is out of range, numbers contradict each other, or the goal cannot be reached.

    >>> from jaxdp.clipping import flat
    >>> p = plan(num_examples=60_000, expected_batch_size=256, num_steps=1_000, clipping=flat(1.0),
    ...          target_epsilon=3.0, target_delta=1e-5)
    >>> p.epsilon() <= 3.0
    True
    """
    num_examples = _validate.positive_integer("num_examples", num_examples)
    num_steps = _validate.positive_integer("num_steps", num_steps)
    clipping = check_policy(clipping)
    sampling_prob = _sampling_prob(num_examples, expected_batch_size, sampling_prob)
    if not isinstance(neighboring_relation, NeighboringRelation):
        raise TypeError(
            "neighboring_relation must be a jaxdp.NeighboringRelation, such as ADD_OR_REMOVE_ONE; got "
            f"{neighboring_relation!r}."
        )
    _validate.one_of("accountant", accountant, ("pld", "rdp"))
    _validate.one_of("noise", noise, ("gaussian", "laplace"))
    if noise == "laplace":
        _check_laplace(clipping, accountant)
    # Asks for the epsilon of nothing: the accountant refuses a relation that it cannot answer for.
    accounting.epsilon([], 0.5, neighboring_relation=neighboring_relation, accountant=accountant)
    if target_delta is not None:
        target_delta = check_delta("target_delta", target_delta, noise=noise)
        if target_delta > 1 / num_examples:
            warnings.warn(accounting.judge_delta(target_delta, num_examples), stacklevel=2)
    target_epsilon, noise_multiplier = _check_goal(target_epsilon, target_delta, noise_multiplier, noise)
    if padded_batch_size is None:
        padded_batch_size = accounting.default_padded_batch_size(
            noise=noise,
            num_examples=num_examples,
            sampling_prob=sampling_prob,
            num_steps=num_steps,
            neighboring_relation=neighboring_relation,
            accountant=accountant,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            noise_multiplier=noise_multiplier,
        )
    padded_batch_size = _validate.positive_integer("padded_batch_size", padded_batch_size)
    largest = num_examples if sampling_prob == 1 else num_examples + 1  # a full batch has no padding, and needs no mask
    if padded_batch_size > largest:
        raise ValueError(
            f"padded_batch_size={padded_batch_size} exceeds {largest}, and no draw can be that large, from num_examples="
            f"{num_examples} or from a neighbor: leave it out."
        )
    if padded_batch_size < sampling_prob * num_examples * (1 - 1e-9):
        raise ValueError(
            f"padded_batch_size={padded_batch_size} is below the expected batch size "
            f"{sampling_prob * num_examples:g}: most draws would be truncated. Raise it or "
            "leave it out; to save memory use microbatch_size."
        )
    if noise_multiplier is None:
        assert target_epsilon is not None
        assert target_delta is not None
        noise_multiplier = accounting.calibrate_noise_multiplier(
            target_epsilon,
            target_delta,
            noise=noise,
            num_examples=num_examples,
            sampling_prob=sampling_prob,
            padded_batch_size=padded_batch_size,
            num_steps=num_steps,
            neighboring_relation=neighboring_relation,
            accountant=accountant,
        )
    result = PrivacyPlan(
        num_examples=num_examples,
        sampling_prob=sampling_prob,
        num_steps=num_steps,
        clipping=clipping,
        noise_multiplier=noise_multiplier,
        padded_batch_size=padded_batch_size,
        neighboring_relation=neighboring_relation,
        accountant=accountant,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        noise=noise,
    )
    _check_noise(result)
    return result


def _sampling_prob(num_examples: int, expected_batch_size: Any, sampling_prob: Any) -> float:
    if (expected_batch_size is None) == (sampling_prob is None):
        raise ValueError(
            f"give exactly one of expected_batch_size and sampling_prob; got {expected_batch_size!r} and {sampling_prob!r}."
        )
    if sampling_prob is not None:
        return _validate.probability("sampling_prob", sampling_prob)
    size = _validate.positive("expected_batch_size", expected_batch_size)
    if size > num_examples:
        raise ValueError(f"expected_batch_size={size:g} exceeds num_examples={num_examples}; use at most num_examples.")
    return size / num_examples


def _check_laplace(clipping: ClippingPolicy, accountant: AccountantName) -> None:
    if not isinstance(clipping, Flat | Automatic):
        raise ValueError(
            f"noise='laplace' is for one number a step, and {clipping} bounds several, whose L1 sensitivity is larger than their "
            "L2 sensitivity. Use jaxdp.flat(C) or jaxdp.automatic(C), or noise='gaussian'."
        )
    if accountant == "rdp":
        raise ValueError("accountant='rdp' has no answer for sampled Laplace noise; use accountant='pld'.")


def _check_goal(
    target_epsilon: Any, target_delta: Any, noise_multiplier: Any, noise: NoiseName
) -> tuple[float | None, float | None]:
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            "give exactly one of target_epsilon (with target_delta) and noise_multiplier; got "
            f"{target_epsilon!r} and {noise_multiplier!r}."
        )
    if noise_multiplier is not None:
        noise_multiplier = _validate.nonnegative("noise_multiplier", noise_multiplier)
        if 0 < noise_multiplier < 1e-3:
            raise ValueError(
                f"noise_multiplier={noise_multiplier:g} is next to no noise (epsilon above "
                f"{'500,000' if noise == 'gaussian' else '1,000'}); use at least 1e-3, or 0 for a run without privacy."
            )
        return None, noise_multiplier
    if target_delta is None:
        raise ValueError("target_epsilon needs target_delta, a probability well below 1 / num_examples, such as 1e-5.")
    return _validate.positive("target_epsilon", target_epsilon), None


def _check_noise(result: PrivacyPlan) -> None:
    if result.noise_multiplier > 0 and math.isinf(result.clipping.total_l2_clip_norm):
        raise ValueError(
            "an infinite l2_clip_norm needs infinite noise; give a finite one, or noise_multiplier=0 for no privacy."
        )
    if isinstance(result.clipping, Quantile) and result.noise_multiplier >= 2 * result.count_stddev:
        raise ValueError(
            "quantile clipping spends more than the whole budget on its count: "
            f"noise_multiplier={result.noise_multiplier:g} needs a count_stddev above {result.noise_multiplier / 2:g}, it is "
            f"{result.count_stddev:g}; set count_stddev to about {2 * result.noise_multiplier:g} examples, or raise "
            "expected_batch_size."
        )
