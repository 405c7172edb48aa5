"""The kernels in Mosaic GPU, for Hopper: one module each, and what they share in `tiles`."""
