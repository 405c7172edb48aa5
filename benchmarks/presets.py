"""The problems that a claim about speed is measured on."""

from __future__ import annotations

from benchmarks.models import Mlp, Model, Transformer

# Name -> the model and the rows of a batch.
PRESETS: dict[str, tuple[Model, int]] = {
    # Small enough for fixed costs to show.
    "mlp_small": (Mlp((784, 256, 10)), 64),
    # 20 million parameters and few tokens: the noise and the sum of the gradients weigh.
    "transformer_d512": (Transformer(num_blocks=5, width=512, num_heads=8, length=32, vocabulary=4096), 32),
    # 0.8 million parameters and many tokens: activations dominate.
    "transformer_d128": (Transformer(num_blocks=4, width=128, num_heads=4, length=128, vocabulary=1024), 32),
}
