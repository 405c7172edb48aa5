"""`clip_noise_dense` on Hopper: the clipped sum of weight gradients and the noise, in one pass over the operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import counter_normal
from pallas_kernels.blocks import ROWS, Blocks
from pallas_kernels.mosaic import tiles


def roundings(num_tokens: int, width: int, out: int, *, blocks: Blocks) -> int:
    """See `pallas_kernels.api.roundings`: `depth` tokens in one wgmma accumulator, times the factor, added up."""
    del width, out
    return min(num_tokens, blocks.depth) + 1 + -(-num_tokens // blocks.depth)


def clip_noise_dense(
    x: jax.Array,
    g: jax.Array,
    factors: jax.Array,
    *,
    accumulator: jax.Array | None,
    noise_stddev: jax.Array | None,
    key_data: jax.Array | None,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:
    """See `pallas_kernels.api.clip_noise_dense`.

    One block per tile of the result. It runs through all examples with two accumulators in registers: one of X_b^T G_b over
    `depth` tokens of one example, and the total, to which the first is added times factors_b in float32. So neither
    operand is scaled and rounded (S4c), and a factor of zero leaves the example out whatever it holds (S9). The result goes
    through shared memory by pieces, where the noise is drawn: all of it in registers would spill.
    """
    num_rows, num_columns = x.shape[2], g.shape[2]
    x = tiles.padded(x, (1, blocks.depth, ROWS))  # [B, T, D]
    g = tiles.padded(g, (1, blocks.depth, blocks.columns))  # [B, T, P]
    grid = {"i": x.shape[2] // ROWS, "j": g.shape[2] // blocks.columns}
    width = tiles.piece_width(jnp.float32)
    num_pieces = blocks.columns // width
    operands = [x, g, factors]
    scratch = [tiles.pieces(num_pieces, jnp.float32)]
    if accumulator is not None:
        operands.append(tiles.padded(accumulator, (ROWS, blocks.columns)))
        scratch.append(plgpu.Barrier(num_arrivals=num_pieces, num_barriers=tiles.COMPUTE_WARPGROUPS))
    if noise_stddev is not None:
        operands += [noise_stddev.reshape(1), key_data]

    def clip_noise_tile(x_ref, g_ref, factors_ref, *refs):
        refs = list(refs)
        accumulator_ref = refs.pop(0) if accumulator is not None else None
        noise_refs = (refs.pop(0), refs.pop(0)) if noise_stddev is not None else None
        result_ref, pieces, *barriers = refs
        i, j = (lax.axis_index(name) for name in grid)
        warpgroup = lax.axis_index("warpgroup")
        row = i * ROWS + warpgroup * tiles.WARPGROUP_ROWS

        def place(n):  # of piece n in the result
            return pl.ds(row, tiles.WARPGROUP_ROWS), pl.ds(j * blocks.columns + n * width, width)

        def step(indices, x_tile, g_tile, total):
            rows = tiles.warpgroup_columns(x_tile, warpgroup).transpose((1, 0))
            product = tiles.product(rows, g_tile, blocks.columns)
            factor = lax.broadcast(factors_ref[indices[0]], product.shape)
            return jnp.where(factor != 0.0, total + factor * product, total)

        def context(run):
            if accumulator_ref is not None:  # arrives while the pipeline runs
                for n in range(num_pieces):
                    plgpu.copy_gmem_to_smem(
                        accumulator_ref.at[place(n)], pieces.at[warpgroup, n], barriers[0].at[warpgroup]
                    )
            total = run(tiles.zeros(blocks.columns))
            if accumulator_ref is not None:
                plgpu.barrier_wait(barriers[0].at[warpgroup])
            for n in range(num_pieces):
                part = total[:, n * width : (n + 1) * width]
                pieces[warpgroup, n] = part if accumulator_ref is None else pieces[warpgroup, n] + part
            plgpu.commit_smem()
            if noise_refs is not None:
                add_noise(*noise_refs)
                plgpu.commit_smem()
            for n in range(num_pieces):
                plgpu.copy_smem_to_gmem(pieces.at[warpgroup, n], result_ref.at[place(n)])
            plgpu.wait_smem_to_gmem(0)

        def add_noise(stddev_ref, key_ref):
            key, stddev = (key_ref[0], key_ref[1]), stddev_ref[0]
            rows = (row + tiles.index(0)).astype(jnp.uint32)

            def add(n, _):
                columns = (j * blocks.columns + n * width + tiles.index(1)).astype(jnp.uint32)
                z = counter_normal.normal_at(key, rows, columns, num_columns=num_columns, size=num_rows * num_columns)
                pieces[warpgroup, n] = pieces[warpgroup, n] + stddev * z

            lax.fori_loop(0, num_pieces, add, None)

        specs = [
            tiles.operand((None, blocks.depth, ROWS), lambda b, t: (b, t, i), x.dtype, delay_release=0),
            tiles.operand((None, blocks.depth, blocks.columns), lambda b, t: (b, t, j), g.dtype, delay_release=0),
        ]
        steps = (x.shape[0], x.shape[1] // blocks.depth)
        tiles.pipeline(step, context, grid=steps, specs=specs, stages=blocks.stages)(x_ref, g_ref)

    result = tiles.launch(
        clip_noise_tile,
        out_type=jax.ShapeDtypeStruct((x.shape[2], g.shape[2]), jnp.float32),
        scratch_types=scratch,
        grid=grid,
        interpret=interpret,
    )(*operands)
    return result[:num_rows, :num_columns]
