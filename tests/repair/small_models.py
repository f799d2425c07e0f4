"""Models to recalibrate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.repair.exact_population import C


class Net(nn.Module):
    """Three layers, one behind the other, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.drop = nn.BatchNorm1d(C), nn.Linear(C, 4), nn.Dropout(0.5)
        self.b, self.two, self.c = nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.two(self.drop(torch.relu(self.b(self.one(self.a(x)))))))


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    for _ in range(steps):
        model(torch.randn(16, C))
    return model


def single(**kwargs: Any) -> nn.Sequential:
    return trained(nn.Sequential(nn.BatchNorm1d(C, **kwargs), nn.Linear(C, 2)))
