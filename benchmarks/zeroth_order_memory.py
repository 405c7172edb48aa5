"""Device memory of a streamed zeroth-order step of OPT models, from programs compiled for an H200; no GPU is needed.

    .ci/aot python -m benchmarks.zeroth_order_memory --json benchmarks/results/zeroth_order_memory_h200_aot.json

One sequence of 2048 tokens, bfloat16, full fine-tuning by SPSA, cuDNN attention. The peak is the largest sum of all that is
alive at once: a program's arguments, results and temporaries, the blocks under way to and from the device, and the
resident embedding. It leaves out what only a real device has: the CUDA context, the allocator's slack, cuDNN's workspace.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import harness
from jaxdp.models import causal_lm
from jaxdp.text import language_model_blocks
from jaxdp.zeroth_order import Gaussian, Law, LowRank, Rademacher, Sgd, TwoSided, buckets, programs, updates

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
    json: Path | None = None
    """Where to write the record."""


def measure(config: Config) -> dict[str, Any]:
    """Compiles every model, and returns the record that is written."""
    record: dict[str, Any] = {
        "benchmark": "device memory of a streamed zeroth-order step, compiled for an H200",
        "command": f".ci/aot python -m benchmarks.zeroth_order_memory --law {config.law}",
        "meter": "XLA compiled memory statistics, summed over what is alive; ZO2's figures are NVML's",
        "length": config.length,
        "law": config.law,
        "num_directions": config.num_directions,
        "versions": {"jax": jax.__version__},
        "rows": [],
    }
    for name in config.models:
        record["rows"].append(row(name, LAWS[config.law], length=config.length, num_directions=config.num_directions))
        print(_line(record["rows"][-1]), flush=True)
        if config.json is not None:
            harness.write_json(config.json, record)
    return record


def row(name: str, law: Law, *, length: int = 2048, num_directions: int = 1) -> dict[str, Any]:
    """The figures of one model, in bytes."""
    from tests.aot import h200

    num_blocks, width, num_heads, zo2_gigabytes = MODELS[name]
    model = causal_lm(_opt(num_blocks, width, num_heads), dtype=jnp.bfloat16, implementation="cudnn")
    shapes = model.shapes(jnp.bfloat16)
    resident = {part: shapes[part] for part in ("embed", "head") if part in shapes}
    layout, _ = buckets.layout_of(shapes["blocks"])
    estimator = TwoSided(num_directions)
    blocks = language_model_blocks(model)
    spec = programs.Spec(blocks, Sgd(1e-6), estimator, law, "nearest", layout, None)
    shape: Any = jax.ShapeDtypeStruct
    context = programs.Context(
        pending=jax.eval_shape(lambda: updates.nothing_pending(spec.sgd, num_directions, 1)),
        root=shape((2,), jnp.uint32),
        step=shape((), jnp.uint32),
        batch={"tokens": shape((1, 1, length), jnp.int32), "weights": shape((1, 1, length), jnp.float32)},
        frozen=None,
    )
    bucket = layout.bucket()
    _, streams = jax.eval_shape(lambda r, c: programs.start_and_write(spec, r, c), resident, context)
    index, mask = shape((), jnp.int32), shape((1,), jnp.bool_)
    compiled = {
        "start": h200.compile_for_h200(
            jax.jit(lambda r, c: programs.start_and_write(spec, r, c), donate_argnums=0), resident, context
        ),
        "visit": h200.compile_for_h200(
            jax.jit(lambda b, s, i, c: programs.visit_and_write(spec, b, s, i, None, c), donate_argnums=(0, 1)),
            *(bucket, streams, index, context),
        ),
        "finish": h200.compile_for_h200(
            lambda r, s, c, m: programs.finish(spec, r, s, c, m), resident, streams, context, mask
        ),
    }
    alone = {program: figures.device_bytes for program, figures in compiled.items()}
    resident_bytes = sum(2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(resident))

    def peak(prefetch: int) -> int:
        return max(
            alone["start"] + prefetch * layout.num_bytes,
            # One block computes, `prefetch` arrive, and one leaves; without prefetch it has left before the next arrives.
            alone["visit"] + resident_bytes + (prefetch + 1 if prefetch else 0) * layout.num_bytes,
            alone["finish"] + layout.num_bytes,
        )

    return {
        "model": name,
        "block_bytes": layout.num_bytes,
        "resident_bytes": resident_bytes,
        "host_bytes": num_blocks * layout.num_bytes,
        "program_bytes": alone,
        "temp_bytes": {program: figures.temp_bytes for program, figures in compiled.items()},
        "visit_alias_bytes": compiled["visit"].alias_bytes,
        "peak_bytes": {str(prefetch): peak(prefetch) for prefetch in (1, 0)},
        "zo2_nvml_gigabytes": zo2_gigabytes,
    }


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
    return (
        f"{found['model']}: block {found['block_bytes'] / _GIB:.2f} GiB, peak {found['peak_bytes']['1'] / _GIB:.2f} GiB with one "
        f"block prefetched, {found['peak_bytes']['0'] / _GIB:.2f} without; host {found['host_bytes'] / _GIB:.1f} GiB; ZO2 "
        f"{found['zo2_nvml_gigabytes']} GB"
    )


if __name__ == "__main__":
    measure(tyro.cli(Config))
