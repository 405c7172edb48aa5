"""A causal language model as three pure functions and a pytree: embed, one block, head, over stacked blocks.

Block parameters are stacked on a leading axis N, so that one block's code runs under `lax.scan`, under DP-SGD, or on blocks
that arrive one at a time. The layers are NNX modules; they are built abstractly, once for each model, and filled with the
arrays of a plain nested dict at every call, so nothing here has state.

Axes: L tokens, D width, V vocabulary, N blocks, H heads, K key/value heads, P head_dim. Every function acts on one sequence;
batches come from `jax.vmap` outside.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdp import _validate
from jaxdp._typing import Key, Params
from jaxdp.models.architectures import architecture, architecture_of
from jaxdp.models.attention import Cache, Implementation
from jaxdp.models.hf_config import HfConfig
from jaxdp.models.layers import Linear, Start
from jaxdp.models.lora_spec import Lora

Part: TypeAlias = Literal["embed", "blocks", "head"]
PARTS: tuple[Part, ...] = ("embed", "blocks", "head")


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A model without its parameters; `causal_lm` makes one.

    The parameters are nested dicts of arrays, `{"embed": ..., "blocks": ..., "head": ...}`, as `shapes` describes them; every
    leaf below `"blocks"` is stacked `[N, ...]`. They may be NumPy arrays, of any floating dtype.

    Attributes:
        config: The frozen `Config` of the architecture; all have `vocab_size`, `num_blocks`, `width`, `max_length`, `is_tied`.
        dtype: What is computed in. Norms, rotations, softmax and logits are float32.
        lora: The adapters; None for none.
        implementation: Of `jax.nn.dot_product_attention`: None for XLA's everywhere; `"cudnn"` for flash attention on NVIDIA
            GPUs, in 16-bit dtypes.
    """

    config: Any
    dtype: Any = jnp.float32
    lora: Lora | None = None
    implementation: Implementation = None

    def __post_init__(self) -> None:
        dtype = jnp.dtype(self.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating-point dtype to compute in, such as bfloat16; got {dtype}.")
        object.__setattr__(self, "dtype", dtype)
        _validate.one_of("implementation", self.implementation or "xla", ("xla", "cudnn"))

    def embed(self, embed_params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens `[L]` at positions `[L]` to `[L, D]`."""
        return _filled(self, "embed", embed_params)(tokens, positions)

    def block(
        self, block_params: Params, hidden: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """One block.

        Args:
            block_params: Parameters of one block, without the axis N.
            hidden: `[L, D]`.
            positions: Int `[L]`, consecutive.
            cache: Keys and values of one block, `[S, K, P]`: these positions are written into it, and attend to it. None to
                attend within the sequence.

        Returns:
            `[L, D]`, and the cache.
        """
        return _filled(self, "blocks", block_params)(hidden, positions, cache)

    def head(self, head_params: Params, embed_params: Params, hidden: jax.Array) -> jax.Array:
        """`[L, D]` to logits `[L, V]` in float32; `embed_params` are read only if the head is tied to the embedding."""
        table = embed_params["tokens"]["table"] if self.config.is_tied else None
        return _filled(self, "head", head_params)(hidden, table)

    def logits(self, params: Params, tokens: Any, *, remat: bool = False) -> jax.Array:
        """Logits `[L, V]` in float32 of every next token of one sequence `[L]`.

        Args:
            params: The parameters. `params["blocks"]` may also be a tuple of stacked trees, scanned one after the other.
            tokens: Int `[L]`. Row t of the logits depends on tokens 0 to t, so padding belongs at the end.
            remat: Keep only the input of each block for the backward pass, and compute the rest again.

        Raises:
            ValueError: A batch instead of a sequence, a sequence longer than the context, or parameters of another shape.
        """
        length = _sequence_length(self, tokens)
        positions = jnp.arange(length, dtype=jnp.int32)

        def block(hidden: jax.Array, block_params: Params) -> jax.Array:
            return self.block(block_params, hidden, positions)[0]

        if remat:
            block = jax.checkpoint(block, prevent_cse=False)  # the scan already keeps the two computations apart
        hidden = self.embed(params["embed"], tokens, positions)
        for segment in segments(self, params["blocks"]):
            hidden, _ = jax.lax.scan(lambda carry, layer: (block(carry, layer), None), hidden, segment)
        # A tied head without a norm has no parameters, and whoever split the tree may have dropped the empty branch.
        return self.head(params.get("head", {}), params["embed"], hidden)

    def shapes(self, dtype: Any = jnp.float32) -> Params:
        """The parameters, as a pytree of `jax.ShapeDtypeStruct` of one dtype."""
        tree: dict[str, Any] = {}
        for part in PARTS:
            stack = (self.config.num_blocks,) if part == "blocks" else ()
            tree[part] = jax.tree.map(
                lambda leaf, stack=stack: jax.ShapeDtypeStruct((*stack, *leaf.shape), dtype),
                _abstract(self, part).shapes,
            )
        return tree

    def init(self, key: Key, dtype: Any = jnp.float32) -> Params:
        """Random parameters, drawn as the architecture draws them; adapters change nothing yet.

        Args:
            key: A typed JAX key. It is public: nothing private may be drawn from it.
            dtype: Of the parameters.

        Returns:
            NumPy arrays on the host, as from a file. Each leaf is a function of the key and its path alone.
        """
        words = np.asarray(jax.random.key_data(_validate.typed_key("key", key))).tolist()
        starts = {part: _abstract(self, part).starts for part in PARTS}

        def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            name = _validate.leaf_name(path)
            part, _, rest = name.partition("/")
            # On the host: XLA takes seconds to compile a draw, for every shape.
            rng = np.random.default_rng([*words, zlib.crc32(name.encode())])
            return _drawn(rng, starts[part][rest], shape.shape).astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(draw, self.shapes(dtype))

    def init_cache(self, max_length: int, dtype: Any = None) -> Cache:
        """An empty cache of all blocks, `[N, max_length, K, P]`; `dtype` None for the compute dtype."""
        config, dtype = self.config, self.dtype if dtype is None else dtype
        shape = config.num_blocks, _validate.positive_integer("max_length", max_length), *config.cache_heads
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def with_lora(self, lora: Lora | None) -> CausalLM:
        """The same model with adapters on the linear layers that `lora` names; None for none.

        Raises:
            ValueError: A target names no linear layer.
        """
        return checked(dataclasses.replace(self, lora=lora))

    def linears(self) -> dict[str, str]:
        """The module path of every linear layer, such as `blocks/attention/q`, and its Hugging Face name, such as `q_proj`."""
        tensors = architecture_of(self.config).TENSORS
        plain = dataclasses.replace(self, lora=None)
        names = [
            f"{part}/{name}" for part in PARTS for name, _ in _validate.named_leaves(_abstract(plain, part).shapes)
        ]
        paths = [name.removesuffix("/kernel") for name in names if name.endswith("/kernel")]
        return {path: tensors[f"{path}/kernel"].name.split(".")[-2:][0] for path in paths}


def causal_lm(
    hf_config: HfConfig, *, dtype: Any = jnp.float32, lora: Lora | None = None, implementation: Implementation = None
) -> CausalLM:
    """The model that a parsed `config.json` describes.

    Args:
        hf_config: The contents of `config.json`.
        dtype: What to compute in; the dtype of the parameters is free.
        lora: Adapters to add.
        implementation: As of `CausalLM`.

    Raises:
        ValueError: An unknown `model_type`, a missing setting, one that is not implemented, or adapters that match nothing.

    >>> model = causal_lm(
    ...     {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}, dtype=jnp.bfloat16
    ... )
    >>> model.shapes()["blocks"]["mlp"]["up"]["kernel"].shape
    (12, 768, 3072)
    """
    if not isinstance(hf_config, dict):
        raise TypeError(f"hf_config must be the object in a config.json, got {type(hf_config).__name__}.")
    config = architecture(hf_config).Config.from_hf(hf_config)
    return checked(CausalLM(config, dtype, lora, implementation))


def checked(model: CausalLM) -> CausalLM:
    """The model itself, once its adapters are known to match."""
    if model.lora is not None:
        model.lora.adapted(model.linears())
    return model


def segments(model: CausalLM, blocks: Params) -> Sequence[Params]:
    """The stacked trees of `params["blocks"]`, which together must hold N blocks."""
    found = tuple(blocks) if isinstance(blocks, tuple | list) else (blocks,)
    sizes = []
    for segment in found:
        lengths = {name: np.shape(leaf)[:1] for name, leaf in _validate.named_leaves(segment)}
        if len(set(lengths.values())) != 1 or () in lengths.values():
            raise ValueError(
                f"the leaves of params['blocks'] are not stacked [N, ...] with one N: their first axes are {lengths}."
            )
        sizes.append(next(iter(lengths.values()))[0])
    if sum(sizes) != model.config.num_blocks:
        raise ValueError(
            f"params['blocks'] holds {sum(sizes)} blocks in segments of {sizes}, and the model has {model.config.num_blocks}: "
            "stack the leaves of all blocks along their first axis."
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Abstract:
    """A part without its arrays; of one block. Shapes as nested dicts, starts by path."""

    graphdef: Any
    shapes: Params
    starts: dict[str, Start]


@functools.cache
def _abstract(model: CausalLM, part: Part) -> _Abstract:
    modules = architecture_of(model.config)
    if part == "blocks":
        module = modules.Block(model.config, dtype=model.dtype, implementation=model.implementation)
    else:
        module = {"embed": modules.Embed, "head": modules.Head}[part](model.config, dtype=model.dtype)
    if model.lora is not None:
        adapted = model.lora.adapted(model.linears())
        for path, layer in list(nnx.iter_modules(module)):
            if isinstance(layer, Linear) and "/".join((part, *map(str, path))) in adapted:
                layer.adapt(model.lora.rank, model.lora.scale)
    graphdef, state = nnx.split(module)
    starts = {"/".join(map(str, path)): param.start for path, param in nnx.to_flat_state(state)}
    return _Abstract(graphdef, nnx.to_pure_dict(state), starts)


def _filled(model: CausalLM, part: Part, params: Params) -> Any:
    """The module of a part, holding `params`."""
    abstract = _abstract(model, part)
    expected = dict(_validate.named_leaves(abstract.shapes))
    given = dict(_validate.named_leaves(params))
    if given.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(
            f"params[{part!r}] does not fit the model: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; "
            "model.shapes() describes the tree, and model.lora decides whether it has adapters."
        )
    for name, leaf in given.items():
        if np.shape(leaf) != expected[name].shape:
            where = " (of one block)" if part == "blocks" else ""
            raise ValueError(
                f"params[{part!r}] leaf {name!r} has shape {np.shape(leaf)}, and the model needs "
                f"{expected[name].shape}{where}."
            )
    state = nnx.from_flat_state([(tuple(name.split("/")), nnx.Param(leaf)) for name, leaf in given.items()])
    return nnx.merge(abstract.graphdef, state)


def _drawn(rng: np.random.Generator, start: Start, shape: tuple[int, ...]) -> np.ndarray:
    if start.bound > 0:
        return np.float32(start.bound) * (2.0 * rng.random(shape, np.float32) - 1.0)
    if start.stddev > 0:
        return start.constant + np.float32(start.stddev) * rng.standard_normal(shape, np.float32)
    return np.full(shape, start.constant, np.float32)


def _sequence_length(model: CausalLM, tokens: Any) -> int:
    shape, longest = np.shape(tokens), model.config.max_length
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"tokens must be one sequence [L], got shape {shape}; map over a batch with jax.vmap.")
    if shape[0] > longest:
        raise ValueError(
            f"tokens has length {shape[0]}, beyond the model's context of {longest}; truncate or split the text."
        )
    return shape[0]
