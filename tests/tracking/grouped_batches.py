"""Batches of groups, and what is to be found of them, by two float64 passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor import LayerReport
from tests.tracking.small_models import moments

C = 8
Grouped = Sequence[tuple[str, Tensor]]


def grouped(names: Sequence[str], offsets: Mapping[str, float] | None = None, seed: int = 0, n: int = 16) -> Grouped:
    """A batch ``(n, C)`` for each of these groups, which lies so far from zero."""
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets or {}
    return [(name, torch.randn(n, C, generator=generator) + offsets.get(name, 0.0)) for name in names]


def drawn(num: int, names: str = "abc", seed: int = 0) -> list[str]:
    """Groups in random order."""
    generator = torch.Generator().manual_seed(seed)
    return [names[index] for index in torch.randint(len(names), (num,), generator=generator).tolist()]


def batches_of(batches: Grouped, name: str) -> list[Tensor]:
    return [batch for group, batch in batches if group == name]


def shift_of(batches: Grouped, name: str, eps: float = 1e-5) -> float:
    """The error that normalising a group by all batches makes, value by value."""
    mean, var = moments([batch for _, batch in batches])
    values = np.concatenate([batch.double().numpy() for batch in batches_of(batches, name)])
    own_mean, own_var = moments(batches_of(batches, name))
    error = (values - mean) / np.sqrt(var + eps) - (values - own_mean) / np.sqrt(own_var + eps)
    bessel = (len(values)) / (len(values) - 1)  # of the part that is a difference of standard deviations
    squares = (error.mean(axis=0) ** 2) + error.var(axis=0) * bessel
    return float(np.sqrt(squares.mean()))


def noise_of(batches: Grouped, name: str, eps: float = 1e-5) -> float:
    """What chance makes of it, of batches in random order with as many runs as such have."""
    _, var = moments([batch for _, batch in batches])
    scale = np.zeros((2, len(var)))
    dof = 0
    for group in {group for group, _ in batches}:
        arrays = [batch.double().numpy() for batch in batches_of(batches, group)]
        n, means = len(arrays[0]), np.stack([array.mean(axis=0) for array in arrays])
        variances = np.stack([array.var(axis=0, ddof=1) for array in arrays])
        scale[0] += n * np.square(means - means.mean(axis=0)).sum(axis=0)
        scale[1] += (n - 1) * np.square(variances - variances.mean(axis=0)).sum(axis=0)
        dof += len(arrays) - 1
    num, total = len(batches_of(batches, name)), len(batches)
    n, scaled = len(batches[0][1]), var + eps
    per_channel = scale[0] / dof / (num * n) / scaled + scale[1] / dof / (num * (n - 1)) / (4 * scaled**2)
    expected = num * (total - num + 1) / total
    names = [group for group, _ in batches]
    runs = sum(group == name != before for before, group in zip([None, *names], names, strict=False))
    return math.sqrt(max(expected / runs, 1) * (1 - num / total) * per_channel.mean())


def assert_groups(layer: LayerReport, batches: Grouped, bound: float = 1e-5) -> None:
    """The report has the exact moments of each group, and its distance from all."""
    assert set(layer.groups) == {name for name, _ in batches}
    for name, group in layer.groups.items():
        own = batches_of(batches, name)
        mean, var = moments(own)
        assert group.num_batches == len(own)
        assert group.num_samples == sum(batch.numel() // batch.shape[1] for batch in own)
        assert np.all(np.abs(group.mean.numpy() - mean) <= bound * np.sqrt(var + layer.eps)), name
        assert np.all(np.abs(group.var.numpy() - var) <= bound * (var + layer.eps)), name
