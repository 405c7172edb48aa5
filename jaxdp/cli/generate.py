"""`jaxdp generate`: what a model writes, for a look."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxdp import _validate
from jaxdp.cli.options import hint
from jaxdp.models import generate
from jaxdp.models.peft import load_adapter
from jaxdp.models.tokenizer import check_matches, load_tokenizer
from jaxdp.models.weights import load_model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt with a model from a Hugging Face folder.

    jaxdp generate --model runs/gpt2/model --prompt "Once upon a time"
    jaxdp generate --model models/gpt2 --adapter runs/gpt2/adapter --prompt "Dear" --temperature 0.8 --top-k 40 --seed 1
    """

    model: Path
    """Hugging Face folder with config.json, safetensors and tokenizer."""
    prompt: str
    """What the text begins with; may be empty."""
    adapter: Annotated[Path | None, hint("default: none", "DIR")] = None
    """PEFT adapter folder to put on the model."""
    max_new_tokens: int = 100
    """Stop after so many tokens, or where the model ends the text."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples as the model predicts."""
    top_k: Annotated[int | None, hint("default: all")] = None
    """Sample among the likeliest tokens only."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""


def run(config: Generate) -> None:
    """Prints the prompt and what follows it.

    Raises:
        ValueError, TypeError, OSError: bad input.
    """
    _validate.nonnegative_integer("seed", config.seed)
    if config.temperature == 0 and config.top_k is not None:
        raise ValueError(f"--top-k {config.top_k} has no effect at --temperature 0; raise the temperature to sample.")
    pretrained = load_model(config.model, dtype=jnp.dtype(config.dtype), param_dtype=None)
    tokenizer = load_tokenizer(config.model)
    check_matches(tokenizer, pretrained.model)
    model, params = pretrained.model, pretrained.params
    if config.adapter is not None:
        model, params = load_adapter(config.adapter, model, params)
    tokens = tokenizer.encode(config.prompt, allow_special_tokens=True)
    ends = {token for token in (tokenizer.eos_id, tokenizer.bos_id) if token is not None}
    if not tokens:  # GPT-2 puts nothing before a text
        tokens = sorted(ends)[:1]
    new = generate(
        model,
        params,
        tokens,
        max_new_tokens=config.max_new_tokens,
        key=jax.random.key(config.seed),
        temperature=config.temperature,
        top_k=config.top_k,
        stop_tokens=ends,
    )
    print(tokenizer.decode([*tokens, *new]))
