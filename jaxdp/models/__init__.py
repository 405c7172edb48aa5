"""Models as pure functions of a parameter pytree. They know nothing of privacy."""

from jaxdp.models.classifier import (
    cnn_logits as cnn_logits,
    init_cnn as init_cnn,
    init_mlp as init_mlp,
    mlp_logits as mlp_logits,
)
