"""What the Mosaic kernels share: padding to whole blocks, the layout of tiles in shared memory, pipeline and launch.

A block is the work of three warpgroups: two compute, each on 64 rows of the tile, and one keeps the TMA loads in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import ROWS

COMPUTE_WARPGROUPS = 2
WARPGROUP_ROWS = ROWS // COMPUTE_WARPGROUPS
_SWIZZLE_BYTES = 128


def padded(array: jax.Array, multiples: Sequence[int]) -> jax.Array:
    """`array` with zeros up to a multiple of each entry; no copy where it fits already. Zeros add nothing to any kernel."""
    widths = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, widths) if any(width for _, width in widths) else array


def piece_width(dtype: Any) -> int:
    """Columns of one swizzled row: 32 of float32, 64 of 16-bit types. Results leave by pieces of this width."""
    return _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def _swizzled(dtype: Any) -> tuple[Any, Any]:
    tiling = plgpu.TilingTransform((8, piece_width(dtype)))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(_SWIZZLE_BYTES)  # pyright: ignore[reportAbstractUsage]


def pieces(slots: int, dtype: Any) -> Any:
    """Shared memory for `slots` pieces of each compute warpgroup's rows, `[2, slots, 64, piece_width]`."""
    shape = (COMPUTE_WARPGROUPS, slots, WARPGROUP_ROWS, piece_width(dtype))
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))


def operand(shape: tuple[int | None, ...], index_map: Callable[..., Any], dtype: Any, *, delay_release: int = 1) -> Any:
    """An operand of wgmma, loaded block by block.

    A step that waits for its own wgmma needs no delayed release. With a delay of one step, and `wgmma_wait(1)`, a wgmma runs
    while the next is issued.
    """
    return plgpu.BlockSpec(shape, index_map, transforms=_swizzled(dtype), delay_release=delay_release)


def warpgroup_rows(tile: Any, warpgroup: Any) -> Any:
    """The rows of a `[rows, depth]` operand tile that are this warpgroup's rows of the output."""
    return tile.at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]


def warpgroup_columns(tile: Any, warpgroup: Any) -> Any:
    """The columns of a `[depth, rows]` operand tile that are this warpgroup's rows of the output."""
    return tile.at[:, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]


def pipeline(
    step: Callable[..., Any], context: Callable[..., None], *, grid: tuple[int, ...], specs: Sequence[Any], stages: int
) -> Callable[..., None]:
    """Runs `step(indices, *tiles, carry) -> carry` over `grid`; `context(run)` supplies the first carry to `run`."""
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=grid,
        in_specs=list(specs),
        memory_registers=40,  # enough to issue loads; the compute warpgroups get the others
        max_concurrent_steps=stages,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTE_WARPGROUPS,
        compute_context=context,
    )


def accumulated(run: Callable[..., Any], columns: int) -> jax.Array:
    """Runs a pipeline whose carry is a wgmma accumulator of this warpgroup; returns it, `[64, columns]` float32."""

    def scope(accumulator):
        run(accumulator)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32))


def product(rows: Any, columns_of: Any, columns: int) -> jax.Array:
    """The product of one step's operands in an accumulator of its own, `[64, columns]` float32, for a pipeline without delay.

    Added to a carry in registers it makes for short chains: a sum in one wgmma accumulator rounds at every one of its terms.
    """

    def scope(accumulator):
        plgpu.wgmma(accumulator, rows, columns_of)
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32))


def zeros(columns: int) -> jax.Array:
    """A float32 accumulator of this warpgroup in registers, `[64, columns]`."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def index(axis: int) -> jax.Array:
    """The row or column numbers of a piece of float32, `[64, 32]` int32."""
    shape = (WARPGROUP_ROWS, piece_width(jnp.float32))
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def total(tile: jax.Array) -> jax.Array:
    """The sum of a tile; one axis at a time, since a sum over both does not lower."""
    return jnp.sum(jnp.sum(tile, axis=1), axis=0)


def total_roundings(columns: int | None = None) -> int:
    """The roundings behind a `total` one after another, in whatever order each axis is summed; of a piece of float32 by default."""
    return (piece_width(jnp.float32) if columns is None else columns) + WARPGROUP_ROWS


def launch(
    body: Callable[..., None],
    *,
    out_type: Any,
    grid: Mapping[str, int],
    interpret: bool,
    scratch_types: Sequence[Any] = (),
) -> Callable[..., Any]:
    """`plgpu.kernel` with the three warpgroups; `interpret` runs it on the CPU, slowly."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,  # pyright: ignore[reportAttributeAccessIssue]
    )
