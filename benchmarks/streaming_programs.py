"""Blocks that pass through the device by one program for each of them, or by one program for all.

`loop` is the library's: Python enqueues the program of one block between eager transfers. The others are one program over
stacks in pinned host memory, with the same program of one block, `programs.visit_and_write`, in their bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.zeroth_order import Placement, programs
from jaxdp.zeroth_order.streaming import pass_through

#: `visit(bucket, streams, index) -> (bucket, streams)`.
Visit: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
#: `run(visit, stacks, streams) -> (stacks, streams)`, to be compiled as a whole.
Program: TypeAlias = Callable[[Visit, Any, Any], tuple[Any, Any]]

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def even_odd(visit: Visit, stacks: tuple[Any, Any], streams: Any) -> tuple[Any, Any]:
    """Blocks 0, 2, ... in one stack `[N/2, ...]` and 1, 3, ... in the other: what is read is never what is written."""
    even, odd = stacks
    last = jax.tree.leaves(even)[0].shape[0] - 1

    def pair(i: Any, carry: Any, is_last: bool = False) -> Any:
        streams, first, even, odd = carry
        second = _read(odd, i)
        first, streams = visit(first, streams, 2 * i)
        even = _write(even, first, i)
        second, streams = lax.optimization_barrier((second, streams))
        following = first if is_last else _read(even, i + 1)  # linear in i: a clamped index is read by a kernel
        second, streams = visit(second, streams, 2 * i + 1)
        odd = _write(odd, second, i)
        following, streams = lax.optimization_barrier((following, streams))
        return streams, following, even, odd

    carry = lax.fori_loop(0, last, pair, (streams, _read(even, 0), even, odd))
    streams, _, even, odd = pair(last, carry, is_last=True)
    return (even, odd), streams


def scan(visit: Visit, stacks: tuple[Any], streams: Any) -> tuple[Any, Any]:
    """No block arrives early; the results are a second stack."""
    (stack,) = stacks

    def body(carry: Any, bucket: Any) -> Any:
        streams, index = carry
        new, streams = visit(jax.device_put(bucket, _DEVICE), streams, index)
        return (streams, index + 1), jax.device_put(new, _HOST)

    (streams, _), stack = lax.scan(body, (streams, jnp.int32(0)), stack)
    return (stack,), streams


def one_stack(visit: Visit, stacks: tuple[Any], streams: Any) -> tuple[Any, Any]:
    """The naive form: the next block is read from the stack that the present one is written to."""
    (stack,) = stacks
    last = jax.tree.leaves(stack)[0].shape[0] - 1

    def body(i: Any, carry: Any) -> Any:
        streams, bucket, stack = carry
        following = _read(stack, i + 1)
        bucket, streams = visit(bucket, streams, i)
        return streams, following, _write(stack, bucket, i)

    streams, bucket, stack = lax.fori_loop(0, last, body, (streams, _read(stack, 0), stack))
    bucket, streams = visit(bucket, streams, jnp.int32(last))
    return (_write(stack, bucket, last),), streams


#: Programs, and how many stacks they divide the blocks among.
PROGRAMS: dict[str, tuple[Program, int]] = {"even_odd": (even_odd, 2), "scan": (scan, 1), "one_stack": (one_stack, 1)}
DESIGNS = ("loop", *PROGRAMS)


def pass_blocks(
    design: str, spec: programs.Spec, blocks: Sequence[Any], streams: Any, context: programs.Context
) -> tuple[list[Any], Any]:
    """Lets all blocks of a step pass, by any design: what is in host memory afterwards, and the streams.

    Args:
        design: One of `DESIGNS`.
        spec: Of the step's programs.
        blocks: Buckets, as NumPy arrays.
        streams: Consumed.
        context: Of the step.

    Raises:
        ValueError: the blocks cannot be divided among the stacks of the design.
    """
    if design == "loop":
        placement = Placement(is_streamed=True)
        stored = [placement.store(block) for block in blocks]
        streams = pass_through(
            lambda arrived, streams, i: programs.visit_and_write(spec, arrived[0], streams, i, None, context),
            [(stored, placement)],
            streams,
            is_written=True,
        )
        return jax.device_get(stored), streams
    num_stacks = stacks_of(design, len(blocks))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind("pinned_host")
    stacks = tuple(
        jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *blocks[first::num_stacks]), host)
        for first in range(num_stacks)
    )
    step = whole_program(design, spec, host=host, device=device)
    stacks, streams = jax.device_get(step(stacks, streams, context))
    blocks = [
        {name: stack[i // num_stacks] for name, stack in stacks[i % num_stacks].items()} for i in range(len(blocks))
    ]
    return blocks, streams


def whole_program(design: str, spec: programs.Spec, *, host: Any, device: Any) -> Any:
    program, num_stacks = PROGRAMS[design]

    def step(stacks: Any, streams: Any, context: programs.Context) -> Any:
        def visit(bucket: Any, streams: Any, index: Any) -> tuple[Any, Any]:
            return programs.visit_and_write(spec, bucket, streams, jnp.asarray(index, jnp.int32), None, context)[:2]

        return program(visit, stacks, streams)

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=((host,) * num_stacks, device))


def stacks_of(design: str, num_blocks: int) -> int:
    num_stacks = PROGRAMS[design][1]
    if num_blocks % num_stacks or num_blocks // num_stacks < 2:
        raise ValueError(
            f"{design} divides the blocks among {num_stacks} stacks of at least 2, and there are {num_blocks}; take another design."
        )
    return num_stacks


def _read(stack: Any, i: Any) -> Any:
    return jax.tree.map(lambda s: jax.device_put(lax.dynamic_index_in_dim(s, i, 0, keepdims=False), _DEVICE), stack)


def _write(stack: Any, new: Any, i: Any) -> Any:
    return jax.tree.map(lambda s, n: lax.dynamic_update_index_in_dim(s, jax.device_put(n, _HOST), i, 0), stack, new)
