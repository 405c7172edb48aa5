"""Zeroth-order fine-tuning: forward passes alone, on models whose blocks need not fit the device together."""

from jaxdp.block_model import BlockModel, BlockParams, loss_fn
from jaxdp.zeroth_order.aggregation import NotPrivate
from jaxdp.zeroth_order.directions import Gaussian, Law, LowRank, Rademacher
from jaxdp.zeroth_order.estimators import Estimator, ForwardMode, OneSided, TwoSided
from jaxdp.zeroth_order.generation import generate
from jaxdp.zeroth_order.objectives import completion_objective, host_objective, token_f1_error
from jaxdp.zeroth_order.resident import ResidentInfo, ResidentState, make_resident_step, projected_gradients
from jaxdp.zeroth_order.stages import Stages, split_block
from jaxdp.zeroth_order.streaming import Placement
from jaxdp.zeroth_order.training import DeferredState, State, StepInfo, Steps, make_step
from jaxdp.zeroth_order.trajectory import Header, Journal, Trajectory, header_of, read_trajectory, replayed
from jaxdp.zeroth_order.transform import ExpandDirectionsState, expand_directions
from jaxdp.zeroth_order.updates import Scalars, Sgd

__all__ = [
    "BlockModel",
    "BlockParams",
    "DeferredState",
    "Estimator",
    "ExpandDirectionsState",
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
    "ResidentInfo",
    "ResidentState",
    "Scalars",
    "Sgd",
    "Stages",
    "State",
    "StepInfo",
    "Steps",
    "Trajectory",
    "TwoSided",
    "completion_objective",
    "expand_directions",
    "generate",
    "header_of",
    "host_objective",
    "loss_fn",
    "make_resident_step",
    "make_step",
    "projected_gradients",
    "read_trajectory",
    "replayed",
    "split_block",
    "token_f1_error",
]
