"""The models of `benchmarks.models` as torch modules, with the same parameter names."""

from __future__ import annotations

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.models import LAYER_NORM_EPS, Mlp, Model, Params, Transformer


def build(model: Model, params: Params) -> Any:
    """Returns the torch module of a model, holding copies of `params`."""
    if isinstance(model, Mlp):
        module = TorchMlp(model)
    elif isinstance(model, Transformer):
        module = TorchTransformer(model)
    else:
        raise NotImplementedError(f"{type(model).__name__} has no torch module.")
    module.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in params.items()})
    return module


class TorchMlp(nn.Module):
    def __init__(self, model: Mlp):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(model.widths, model.widths[1:], strict=False))

    def forward(self, x: Any) -> Any:
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.feed_forward_out = nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:  # [B, L, D]
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, heads, L, D/heads]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        hidden = nn.functional.gelu(self.feed_forward_in(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.feed_forward_out(hidden)


class TorchTransformer(nn.Module):
    def __init__(self, model: Transformer):
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary, model.width)
        self.positions = nn.Embedding(model.length, model.width)
        self.blocks = nn.ModuleList(Block(model.width, model.num_heads) for _ in range(model.num_blocks))
        self.norm = nn.LayerNorm(model.width, LAYER_NORM_EPS)
        self.head = nn.Linear(model.width, model.vocabulary, bias=False)

    def forward(self, tokens: Any) -> Any:  # [B, L]
        # Opacus reads the batch axis off every layer's input, so each example brings its own positions.
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
