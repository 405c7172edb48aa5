"""Block sizes of the kernels for each kind of device, and where a kernel was measured to beat XLA.

Both tables change by measurement alone: `python -m benchmarks.kernels` on the device in question, and for the second the
steps of `python -m benchmarks.gpu_check`. `FASTER_FROM` is what the automatic choice goes by, here and in
`jaxdp.clipped_grad`: an entry turns a kernel on, and no other line has to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

ROWS = 128  # of every output tile: two warpgroups compute 64 rows each, the rows of one wgmma


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The sizes of a kernel that may be tuned; none changes a result by more than the order of its sums.

    That order decides how many roundings follow one another, which `pallas_kernels.roundings` counts.

    Attributes:
        columns: Columns of the output tile, 64, 128, 192 or 256; the Gram kernel's tiles are square, 128.
        depth: Length of the reduction in one step of the pipeline, a multiple of 64; in the Gram and the sum kernel, of one
            accumulator.
        stages: Steps in flight in shared memory, at least 2.
    """

    columns: int
    depth: int
    stages: int

    def __post_init__(self) -> None:
        if self.columns not in (64, 128, 192, 256) or self.depth < 64 or self.depth % 64 or self.stages < 2:
            raise ValueError(f"{self}: columns must be 64 to 256 and depth a multiple of 64; at least 2 stages.")


# Compiled for an H200 these take no spills (tests/aot). Nothing has been run on a GPU yet, so no entry is tuned.
SAFE: Mapping[str, Blocks] = {
    "gram_norms": Blocks(columns=ROWS, depth=64, stages=4),
    "wgrad_norms": Blocks(columns=256, depth=64, stages=3),
    "clip_noise_dense": Blocks(columns=128, depth=64, stages=4),
}
TUNED: Mapping[str, Mapping[str, Blocks]] = {}  # device kind -> kernel -> sizes


def blocks_of(kernel: str, device_kind: str) -> Blocks:
    return TUNED.get(device_kind, SAFE).get(kernel, SAFE[kernel])


# Device kind -> kernel -> the least T from which it was measured to be faster than XLA. Empty, because nothing has been
# measured on a GPU: the automatic choice is XLA everywhere.
FASTER_FROM: Mapping[str, Mapping[str, int]] = {}


def measured_faster(kernel: str, device_kind: str, num_tokens: int) -> bool:
    """Whether `kernel` beat XLA on this kind of device for sequences of `num_tokens`."""
    least = FASTER_FROM.get(device_kind, {}).get(kernel)
    return least is not None and num_tokens >= least
