"""Noise multiplier <-> (epsilon, delta), by way of a `DpEvent`. Runs on the host."""

from jaxdp.accounting.accountants import (
    AccountantName as AccountantName,
    epsilon as epsilon,
    format_epsilon as format_epsilon,
)
from jaxdp.accounting.calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from jaxdp.accounting.releases import (
    SampledGaussian as SampledGaussian,
    smallest_padded_batch_size as smallest_padded_batch_size,
)
