"""Bound each example's contribution, then sum."""

from jaxdp.clipping.aggregation import ClippedSum as ClippedSum, clip_and_sum as clip_and_sum
from jaxdp.clipping.gradients import (
    ClippedGrad as ClippedGrad,
    NotPrivate as NotPrivate,
    check_policy as check_policy,
    clipped_grad as clipped_grad,
)
from jaxdp.clipping.policies import (
    Automatic as Automatic,
    ClippingPolicy as ClippingPolicy,
    Flat as Flat,
    Groups as Groups,
    NoiseAllocation as NoiseAllocation,
    PerLayer as PerLayer,
    Quantile as Quantile,
    automatic as automatic,
    flat as flat,
    per_layer as per_layer,
    quantile as quantile,
)
