"""jaxdp: differentially private fine-tuning in JAX. The names below are the supported surface, in data-flow order."""

# The plan: every privacy number, once.
from dp_accounting import NeighboringRelation as NeighboringRelation

from jaxdp._validate import BudgetExhaustedError as BudgetExhaustedError

# Interruption and resumption.
from jaxdp.checkpointing import Checkpointer as Checkpointer, CheckpointError as CheckpointError
from jaxdp.clipping import (
    ClippedSum as ClippedSum,
    ClippingPolicy as ClippingPolicy,
    automatic as automatic,
    clip_and_sum as clip_and_sum,
    flat as flat,
    per_layer as per_layer,
    quantile as quantile,
)
from jaxdp.gradients import (
    ClippedGrad as ClippedGrad,
    Explanation as Explanation,
    NotPrivate as NotPrivate,
    clipped_grad as clipped_grad,
)
from jaxdp.mechanism import (
    Ledger as Ledger,
    PrivacyPlan as PrivacyPlan,
    Release as Release,
    plan as plan,
    privatize as privatize,
)

# Secret randomness and data.
from jaxdp.noise import secret_key as secret_key
from jaxdp.sampling import poisson_batches as poisson_batches

# Training: a functional step, or an optax transformation.
from jaxdp.training import StepInfo as StepInfo, TrainingState as TrainingState, make_dp_step as make_dp_step
from jaxdp.transforms import DPAggregateState as DPAggregateState, dp_aggregate as dp_aggregate

__version__ = "0.1.0"
