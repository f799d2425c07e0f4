r"""Weighted sums of a window's blocks: averages over parts of the window, and how the values went over it.

With :math:`x_k` the value of block k and :math:`G_k` its weight (n for the mean, n - K for the variance), an average is
:math:`\sum_k d_k G_k x_k` with a density :math:`d_k` of which :math:`\sum_k d_k G_k = 1`. Whatever is asked of a window
is such a sum, or a difference of two: its variance under sampling noise is a number known from the weights alone, times
the noise scale V (see :mod:`~lightning_bnmonitor.statistics.noise`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bnmonitor.statistics.blocks import MAX_BLOCKS, Blocks, alike
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.scores import MEAN, VAR


class Densities(NamedTuple):
    """Weights of the blocks, and densities of the averages that are asked for."""

    weights: FloatArray
    """G: n and n - K of each block, ``(2, L, 16)``."""
    total: FloatArray
    """Its sum over the blocks, ``(2, L)``."""
    num_batches: FloatArray
    """T, ``(L,)``."""
    num_blocks: FloatArray
    """Blocks in use, ``(L,)``."""
    window: FloatArray
    """Density of the average over the whole window, ``(2, L, 16)``."""
    recent: FloatArray
    """Those over the last three runs of about an eighth of the batches each, the last first, ``(3, 2, L, 16)``. A run
    that does not exist is the window."""
    step: FloatArray
    """h: how far the window's end lies beyond the middle of the last run, in distances of the last two, ``(L,)``."""
    ratio: FloatArray
    """k: the distance between the earlier two runs over that between the later two, ``(L,)``; 0 without three."""
    time: FloatArray
    """When a block came, in batches from the window's weighted middle, ``(2, L, 16)``."""
    cubic: FloatArray
    """Three orthonormal contrasts of the blocks' means, which a cubic in time is made of, ``(L, 3, 16)``."""

    @property
    def dof(self) -> FloatArray:
        """Degrees of freedom of the variance within blocks, ``(L,)``."""
        return self.num_batches - self.num_blocks


class Sums(NamedTuple):
    """What a window's blocks come to, flat over the channels."""

    weighted: FloatArray
    """The part that the window's batches have in the running statistics, ``(2, C)``."""
    reference: FloatArray
    """Average over the window: of the means (weight n) and of the variances (n - 1) of its batches, ``(2, C)``."""
    last: FloatArray
    """Average over the last run of blocks, ``(2, C)``."""
    before: FloatArray
    """That over the run before it."""
    earlier: FloatArray
    """That over the run before that."""
    trend: FloatArray
    """Sum of G x t: the movement along a straight line in time."""
    within: FloatArray
    """Sum over the blocks of the weighted squares of batches about their block, ``(2, C)``."""
    between: FloatArray
    """Weighted sum of squares of the blocks' means about the window's, ``(C,)``."""
    smooth: FloatArray
    """The part of it that a cubic in time is, ``(C,)``."""
    steps: FloatArray
    """Sum of squared differences between neighbouring blocks, ``(2, C)``."""
    late_steps: FloatArray
    """The part of it that is of the later half of the neighbours, ``(2, C)``."""


def densities_of(blocks: Blocks) -> Densities:
    """The weights and densities of a window's blocks."""
    weights = np.stack([blocks.num_samples, blocks.num_samples - blocks.num_batches])
    total = weights.sum(axis=2)
    window = np.broadcast_to(1 / total[..., None], weights.shape)
    runs = [_recent_runs(tuple(row)) for row in blocks.num_batches]
    members = np.array([run.members for run in runs]).reshape(-1, 3, MAX_BLOCKS).transpose(1, 0, 2)  # (3, L, 16)
    run_total = np.einsum("slk,flk->sfl", members, weights)
    recent = members[:, None] / np.where(run_total > 0, run_total, np.nan)[..., None]
    middle = np.cumsum(blocks.num_batches, axis=1) - (blocks.num_batches - 1) / 2
    time = middle - (weights * middle).sum(axis=2, keepdims=True) / total[..., None]
    return Densities(
        weights=weights,
        total=total,
        num_batches=blocks.num_batches.sum(axis=1),
        num_blocks=(blocks.num_batches > 0).sum(axis=1),
        window=window,
        recent=np.where(np.isnan(recent), window, recent),
        step=np.array([run.step for run in runs]),
        ratio=np.array([run.ratio for run in runs]),
        time=time,
        cubic=_cubic(weights[MEAN], time[MEAN]),
    )


def first_of_later(densities: Densities) -> NDArray[np.int64]:
    """The first of the later half of the differences between neighbouring blocks, of each layer, ``(L,)``."""
    first: NDArray[np.int64] = np.maximum(densities.num_blocks.astype(np.int64) - 1, 0) // 2
    return first


def sums_of(blocks: Blocks, densities: Densities, layout: ChannelLayout) -> Sums:
    """All sums that the analysis needs, in one pass over the blocks."""
    weights, first = densities.weights, first_of_later(densities)
    coefficients = np.stack(
        [
            np.broadcast_to(blocks.weight, weights.shape),
            weights * densities.window,
            *(weights * density for density in densities.recent),
            weights * densities.time,
        ],
        axis=2,
    )  # (2, L, 6, 16)
    sums, contrasts = np.empty((6, 2, layout.num_channels)), np.empty((3, layout.num_channels))
    (within, steps, late_steps), between = np.empty((3, 2, layout.num_channels)), np.empty(layout.num_channels)
    for layer, own in alike(blocks):
        num_blocks = int(densities.num_blocks[layer])
        if not num_blocks:
            sums[..., own] = contrasts[:, own] = between[own] = np.nan
            within[:, own] = steps[:, own] = late_steps[:, own] = np.nan
            continue
        value = blocks.value[:num_blocks, :, own]
        for f in (MEAN, VAR):
            np.matmul(coefficients[f, layer, :, :num_blocks], value[:, f], out=sums[:, f, own])
        blocks.m2[:num_blocks, :, own].sum(axis=0, out=within[:, own])
        step = value[1:] - value[:-1]
        np.square(step, out=step).sum(axis=0, out=steps[:, own])
        step[first[layer] :].sum(axis=0, out=late_steps[:, own])
        difference = value[:, MEAN] - sums[1, MEAN, own]
        np.matmul(densities.cubic[layer, :, :num_blocks], difference, out=contrasts[:, own])
        np.matmul(weights[MEAN, layer, :num_blocks], np.square(difference, out=difference), out=between[own])
    weighted, reference, last, before, earlier, trend = sums
    smooth = np.square(contrasts, out=contrasts).sum(axis=0)
    return Sums(weighted, reference, last, before, earlier, trend, within, between, smooth, steps, late_steps)


def squares_of(densities: Densities, sums: Sums, layout: ChannelLayout) -> FloatArray:
    """Sum of squares of all values about their mean, ``(C,)``, of calls that updated the running statistics."""
    degrees = layout.spread(densities.total[VAR])
    squares: FloatArray = sums.within[MEAN] + sums.between + np.where(degrees > 0, degrees * sums.reference[VAR], 0)
    return squares


def trend_variance(densities: Densities) -> FloatArray:
    """Variance over V of the sum that a straight line in time is seen by, ``(2, L)``; 0 with one block."""
    variance = (densities.weights * densities.time**2).sum(axis=2)
    return np.where(densities.num_blocks > 1, variance, 0)


def _cubic(weights: FloatArray, time: FloatArray) -> FloatArray:
    """Orthonormal contrasts by blocks' weights and times, ``(L, 16)`` each, of degree 1 to 3, ``(L, 3, 16)``."""
    root = np.sqrt(weights)
    extent = abs(np.where(weights > 0, time, 0)).max(axis=1, keepdims=True)
    scaled = np.where(weights > 0, time / np.where(extent > 0, extent, 1), 0)
    powers = root[..., None] * scaled[..., None] ** np.arange(4)
    contrasts: FloatArray = (np.linalg.qr(powers).Q[..., 1:] * root[..., None]).transpose(0, 2, 1)
    return contrasts


class _RecentRuns(NamedTuple):
    """The last three runs of whole blocks, the last one first."""

    members: FloatArray
    """Which blocks are in which, ``(3, 16)`` of 0 and 1."""
    step: float
    """h: how far the end of the window lies beyond the middle of the last run, in distances of the last two."""
    ratio: float
    """k: the distance between the earlier two over that between the later two; 0 with fewer than three."""


@lru_cache(maxsize=1024)
def _recent_runs(num_batches: tuple[float, ...]) -> _RecentRuns:
    """Runs of whole blocks from the end: the first nearest an eighth of all batches, the others nearest the first."""
    blocks = [count for count in num_batches if count]
    members, counts = np.zeros((3, MAX_BLOCKS)), [0.0, 0.0, 0.0]
    stop, target = len(blocks), sum(blocks) / 8
    for run in range(3):
        if stop == 0:
            break
        lengths = np.cumsum(blocks[:stop][::-1])
        distance = abs(lengths - target)
        length = len(distance) - int(np.argmin(distance[::-1]))  # of two as near, the longer
        members[run, stop - length : stop] = 1
        counts[run] = float(lengths[length - 1])
        stop, target = stop - length, counts[0]
    last, before, earlier = counts
    return _RecentRuns(
        members=members,
        step=last / (last + before) if last else 0.0,
        ratio=(before + earlier) / (last + before) if earlier else 0.0,
    )
