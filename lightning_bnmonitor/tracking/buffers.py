"""Copies of layers' running statistics: as they were at one moment, and what they are made of; and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.compat import BatchNorm, is_lazy


class History(NamedTuple):
    """What running statistics are made of."""

    initial_weight: float
    """The weight that the initial values have in them."""
    noise_of_mean: float
    """The sum of squared weights over n of all batches since."""
    noise_of_var: float
    """The same over n - 1."""


_RUNNING_STATS = ("running_mean", "running_var")
_BUFFERS = (*_RUNNING_STATS, "num_batches_tracked")
FRESH = History(1.0, 0.0, 0.0)
"""Of running statistics that no batch has updated."""


class Snapshot(NamedTuple):
    """A layer's running statistics at one moment."""

    buffers: Tensor | None = None
    """Mean and variance, ``(2, C)`` in float64 on the CPU; None if the layer has none."""
    num_tracked: int | None = None
    """``num_batches_tracked``; None if it has none."""
    history: History | None = None
    """What the buffers are made of; None if that is not known, as they were there before."""

    def has_same_buffers(self, other: Snapshot) -> bool:
        """Whether the buffers are equal, to the bit. False if there are none."""
        if self.buffers is None or other.buffers is None:
            return False
        return np.array_equal(self.buffers.numpy(), other.buffers.numpy(), equal_nan=True)

    @property
    def is_initial(self) -> bool:
        """Whether no batch has updated them: they are zeros and ones and no update was counted, or there are none."""
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


class SavedBuffers:
    """Copies of layers' running statistics and ``num_batches_tracked``, on the layers' device and in their dtype."""

    def __init__(self, layers: Iterable[BatchNorm]) -> None:
        self._copies = {
            layer: {
                name: buffer.detach().clone()
                for name in _BUFFERS
                if (buffer := getattr(layer, name)) is not None and not is_lazy(buffer)
            }
            for layer in layers
        }

    def of(self, layers: Iterable[BatchNorm]) -> SavedBuffers:
        """The same copies, of some of the layers only."""
        some = SavedBuffers(())
        some._copies = {layer: self._copies[layer] for layer in layers}
        return some

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back into the layers' buffers, which may be on another device by now."""
        writes = [
            (getattr(layer, name), values) for layer, copies in self._copies.items() for name, values in copies.items()
        ]
        with torch.inference_mode(any(buffer.is_inference() for buffer, _ in writes)):
            for buffer, values in writes:
                buffer.copy_(values)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """A context that writes them back if it is left by an error or an interrupt."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    @contextmanager
    def restored_at_end(self) -> Iterator[None]:
        """A context that writes them back however it is left."""
        try:
            yield
        finally:
            self.restore()


def copied_stats(layer: BatchNorm) -> Tensor | None:
    """A copy of a layer's running mean and variance on the CPU, ``(2, C)`` in their dtype; None if it has none."""
    ((buffers, _, _),) = snapshots([layer])
    return None if buffers is None or layer.running_mean is None else buffers.to(layer.running_mean.dtype)


@torch.no_grad()
def write_stats(layer: BatchNorm, stats: Iterable[Tensor]) -> None:
    """Write a running mean and variance, ``(C,)`` each or together ``(2, C)``, into a layer's buffers."""
    for name, values in zip(_RUNNING_STATS, stats, strict=True):
        getattr(layer, name).copy_(values)


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
