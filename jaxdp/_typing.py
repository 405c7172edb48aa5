"""Type aliases, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

#: A pytree of floating-point arrays.
Params: TypeAlias = Any
#: One record: a pytree of arrays without a batch axis.
Example: TypeAlias = Any
#: Records stacked along a leading axis: a pytree of arrays `[B, ...]`.
Batch: TypeAlias = Any
#: `loss_fn(params, example) -> scalar`, or `-> (scalar, aux)` with `has_aux=True`.
LossFn: TypeAlias = Callable[[Params, Example], Any]
#: A typed JAX PRNG key, as `jax.random.key` or `jaxdp.secret_key` makes it.
Key: TypeAlias = jax.Array
