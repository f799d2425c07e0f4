"""Where each layer's channels lie in arrays that hold those of all layers side by side."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class ChannelLayout:
    """Layers as consecutive ranges of one flat axis of channels: from one value a channel to one a layer, and back.

    Channels that are NaN are left out of every aggregate. ``L`` is the number of layers, ``C`` that of all channels.

    Args:
        widths: Channels of each layer, ``(L,)``; 0 for a layer that has none yet (a lazy one).
    """

    def __init__(self, widths: NDArray[np.int64]) -> None:
        self.widths = widths
        self.starts = np.cumsum(widths) - widths
        self.slices = [slice(start, start + width) for start, width in zip(self.starts, widths, strict=True)]
        self.num_layers, self.num_channels = len(widths), int(widths.sum())
        self._has_channels = widths > 0

    def spread(self, values: NDArray[np.generic]) -> FloatArray:
        """``(*, L)`` to ``(*, C)``: each channel its layer's value."""
        return np.repeat(values, self.widths, axis=-1)

    def columns(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the channels of some layers, in this order of the layers."""
        widths = self.widths[order]
        shifts = self.starts[order] - (np.cumsum(widths) - widths)
        columns: NDArray[np.int64] = np.arange(int(widths.sum())) + np.repeat(shifts, widths)
        return columns

    def total(self, values: FloatArray) -> FloatArray:
        """Sum over each layer's channels, ``(*, L)``."""
        return self._reduced(np.add, np.where(np.isfinite(values), values, 0), 0.0)

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean over each layer's channels, ``(*, L)``; NaN if none is left."""
        return self.total(values) / self.count(np.isfinite(values))

    def count(self, marks: BoolArray) -> FloatArray:
        """Number of each layer's channels that are marked, ``(*, L)``."""
        return self._reduced(np.add, marks, 0.0)

    def first(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Each layer's smallest value and the first of its channels that has it, ``(L,)``."""
        smallest = self._reduced(np.minimum, values, np.inf)
        channel = np.arange(self.num_channels) - self.spread(self.starts)
        candidates = np.where(values == self.spread(smallest), channel, np.inf)
        return smallest, self._reduced(np.minimum, candidates, np.inf)

    def maximum(self, values: FloatArray) -> FloatArray:
        """Maximum over each layer's channels and over all other axes, ``(L,)``; NaN if none is left."""
        several = values.reshape(math.prod(values.shape[:-1]), self.num_channels)
        return self._reduced(np.fmax, np.fmax.reduce(several, initial=np.nan), np.nan)

    def _reduced(self, function: np.ufunc, values: NDArray[np.generic], empty: float) -> FloatArray:
        reduced: FloatArray = np.full((*values.shape[:-1], self.num_layers), empty)
        if self.num_channels:
            starts = self.starts[self._has_channels]
            reduced[..., self._has_channels] = function.reduceat(values, starts, axis=-1, dtype=float)
        return reduced
