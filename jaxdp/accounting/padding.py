"""How large a batch is padded by default, so that truncation costs nothing visible."""

from __future__ import annotations

import math

from dp_accounting import NeighboringRelation

from jaxdp.accounting import laplace
from jaxdp.accounting.accountants import AccountantName, epsilon
from jaxdp.accounting.releases import NoiseName, SampledRelease, smallest_padded_batch_size


def default_padded_batch_size(
    *,
    noise: NoiseName,
    num_examples: int,
    sampling_prob: float,
    num_steps: int,
    neighboring_relation: NeighboringRelation,
    accountant: AccountantName,
    target_epsilon: float | None,
    target_delta: float | None,
    noise_multiplier: float | None,
) -> int:
    """The smallest multiple of 8, at most N + 1, at which truncation costs nothing visible (S10); N for full batches.

    A neighbor may have a record more than N: where N rows would truncate its draws visibly, a batch has N + 1.

    One of `target_epsilon` and `noise_multiplier` is given. PLD charges for the truncation of a Gaussian step by its own event; the
    others have num_steps * (1 + e^epsilon) times the probability of it added to delta, and a pure epsilon pays as `laplace` has it.
    """
    if sampling_prob == 1:
        return num_examples
    if target_delta == 0:
        b = noise_multiplier
        if b is None:
            assert target_epsilon is not None
            b = laplace.noise_multiplier_for(target_epsilon, sampling_prob=sampling_prob, num_steps=num_steps)
        s = 1 / b if b > 0 else 0.0
        return laplace.padded_batch_size_for(s, num_examples=num_examples, sampling_prob=sampling_prob)
    delta = 1e-5 if target_delta is None else target_delta
    share = math.log(1e-3 * delta / num_steps)
    if accountant == "pld" and noise == "gaussian":
        return smallest_padded_batch_size(num_examples + 1, sampling_prob, min(math.log(1e-8), share))
    budget = target_epsilon
    if budget is None:
        assert noise_multiplier is not None
        untruncated = SampledRelease(noise, num_examples, sampling_prob, num_examples + 1, noise_multiplier, num_steps)
        budget = epsilon([untruncated], delta, neighboring_relation=neighboring_relation, accountant=accountant)
    log_overflow = min(math.log(1e-12), share - (0.0 if math.isinf(budget) else budget))
    return smallest_padded_batch_size(num_examples + 1, sampling_prob, log_overflow)
