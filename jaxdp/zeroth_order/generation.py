"""Text from a model whose blocks wait in host memory: each further token is one pass of all blocks through the device.

The tokens are those of `jaxdp.models.generate`. Keys and values stay on the device; a pass reads every block once, so a token costs
what it takes to send the model down the link.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp._typing import Key, Params
from jaxdp.block_model import BlockParams
from jaxdp.models.attention import Cache
from jaxdp.models.causal_lm import CausalLM
from jaxdp.models.decoding import NextLogits, continued
from jaxdp.models.trainable import join
from jaxdp.zeroth_order import buckets
from jaxdp.zeroth_order.buckets import Bucket, Layout, Part
from jaxdp.zeroth_order.streaming import Placement, on_device, pass_through
from jaxdp.zeroth_order.training import DeferredState, State


def generate(
    model: CausalLM,
    state: State | BlockParams,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    key: Key | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_tokens: Iterable[int] = (),
    prefetch: int = 1,
) -> list[int]:
    """Continues a prompt, as `jaxdp.models.generate` does, with one block on the device at a time.

    Compiled as often as that: once for the prompt and once for a further token, for a size of the cache, whatever the depth.

    Args:
        model: The model. Its parameters are `BlockParams({"embed": ..., "head": ...}, blocks)`.
        state: Of `make_step`; or parameters on the host, whose blocks are read where they lie and never copied as a whole.
        prompt_tokens: As in `jaxdp.models.generate`, with all that follows.
        prefetch: Blocks under way to the device while one computes, as in `Placement`.

    Returns:
        The new tokens, without the prompt and without the stop token.

    Raises:
        TypeError: `state` waits for its last update.
        ValueError: as `jaxdp.models.generate`.
    """
    if isinstance(state, DeferredState):
        raise TypeError(
            "generate needs a State, got DeferredState: its last update has not reached the blocks; call flush first."
        )
    if not isinstance(state, State | BlockParams):
        raise TypeError(f"state must be a State of make_step or BlockParams, got {type(state).__name__}.")
    placement = Placement(is_streamed=True, prefetch=prefetch)
    placement.check()
    resident, layouts, stores = _parts(state, placement)

    def start(length: int) -> NextLogits:
        shapes = jax.eval_shape(lambda: model.init_cache(length))
        caches = [
            jax.tree.map(lambda leaf: on_device(jnp.zeros(leaf.shape[1:], leaf.dtype)), shapes)
            for _ in range(model.config.num_blocks)
        ]

        def next_logits(tokens: np.ndarray, first: jax.Array, row: jax.Array) -> jax.Array:
            order = iter(range(len(caches)))

            def visit(arrived: tuple[Any, ...], hidden: Any, index: jax.Array) -> tuple[None, Any, jax.Array]:
                i = next(order)
                hidden, caches[i], index = _advance(model, layouts, arrived, hidden, caches[i], first, index)
                return None, hidden, index

            hidden = _enter(model, resident, on_device(tokens), first)
            hidden = pass_through(visit, stores, hidden, is_written=False)
            return _leave(model, resident, hidden, row)

        return next_logits

    if len(stores[0][0]) != model.config.num_blocks:
        raise ValueError(f"state has {len(stores[0][0])} blocks, and the model {model.config.num_blocks}.")
    return continued(
        model,
        start,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        key=key,
        temperature=temperature,
        top_k=top_k,
        stop_tokens=stop_tokens,
    )


#: How the blocks of each store lie in their buckets; None for a block that is no bucket. Parts make up a block together.
_Layouts = tuple[Layout | None, ...] | tuple[Part, ...]


def _parts(
    state: State | BlockParams, placement: Placement
) -> tuple[Params, _Layouts, list[tuple[list[Any], Placement]]]:
    """What stays on the device, and the stores of blocks that pass through it; fetching what is there already is free."""
    if isinstance(state, BlockParams):
        blocks: list[Any] = _views(state.blocks)
        return on_device(state.resident), (None,), [(blocks, placement)]
    num_parts = max(1, len(state.parts))
    trained = [(list(state.blocks[i::num_parts]), placement) for i in range(num_parts)]
    if state.frozen is None:
        return state.resident, state.parts or (state.layout,), trained
    resident = join(state.resident, state.frozen.resident)
    if state.frozen.layout is None:
        return resident, state.parts or (state.layout,), trained
    return resident, (state.layout, state.frozen.layout), [*trained, (list(state.frozen.blocks), placement)]


def _views(stacked: Params) -> list[Params]:
    """The blocks of a stacked pytree, without a copy of what is on the host."""
    layout, num_blocks = buckets.layout_of(stacked)  # complains about leaves that are not stacked
    if any(layout.specs):
        raise ValueError("the blocks are quantized; give the State of make_step, with these parameters as frozen.")
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_blocks)]


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: CausalLM, resident: Params, tokens: jax.Array, first: jax.Array) -> jax.Array:
    return model.embed(resident["embed"], tokens, _positions(first, tokens.shape[0]))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _advance(
    model: CausalLM,
    layouts: _Layouts,
    arrived: tuple[Bucket, ...],
    hidden: jax.Array,
    cache: Cache,
    first: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, Cache | None, jax.Array]:
    """One block; the index of the next one."""
    params = functools.reduce(join, _trees(layouts, arrived))
    hidden, cache_or_none = model.block(params, hidden, _positions(first, hidden.shape[0]), cache)
    return hidden, cache_or_none, index + 1


def _trees(layouts: _Layouts, arrived: tuple[Bucket, ...]) -> list[Params]:
    """The trained and the frozen leaves of a block."""
    parts = tuple(layout for layout in layouts if isinstance(layout, Part))
    if parts:
        return [buckets.all_unpacked(parts[0].whole, parts, arrived)]
    return [
        buckets.unpacked(layout, block) if isinstance(layout, Layout) else block
        for layout, block in zip(layouts, arrived, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _leave(model: CausalLM, resident: Params, hidden: jax.Array, row: jax.Array) -> jax.Array:
    hidden = jax.lax.dynamic_slice_in_dim(hidden, row, 1)
    return model.head(resident.get("head", {}), resident["embed"], hidden)[0]


def _positions(first: jax.Array, length: int) -> jax.Array:
    return first + jnp.arange(length, dtype=jnp.int32)
