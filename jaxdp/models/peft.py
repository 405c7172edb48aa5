"""Adapters in the format of the `peft` library: `adapter_config.json` and `adapter_model.safetensors`.

Its A is stored `[r, in]` and its B `[out, r]`, whichever way the base stores its kernel.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.architectures import architecture_of
from jaxdp.models.causal_lm import CausalLM
from jaxdp.models.folders import existing_folder, file_names, placed_together, read_json, write_json
from jaxdp.models.lora import is_adapter
from jaxdp.models.lora_spec import Lora
from jaxdp.models.saving import segments_by_path
from jaxdp.models.tensor_files import StoredTensor, open_tensors, write_tensors
from jaxdp.models.trainable import join

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: peft adds a copy of the head's matrix where the head is adapted.
_HEAD_COPY = "base_model.model.lm_head.base_layer.weight"
_HALVES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_REMEDY = f"give the folder that peft's save_pretrained wrote, with {CONFIG} and {WEIGHTS}."

#: Settings that do not change the function of a finished adapter, that its tensors tell better, or that are read below.
#: Whatever else is set, to something that is not false or empty, is refused: DoRA, biases, ranks and alphas of single layers.
_KNOWN = (
    "auto_mapping base_model_name_or_path bias eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version qalora_group_size r "
    "revision runtime_config target_modules task_type use_rslora"
)
#: Other starts (PiSSA, OLoRA, LoftQ, CorDA, ...) also change the weights of the base, so that the base as it is does not fit.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def load_adapter(
    folder: str | os.PathLike[str], model: CausalLM, params: Params, *, dtype: Any = np.float32
) -> tuple[CausalLM, Params]:
    """Adds an adapter from a PEFT folder to a base model.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        model: The base, without adapters.
        params: Its parameters, blocks in one stack; the arrays are shared with the result, not copied.
        dtype: Of A and B.

    Returns:
        The model with adapters, and `params` with leaves `lora_a` and `lora_b` added. `lora_dropout` is not part of the model;
        `use_rslora` becomes the `alpha` that scales by the same number.

    Raises:
        FileNotFoundError: no folder, or a file of it is missing.
        ValueError: a kind or a setting that is not implemented, or tensors that do not fit the model.
    """
    folder = existing_folder(folder, what="adapter", remedy=_REMEDY)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"no {name} in {folder}, which holds {file_names(folder)}; {_REMEDY} Older peft wrote adapter_model.bin: load and "
                "save the adapter with a newer one."
            )
    if model.lora is not None:
        raise ValueError(f"the model has adapters already ({model.lora}); load the adapter into the base model.")
    rank, alpha = _rank_and_alpha(read_json(folder / CONFIG), folder / CONFIG)
    with open_tensors([folder / WEIGHTS]) as stored:
        if "out" in params["head"] and (copy := stored.pop(_HEAD_COPY, None)) is not None:
            _check_is_base(copy, params["head"]["out"]["kernel"])
        adapted = model.with_lora(Lora(rank, alpha, _targets(stored, model, folder)))
        adapters = _read(stored, adapted, dtype)
    return adapted, join(adapters, params)


def save_adapter(
    folder: str | os.PathLike[str], model: CausalLM, params: Params, *, base_model: str | os.PathLike[str] = ""
) -> None:
    """Writes the adapters of a model for `peft` to load onto the base.

    Args:
        folder: It is made if missing; an earlier adapter there is replaced when the new one is written, not before.
        model: With adapters.
        params: Its parameters, or the adapters alone.
        base_model: Name or folder of the base, noted for whoever loads the adapter.

    Raises:
        ValueError: the model has no adapters, or `params` lacks them.
        OSError: the folder cannot be written.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters to save; save a whole model with jaxdp.models.save_model.")
    leaves = {path: arrays for path, arrays in segments_by_path(params).items() if is_adapter(path)}
    shapes = {path: shape.shape for path, shape in _validate.named_leaves(model.shapes()) if is_adapter(path)}
    if odd := sorted(leaves.keys() ^ shapes.keys()):
        raise ValueError(
            f"the parameters and the model disagree on {', '.join(odd[:5])}; save the parameters with the model they were made for."
        )
    tensors: dict[str, np.ndarray] = {}
    for path, arrays in leaves.items():
        whole = np.concatenate([np.asarray(array) for array in arrays])
        if whole.shape != shapes[path]:
            raise ValueError(
                f"parameter {path!r} has shape {list(whole.shape)}, but the model's has {list(shapes[path])}."
            )
        for name, matrix in zip(_names(model, path), _matrices(whole), strict=True):
            tensors[name] = matrix.T
    with placed_together(folder, last=(WEIGHTS,), stale=("adapter_model.bin",)) as staging:
        write_json(staging / CONFIG, _config(model, model.lora, str(base_model)))
        write_tensors(staging / WEIGHTS, tensors)


def _rank_and_alpha(config: dict[str, Any], file: Path) -> tuple[int, float]:
    """Rank and alpha of a configuration without anything that this package does not compute."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, which is not implemented; only 'LORA' is.")
    given = {name: value for name, value in config.items() if name not in _KNOWN.split() and value}
    if config.get("bias", "none") != "none":
        given["bias"] = config["bias"]
    start = config.get("init_lora_weights", True)
    if start not in _INITIALIZATIONS:
        given["init_lora_weights"] = start
    if given:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(given.items()))
        raise ValueError(
            f"{file} asks for {settings}, which is not implemented: only adapters x A B on linear layers, of one rank, over the "
            "base as it is. Merge the adapter into its base with peft's merge_and_unload and load that model."
        )
    rank = _validate.positive_integer(f"{file}: r", config.get("r"))
    alpha = _validate.positive(f"{file}: lora_alpha", config.get("lora_alpha"))
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha  # alpha / sqrt(r) there, alpha / r here


def _module(model: CausalLM, path: str) -> str:
    """What Hugging Face calls the linear layer at `path`, with `{}` for the block."""
    return architecture_of(model.config).TENSORS[f"{path}/kernel"].name.removesuffix(".weight")


def _names(model: CausalLM, path: str) -> list[str]:
    """What PEFT calls the leaf at `path`, such as `blocks/attention/q/lora_a`: one name for each matrix in it."""
    layer, _, half = path.rpartition("/")
    name = f"base_model.model.{_module(model, layer)}.{_HALVES[half]}.weight"
    return [name.format(i) for i in range(model.config.num_blocks)] if layer.startswith("blocks/") else [name]


def _matrices(leaf: np.ndarray) -> np.ndarray:
    """`[N, ...]` of a stacked leaf, `[1, ...]` of another."""
    return leaf if leaf.ndim == 3 else leaf[None]


def _targets(stored: dict[str, StoredTensor], model: CausalLM, folder: Path) -> tuple[str, ...]:
    """The paths of the linear layers that the tensors adapt: `target_modules` is what was asked, the tensors what is."""
    paths = {name: path for path in model.linears() for half in _HALVES for name in _names(model, f"{path}/{half}")}
    strange = [name for name in stored if name not in paths]
    if strange or not stored:
        raise ValueError(
            f"{folder / WEIGHTS} adapts {', '.join(map(repr, strange[:3])) or 'nothing'}, which is no linear layer of this model "
            f"(it has {', '.join(sorted(model.linears()))}); load the adapter onto the base it was trained on."
        )
    targets = {paths[name] for name in stored}
    missing = [name for name, path in paths.items() if path in targets and name not in stored]
    if missing:
        raise ValueError(
            f"{folder / WEIGHTS} lacks {', '.join(map(repr, missing[:3]))}: it adapts some blocks only, and here a layer has its "
            "adapter in every block. Merge the adapter into its base with peft's merge_and_unload and load that model."
        )
    return tuple(sorted(targets))


def _check_is_base(copy: StoredTensor, kernel: Any) -> None:
    """Refuses an adapter that brings a head of its own, resized or trained."""
    kernel = np.asarray(kernel)  # [D, V]
    if copy.shape != kernel.shape[::-1] or not all(
        np.array_equal(piece.astype(kernel.dtype), kernel[:, rows].T) for rows, piece in copy.pieces()
    ):
        raise ValueError(
            f"tensor {copy.name!r} in {copy.path} differs from the head of the base model; load the adapter onto the base it was "
            "trained on, or merge it there with peft's merge_and_unload and load that model."
        )


def _read(stored: dict[str, StoredTensor], model: CausalLM, dtype: Any) -> Params:
    leaves = {}
    for path, shape in _validate.named_leaves(model.shapes(dtype)):
        if not is_adapter(path):
            continue
        leaves[path] = np.empty(shape.shape, shape.dtype)
        for name, place in zip(_names(model, path), _matrices(leaves[path]), strict=True):
            tensor = stored[name]
            if tensor.shape != place.shape[::-1]:
                raise ValueError(
                    f"tensor {name!r} in {tensor.path} has shape {list(tensor.shape)}, but the model and {CONFIG} ask for "
                    f"{list(place.shape[::-1])}; load the adapter onto the base it was trained on, with its own {CONFIG}."
                )
            tensor.read_into(place, is_transposed=True)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _config(model: CausalLM, lora: Lora, base_model: str) -> dict[str, Any]:
    adapted = lora.adapted(model.linears())
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({_suffix(model, path, adapted) for path in adapted}),
        # GPT-2's Conv1D; a layer of another kind in the same adapter, as its untied head, is recognized by peft.
        "fan_in_fan_out": not any(
            architecture_of(model.config).TENSORS[f"{path}/kernel"].is_transposed for path in adapted
        ),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _suffix(model: CausalLM, path: str, adapted: frozenset[str]) -> str:
    """How target_modules names a layer: `q_proj`, or `attn.c_proj` where another `c_proj` is not adapted."""
    linears = model.linears()
    if all(other in adapted for other, name in linears.items() if name == linears[path]):
        return linears[path]
    return _module(model, path).rpartition("{}.")[2]
