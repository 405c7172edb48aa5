"""`gram_norms` on Hopper: tiles of X X^T and of G G^T meet in registers, and only their product's sum leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import ROWS, Blocks
from pallas_kernels.mosaic import tiles


def roundings(num_tokens: int, width: int, out: int, *, blocks: Blocks) -> int:
    """See `pallas_kernels.api.roundings`: those of both entries, of their product, and of its sum over a tile and over the tiles.

    The sum over the tiles is XLA's, in any order.
    """

    def entry(length: int) -> int:
        return min(length, blocks.depth) + -(-length // blocks.depth)

    rows = -(-num_tokens // ROWS)
    tile = tiles.total_roundings() + ROWS // tiles.piece_width(jnp.float32)
    return entry(width) + entry(out) + 1 + tile + tiles.COMPUTE_WARPGROUPS * (rows * (rows + 1) // 2)


def gram_norms(x: jax.Array, g: jax.Array, *, blocks: Blocks, interpret: bool) -> jax.Array:
    """See `pallas_kernels.api.gram_norms`.

    One block per example and tile (i, j), j <= i, of the symmetric T x T Grams; a tile below the diagonal counts twice. A
    block forms its tile of X X^T, puts it by in shared memory, forms that of G G^T, and sums the product. An entry is summed
    `depth` terms at a time, each time in a new wgmma accumulator that is added to the tile in registers: one accumulator for
    all D terms would round D times in turn, and a caller would have to charge for it.
    """
    if blocks.columns != ROWS:
        raise ValueError(f"the tiles of a Gram are square: columns must be {ROWS}, got {blocks.columns}.")
    x = tiles.padded(x, (1, ROWS, blocks.depth))  # [B, T, D]
    g = tiles.padded(g, (1, ROWS, blocks.depth))  # [B, T, P]
    row_of, column_of = (jnp.asarray(index, jnp.int32) for index in np.tril_indices(x.shape[1] // ROWS))
    grid = {"b": x.shape[0], "k": len(row_of)}
    width = tiles.piece_width(jnp.float32)

    def gram_tile(x_ref, g_ref, row_ref, column_ref, sums_ref, pieces):
        b, k = (lax.axis_index(name) for name in grid)
        warpgroup = lax.axis_index("warpgroup")
        i, j = row_ref[k], column_ref[k]

        def step(_, row_tile, column_tile, tile):
            rows = tiles.warpgroup_rows(row_tile, warpgroup)
            return tile + tiles.product(rows, column_tile.transpose((1, 0)), ROWS)

        def put_by(run):
            tile = run(tiles.zeros(ROWS))
            for n in range(ROWS // width):
                pieces[warpgroup, n] = tile[:, n * width : (n + 1) * width]
            plgpu.commit_smem()

        def multiply(run):
            tile = run(tiles.zeros(ROWS))
            result = jnp.float32(0)
            for n in range(ROWS // width):
                result = result + tiles.total(pieces[warpgroup, n] * tile[:, n * width : (n + 1) * width])
            sums_ref[b, k, warpgroup] = jnp.where(i == j, result, 2.0 * result)

        for ref, context in ((x_ref, put_by), (g_ref, multiply)):
            shape = (None, ROWS, blocks.depth)
            specs = [
                tiles.operand(shape, lambda d: (b, i, d), x.dtype, delay_release=0),
                tiles.operand(shape, lambda d: (b, j, d), x.dtype, delay_release=0),
            ]
            depths = (ref.shape[2] // blocks.depth,)
            tiles.pipeline(step, context, grid=depths, specs=specs, stages=blocks.stages)(ref, ref)

    sums = tiles.launch(
        gram_tile,
        out_type=jax.ShapeDtypeStruct((*grid.values(), tiles.COMPUTE_WARPGROUPS), jnp.float32),
        scratch_types=[tiles.pieces(ROWS // width, jnp.float32)],
        grid=grid,
        interpret=interpret,
    )(x, g, row_of, column_of)
    return jnp.maximum(jnp.sum(sums, axis=(1, 2)), 0.0)  # S4d: rounding may leave a tiny norm below zero
