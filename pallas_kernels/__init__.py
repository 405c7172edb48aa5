"""Kernels for dense layers, each beside the definition in plain JAX that it is tested against. Imports JAX only."""

from pallas_kernels.api import (
    chosen_implementation as chosen_implementation,
    clip_noise_dense as clip_noise_dense,
    gram_norms as gram_norms,
    roundings as roundings,
    wgrad_norms as wgrad_norms,
)
from pallas_kernels.support import Implementation as Implementation
