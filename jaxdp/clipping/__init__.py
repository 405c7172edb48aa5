"""Bound each example's contribution, then sum."""

from jaxdp.clipping.aggregation import (
    ClippedSum as ClippedSum,
    accumulator as accumulator,
    clip_and_sum as clip_and_sum,
    clipping_factors as clipping_factors,
    squared_norms as squared_norms,
    sum_rows as sum_rows,
)
from jaxdp.clipping.policies import (
    Automatic as Automatic,
    ClippingPolicy as ClippingPolicy,
    Flat as Flat,
    Groups as Groups,
    LeafGroup as LeafGroup,
    NoiseAllocation as NoiseAllocation,
    PerLayer as PerLayer,
    Quantile as Quantile,
    automatic as automatic,
    check_policy as check_policy,
    flat as flat,
    per_layer as per_layer,
    quantile as quantile,
)
