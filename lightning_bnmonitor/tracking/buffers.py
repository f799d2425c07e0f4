"""Copies of the buffers of BatchNorm layers, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_bnmonitor.compat import _BatchNorm, is_lazy

_RUNNING_STATS = ("running_mean", "running_var")
_BUFFERS = (*_RUNNING_STATS, "num_batches_tracked")


class SavedBuffers:
    """Copies of layers' running statistics and ``num_batches_tracked``, on the layers' device and in their dtype."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._copies = {
            layer: {
                name: buffer.detach().clone()
                for name in _BUFFERS
                if (buffer := getattr(layer, name)) is not None and not is_lazy(buffer)
            }
            for layer in layers
        }

    def of(self, layers: Iterable[_BatchNorm]) -> SavedBuffers:
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


def copied_stats(layer: _BatchNorm) -> Tensor | None:
    """A copy of a layer's running mean and variance on the CPU, ``(2, C)`` in their dtype; None if it has none."""
    mean, var = (getattr(layer, name) for name in _RUNNING_STATS)
    return None if mean is None or var is None else torch.stack([mean, var]).detach().cpu()


@torch.no_grad()
def write_stats(layer: _BatchNorm, stats: Iterable[Tensor]) -> None:
    """Write a running mean and variance, ``(C,)`` each or together ``(2, C)``, into a layer's buffers."""
    for name, values in zip(_RUNNING_STATS, stats, strict=True):
        getattr(layer, name).copy_(values)
