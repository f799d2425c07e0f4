"""The independent expectation: population statistics of what layers received, in two float64 passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

C = 3


SIZES = (8, 5, 13, 2, 30, 7, 9, 8, 4, 6)


def moments(received: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values of ``(N, C, *)`` batches, in two float64 passes."""
    arrays = [np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1) for x in received]
    values = np.concatenate(arrays, axis=1)
    mean = values.mean(axis=1)
    return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def error_in_eval(layer: nn.Module, received: list[Tensor]) -> float:
    """RMS over all values, in float64, of what the layer's buffers make of them against what the population does."""
    x = np.concatenate([np.moveaxis(r.detach().double().numpy(), 1, 0).reshape(r.shape[1], -1) for r in received], 1)
    (mean, var), eps = moments(received), layer.eps
    running_mean, running_var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    apart = (x.T - running_mean) / np.sqrt(running_var + eps) - (x.T - mean) / np.sqrt(var + eps)
    return float(np.sqrt(np.square(apart).mean()))


def assert_written(layer: nn.Module, received: list[Tensor], rtol: float = 1e-5, rounding: float = 1e-7) -> None:
    """The buffers hold the population of what was received, up to their own rounding."""
    mean, var = moments(received)
    apart = np.abs(layer.running_mean.double().numpy() - mean)
    assert np.all(apart <= rounding * np.abs(mean) + 1e-6 * np.sqrt(var))
    np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=rtol)


class Recorder:
    """Everything that each BatchNorm layer of a model receives, by name, in each of its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.received: dict[str, list[Tensor]] = {}
        self.training: dict[str, list[bool]] = {}
        for name, layer in layers_of(model).items():
            layer.register_forward_pre_hook(lambda _, args, name=name: self.keep(name, _, args[0]))

    def keep(self, name: str, layer: nn.Module, x: Tensor) -> None:
        self.received.setdefault(name, []).append(x.detach().clone())
        self.training.setdefault(name, []).append(layer.training)

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.received[name]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def data(
    sizes: tuple[int, ...] = SIZES, shape: tuple[int, ...] = (C,), mean: float = 3.0, std: float = 2.0
) -> list[Tensor]:
    """Batches whose means and variances differ from each other, and from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return [
        (torch.randn(n, *shape, generator=generator) * std * (1 + t % 3) + mean + std * (t % 4)) * scale
        for t, n in enumerate(sizes)
    ]
