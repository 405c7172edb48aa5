"""A model and its weights from a Hugging Face folder.

Tensors go piece by piece from the file into their place in the stacked block arrays `[N, ...]`: while a model loads, the
memory it needs is the model and a few megabytes, whatever the largest tensor. A model that is only opened needs the memory of what
is outside its blocks; a block is read when it is asked for.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.architectures import architecture_of
from jaxdp.models.causal_lm import CausalLM, causal_lm
from jaxdp.models.folders import existing_folder, file_names, read_json
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.tensor_files import StoredTensor, stored_tensors

#: The weights in one file, or in shards with an index.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Where `transformers` keeps the matrix of the head, in every architecture; a tied model has no such tensor of its own.
HEAD = "lm_head.weight"
_REMEDY = (
    "give the folder of a Hugging Face model, with config.json and model.safetensors. jaxdp fetches nothing from the network: "
    "download the model first, with `hf download NAME --local-dir FOLDER` for example."
)
_CONVERT = (
    "convert them once, with the `transformers` library: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)."
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its parameters, and what a folder of it needs besides.

    Attributes:
        model: The functions.
        params: Their parameters, numpy arrays as loaded, or `LazyStack`s of blocks as opened;
            `dataclasses.replace(pretrained, params=trained)` after training.
        hf_config: The parsed `config.json`.
        folder: Where the tokenizer's files are; None for a model that came from no folder.
    """

    model: CausalLM
    params: Params
    hf_config: dict[str, Any]
    folder: Path | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of a file belongs.

    Attributes:
        name: The tensor's name, with the prefix of the full model.
        path: The leaf, such as `blocks/attention/q/kernel`.
        block: Which block of a stacked leaf; None outside the blocks.
        shape: As stored in the file.
        is_transposed: The file holds `[out, in]`, the leaf `[in, out]`.
    """

    name: str
    path: str
    block: int | None
    shape: tuple[int, ...]
    is_transposed: bool


def load_model(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> Pretrained:
    """Reads `config.json`, and `model.safetensors` or an index with its shards.

    Every tensor is checked against the configuration before the first one is read. Where the head is tied to the embedding
    they are one leaf, and a copy of it in the file is not read.

    Args:
        folder: A Hugging Face folder; nothing is fetched from the network.
        dtype: What the model computes in. Norms, softmax and logits are in float32 in any case.
        param_dtype: Of the parameters. Float32 for training: small updates vanish in bfloat16. None keeps what the file has, with
            float64 as float32 and float8 as bfloat16, which jax can compute with.

    Returns:
        The model and its parameters, in numpy arrays: put them on a device with `jax.device_put`.

    Raises:
        FileNotFoundError: no folder, no `config.json`, no weights, or an absent shard.
        ValueError: a file is broken, the architecture or a setting is not implemented, or a tensor is missing, unexpected
            or of another shape.
    """
    return _read(folder, dtype, param_dtype, lambda path, leaf: leaf.whole())


def open_model(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> Pretrained:
    """`load_model`, but that the blocks stay in their files: for a model that the host's memory does not hold.

    The leaves of the blocks are `LazyStack`s, of the same values. Every tensor is checked here, as `load_model` does it. The files
    stay open while one of these leaves lives, and are read again whenever a block is asked for.

    **Guarantee**: the values are those of the files that were opened, as `jaxdp.models.tensor_files.OpenFile` has it: other files
    may take their names meanwhile, and one that is written into is refused.

    Args:
        folder, dtype, param_dtype: As of `load_model`.

    Returns:
        The model; the parameters outside its blocks in numpy arrays.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; and where a block is asked for, if its file was written into.
    """

    def read(path: str, leaf: _StoredLeaf) -> Any:
        return LazyStack(leaf.shape, leaf.dtype, leaf.block) if path.startswith("blocks/") else leaf.whole()

    return _read(folder, dtype, param_dtype, read)


@dataclasses.dataclass(frozen=True)
class _StoredLeaf:
    """A leaf as files hold it.

    Attributes:
        shape: Of the leaf, stacked if it is.
        dtype: That it is read in.
        tensors: What it is made of: one tensor, or one for each block, in their order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: list[tuple[Place, StoredTensor]]

    def whole(self) -> np.ndarray:
        leaf = np.empty(self.shape, self.dtype)
        for place, tensor in self.tensors:
            tensor.read_into(leaf if place.block is None else leaf[place.block], is_transposed=place.is_transposed)
        return leaf

    def block(self, index: int) -> np.ndarray:
        place, tensor = self.tensors[index]
        block = np.empty(self.shape[1:], self.dtype)
        tensor.read_into(block, is_transposed=place.is_transposed)
        return block


def _read(
    folder: str | os.PathLike[str], dtype: Any, param_dtype: Any, read: Callable[[str, _StoredLeaf], Any]
) -> Pretrained:
    """A model whose leaves are what `read(path, leaf)` makes of them, once all of them are known to be there."""
    if param_dtype is not None and not jnp.issubdtype(param_dtype, jnp.floating):
        raise ValueError(
            f"param_dtype must be a floating-point dtype, or None for the file's; got {np.dtype(param_dtype)}."
        )
    folder = existing_folder(folder, what="model", remedy=_REMEDY)
    hf_config = read_config(folder)
    model = causal_lm(hf_config, dtype=dtype)
    tensors = _assign(stored_tensors(weight_files(folder)), model, folder)
    leaves = {}
    for path, shape in leaf_shapes(model).items():
        leaf_dtype = _held_as(tensors[path]) if param_dtype is None else np.dtype(param_dtype)
        leaves[path] = read(path, _StoredLeaf(shape, leaf_dtype, tensors[path]))
    return Pretrained(model, traverse_util.unflatten_dict(leaves, sep="/"), hf_config, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds an adapter and not the model it belongs to; load the base model from its own folder, then the "
            "adapter with jaxdp.models.load_adapter."
        )
    raise FileNotFoundError(f"no config.json in {folder}, which holds {file_names(folder)}; {_REMEDY}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards of an index."""
    single = folder / SINGLE
    if single.exists():  # before the index, as `transformers` has it
        return [single]
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files; download it again.")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file() or Path(shard).name != shard:
                raise FileNotFoundError(
                    f"{folder / INDEX} names the shard {shard!r}, which is not in {folder}; download the missing file."
                )
        return [folder / shard for shard in shards]
    if any(path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf") for path in folder.iterdir()):
        raise FileNotFoundError(
            f"no {SINGLE} in {folder}, which holds {file_names(folder)}: jaxdp reads no pickled or converted weights; "
            f"{_CONVERT}"
        )
    raise FileNotFoundError(f"no {SINGLE} and no {INDEX} in {folder}, which holds {file_names(folder)}; {_REMEDY}")


def leaf_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    return {path: tuple(leaf.shape) for path, leaf in _validate.named_leaves(model.shapes())}


def places(model: CausalLM) -> Iterator[Place]:
    """Where each tensor of a file belongs, leaf by leaf and block by block."""
    tensors = architecture_of(model.config).TENSORS
    for path, shape in leaf_shapes(model).items():
        tensor = tensors[path]
        is_stacked = path.startswith("blocks/")
        inner = shape[1:] if is_stacked else shape
        stored = inner[::-1] if tensor.is_transposed else inner
        for block in range(shape[0]) if is_stacked else (None,):
            name = tensor.name if block is None else tensor.name.format(block)
            yield Place(name, path, block, stored, tensor.is_transposed)


def _assign(
    stored: dict[str, StoredTensor], model: CausalLM, folder: Path
) -> dict[str, list[tuple[Place, StoredTensor]]]:
    """The tensors of every leaf, all of them checked."""
    kind = architecture_of(model.config)
    left = dict(stored)
    tensors: dict[str, list[tuple[Place, StoredTensor]]] = {}
    missing = []
    for place in places(model):
        # A file may have been saved from the model without its head, whose names lack the prefix.
        names = [place.name, *(place.name.removeprefix(prefix) for prefix in kind.PREFIXES)]
        name = next((name for name in names if name in left), None)
        if name is None:
            missing.append(place.name)
            continue
        tensor = left.pop(name)
        if tensor.shape != place.shape:
            raise ValueError(
                f"tensor {tensor.name!r} in {tensor.path} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(place.shape)}; the weights and config.json belong to different models: take both from one folder."
            )
        tensor.float_dtype()
        tensors.setdefault(place.path, []).append((place, tensor))
    if missing:
        raise ValueError(
            f"{folder} lacks {_some(missing)}; the weights are incomplete or belong to another model than config.json: download "
            "the folder again."
        )
    if model.config.is_tied and (head := left.pop(HEAD, None)) is not None:
        _check_is_tied(head, tensors["embed/tokens/table"][0][1])
    unexpected = [name for name in left if not any(fnmatch.fnmatchcase(name, pattern) for pattern in kind.IGNORED)]
    if unexpected:
        raise ValueError(
            f"{folder} holds {_some(unexpected)}, which the model of config.json has no place for; the weights belong to another "
            "model, or to one with parts that are not implemented: use the config.json that came with them."
        )
    return tensors


def _check_is_tied(head: StoredTensor, table: StoredTensor) -> None:
    """Refuses a head that the file holds, that config.json ties to the embedding, and that differs from it."""
    is_same = head.shape == table.shape and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(head.pieces(), table.pieces(), strict=False)
    )
    if not is_same:
        raise ValueError(
            f"{head.path} holds a {HEAD} that differs from {table.name!r}, though tie_word_embeddings makes them one; set "
            "tie_word_embeddings to false in config.json to use both."
        )


def _held_as(found: list[tuple[Place, StoredTensor]]) -> np.dtype:
    """The dtype that holds what the file has: the widest of a stacked leaf, between bfloat16 and float32."""
    dtypes = {tensor.float_dtype() for _, tensor in found}
    if dtypes == {np.dtype(np.float16)}:
        return np.dtype(np.float16)
    is_narrow = all(ml_dtypes.finfo(dtype).bits <= 16 for dtype in dtypes) and np.dtype(np.float16) not in dtypes
    return np.dtype(ml_dtypes.bfloat16) if is_narrow else np.dtype(np.float32)


def _some(names: list[str], *, limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:limit]))}{more}"
