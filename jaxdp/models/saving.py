"""A model into a Hugging Face folder that `transformers` loads."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.folders import placed_together, write_json
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.tensor_files import write_shards
from jaxdp.models.weights import INDEX, SINGLE, Place, Pretrained, leaf_shapes, places

#: What a folder needs besides the weights, copied as it is: the tokenizer's files, and how to generate.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "gpt2-vocab.json",
    "gpt2-merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


#: Larger models are written in several files.
MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    folder: str | os.PathLike[str], pretrained: Pretrained, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes `config.json`, the weights under Hugging Face's names, and the tokenizer's files.

    The weights keep the dtype of the parameters, and `config.json` names it. All is written before anything in `folder`
    is replaced, so that a full disk leaves an earlier output whole; files of other names there stay.

    Args:
        folder: It is made if missing. The folder that the model came from will do.
        pretrained: `dataclasses.replace(pretrained, params=trained)` after training. Blocks in segments, as `join` makes
            them, are written in their order.
        max_shard_bytes: Larger models are written in shards, with an index. A shard is copied in memory before it is written.

    Raises:
        ValueError: the model has adapters, or the parameters do not fit it.
        OSError: the folder cannot be written.
    """
    model, params = pretrained.model, pretrained.params
    max_shard_bytes = _validate.positive_integer("max_shard_bytes", max_shard_bytes)
    if model.lora is not None:
        raise ValueError(
            "the model has adapters, which a Hugging Face model folder has no place for; merge them with jaxdp.models.merge, or "
            "save them alone with jaxdp.models.save_adapter."
        )
    leaves = segments_by_path(params)
    _check_fits(leaves, leaf_shapes(model))
    tensors = _as_stored(leaves, places(model))
    with placed_together(folder, last=(SINGLE, INDEX), stale=("model-*-of-*.safetensors",)) as staging:
        for name in COMPANIONS:
            if pretrained.folder is not None and (pretrained.folder / name).is_file():
                shutil.copyfile(pretrained.folder / name, staging / name)
        write_json(staging / "config.json", _with_dtype(pretrained.hf_config, leaves))
        write_shards(staging, tensors, max_shard_bytes=max_shard_bytes)


def segments_by_path(params: Params) -> dict[str, list[Any]]:
    """The arrays of every leaf by its path: one, or one for each segment of the blocks."""
    leaves: dict[str, list[Any]] = {}
    for name, branch in params.items():
        for segment in branch if isinstance(branch, tuple) else (branch,):
            for path, leaf in _validate.named_leaves({name: segment}):
                leaves.setdefault(path, []).append(leaf)
    return leaves


def _check_fits(leaves: dict[str, list[Any]], shapes: dict[str, tuple[int, ...]]) -> None:
    if odd := sorted(leaves.keys() ^ shapes.keys()):
        raise ValueError(
            f"the parameters and the model disagree on {', '.join(odd[:5])}: params has it and the model has not, or the other way "
            "round; save the parameters with the model they were made for."
        )
    for path, shape in shapes.items():
        arrays = leaves[path]
        whole = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
        if whole != shape:
            raise ValueError(
                f"parameter {path!r} has shape {list(whole)}, the model's {list(shape)}; save it with its own model."
            )


def _as_stored(leaves: dict[str, list[Any]], in_order: Iterator[Place]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as the file has them, one leaf on the host at a time; of a `LazyStack`, one block."""
    for path, group in itertools.groupby(in_order, key=lambda place: place.path):
        arrays = (array if isinstance(array, LazyStack) else np.asarray(array) for array in leaves[path])
        rows = (row for array in arrays for row in array) if path.startswith("blocks/") else arrays
        for place, row in zip(group, rows, strict=True):
            # As the file will have it: a shard that waited for its transposes would be in memory twice.
            yield place.name, np.ascontiguousarray(row.T if place.is_transposed else row)


def _with_dtype(hf_config: dict[str, Any], leaves: dict[str, list[Any]]) -> dict[str, Any]:
    """The configuration, naming the dtype that most of the saved bytes have; under the key it has, old or new."""
    sizes: collections.Counter[str] = collections.Counter()
    for arrays in leaves.values():
        for array in arrays:
            sizes[np.dtype(array.dtype).name] += array.nbytes
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]
    return hf_config | dict.fromkeys(keys, sizes.most_common(1)[0][0])
