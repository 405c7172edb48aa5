"""No record reaches another before the clip (S3): what a jaxpr shows of it is refused, or runs one example after the other.

`jax.vmap` of a loss of one example is the loss of every example, except where the loss says itself what a batch of it is. There
the definition for one example is all that counts, and where it cannot be mapped it runs one example after the other:

- `jax.custom_batching.custom_vmap`, whose rule sees the batch: its function of one example is what runs;
- `jax.pure_callback` and `jax.ffi.ffi_call`, whose function sees the batch unless `vmap_method` is `"sequential"`;
- primitives that `jax.vmap` cannot map, or not in all their forms, such as `jax.lax.ragged_dot`.

Refused are collectives over an axis that is bound outside of the loss, whatever carries state from one call to the next, and the
writing of mutable arrays. Custom derivatives are followed into their rules. What no jaxpr shows is not seen: a Python function
that hides state behind `pure_callback`, or a loss that closes over other records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp._typing import Batch, LossFn, Params
from jaxdp.gradients import jaxprs
from jaxdp.gradients.rewrite import evaluate_alone

_BATCH_STATISTICS = (
    "Statistics over a batch, such as batch normalization in training mode, couple records. Normalize within the example "
    "(LayerNorm, GroupNorm), or use running averages that are fixed (use_running_average=True)."
)


def output_of_one_example(fun: LossFn, params: Params, batch: Batch) -> Any:
    """Traces the loss of one example of a batch, and refuses couplings; returns the shapes of what it returns.

    Raises:
        ValueError: the loss reads across an axis that is bound outside of it, or keeps state from call to call.
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), batch)
    traced = _traced(fun, params, example)
    _refuse(traced.couplings)
    return traced.out


def over_batch(fun: Callable[..., Any], *rows: Any, derivative: Literal["forward"] | None) -> Any:
    """`fun` of each example, stacked: by `jax.vmap`, or one example after the other where it could see two.

    Args:
        fun: A function of one example.
        rows: Its arguments, pytrees of arrays `[B, ...]`.
        derivative: The derivative that is taken of the result; in reverse there is `jaxdp.clipped_grad`.

    Raises:
        ValueError: as of `output_of_one_example`.
    """
    one = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), row) for row in rows]
    traced = _traced(fun, *one)
    couplings = jaxprs.find_couplings(traced.body, derivative=derivative)
    _refuse(couplings)
    if couplings.apart:
        return lax.map(
            lambda row: evaluate_alone(traced, couplings.apart, *row), rows
        )  # a scan: nothing in it is mapped
    return jax.vmap(fun)(*rows)


def _traced(fun: Callable[..., Any], *arguments: Any) -> jaxprs.Traced:
    try:
        return jaxprs.trace(fun, *arguments)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            f"the loss is of one example and has no batch axis to reduce over: {error} {_BATCH_STATISTICS}"
        ) from error
    except Exception as error:
        if type(error).__name__ in (
            "ModifyScopeVariableError",
            "TraceContextError",
        ):  # flax, which is not imported here
            error.add_note(
                "The loss writes to state of the model while it is traced for one example, and what it writes would be lost. "
                f"{_BATCH_STATISTICS}"
            )
        raise


def _refuse(couplings: jaxprs.Couplings) -> None:
    if couplings.collectives:
        listing = ", ".join(f"`{primitive}` over axis {axis!r}" for primitive, axis in couplings.collectives)
        raise ValueError(
            f"the loss of one example has a collective over an axis that is bound outside of it: {listing}. It couples the records "
            "of that axis before the clip, and one of them could move the sum by more than its sensitivity. Leave the "
            f"collective out of the loss, and sum what is clipped. {_BATCH_STATISTICS}"
        )
    if couplings.stateful:
        raise ValueError(
            f"the loss keeps state from call to call ({', '.join(couplings.stateful)}), so what it computes for one record may "
            "depend on the others. Make it a function of its arguments: jax.pure_callback(..., vmap_method='sequential') for "
            "work on the host, jax.debug.callback to look at values, has_aux=True to return them."
        )
