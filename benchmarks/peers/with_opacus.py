"""Opacus: per-example gradients from hooks, or ghost clipping; and plain PyTorch, the yardstick of both."""

from __future__ import annotations

import warnings
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from opacus.grad_sample import (  # pyright: ignore[reportMissingImports]
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import (  # pyright: ignore[reportMissingImports]
    DPOptimizer,
    DPOptimizerFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (  # pyright: ignore[reportMissingImports]
    DPLossFastGradientClipping,
)

from benchmarks.peers.torch_models import build
from benchmarks.peers.trainer import Problem, Settings, Trainer

# Opacus puts full backward hooks on layers whose inputs need no gradient, and PyTorch remarks on it at every first layer.
warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)


def make_non_private(problem: Problem, settings: Settings, *, device: str = "cpu", dtype: str = "float32") -> Trainer:
    module = build(problem.model, problem.params()).to(device, getattr(torch, dtype))
    optimizer = torch.optim.SGD(module.parameters(), settings.learning_rate)
    return _trainer(problem, module, module, optimizer, _mean_loss)


def make(problem: Problem, settings: Settings, *, device: str = "cpu", dtype: str = "float32") -> Trainer:
    module = build(problem.model, problem.params()).to(device, getattr(torch, dtype))
    wrapped = GradSampleModule(module)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), settings.learning_rate),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.l2_clip_norm,
        expected_batch_size=problem.rows,
    )
    return _trainer(problem, module, wrapped, optimizer, _mean_loss)


def make_ghost(problem: Problem, settings: Settings, *, device: str = "cpu", dtype: str = "float32") -> Trainer:
    module = build(problem.model, problem.params()).to(device, getattr(torch, dtype))
    wrapped = GradSampleModuleFastGradientClipping(
        module,
        max_grad_norm=settings.l2_clip_norm,  # pyright: ignore[reportArgumentType]  # its annotation says int
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), settings.learning_rate),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.l2_clip_norm,
        expected_batch_size=problem.rows,
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, torch.nn.CrossEntropyLoss())

    def loss(logits: Any, labels: Any) -> Any:
        if logits.ndim == 2:  # [B, classes]
            return criterion(logits, labels)
        return criterion(logits.flatten(0, 1), labels.flatten(), shape=logits.shape)  # [B, L, vocabulary]

    return _trainer(problem, module, wrapped, optimizer, loss)


def _mean_loss(logits: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _trainer(problem: Problem, module: Any, wrapped: Any, optimizer: Any, loss: Any) -> Trainer:
    device = next(module.parameters()).device
    batch = {name: torch.from_numpy(rows).to(device) for name, rows in problem.batch().items()}
    labels = batch["labels"].long()

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(batch["inputs"]), labels).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def params() -> dict[str, Any]:
        return {name: param.detach().float().cpu().numpy().copy() for name, param in module.named_parameters()}

    return Trainer(step, params, None)
