"""A window as blocks of consecutive batches: what they hold, how long they are, and how neighbours are merged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray

MAX_BLOCKS = 16
_AT_ONCE = 8192  # channels that are worked on together, for whose blocks caches suffice
_LAST_BUT_ONE = dict.fromkeys(("num_batches", "num_samples", "batch_size", "weight", "noise"), -2)  # axis of layers


class PooledBatches(NamedTuple):
    """Batches of each layer pooled into one block: what is known of them when the single batches are gone."""

    num_batches: FloatArray
    """Batches, ``(L,)``."""
    num_samples: FloatArray
    """Values per channel, ``(L,)``."""
    batch_size: FloatArray
    """Samples, ``(L,)``: the sum over the batches."""
    value: FloatArray
    """Mean of the batch means, weighted by n, and of the unbiased batch variances, by n - 1, ``(2, C)``."""
    m2: FloatArray
    """The weighted sum of their squared deviations from it, ``(2, C)``."""

    @property
    def weight(self) -> FloatArray:
        """Sum of the weights n and n - 1, ``(2, L)``."""
        return np.stack([self.num_samples, self.num_samples - self.num_batches])


class Blocks(NamedTuple):
    """The blocks of all layers in the order of time, on the host in float64.

    There are 16 for every layer; those that a window is too short for come last and are 0 throughout. What is kept per
    channel is flat over all layers' channels, for the means at index 0 of the axis of 2, for the variances at index 1.
    """

    widths: NDArray[np.int64]
    """Channels of each layer, ``(L,)``."""
    num_batches: FloatArray
    """K: batches in each block, ``(L, 16)``."""
    num_samples: FloatArray
    """n: values per channel, ``(L, 16)``."""
    batch_size: FloatArray
    """Samples, ``(L, 16)``: the sum over the batches."""
    weight: FloatArray
    """W: the sum of the weights that the batches have in the running statistics now, ``(L, 16)``."""
    noise: FloatArray
    """Q: the sum of squared weights over n (mean) and over n - 1 (variance) of each batch, ``(2, L, 16)``."""
    value: FloatArray
    """Mean of the batch means, weighted by n, and of the unbiased batch variances, by n - 1, ``(16, 2, C)``."""
    m2: FloatArray
    """The weighted sum of their squared deviations from it, ``(16, 2, C)``."""
    decay: FloatArray
    """A: the weight that the buffers at the window's start still have in those of now, ``(L,)``."""
    rounding: FloatArray
    """S: the sum of the decays that each update's float32 rounding has undergone since, ``(L,)``."""
    first_bad: FloatArray
    """The first call in the window with a value that is not finite, counted from 1, ``(C,)``; inf if none."""
    beside: PooledBatches
    """Batches that updated no running statistics; they are in none of the above but ``first_bad``."""


def block_size(num_batches: int) -> int:
    """Batches in a full block of a window of ``num_batches``: the smallest power of 2 that makes 16 blocks suffice."""
    size = 1
    while num_batches > size * MAX_BLOCKS:
        size *= 2
    return size


def empty_blocks(widths: NDArray[np.int64]) -> Blocks:
    """The blocks of layers that were not called."""
    layers, channels = len(widths), int(widths.sum())
    of_blocks, of_channels = np.zeros((layers, MAX_BLOCKS)), np.zeros((MAX_BLOCKS, 2, channels))
    of_layers = np.zeros(layers)
    return Blocks(
        widths=widths,
        num_batches=of_blocks,
        num_samples=of_blocks,
        batch_size=of_blocks,
        weight=of_blocks,
        noise=np.stack([of_blocks, of_blocks]),
        value=of_channels,
        m2=of_channels,
        decay=np.ones(layers),
        rounding=of_layers,
        first_bad=np.full(channels, np.inf),
        beside=PooledBatches(of_layers, of_layers, of_layers, of_channels[0], of_channels[0]),
    )


def concatenated(parts: list[Blocks]) -> Blocks:
    """The layers of several blocks after each other."""
    if len(parts) == 1:
        return parts[0]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=_LAST_BUT_ONE.get(name, -1))
        for name in Blocks._fields
        if name != "beside"
    }
    beside = (np.concatenate(fields, axis=-1) for fields in zip(*(part.beside for part in parts), strict=True))
    return Blocks(**joined, beside=PooledBatches(*beside))


def selected(blocks: Blocks, order: NDArray[np.int64]) -> Blocks:
    """The blocks of some layers, by index, in this order."""
    columns = ChannelLayout(blocks.widths).columns(order)
    return Blocks(
        widths=blocks.widths[order],
        num_batches=blocks.num_batches[order],
        num_samples=blocks.num_samples[order],
        batch_size=blocks.batch_size[order],
        weight=blocks.weight[order],
        noise=blocks.noise[:, order],
        value=blocks.value[..., columns],
        m2=blocks.m2[..., columns],
        decay=blocks.decay[order],
        rounding=blocks.rounding[order],
        first_bad=blocks.first_bad[columns],
        beside=PooledBatches(
            *(field[order] for field in blocks.beside[:3]), *(field[..., columns] for field in blocks.beside[3:])
        ),
    )


def alike(blocks: Blocks) -> Iterator[tuple[int, slice]]:
    """Consecutive layers with equal numbers of batches and values and equal weights: the first, and their channels.

    Few calls of numpy then do for many layers, and about 8192 channels at most are taken together.
    """
    ends = np.cumsum(blocks.widths)
    of_layers = np.concatenate([blocks.num_batches, blocks.num_samples, blocks.weight], axis=1)
    portions = (ends - 1) // _AT_ONCE
    is_first = (of_layers[1:] != of_layers[:-1]).any(axis=1) | (portions[1:] != portions[:-1])
    firsts = [0, *(is_first.nonzero()[0] + 1).tolist(), len(ends)] if len(ends) else []
    for first, end in pairwise(firsts):
        yield first, slice(int(ends[first] - blocks.widths[first]), int(ends[end - 1]))


def paired(blocks: Blocks) -> Blocks:
    """Blocks of single batches merged in pairs, so that there is a variance within.

    Values are then kept of as many blocks as there may be at most: 16, or 8.
    """
    single = blocks.num_batches.max(axis=1, initial=0) == 1
    if not single.any():
        return blocks
    weights = np.stack([blocks.num_samples, blocks.num_samples - blocks.num_batches]).transpose(1, 2, 0)  # (L, 16, 2)
    one, other = weights[:, 0::2, :, None], weights[:, 1::2, :, None]
    share = np.divide(other, one + other, out=np.zeros_like(one), where=other > 0)
    weight, rows = share * one, MAX_BLOCKS // 2
    if single.all():  # nothing else is needed, not to touch twice the memory
        value, m2 = (np.empty((rows, *part.shape[1:])) for part in (blocks.value, blocks.m2))
    else:
        value, m2 = blocks.value.copy(), blocks.m2.copy()
    for layer, own in alike(blocks):
        if not single[layer]:
            continue
        first, merged = blocks.value[0::2, :, own], value[:rows, :, own]
        step = blocks.value[1::2, :, own] - first
        np.multiply(step, share[layer], out=merged)
        merged += first
        np.multiply(np.square(step, out=step), weight[layer], out=m2[:rows, :, own])
        value[rows:, :, own] = m2[rows:, :, own] = 0

    def halved(sums: FloatArray) -> FloatArray:
        sums = sums.copy()
        sums[..., single, :rows] = sums[..., single, 0::2] + sums[..., single, 1::2]
        sums[..., single, rows:] = 0
        return sums

    return blocks._replace(
        num_batches=halved(blocks.num_batches),
        num_samples=halved(blocks.num_samples),
        batch_size=halved(blocks.batch_size),
        weight=halved(blocks.weight),
        noise=halved(blocks.noise),
        value=value,
        m2=m2,
    )


def pooled(blocks: Blocks) -> PooledBatches:
    """All batches of a window's blocks as if they were one block."""
    layout = ChannelLayout(blocks.widths)
    weights = np.stack([blocks.num_samples, blocks.num_samples - blocks.num_batches])  # (2, L, 16)
    total = weights.sum(axis=2)
    share = np.divide(weights, total[..., None], out=np.zeros_like(weights), where=total[..., None] > 0)
    of_channels, shares = (layout.spread(np.moveaxis(each, 2, 0)) for each in (weights, share))  # (16, 2, C)
    value = blocks.value[0] + (shares * (blocks.value - blocks.value[0])).sum(axis=0)  # exact if they are all the same
    m2 = (blocks.m2 + of_channels * np.square(blocks.value - value)).sum(axis=0)
    return PooledBatches(
        blocks.num_batches.sum(axis=1), blocks.num_samples.sum(axis=1), blocks.batch_size.sum(axis=1), value, m2
    )


def at_fixed_weights(blocks: Blocks, pooled: PooledBatches, are_averaged: bool) -> Blocks:
    """One block of batches that were received while the weights stayed: when one of them came says nothing then.

    Args:
        blocks: Of the layers that received them.
        pooled: The batches.
        are_averaged: Whether the running statistics are the average of all their values: the weight of a batch of n
            values then is n / N in the mean, and (n - 1) / (N - T) in the variance of N values in T batches. Otherwise
            the running statistics are from earlier batches, whose noise they have.
    """

    def first(values: FloatArray) -> FloatArray:
        padded: FloatArray = np.zeros(blocks.num_batches.shape)
        padded[:, 0] = values
        return padded

    def first_row(values: FloatArray) -> FloatArray:
        padded: FloatArray = np.zeros(blocks.value.shape)
        padded[0] = values
        return padded

    degrees = pooled.weight
    noise: FloatArray = np.divide(float(are_averaged), degrees, out=np.zeros_like(degrees), where=degrees > 0)
    return blocks._replace(
        num_batches=first(pooled.num_batches),
        num_samples=first(pooled.num_samples),
        batch_size=first(pooled.batch_size),
        weight=first(np.where((pooled.num_batches > 0) & are_averaged, 1.0, 0.0)),
        noise=np.stack([first(of_buffer) for of_buffer in noise]),
        value=first_row(pooled.value),
        m2=first_row(pooled.m2),
        decay=np.full_like(blocks.decay, float(not are_averaged)),
        rounding=np.zeros_like(blocks.rounding),
        beside=PooledBatches(*(np.zeros_like(field) for field in pooled)),
    )
