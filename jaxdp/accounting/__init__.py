"""Noise multiplier <-> (epsilon, delta), by way of a `DpEvent`. Runs on the host."""

from jaxdp.accounting.accountants import (
    AccountantName as AccountantName,
    accountant_in_words as accountant_in_words,
    composed_by as composed_by,
    epsilon as epsilon,
    format_epsilon as format_epsilon,
)
from jaxdp.accounting.calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from jaxdp.accounting.judgment import judge as judge, judge_delta as judge_delta
from jaxdp.accounting.padding import default_padded_batch_size as default_padded_batch_size
from jaxdp.accounting.releases import (
    NoiseName as NoiseName,
    SampledRelease as SampledRelease,
    smallest_padded_batch_size as smallest_padded_batch_size,
)
