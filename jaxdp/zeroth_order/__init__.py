"""Zeroth-order fine-tuning: forward passes alone, on models whose blocks need not fit the device together."""

from jaxdp.block_model import BlockModel, BlockParams, loss_fn
from jaxdp.zeroth_order.aggregation import NotPrivate
from jaxdp.zeroth_order.directions import Gaussian, Law, LowRank, Rademacher
from jaxdp.zeroth_order.estimators import Estimator, ForwardMode, OneSided, TwoSided
from jaxdp.zeroth_order.streaming import Placement
from jaxdp.zeroth_order.training import DeferredState, State, StepInfo, Steps, make_step
from jaxdp.zeroth_order.trajectory import Header, Journal, Trajectory, header_of, read_trajectory, replayed
from jaxdp.zeroth_order.updates import Scalars, Sgd

__all__ = [
    "BlockModel",
    "BlockParams",
    "DeferredState",
    "Estimator",
    "ForwardMode",
    "Gaussian",
    "Header",
    "Journal",
    "Law",
    "LowRank",
    "NotPrivate",
    "OneSided",
    "Placement",
    "Rademacher",
    "Scalars",
    "Sgd",
    "State",
    "StepInfo",
    "Steps",
    "Trajectory",
    "TwoSided",
    "header_of",
    "loss_fn",
    "make_step",
    "read_trajectory",
    "replayed",
]
