"""Small models to monitor, and what a report must say of the batches that they were given."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from lightning_bnmonitor import LayerReport, Report

C = 3


def moments(batches: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values of ``(N, C, *)`` batches, in two float64 passes."""
    arrays = [batch.detach().double().numpy() for batch in batches]
    values = np.concatenate([np.moveaxis(array, 1, 0).reshape(array.shape[1], -1) for array in arrays], axis=1)
    mean = values.mean(axis=1)
    return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def assert_population(layer: LayerReport, batches: list[Tensor], bound: float = 1e-5) -> None:
    assert layer.num_batches == len(batches)
    assert layer.num_samples == sum(batch.numel() // batch.shape[1] for batch in batches)
    mean, var = moments(batches)
    assert np.all(np.abs(layer.population_mean.numpy() - mean) <= bound * np.sqrt(var))
    assert np.all(np.abs(layer.population_var.numpy() - var) <= bound * (var + layer.eps))


def assert_same(one: Report, other: Report, bound: float = 1e-12) -> None:
    """All that reports say is the same, numbers up to rounding."""
    assert list(one) == list(other)
    assert_alike(one.to_dict(), other.to_dict(), bound)


def assert_alike(one: Any, other: Any, bound: float = 1e-12, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:  # a z-score is a difference over its noise, and makes of the rounding of one that of the other
            own = max(bound, 1e-5) if str(key).startswith("z_") else bound
            assert_alike(one[key], other[key], own, f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, bound, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True, msg=lambda text: where + text)
    elif isinstance(one, float) and not math.isnan(one):
        assert math.isclose(one, other, rel_tol=bound, abs_tol=bound), (where, one, other)
    elif isinstance(one, float):
        assert math.isnan(other), where
    else:
        assert one == other, where


def hooks_on(model: nn.Module) -> list[Any]:
    """Every hook of every module of a model, and those of all optimizers."""
    hooks: list[Any] = list(torch_optimizer._global_optimizer_post_hooks.values())
    for module in model.modules():
        for name, registered in vars(module).items():
            if "hooks" in name and registered:
                hooks += [(name, hook) for hook in registered.values()]
    return hooks


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 2), nn.BatchNorm1d(2))


class Several(nn.Module):
    """Calls the BatchNorm layers that it is told to."""

    def __init__(self, num: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(C, dtype=dtype) for _ in range(num))

    def forward(self, x: Tensor, which: list[int]) -> None:
        for index in which:
            self.layers[index](x)


def feed(model: nn.Module, num_batches: int, size: int = 8) -> list[Tensor]:
    """Train on batches from one distribution, in every channel; return them."""
    batches = [torch.randn(size, C) * 2 + 3 for _ in range(num_batches)]
    for x in batches:
        model(x)
    return batches


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(C)
        self.block = nn.ModuleDict({"bn1": nn.BatchNorm1d(C), "bn2": nn.BatchNorm1d(C)})
        self.head = nn.Sequential(nn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block["bn2"](self.block["bn1"](self.stem(x))))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
