"""Device memory of a streamed zeroth-order step of OPT models, from programs compiled for an H200; no GPU is needed.

    .ci/aot python -m benchmarks.zeroth_order_memory --json benchmarks/results/zeroth_order_memory_h200_aot.json
    .ci/aot python -m benchmarks.zeroth_order_memory --base int4 --json benchmarks/results/zeroth_order_memory_int4_h200_aot.json

One sequence of 2048 tokens, bfloat16, SPSA, cuDNN attention: full fine-tuning, with blocks whole and in stages, or adapters of
rank 8 above a frozen base. The peak is the largest sum of all that is alive at once (`jaxdp.zeroth_order.memory`). It leaves out
what only a real device has: the CUDA context, the allocator's slack, cuDNN's workspace.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

import jaxdp
from benchmarks import harness
from jaxdp.models import Lora, causal_lm
from jaxdp.models.lora import is_adapter
from jaxdp.models.trainable import parts
from jaxdp.quantization import quantized_shapes
from jaxdp.text import language_model_blocks
from jaxdp.zeroth_order import (
    BlockParams,
    Gaussian,
    Law,
    LowRank,
    Placement,
    Rademacher,
    Sgd,
    Stages,
    TwoSided,
    split_block,
)
from jaxdp.zeroth_order.memory import step_memory

#: Blocks, width, heads; and what ZO2 takes by NVML for one sequence of 2048 tokens in float16, in GB (its README).
MODELS = {
    "opt-1.3b": (24, 2048, 32, 3.75),
    "opt-2.7b": (32, 2560, 32, 4.14),
    "opt-6.7b": (32, 4096, 32, 4.99),
    "opt-13b": (40, 5120, 40, 6.18),
    "opt-30b": (48, 7168, 56, 8.86),
    "opt-66b": (64, 9216, 72, 12.07),
    "opt-175b": (96, 12288, 96, 18.04),
}
LAWS = {"rademacher": Rademacher(), "gaussian": Gaussian(), "low-rank": LowRank()}
#: Full fine-tuning; or adapters above a base that is frozen in a format.
Base = Literal["trained", "bfloat16", "int8", "int6", "int4"]
_VOCABULARY, _GIB = 50272, 2**30


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile the programs of a streamed step and add up what is alive."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which of the OPT sizes."""
    law: str = "rademacher"
    """rademacher, gaussian or low-rank."""
    num_directions: int = 1
    """K."""
    length: int = 2048
    """Tokens of the sequence."""
    base: Base = "trained"
    """trained: full fine-tuning. Others: adapters of rank 8 above a base in that format."""
    private: bool = False
    """Clip and noise the projected gradients."""
    json: Path | None = None
    """Where to write the record."""


def measure(config: Config) -> dict[str, Any]:
    """Compiles every model, and returns the record that is written."""
    settings = {name: getattr(config, name) for name in ("law", "num_directions", "length", "base", "private")}
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not False)
    record: dict[str, Any] = {
        "benchmark": "device memory of a streamed zeroth-order step, compiled for an H200",
        "command": ".ci/aot python -m benchmarks.zeroth_order_memory" + options.replace("True", "").rstrip(),
        "meter": "XLA compiled memory statistics, summed over what is alive; ZO2's figures are NVML's",
        **settings,
        "versions": {"jax": jax.__version__},
        "rows": [],
    }
    for name in config.models:
        record["rows"].append(row(name, **settings | {"law": LAWS[config.law]}))
        print(_line(record["rows"][-1]), flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    return record


def row(
    name: str,
    law: Law,
    *,
    length: int = 2048,
    num_directions: int = 1,
    base: Base = "trained",
    private: bool = False,
) -> dict[str, Any]:
    """The figures of one model, in bytes."""
    from tests.aot import h200

    num_blocks, width, num_heads, zo2_gigabytes = MODELS[name]
    model = causal_lm(_opt(num_blocks, width, num_heads), dtype=jnp.bfloat16, implementation="cudnn")
    if base != "trained":
        model = model.with_lora(Lora(8, 16.0, ("all-linear",)))
    trained, frozen = _shapes(model, base)
    tokens = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    batch = {"tokens": tokens, "weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32)}
    blocks = language_model_blocks(model)

    def found(stages: Stages | None) -> dict[str, Any]:
        figures: list[dict[str, Any]] = []

        def compiled(program: Any, *arguments: Any) -> Any:
            found = h200.compile_for_h200(program, *arguments)
            sizes = {name: getattr(found, name) for name in ("device_bytes", "temp_bytes", "alias_bytes")}
            figures.append({"program": program.__name__, **sizes})
            return found

        memory = step_memory(
            blocks,
            Sgd(1e-6),
            trained,
            batch,
            plan=_plan() if private else None,
            estimator=TwoSided(num_directions),
            law=law,
            stages=stages,
            frozen=frozen,
            compiled=compiled,
        )
        placements = {str(prefetch): Placement(is_streamed=True, prefetch=prefetch) for prefetch in (1, 0)}
        return {
            "block_bytes": memory.frozen_block or memory.block,
            "stage_bytes": memory.parts if stages else None,
            "resident_bytes": memory.resident,
            "programs": figures,
            "peak_bytes": {prefetch: memory.device_peak(placement) for prefetch, placement in placements.items()},
            "host_bytes": {prefetch: memory.host_bytes(placement) for prefetch, placement in placements.items()},
        }

    with h200.target():  # blocks are traced outside of any compilation too
        whole: dict[str, Any] = {"model": name, **found(None), "zo2_nvml_gigabytes": zo2_gigabytes}
        if base != "trained":
            return whole
        example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
        return whole | {"in_stages": found(split_block(blocks, trained, example))}


def _shapes(model: Any, base: Base) -> tuple[BlockParams, BlockParams | None]:
    """The trained part and the frozen part."""
    if base == "trained":
        return _block_params(model.shapes(jnp.bfloat16)), None
    trained, _ = parts(model, model.shapes(jnp.float32), "lora")
    _, frozen = parts(model, model.shapes(jnp.bfloat16), "lora")
    trained, frozen = _block_params(trained), _block_params(frozen)
    if base != "bfloat16":
        frozen = frozen._replace(blocks=quantized_shapes(frozen.blocks, base, but=is_adapter))
    return trained, frozen


def _block_params(tree: Any) -> BlockParams:
    return BlockParams({part: tree[part] for part in ("embed", "head") if part in tree}, tree["blocks"])


def _plan() -> jaxdp.PrivacyPlan:
    return jaxdp.plan(num_examples=1, sampling_prob=1.0, num_steps=1, clipping=jaxdp.flat(1.0), noise_multiplier=1.0)


def _opt(num_blocks: int, width: int, num_heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": _VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "ffn_dim": 4 * width,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": width,
        "do_layer_norm_before": True,
    }


def _line(found: dict[str, Any]) -> str:
    def peaks(row: dict[str, Any]) -> str:
        return (
            f"{row['peak_bytes']['1'] / _GIB:.2f} GiB with one prefetched, {row['peak_bytes']['0'] / _GIB:.2f} without"
        )

    staged = (
        f"; in {len(found['in_stages']['stage_bytes'])} stages {peaks(found['in_stages'])}"
        if "in_stages" in found
        else ""
    )
    return (
        f"{found['model']}: block {found['block_bytes'] / _GIB:.2f} GiB, peak {peaks(found)}{staged}; "
        f"host {found['host_bytes']['1'] / _GIB:.1f} GiB; ZO2 {found['zo2_nvml_gigabytes']} GB"
    )


if __name__ == "__main__":
    measure(tyro.cli(Config))
