"""Layers as segments of the flat channel space: from one value a channel to one a layer, and back; their scores.

And what a window keeps per layer: how batches are merged into it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
K, N, W, Q, QV, B = range(6)  # what a block sums per layer
A, S = range(2)  # what a layer keeps of its momenta


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


class Calls(NamedTuple):
    """Batches of one layer, field by field."""

    layer: int
    fields: Any
    """Their ``window.Batches``."""
    lead: tuple[int, ...]
    """The number that each batch has in the window, less its number among these."""


class Table(NamedTuple):
    """What the merge of a group's channels needs per layer, ``(rows, layers)``.

    There is a row for each batch, or one if these are all alike.
    """

    weight: FloatArray
    """Weights of each part, old rows first: n and n - K in turn. If all batches are alike, those of the first."""
    total: FloatArray
    """The same of each of the new rows."""
    bessel: FloatArray
    """n / (n - 1)."""
    eps: FloatArray
    """NaN where the spread is a variance."""
    lead: FloatArray
    """Those of :class:`Calls`."""


def merge_scalars(
    group: list[Calls], old: slice, new: slice, union: NDArray[np.int64], scalars: FloatArray, momenta: FloatArray
) -> tuple[Table, FloatArray]:
    """Merge what is kept per layer, in place: the ``old`` rows and the batches of a group into the ``new`` rows.

    ``union`` tells for every part, old rows first, which of the new rows it belongs to. Returns what the merge of the
    channels needs: a table, and of 0 and 1 which part is in which row, ``(rows, P)``.
    """
    members = (np.arange(new.stop - new.start)[:, None] == union).astype(float)
    everything = len(group) == len(scalars)
    layers = slice(None) if everything else [calls.layer for calls in group]
    num_old, num_added, num_layers = old.stop - old.start, len(group[0].lead), len(group)
    count = _rows_of([calls.fields.num_samples for calls in group])
    momentum = np.empty((num_added, num_layers))
    momentum[:] = _rows_of([calls.fields.momentum for calls in group])
    since = np.ones((num_added + 1, num_layers))  # what remains at the end of what stood before each batch
    np.cumprod((1 - momentum)[::-1], axis=0, out=since[-2::-1])
    remains, after = since[0], since[1:]
    weight, dof = momentum * after, np.maximum(count - 1, 1)

    scalars[layers, : old.stop, W] *= remains[:, None]
    scalars[layers, : old.stop, Q : QV + 1] *= np.square(remains)[:, None, None]
    parts = np.empty((num_old + num_added, num_layers, 6))
    parts[:num_old] = scalars[layers, old].transpose(1, 0, 2)
    batch = parts[num_old:]
    batch[..., K], batch[..., N], batch[..., W] = 1, count, weight
    batch[..., B] = _rows_of([calls.fields.batch_size for calls in group])
    batch[..., Q], batch[..., QV] = weight**2 / count, weight**2 / dof

    merged = (members @ parts.reshape(len(parts), -1)).reshape(-1, num_layers, 6)
    scalars[layers, old] = 0
    scalars[layers, new] = merged.transpose(1, 0, 2)
    momenta[layers, A] *= remains
    momenta[layers, S] = momenta[layers, S] * remains + (after * (momentum > 0)).sum(axis=0)
    weights, total = _weights(parts[: num_old + len(count)]), _weights(merged)
    eps, lead = _rows_of([calls.fields.eps for calls in group]), _rows_of([calls.lead for calls in group])
    return Table(weights, total, count / dof, eps, lead), members


def _weights(parts: FloatArray) -> FloatArray:
    """Of what is kept of parts of some layers, ``(P, L, 6)``: n and n - K in turn, ``(2 * P, L)``."""
    weights = np.empty((len(parts), 2, parts.shape[1]))
    weights[:] = parts[:, None, :, N]
    weights[:, 1] -= parts[..., K]
    return weights.reshape(-1, parts.shape[1])


def _rows_of(columns: list[Any]) -> FloatArray:
    """A row for each batch of a column for each layer, or one row if these are all alike. None becomes NaN."""
    if all(column.count(column[0]) == len(column) for column in columns):
        columns = [column[:1] for column in columns]
    rows: FloatArray = np.array(columns, dtype=float).T
    return rows
