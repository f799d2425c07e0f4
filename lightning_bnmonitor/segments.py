"""Layers as segments of the flat channel space: from one value a channel to one a layer, and back; their scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Segments:
    """Layers as segments of the flat channel space. Channels that are NaN are left out of every aggregate."""

    def __init__(self, widths: NDArray[np.int64]) -> None:
        self.widths = widths
        self.starts = np.cumsum(widths) - widths
        self.slices = [slice(start, start + width) for start, width in zip(self.starts, widths, strict=True)]
        self.num_channels = int(widths.sum())

    def spread(self, values: NDArray[np.generic]) -> FloatArray:
        """``(*, L)`` to ``(*, C)``: each channel its layer's value."""
        return np.repeat(values, self.widths, axis=-1)

    def total(self, values: FloatArray) -> FloatArray:
        """Sum over each layer's channels, ``(*, L)``."""
        total: FloatArray = np.add.reduceat(np.where(np.isfinite(values), values, 0), self.starts, axis=-1)
        return total

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean over each layer's channels, ``(*, L)``; NaN if none is left."""
        return self.total(values) / self.count(np.isfinite(values))

    def count(self, marks: BoolArray) -> FloatArray:
        """Number of each layer's channels that are marked, ``(*, L)``."""
        number: FloatArray = np.add.reduceat(marks, self.starts, axis=-1, dtype=float)
        return number

    def first(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Each layer's smallest value and the first of its channels that has it, ``(L,)``."""
        smallest: FloatArray = np.minimum.reduceat(values, self.starts)
        channel = np.arange(self.num_channels) - self.spread(self.starts)
        candidates = np.where(values == self.spread(smallest), channel, np.inf)
        return smallest, np.minimum.reduceat(candidates, self.starts)

    def maximum(self, values: FloatArray) -> FloatArray:
        """Maximum over each layer's channels and over all other axes, ``(L,)``; NaN if none is left."""
        return np.fmax.reduceat(np.fmax.reduce(values.reshape(-1, self.num_channels)), self.starts)


def student_score(z: FloatArray, dof: FloatArray) -> FloatArray:
    """Student's t with ``dof`` degrees of freedom on the scale of a standard normal variable (Wallace, 1959)."""
    score: FloatArray = np.square(z)
    score /= dof
    np.sqrt(np.log1p(score, out=score), out=score)
    score *= (8 * dof + 1) / (8 * dof + 3) * np.sqrt(dof)
    return np.copysign(score, z, out=score)
