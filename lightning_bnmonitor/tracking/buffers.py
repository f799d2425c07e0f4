"""Running statistics as they were at one moment: copies of layers' buffers, and what these are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.compat import BatchNorm, is_lazy

History = tuple[float, float, float]
"""The weight that the initial values have in running statistics, and the sums of squared weights over n and n - 1 of all
batches since. None in its place: not known, as the running statistics were there before."""
FRESH: History = (1.0, 0.0, 0.0)
"""Of running statistics that no batch has updated."""


class Snapshot(NamedTuple):
    """A layer's running statistics at one moment."""

    buffers: Tensor | None = None
    """Mean and variance, ``(2, C)`` in float64 on the CPU; None if the layer has none."""
    num_tracked: int | None = None
    """``num_batches_tracked``; None if it has none."""
    history: History | None = None
    """What the buffers are made of; None if that is not known."""

    def has_same_buffers(self, other: Snapshot) -> bool:
        """Whether the buffers are equal, to the bit. False if there are none."""
        if self.buffers is None or other.buffers is None:
            return False
        return np.array_equal(self.buffers.numpy(), other.buffers.numpy(), equal_nan=True)

    @property
    def is_initial(self) -> bool:
        """Whether no batch has updated them: zeros and ones that were never counted on, or none at all."""
        if self.num_tracked:
            return False
        if self.buffers is None:
            return True
        mean, var = self.buffers.numpy()
        return bool((mean == 0).all() and (var == 1).all())


def snapshots(layers: Sequence[BatchNorm]) -> list[Snapshot]:
    """The running statistics of layers as they are now, by one copy per device; what they are made of is left open."""
    pairs = zip(_running_stats(layers), _num_batches_tracked(layers), strict=True)
    return [Snapshot(buffers, num_tracked) for buffers, num_tracked in pairs]


def has_running_stats(layer: BatchNorm) -> bool:
    """Whether a layer has running statistics with values: not if it has none, or (a lazy one) not yet."""
    mean, var = layer.running_mean, layer.running_var
    return not (mean is None or var is None or is_lazy(mean) or mean.is_meta)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer is; the CPU if it has no values."""
    for tensor in (*module.buffers(), *module.parameters()):
        return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")


def _running_stats(layers: Sequence[BatchNorm]) -> list[Tensor | None]:
    by_device: dict[torch.device, list[int]] = {}
    for index, layer in enumerate(layers):
        if has_running_stats(layer):
            assert layer.running_mean is not None
            by_device.setdefault(layer.running_mean.device, []).append(index)
    copies: list[Tensor | None] = [None] * len(layers)
    for there in by_device.values():
        means, variances = zip(*((layers[i].running_mean, layers[i].running_var) for i in there), strict=True)
        stats = torch.stack([torch.cat(means), torch.cat(variances)]).detach().cpu().double()
        for index, copy in zip(there, torch.split(stats, [mean.numel() for mean in means], dim=1), strict=True):
            copies[index] = copy
    return copies


def _num_batches_tracked(layers: Sequence[BatchNorm]) -> list[int | None]:
    known = [
        (index, tracked)
        for index, layer in enumerate(layers)
        if (tracked := layer.num_batches_tracked) is not None and not tracked.is_meta
    ]
    counts: list[int | None] = [None] * len(layers)
    for device in {tracked.device for _, tracked in known}:
        there = [(index, tracked) for index, tracked in known if tracked.device == device]
        values = torch.stack([tracked.reshape(()) for _, tracked in there]).tolist()
        for (index, _), count in zip(there, values, strict=True):
            counts[index] = count
    return counts
