"""Which file implements which `model_type` of Hugging Face. A new architecture is one file and one line here.

Such a file holds `Config`, the NNX modules `Embed`, `Block` and `Head`, and how a folder stores the parameters: `TENSORS`,
`PREFIXES` (of tensor names, absent in some folders) and `IGNORED` (glob patterns of tensors that are no parameters).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from jaxdp.models import gpt2, llama, opt, qwen3
from jaxdp.models.hf_config import HfConfig

ARCHITECTURES: dict[str, ModuleType] = {"gpt2": gpt2, "opt": opt, "llama": llama, "mistral": llama, "qwen3": qwen3}


def architecture(hf_config: HfConfig) -> ModuleType:
    """The file that implements a parsed `config.json`.

    Raises:
        ValueError: Its `model_type` is not implemented.
    """
    model_type = hf_config.get("model_type")
    if model_type not in list(ARCHITECTURES):
        raise ValueError(
            f"config.json: model_type is {model_type!r}, which is not implemented; supported: {', '.join(ARCHITECTURES)}. "
            "Use a folder of one of these."
        )
    return ARCHITECTURES[model_type]


def architecture_of(config: Any) -> ModuleType:
    """The file that a `Config` comes from."""
    return next(module for module in ARCHITECTURES.values() if module.Config is type(config))
