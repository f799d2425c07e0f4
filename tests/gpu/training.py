"""Small networks, their data and training steps on the device, and what their BatchNorm layers receive.

``BNMONITOR_DEVICE=cpu`` runs the same without a GPU, where it can: a rehearsal.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import Report

DEVICE = torch.device(os.environ.get("BNMONITOR_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="rehearsed on the CPU, which has nothing like it")
SIZE = 12


def network(width: int = 16, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Three BatchNorm layers: ``1``, ``4`` and, of inputs with one position a sample, ``9``."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), norm(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), norm(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
    ).to(DEVICE)


class Checkpointed(nn.Module):
    """:func:`network`, the first six modules under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = network()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(self.reentrant)  # without it, a reentrant checkpoint has no gradients
        return self.layers[6:](checkpoint(self.layers[:6], x, use_reentrant=self.reentrant))


def images(step: int, size: int = 32, **options: Any) -> Tensor:
    """A batch, ``(N, 3, 12, 12)``, that depends on nothing but the step."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(size, 3, SIZE, SIZE, generator=generator) + 1).to(DEVICE, **options)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, autocast: torch.dtype | None = None
) -> Tensor:
    """One step. Returns the loss, on the device."""
    with torch.autocast(DEVICE.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    model: nn.Module,
    steps: range | int = 80,
    lr: float = 0.01,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """Steps on a batch each, with momentum; by default so many that there is an update. Returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    steps = range(steps) if isinstance(steps, int) else steps
    return [training_step(model, optimizer, images(step, **options), autocast) for step in steps]


class Received:
    """What every BatchNorm layer of a model receives, by name, but for recomputed calls and those that are captured.

    It waits for the device at every call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.batches: dict[str, list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(self._hook_of(name))

    def _hook_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            is_recomputed = torch._C._current_graph_task_id() != -1
            is_captured = ON_CUDA and torch.cuda.is_current_stream_capturing()
            if not (is_recomputed or is_captured):
                self.batches[name].append(args[0].detach().clone().cpu())

        return hook


def moments(batches: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and unbiased variance, ``(C,)``, of all values of batches, in float64 and two passes; and their number."""
    values = torch.cat([batch.cpu().double().movedim(1, -1).reshape(-1, batch.shape[1]) for batch in batches]).numpy()
    return values.mean(axis=0), values.var(axis=0, ddof=1), len(values)


def paths(report: Report, name: str) -> dict[str, float]:
    """Calls of a layer by the way in which their moments were obtained; those that there were none of left out."""
    evidence = report[name].evidence
    return {path: count for path in ("saved", "traced", "pass") if (count := evidence[f"calls_{path}"])}


def assert_exact(
    report: Report,
    batches: dict[str, list[Tensor]],
    path: str | None = None,
    mean_bound: float = 1e-6,
    var_bound: float = 1e-5,
) -> None:
    """The population is that of these batches; None for ``path``: whatever way they came.

    Bounds are in standard deviations, times 1 + |mean| / std as float32 rounds the mean of a batch, and relative.
    """
    assert set(report) == set(batches)
    for name, received in batches.items():
        mean, var, num_samples = moments(received)
        layer, std = report[name], np.sqrt(var)
        assert (layer.num_batches, layer.num_samples) == (len(received), num_samples), name
        counted = paths(report, name)
        assert sum(counted.values()) == len(received), name
        if path is not None:
            assert list(counted) == [path], name
        error = np.abs(layer.population_mean.cpu().numpy() - mean) / std
        assert (error <= mean_bound * (1 + np.abs(mean) / std)).all(), (name, error.max())
        var_error = np.abs(layer.population_var.cpu().numpy() / var - 1)
        assert (var_error <= var_bound).all(), (name, var_error.max())
