r"""Blocks that pass through the device: one compiled program for a block, or one program for all blocks.

    .ci/aot python -m benchmarks.streaming_designs --json benchmarks/results/zeroth_order_designs_h200_aot.json

`loop` is the library's: Python enqueues the program of one block between eager transfers. The others are one program over
stacks in pinned host memory, with the same program of one block, `programs.visit_and_write`, in their bodies:

    even_odd     `fori_loop` over pairs of blocks: while a block of one stack computes, the next one of the other arrives
    scan         `scan` over one stack, which hands out a block and stacks up what comes back
    one_stack    block i + 1 arrives from the stack to which block i, which computes, is then written

Compiled for an H200, without one, they show device and host memory, what the schedule puts between the start and the end of
each transfer, whether a host stack is copied whole, and how long compiling takes with the depth. Times of a step cannot be had
so. On a CPU, where pinned host memory is memory, they run, and their bits are compared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import harness, scheduled_hlo, streaming_programs
from benchmarks.streaming_programs import DESIGNS
from jaxdp.block_model import BlockModel, BlockParams
from jaxdp.zeroth_order import Rademacher, Scalars, Sgd, TwoSided, buckets, programs, updates

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile every design for an H200."""

    designs: tuple[str, ...] = DESIGNS
    """Which."""
    width: int = 5120
    """Of the residual stream; 5120 and 40 heads are OPT-13B's."""
    num_heads: int = 40
    """Of its attention."""
    length: int = 2048
    """Tokens of the sequence."""
    num_blocks: int = 40
    """Of the model."""
    depths: tuple[int, ...] = (8, 40, 96)
    """Blocks of the models for which the size of what the compiler gets is compared."""
    block_models: tuple[str, ...] = ("toy", "opt")
    """Small models to run on the CPU."""
    json: Path | None = None
    """Where to write the record."""


def measure(config: Config) -> dict[str, Any]:
    """Compiles every design at every depth, and returns the record that is written."""
    record: dict[str, Any] = {
        "benchmark": "designs of a streamed zeroth-order step, compiled for an H200",
        "command": ".ci/aot python -m benchmarks.streaming_designs",
        "meter": "XLA compiled memory statistics and scheduled HLO, blocks alone: neither embedding nor head",
        "config": {"width": config.width, "num_heads": config.num_heads, "length": config.length, "dtype": "bfloat16"},
        "machine": harness.machine(),
        "versions": {"jax": jax.__version__},
        "rows": [],
        "same_bits_as_loop_on_cpu": {},
    }
    for design in config.designs:
        problem = setup(config.width, config.num_heads, config.length)
        row = {"design": design, "num_blocks": config.num_blocks, **figures(design, config.num_blocks, *problem)}
        row["lowered_bytes"] = {depth: lowered_bytes(design, depth, *problem) for depth in config.depths}
        record["rows"].append(row)
        print(_line(row), flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    for name in config.block_models:
        record["same_bits_as_loop_on_cpu"][name] = same_bits(config.designs, *block_models()[name])
        print(name, record["same_bits_as_loop_on_cpu"][name], flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    return record


def block_models() -> dict[str, tuple[BlockModel, BlockParams, Any]]:
    """Small models with four blocks to run on a CPU, and their batches."""
    from tests.zeroth_order import models

    _, opt, opt_params = models.language_model("opt")
    blocks = jax.tree.map(lambda leaf: np.resize(leaf, (4, *leaf.shape[1:])), opt_params.blocks)
    return {
        "toy": (models.toy(), models.toy_params(4), models.toy_batch()),
        "opt": (opt, BlockParams(opt_params.resident, blocks), models.token_batch()),
    }


def same_bits(designs: Sequence[str], model: BlockModel, params: BlockParams, batch: Any) -> dict[str, bool]:
    """Whether designs leave the blocks and the streams that `loop` leaves, bit for bit, with an update to apply."""
    layout, num_blocks = buckets.layout_of(params.blocks)
    spec = programs.Spec(
        model=model, estimator=TwoSided(), law=Rademacher(), rounding="nearest", layout=layout, frozen_layout=None
    )
    sgd = Sgd(1e-2, weight_decay=0.1)
    scalars = Scalars(jnp.full(1, 0.7), jnp.float32(0.01))
    pending = updates.appended(updates.nothing_pending(sgd, 1, 1), sgd, scalars, jnp.uint32(3))
    batch = jax.tree.map(jnp.asarray, batch)
    context = programs.Context(pending, jnp.asarray([1, 2], jnp.uint32), np.uint32(4), batch, None)
    blocks = [buckets.packed(layout, params.blocks, i) for i in range(num_blocks)]
    found = {}
    for design in ("loop", *designs):
        _, streams = programs.start_and_keep(spec, jax.tree.map(jnp.asarray, params.resident), context)
        left = streaming_programs.pass_blocks(design, spec, blocks, streams, context)
        found[design] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(left)]
    unchanged = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(blocks)]
    assert not set(unchanged) & set(found["loop"]), "the update changed nothing"
    return {design: found[design] == found["loop"] for design in designs}


def setup(width: int, num_heads: int, length: int) -> tuple[programs.Spec, Any, programs.Context]:
    """Spec, and shapes of streams and context, of a step on one sequence.

    A block is the attention and the feed-forward layer of a transformer in bfloat16: 12 width² parameters in four matrices.
    Biases would add to the time of compiling and to nothing else.
    """
    shape: Any = jax.ShapeDtypeStruct
    D = width
    sizes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    layout, _ = buckets.layout_of({name: shape((1, *size), jnp.bfloat16) for name, size in sizes.items()})

    def normalized(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True))).astype(x.dtype)

    def block(params: Any, hidden: jax.Array, example: Any) -> jax.Array:
        heads = (normalized(hidden) @ params["qkv"]).reshape(length, 3, num_heads, D // num_heads)
        attended = jax.nn.dot_product_attention(
            heads[:, 0], heads[:, 1], heads[:, 2], is_causal=True, implementation="cudnn"
        )
        hidden = hidden + attended.reshape(length, D) @ params["out"]
        return hidden + jax.nn.relu(normalized(hidden) @ params["up"]) @ params["down"]

    model = BlockModel(lambda resident, example: example, block, lambda resident, hidden, example: jnp.mean(hidden))
    spec = programs.Spec(
        model=model, estimator=TwoSided(), law=Rademacher(), rounding="nearest", layout=layout, frozen_layout=None
    )
    pending = jax.eval_shape(lambda: updates.nothing_pending(Sgd(1e-6), 1, 1))
    hidden = shape((1, length, width), jnp.bfloat16)
    stream = shape((1, *hidden.shape), jnp.bfloat16)  # of the one direction
    return (
        spec,
        (stream, stream),
        programs.Context(pending, shape((2,), jnp.uint32), shape((), jnp.uint32), hidden, None),
    )


def program(
    design: str, num_blocks: int, spec: programs.Spec, streams: Any, context: programs.Context
) -> tuple[Any, tuple[Any, ...], list[str]]:
    """What a design compiles, its arguments, and the shapes of its stacks in HLO."""
    # A mesh without axes: shardings of compile-only devices, and of meshes with axes, lose the kind of memory.
    device: Any = NamedSharding(Mesh(np.array(jax.devices("cpu")[0]), ()), PartitionSpec(), memory_kind="device")
    host: Any = device.with_memory_kind("pinned_host")
    bucket = spec.layout.bucket()
    (size,) = bucket["bfloat16"].shape

    def placed(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    if design == "loop":
        visit = jax.jit(lambda b, s, i, c: programs.visit_and_write(spec, b, s, i, None, c), donate_argnums=(0, 1))
        return visit, (bucket, streams, jax.ShapeDtypeStruct((), jnp.int32), context), []
    num_stacks = streaming_programs.stacks_of(design, num_blocks)
    shape = (num_blocks // num_stacks, size)
    stacks = ({"bfloat16": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=host)},) * num_stacks
    step = streaming_programs.whole_program(design, spec, host=host, device=device)
    return step, (stacks, placed(streams, device), placed(context, device)), [f"bf16[{shape[0]},{shape[1]}]"]


def lowered_bytes(design: str, num_blocks: int, *problem: Any) -> int:
    """Length of the module that the compiler gets."""
    from tests.aot import h200

    step, arguments, _ = program(design, num_blocks, *problem)
    return len(h200.lower_for_h200(step, *arguments).as_text())


def figures(
    design: str, num_blocks: int, spec: programs.Spec, streams: Any, context: programs.Context
) -> dict[str, Any]:
    """What a program compiled for an H200 says of a design; sizes in bytes."""
    from tests.aot import h200

    step, arguments, shapes = program(design, num_blocks, spec, streams, context)
    begin = time.perf_counter()
    compiled = h200.compile_for_h200(step, *arguments)
    seconds = time.perf_counter() - begin
    text, stats = compiled.text(), compiled.executable.get_compiled_memory_stats()
    block_bytes = spec.layout.num_bytes
    if design == "loop":  # beside its program: blocks wait on the host, one arrives and one leaves
        device_bytes = compiled.device_bytes + 2 * block_bytes
        host_bytes = host_alias = num_blocks * block_bytes
    else:
        device_bytes, host_alias = compiled.device_bytes, stats.host_alias_size_in_bytes
        host_bytes = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes - host_alias
    return {
        "block_bytes": block_bytes,
        "device_bytes": device_bytes,
        "host_bytes": host_bytes + stats.host_temp_size_in_bytes,
        "host_alias_bytes": host_alias,
        "host_temp_bytes": stats.host_temp_size_in_bytes,
        "whole_stack_copies": sum(scheduled_hlo.whole_copies(text, shape) for shape in shapes),
        "transfers": [dataclasses.asdict(transfer) for transfer in scheduled_hlo.transfers(text)],
        "slice_offsets": sorted(scheduled_hlo.slice_offsets(text)),
        "compile_seconds": seconds,
    }


def _line(row: dict[str, Any]) -> str:
    shares = [f"{one['direction']} {one['matmul_share_between']:.2f}" for one in row["transfers"] if one["is_in_loop"]]
    return (
        f"{row['design']}, {row['num_blocks']} blocks of {row['block_bytes'] / _MIB:.1f} MiB: device "
        f"{row['device_bytes'] / _MIB:.1f} MiB, host {row['host_bytes'] / _MIB:.1f} MiB, whole-stack copies "
        f"{row['whole_stack_copies']}, compiled in {row['compile_seconds']:.0f} s; matmuls behind transfers: "
        f"{', '.join(shares) or 'outside the program'}"
    )


if __name__ == "__main__":
    measure(tyro.cli(Config))
