"""Single layers under a tracker, and data with every ailment that a window of batches may have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport


class Monitored:
    """A single layer under a tracker, window after window."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.model = layer, nn.Sequential(layer)
        self.tracker = BatchNormTracker(self.model).attach()
        self.in_window = True

    def window(self, batches: Iterable[Tensor], call: Callable[[Tensor], object] | None = None) -> LayerReport:
        """Feed it a window of batches and close that: what happens until the next one happens between windows."""
        if not self.in_window:
            self.tracker.reset()
        for x in batches:
            (call or self.model)(x)
        self.in_window = False
        return self.closed()

    def closed(self) -> LayerReport:
        return self.tracker.close()["0"]


WIDTH = 16


def samples(
    num_batches: int,
    batch_size: int,
    width: int = WIDTH,
    seed: int = 0,
    *,
    positions: tuple[int, ...] = (),
    offset: float = 0.0,
    drift: float = 0.0,
    shared: float = 0.0,
    classes: tuple[float, ...] = (0.0,),
) -> list[Tensor]:
    """Normal values of variance 1: ``drift`` moves their mean per batch, and each batch shares a random offset.

    The window's parts come from ``classes`` of different means, one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    place = (1, width, *[1] * len(positions))
    batches = []
    for t in range(num_batches):
        mean = offset + drift * t + classes[t * len(classes) // num_batches]
        together = shared * torch.randn(place, generator=generator)
        batches.append(torch.randn(batch_size, width, *positions, generator=generator) + mean + together)
    return batches


def norm(width: int = WIDTH, **options) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(width, **options)


def unmoved(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """A layer with buffers that it does not update."""
    layer.track_running_stats = False
    return layer


def frozen(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    return layer.eval()


def pretrained(offset: float, **options) -> nn.BatchNorm1d:
    """A layer whose running statistics have been trained to another mean."""
    layer = norm(**options)
    layer.running_mean += offset
    layer.num_batches_tracked += 1000
    return layer


def moved(layer: nn.Module, drift: float) -> nn.Module:
    """A layer whose inputs move by so much a call, as the weights before it may make them."""
    calls = itertools.count()
    layer.register_forward_pre_hook(lambda _, args: (args[0] + drift * next(calls),))
    return layer


def checkpointed(layer: nn.Module, reentrant: bool) -> Callable[[Tensor], None]:
    """A training step of the layer under activation checkpointing."""
    return lambda x: checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
