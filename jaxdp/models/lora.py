"""Low-rank adapters on a model: fresh ones, and merged ones. Source: arXiv 2106.09685 (FFA-LoRA: arXiv 2403.12313)."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Key, Params
from jaxdp.models.causal_lm import CausalLM
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.lora_spec import Lora
from jaxdp.models.trainable import join, split


def add_adapters(
    key: Key, model: CausalLM, params: Params, lora: Lora, *, dtype: Any = jnp.float32
) -> tuple[CausalLM, Params]:
    """The same function with fresh adapters: A uniform in ±1/sqrt(in), as in PEFT, and B zero.

    Args:
        key: A and nothing else is drawn from it. It does not depend on the data and need not be secret.
        model: Without adapters.
        params: Its parameters; the arrays are shared with the result, not copied.
        lora: Rank, alpha and targets.
        dtype: Of A and B, however narrow the base is: small updates vanish in bfloat16.

    Returns:
        The model, and `params` with leaves `lora_a` `[N, in, r]` and `lora_b` `[N, r, out]` beside each adapted kernel.
    """
    key = _validate.typed_key("key", key)
    if model.lora is not None:
        raise ValueError(f"the model has adapters already ({model.lora}); merge them first with jaxdp.models.merge.")
    model = model.with_lora(lora)
    adapters, _ = split(model.shapes(dtype), is_adapter)
    return model, join(jax.tree_util.tree_map_with_path(_fresh(key), adapters), params)


def is_adapter(path: str) -> bool:
    """Whether a leaf belongs to an adapter."""
    return path.endswith(("/lora_a", "/lora_b"))


def _fresh(key: Key) -> Any:
    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = _validate.leaf_name(path)
        if name.endswith("/lora_b"):
            return jnp.zeros(shape.shape, shape.dtype)
        # Kaiming uniform with a = sqrt(5), PyTorch's default for a linear layer: 1 / sqrt(in). Keyed by path, never by
        # call order (S17).
        bound = 1.0 / math.sqrt(shape.shape[-2])
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own_key, shape.shape, jnp.float32, -bound, bound).astype(shape.dtype)

    return leaf


def merge(model: CausalLM, params: Params) -> tuple[CausalLM, Params]:
    """The same function without adapters: W + (alpha / r) A B, added in float32 and rounded once to the dtype of W.

    In bfloat16 this rounding is about 1/256 of a weight, which a small adapter may drown in: merge into float32 parameters
    to keep it.

    Args:
        model: With adapters.
        params: Its parameters, blocks in one stack or in segments.

    Returns:
        The model without adapters, and its parameters; merged kernels are numpy arrays on the host, others are shared. The kernels
        of an opened model are merged block by block, when a block is asked for.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters to merge; save it as it is.")
    return model.with_lora(None), _merge_below(params, model.lora.scale)


def _merge_below(tree: Any, scale: float) -> Any:
    if isinstance(tree, tuple):  # segments
        return tuple(_merge_below(segment, scale) for segment in tree)
    if not isinstance(tree, dict):
        return tree
    below = {name: _merge_below(branch, scale) for name, branch in tree.items() if name not in ("lora_a", "lora_b")}
    if "lora_a" in tree:
        below["kernel"] = _merged(tree["kernel"], tree["lora_a"], tree["lora_b"], scale)
    return below


def _merged(kernel: Any, lora_a: Any, lora_b: Any, scale: float) -> Any:
    if isinstance(kernel, LazyStack):
        return kernel.derived(kernel.shape, kernel.dtype, lambda i: _merged(kernel[i], lora_a[i], lora_b[i], scale))
    kernel = np.asarray(kernel)  # [N, in, out], or [in, out] outside the blocks
    if kernel.ndim > 2:
        out = np.empty_like(kernel)
        # Block by block: a whole stack in float32 would be a copy of a good part of the model.
        for i in range(len(kernel)):
            out[i] = _merged(kernel[i], lora_a[i], lora_b[i], scale)
        return out
    a, b = np.asarray(lora_a, np.float32), np.asarray(lora_b, np.float32)
    return (kernel.astype(np.float32) + np.float32(scale) * (a @ b)).astype(kernel.dtype)
