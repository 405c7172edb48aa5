"""From a loss of one example to the clipped sum of a batch, without a gradient for each example."""

from jaxdp.gradients.clipped_grad import (
    ClippedGrad as ClippedGrad,
    NotPrivate as NotPrivate,
    clipped_grad as clipped_grad,
)
from jaxdp.gradients.explanation import Explanation as Explanation, LeafExplanation as LeafExplanation
from jaxdp.gradients.methods import Method as Method
