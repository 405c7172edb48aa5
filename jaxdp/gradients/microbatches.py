"""A batch in parts: the same sums from fewer rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp._typing import Batch


def scan_microbatches(
    on_rows: Callable[[Batch, jax.Array], tuple[Any, Any]], batch: Batch, is_padding: jax.Array, microbatch_size: int
) -> Any:
    """Runs `on_rows` on `microbatch_size` rows at a time and adds the sums; the last microbatch is filled with padding."""
    size = is_padding.shape[0]
    count = -(-size // microbatch_size)
    fill = count * microbatch_size - size

    def split(x: Any, fill_value: Any) -> jax.Array:  # [B, ...] -> [count, microbatch_size, ...]
        x = jnp.asarray(x)
        if fill:
            x = jnp.concatenate([x, jnp.full((fill, *x.shape[1:]), fill_value, x.dtype)])
        return x.reshape(count, microbatch_size, *x.shape[1:])

    def fill_like(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # keys have no zero: repeat the first row, which is masked
            x = jnp.concatenate([x, jnp.repeat(x[:1], fill, axis=0)])
            return x.reshape(count, microbatch_size, *x.shape[1:])
        return split(x, 0)

    rows = jax.tree.map(fill_like, batch)
    masks = split(is_padding, True)
    shapes = jax.eval_shape(on_rows, jax.tree.map(lambda x: x[0], rows), masks[0])[0]
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total: Any, xs: Any) -> tuple[Any, Any]:
        part, rows = on_rows(*xs)
        return jax.tree.map(jnp.add, total, part), rows

    total, stacked = jax.lax.scan(body, zero, (rows, masks))
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], stacked)
