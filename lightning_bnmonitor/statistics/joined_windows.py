r"""Short windows that follow each other, laid end to end: what is kept of those before, and the window that they make.

Chance and trouble cannot be told apart in fewer than :data:`ENOUGH` batches. Where a window has fewer, the fewest last
windows that have as many together are judged as if they were one. With A and S of each window (see
:mod:`~lightning_bnmonitor.statistics.window`), the sums of weights W of a window's blocks are multiplied by the product
of the A of the windows after it, Q by its square; A of the whole is the product of all, and
:math:`S \leftarrow S A_\text{next} + S_\text{next}`. What the running statistics began as is what they were when the
first of these windows began. Windows of fewer than 8 batches have a block for each, and the fewest that suffice make 14
at most: no block needs to be merged.

*Checked by simulation:* that is, to rounding, what one window of all these batches shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightning_bnmonitor.statistics.blocks import Blocks
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray

ENOUGH = 8
"""Batches from which chance and trouble are told apart."""
_SCALARS = 5  # of a window, whatever its length
_OF_BATCHES = 3  # numbers of each batch, besides those of channels


class KeptWindow(NamedTuple):
    """One layer's part of a window that has ended, of fewer than 8 batches that updated the running statistics."""

    decay: float
    """A: the weight that the buffers at its start had in those at its end."""
    rounding: float
    """S: the sum of the decays that each update's rounding has undergone."""
    initial_weight: float
    """A0: the weight that the initial values had in the buffers at its start."""
    noise: FloatArray
    """Q0: the sum of squared weights over n and over n - 1 of earlier batches in them, ``(2,)``."""
    num_samples: FloatArray
    """Values per channel in each batch, ``(T,)``."""
    batch_size: FloatArray
    """Samples in each, ``(T,)``."""
    weight: FloatArray
    """W: its weight in the buffers at the window's end, ``(T,)``."""
    start: FloatArray
    """Running mean and variance when the window began, ``(2, C)``."""
    value: FloatArray
    """Mean and unbiased variance of each batch, ``(T, 2, C)``."""

    @property
    def num_batches(self) -> int:
        """T."""
        return len(self.num_samples)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return 8 * self.packed_size(self.num_batches, self.start.shape[1])

    def packed(self) -> FloatArray:
        """All of it as one array."""
        return np.concatenate([np.ravel(field) for field in self])

    @staticmethod
    def packed_size(num_batches: int, width: int) -> int:
        """Numbers in what is :meth:`packed` of so many batches and channels."""
        return _SCALARS + _OF_BATCHES * num_batches + 2 * width * (1 + num_batches)

    @classmethod
    def unpacked(cls, packed: FloatArray, num_batches: int, width: int) -> KeptWindow:
        """What was :meth:`packed`."""
        sizes = [1, 1, 1, 2, *[num_batches] * _OF_BATCHES, 2 * width]
        decay, rounding, initial_weight, noise, *of_batches, start, value = np.split(packed, np.cumsum(sizes))
        numbers = float(decay[0]), float(rounding[0]), float(initial_weight[0])
        shaped = start.reshape(2, width), value.reshape(num_batches, 2, width)
        return cls(*numbers, *(part.copy() for part in (noise, *of_batches, *shaped)))


def kept_window(
    blocks: Blocks, layer: int, start: FloatArray, initial_weight: float, noise: Sequence[float]
) -> KeptWindow:
    """What is to be kept of a layer's window of fewer than 8 batches.

    Args:
        blocks: All layers'.
        layer: Which it is.
        start: Running mean and variance when the window began, ``(2, C)``.
        initial_weight: The weight that the initial values had in them.
        noise: The sums of squared weights over n and over n - 1 of earlier batches in them.
    """
    own = ChannelLayout(blocks.widths).slices[layer]
    num = int(blocks.num_batches[layer].sum())
    return KeptWindow(
        decay=float(blocks.decay[layer]),
        rounding=float(blocks.rounding[layer]),
        initial_weight=initial_weight,
        noise=np.array(noise, dtype=float),
        num_samples=blocks.num_samples[layer, :num].copy(),
        batch_size=blocks.batch_size[layer, :num].copy(),
        weight=blocks.weight[layer, :num].copy(),
        start=start.copy(),
        value=blocks.value[:num, :, own].copy(),
    )


def fewest(windows: Sequence[KeptWindow], num_batches: float) -> Sequence[KeptWindow]:
    """The last of these windows, as few as have so many batches together; all if they have fewer."""
    first, missing = len(windows), num_batches
    while first and missing > 0:
        first -= 1
        missing -= windows[first].num_batches
    return windows[first:]


def joined(blocks: Blocks, earlier: Mapping[int, Sequence[KeptWindow]]) -> Blocks:
    """The blocks of layers whose earlier windows come before the present one.

    Args:
        blocks: Of the present window, all layers'.
        earlier: The windows before it by the index of the layer, each of which has fewer than 8 batches now. Of the
            other layers nothing changes.
    """
    layout = ChannelLayout(blocks.widths)
    num_batches, num_samples, batch_size, weight, noise, value, decay, rounding = (
        part.copy()
        for part in (
            *(blocks.num_batches, blocks.num_samples, blocks.batch_size, blocks.weight, blocks.noise),
            *(blocks.value, blocks.decay, blocks.rounding),
        )
    )
    for layer, windows in earlier.items():
        own, now = layout.slices[layer], int(blocks.num_batches[layer].sum())
        stop = sum(window.num_batches for window in windows)
        rows = slice(stop, stop + now)
        for to, source in (
            *((num_samples[layer], blocks.num_samples), (batch_size[layer], blocks.batch_size)),
            *((weight[layer], blocks.weight), (noise[0, layer], blocks.noise[0]), (noise[1, layer], blocks.noise[1])),
        ):
            to[rows] = source[layer, :now]
        value[rows, :, own] = blocks.value[:now, :, own]
        num_batches[layer, : rows.stop] = 1
        for window in reversed(windows):
            rows = slice(stop - window.num_batches, stop)
            num_samples[layer, rows], batch_size[layer, rows] = window.num_samples, window.batch_size
            value[rows, :, own] = window.value
            weight[layer, rows] = window.weight * decay[layer]
            for of_buffer, degrees in zip(
                noise, (window.num_samples, np.maximum(window.num_samples - 1, 1)), strict=True
            ):
                of_buffer[layer, rows] = weight[layer, rows] ** 2 / degrees
            rounding[layer] += window.rounding * decay[layer]
            decay[layer] *= window.decay
            stop = rows.start
    return blocks._replace(
        num_batches=num_batches,
        num_samples=num_samples,
        batch_size=batch_size,
        weight=weight,
        noise=noise,
        value=value,
        decay=decay,
        rounding=rounding,
    )
