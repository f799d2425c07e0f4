"""Calls whose moments are not finite, which a guarded window leaves out: their updates are put back, too.

They are looked for when what waits is merged, which is the one time that a guarded model waits for its device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.capture.calls import Call
from lightning_bnmonitor.statistics.side_by_side import joined
from lightning_bnmonitor.statistics.window import Write
from lightning_bnmonitor.tracking.call_counts import WaitingCalls
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer


def not_finite(stashed: Mapping[TrackedLayer, Sequence[Call]]) -> dict[TrackedLayer, NDArray[np.bool_]]:
    """Which moments of calls that wait are not finite, ``(calls, C)``, of those layers that have any.

    Args:
        stashed: Calls of layers that have their places.
    """
    on_devices: dict[torch.device, list[Tensor]] = {}
    for layer, calls in stashed.items():
        for mean, var in _moments(layer, calls):
            on_devices.setdefault(mean.device, []).extend((mean, var))
    sums = [joined(tensors, device).sum() for device, tensors in on_devices.items()]
    if all(math.isfinite(total) for total in sums):
        return {}
    found = {layer: _of_layer(layer, calls) for layer, calls in stashed.items()}
    return {layer: is_bad for layer, is_bad in found.items() if is_bad.any()}


def without(layer: TrackedLayer, calls: Sequence[Call], is_bad: NDArray[np.bool_]) -> WaitingCalls:
    """Calls of a layer that wait, less those of which anything is bad."""
    left_out: list[bool] = np.any(is_bad, axis=1).tolist()
    good = [call for call, is_out in zip(calls, left_out, strict=True) if not is_out]
    waiting = layer.waiting(good) if good else WaitingCalls(None, layer.counts, 0, 0)
    counts = waiting.counts._replace(left_out=layer.counts.left_out + sum(left_out))
    return waiting._replace(counts=counts, num_calls=len(calls))


def noted(bad: Mapping[TrackedLayer, NDArray[np.bool_]]) -> list[Write]:
    """What is to be written for the windows to tell which calls were the first that were bad."""
    writes: list[Write] = []
    for layer, is_bad in bad.items():
        assert layer.window is not None
        number = layer.counts.total + layer.counts.left_out + 1 + np.arange(len(is_bad))
        first = torch.from_numpy(np.where(is_bad, number[:, None], math.inf).min(axis=0))
        known = layer.window.first_bad(layer.index)
        writes.append(partial(torch.minimum, known, first.to(known.device), out=known))
    return writes


def _of_layer(layer: TrackedLayer, calls: Sequence[Call]) -> NDArray[np.bool_]:
    is_bad = np.zeros((len(calls), layer.width), dtype=bool)
    for row, (mean, var) in zip(is_bad, _moments(layer, calls), strict=True):
        if len(mean) == layer.width:
            row[:] = (mean.isfinite() & var.isfinite()).logical_not().cpu().numpy()
    return is_bad


def _moments(layer: TrackedLayer, calls: Sequence[Call]) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and variance of each call; of a running variance in float16, what that adds to it, which it may not hold."""
    running = layer.module.running_var
    is_narrow = running is not None and running.dtype is torch.float16
    for mean, spread, _, kind in calls:
        var = spread if kind.eps is None else spread.reciprocal()
        if is_narrow and kind.updating and kind.momentum:
            var = (var * (kind.momentum * kind.num_samples / max(kind.num_samples - 1, 1))).half()
        yield mean, var
