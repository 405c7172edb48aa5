"""`wgrad_norms` on Hopper: weight-gradient tiles of each example, their squares summed in the registers they stand in."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import ROWS, Blocks
from pallas_kernels.mosaic import tiles


def roundings(num_tokens: int, width: int, out: int, *, blocks: Blocks) -> int:
    """See `pallas_kernels.api.roundings`: a chain of T in one wgmma accumulator, and the sum of squares.

    The squares are summed over a tile and, by XLA in any order, over the tiles; the root halves their errors.
    """
    num_tiles = -(-width // ROWS) * -(-out // blocks.columns)
    squares = 1 + tiles.total_roundings(blocks.columns) + tiles.COMPUTE_WARPGROUPS * num_tiles
    return num_tokens + -(-squares // 2)


def wgrad_norms(
    x: jax.Array, g: jax.Array, *, store: bool, dtype: Any, blocks: Blocks, interpret: bool
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.api.wgrad_norms`.

    One block per example and tile of M_b = X_b^T G_b. The tiles' sums of squares leave as `[B, D/128, P/columns, 2]`, which
    XLA adds up in a fixed order: no atomics, so every run gives the same bits.
    """
    num_examples, _, num_rows = x.shape
    num_columns = g.shape[2]
    x = tiles.padded(x, (1, blocks.depth, ROWS))  # [B, T, D]
    g = tiles.padded(g, (1, blocks.depth, blocks.columns))  # [B, T, P]
    grid = {"b": num_examples, "i": x.shape[2] // ROWS, "j": g.shape[2] // blocks.columns}
    width = tiles.piece_width(dtype)

    def wgrad_tile(x_ref, g_ref, squares_ref, *refs):
        b, i, j = (lax.axis_index(name) for name in grid)
        warpgroup = lax.axis_index("warpgroup")
        row = i * ROWS + warpgroup * tiles.WARPGROUP_ROWS

        def step(_, x_tile, g_tile, accumulator):
            plgpu.wgmma(accumulator, tiles.warpgroup_columns(x_tile, warpgroup).transpose((1, 0)), g_tile)
            plgpu.wgmma_wait(1)
            return accumulator

        def context(run):
            tile = tiles.accumulated(run, blocks.columns)
            if store:
                tile = tile.astype(dtype)
                leave(tile, *refs)
                tile = tile.astype(jnp.float32)  # S4b: the norm is that of the stored values
            squares_ref[b, i, j, warpgroup] = tiles.total(jnp.square(tile))

        def leave(tile, gradients_ref, pieces):
            for n in range(blocks.columns // width):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the previous piece of this slot has left
                pieces[warpgroup, n % 2] = tile[:, n * width : (n + 1) * width]
                plgpu.commit_smem()
                column = j * blocks.columns + n * width
                target = gradients_ref.at[b, pl.ds(row, tiles.WARPGROUP_ROWS), pl.ds(column, width)]
                plgpu.copy_smem_to_gmem(pieces.at[warpgroup, n % 2], target)
            plgpu.wait_smem_to_gmem(0)

        specs = [
            tiles.operand((None, blocks.depth, ROWS), lambda t: (b, t, i), x.dtype),
            tiles.operand((None, blocks.depth, blocks.columns), lambda t: (b, t, j), g.dtype),
        ]
        tiles.pipeline(step, context, grid=(x.shape[1] // blocks.depth,), specs=specs, stages=blocks.stages)(
            x_ref, g_ref
        )

    squares = jax.ShapeDtypeStruct((*grid.values(), tiles.COMPUTE_WARPGROUPS), jnp.float32)
    gradients = jax.ShapeDtypeStruct((num_examples, x.shape[2], g.shape[2]), dtype)
    launch = functools.partial(tiles.launch, wgrad_tile, grid=grid, interpret=interpret)
    if not store:
        return jnp.sum(launch(out_type=squares)(x, g), axis=(1, 2, 3))
    partial, stored = launch(out_type=(squares, gradients), scratch_types=[tiles.pieces(2, dtype)])(x, g)
    return jnp.sum(partial, axis=(1, 2, 3)), stored[:, :num_rows, :num_columns]
