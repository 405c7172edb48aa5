"""MeZO in PyTorch, eagerly and in place, as its authors run it: the peer of `benchmarks.zeroth_order`.

w is perturbed by +μz, -2μz and +μz, and updated, each time by directions drawn again from a seed (arXiv 2305.17333, algorithm 1).
The model is OPT's: pre-norm blocks with fused attention, learned positions, a tied head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.zeroth_order_problems import Problem

_SCALE, _LEARNING_RATE = 1e-3, 1e-6


def why_not() -> str | None:
    """Why the peer cannot run, or None."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "torch is not installed"
    return None


def mezo(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """A MeZO step, and a plain forward pass, of one model with random weights; each returns when it has finished."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, problem.dtype)
    with torch.device(device):
        params = _params(problem, dtype)
    tokens = torch.as_tensor(problem.draw_batch()["tokens"][:, 0], device=device, dtype=torch.long)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def shift(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for leaf in params:
            leaf.data.add_(torch.normal(0.0, 1.0, leaf.shape, device=device, dtype=dtype), alpha=scale)

    step_index = 0

    def step() -> None:
        nonlocal step_index
        with torch.inference_mode():
            shift(step_index, _SCALE)
            plus = _loss(problem, params, tokens)
            shift(step_index, -2 * _SCALE)
            minus = _loss(problem, params, tokens)
            shift(step_index, _SCALE)
            projected_gradient = ((plus - minus) / (2 * _SCALE)).item()
            shift(step_index, -_LEARNING_RATE * projected_gradient)
        step_index += 1
        finish()

    def forward() -> None:
        with torch.inference_mode():
            _loss(problem, params, tokens)
        finish()

    return step, forward


def peak_bytes() -> int | None:
    """Device memory that PyTorch's allocator had handed out at most; None on a CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


_LEAVES_OF_A_BLOCK = 12


def _params(problem: Problem, dtype: Any) -> list[Any]:
    """Embedding, positions, scale and bias of the last norm, and twelve leaves for each block."""
    import torch  # pyright: ignore[reportMissingImports]

    D = problem.width

    def matrix(*shape: int) -> Any:
        return torch.empty(*shape, dtype=dtype).normal_(0.0, 0.02)

    def norm() -> list[Any]:
        return [torch.ones(D, dtype=dtype), torch.zeros(D, dtype=dtype)]

    def linear(fan_in: int, fan_out: int) -> list[Any]:
        return [matrix(fan_out, fan_in), torch.zeros(fan_out, dtype=dtype)]

    params = [matrix(problem.vocabulary, D), matrix(problem.length, D), *norm()]
    for _ in range(problem.num_blocks):
        params += [*norm(), *linear(D, 3 * D), *linear(D, D), *norm(), *linear(D, 4 * D), *linear(4 * D, D)]
    return params


def _loss(problem: Problem, params: list[Any], tokens: Any) -> Any:
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    B, T = tokens.shape
    D, H = problem.width, problem.num_heads
    embedding, positions, *last_norm = params[:4]
    x = embedding[tokens] + positions[:T]
    for i in range(problem.num_blocks):
        begin = 4 + _LEAVES_OF_A_BLOCK * i
        a, b, qkv, qkv_bias, out, out_bias, c, d, up, up_bias, down, down_bias = params[
            begin : begin + _LEAVES_OF_A_BLOCK
        ]
        heads = F.linear(F.layer_norm(x, (D,), a, b), qkv, qkv_bias).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + F.linear(attended.transpose(1, 2).reshape(B, T, D), out, out_bias)
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (D,), c, d), up, up_bias)), down, down_bias)
    logits = F.linear(F.layer_norm(x, (D,), *last_norm), embedding)
    return F.cross_entropy(logits[:, :-1].reshape(-1, problem.vocabulary).float(), tokens[:, 1:].reshape(-1))
