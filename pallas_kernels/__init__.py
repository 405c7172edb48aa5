"""GPU kernels of jaxdp, each beside its definition in plain JAX. Imports JAX only, and is imported on first use."""

from pallas_kernels.reference import dense_clip_and_sum as dense_clip_and_sum, dense_norms as dense_norms
