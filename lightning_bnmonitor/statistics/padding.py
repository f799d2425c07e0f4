r"""What padding does to the statistics of a layer: with and without it, and how far it moves those of batches.

A batch t has N values per channel, of which n count; :math:`p = 1 - n/N` is its share of padding. With b the mean (the
unbiased variance) of all of them and b' that of those that count, :math:`D = b - b'` is by how much padding has moved
what BatchNorm normalises by. If all batches were padded alike, training would have learned with that. So what matters
is the part of D that follows p from batch to batch. As D is 0 where p is,

.. math:: \hat\Delta = \frac{\sum p D}{\sum p^2}, \qquad
    \text{movement}^2 = \operatorname{Var}(p) \operatorname{mean}\Bigl(
    \frac{\hat\Delta_\mu^2}{s} + \frac{\hat\Delta_{\sigma^2}^2}{4 s^2}\Bigr),

the means over batches and over the layer's channels, s the population variance plus ``eps``: in standard deviations of
the normalised activation, to first order. Chance (which samples a batch happens to have) makes of it

.. math:: \text{noise}^2 = \operatorname{Var}(p) \operatorname{mean}\Bigl(
    \frac{V_\mu}{s} + \frac{V_{\sigma^2}}{4 s^2}\Bigr), \qquad
    V = \frac{\sum (D - p \hat\Delta)^2}{(T - 1) \sum p^2},

and the *shift* is :math:`\sqrt{\text{movement}^2 - \text{noise}^2}`, or 0 where the movement is at most three times the
noise. Batches of which fewer than two values count have no D.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.divergence import act_rmse
from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.scores import MEAN, VAR

_MIN_BATCHES = 8
_OVER_NOISE = 3.0
_COUNT, _TOTAL, _BATCHES, _SHARE, _SQUARED_SHARE = range(5)
_MEAN, _M2, _OF_SHARE, _SQUARES = 0, 1, slice(2, 4), slice(4, 6)

SCALARS = 5
"""What is kept of a layer: n and N of all batches, and of those that have a D their number T and the sums of p, p²."""
ROWS = 6
"""And per channel: mean of the values that count, sum of squares about it, sums of p D and D² of mean and variance."""


class PaddedSums(NamedTuple):
    """What is kept of the batches of a layer."""

    scalars: Tensor
    """``(5,)`` float64: see :data:`SCALARS`."""
    channels: Tensor
    """``(6, C)`` float64: see :data:`ROWS`."""

    @classmethod
    def empty(cls, width: int, device: torch.device) -> PaddedSums:
        """Of no batch, of so many channels."""
        zeros = torch.zeros(SCALARS + ROWS * width, dtype=torch.float64, device=device)
        return cls.unpacked(zeros)

    @property
    def width(self) -> int:
        """Channels."""
        return self.channels.shape[1]

    @property
    def is_any(self) -> bool:
        """Whether there was a batch."""
        return bool(self.scalars[_TOTAL] > 0)

    def packed(self) -> Tensor:
        """All of it, ``(5 + 6 C,)``."""
        return torch.cat([self.scalars, self.channels.flatten()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> PaddedSums:
        """What was :meth:`packed`."""
        return cls(packed[:SCALARS], packed[SCALARS:].view(ROWS, -1))


class Padding(NamedTuple):
    """What padding does to layers, ``(L,)`` each; NaN where that is not known."""

    batches: FloatArray
    """Batches that tell of it, T."""
    share: FloatArray
    """Share of the values that do not count."""
    scatter: FloatArray
    """Standard deviation of p over the batches."""
    shift: FloatArray
    """How far it moves the statistics of batches, chance taken off; 0 if that may be chance; NaN before 8 batches."""
    noise: FloatArray
    """The part of the movement that is chance."""
    offset: FloatArray
    """RMS error of the normalised activation that statistics with padding make on the values that count."""
    unpadded: FloatArray
    """Mean and unbiased variance of the values that count, ``(2, C)``."""


@torch.no_grad()
def with_batches(sums: PaddedSums, total: Tensor, count: Tensor, kept: Tensor, every: Tensor) -> PaddedSums:
    """What is kept, with further batches: in new memory.

    Args:
        sums: What is kept of those before.
        total: Values per channel in each, N, ``(T,)`` float64, as all that follows.
        count: Those that count, n, ``(T,)``.
        kept: Mean and biased variance of those, ``(T, 2, C)``; anything finite where there are none.
        every: Mean and biased variance of all, ``(T, 2, C)``.
    """
    weight = torch.cat([sums.scalars[:1], count])[:, None].expand(-1, kept.shape[-1])
    members = torch.ones(1, len(weight), dtype=torch.float64, device=weight.device)
    means = torch.cat([sums.channels[_MEAN, None], kept[:, 0]])
    squares = torch.cat([sums.channels[_M2, None], kept[:, 1] * count[:, None]])
    merged = torch.cat(merge_moments(weight, means, squares, members)[1:])

    has_two = count >= 2
    share = torch.where(has_two, 1 - count / total, 0)
    moved = _unbiased(every, total) - _unbiased(kept, count)
    moved = torch.where(has_two[:, None, None], moved, 0)
    of_share, of_squares = (share[:, None, None] * moved).sum(0), moved.square().sum(0)
    scalars = torch.stack([count.sum(), total.sum(), has_two.sum(), share.sum(), share.square().sum()])
    channels = torch.cat([merged, sums.channels[2:] + torch.cat([of_share, of_squares])])
    return PaddedSums(sums.scalars + scalars, channels)


def _unbiased(moments: Tensor, count: Tensor) -> Tensor:
    bessel = count / (count - 1).clamp_min(1)
    return torch.stack([moments[:, MEAN], moments[:, VAR] * bessel[:, None]], dim=1)


def pooled(ranks: list[PaddedSums]) -> PaddedSums:
    """What several ranks have seen of a layer, as if one had."""
    scalars, channels = (torch.stack(parts) for parts in zip(*ranks, strict=True))
    count = scalars[:, _COUNT, None].expand(-1, channels.shape[-1])
    members = torch.ones(1, len(ranks), dtype=torch.float64, device=channels.device)
    merged = merge_moments(count, channels[:, _MEAN], channels[:, _M2], members)[1:]
    return PaddedSums(scalars.sum(0), torch.cat([*merged, channels[:, 2:].sum(0)]))


def padding_of(
    scalars: FloatArray, channels: FloatArray, population: FloatArray, layout: ChannelLayout, eps: FloatArray
) -> Padding:
    """What padding does to layers.

    Args:
        scalars: Of each, ``(5, L)``.
        channels: Theirs, ``(6, C)``.
        population: Mean and unbiased variance of all values, ``(2, C)``.
        layout: Which channels are whose.
        eps: Of each layer, ``(L,)``.
    """
    count, total, batches, shares, squares = scalars
    with np.errstate(all="ignore"):
        scaled = population[VAR] + layout.spread(eps)
        per_channel = layout.spread(count)
        var = np.where(per_channel > 1, channels[_M2] / (per_channel - 1), np.nan)
        unpadded = np.stack([np.where(per_channel > 0, channels[_MEAN], np.nan), var])
        variance = np.maximum(squares / batches - np.square(shares / batches), 0)
        slope = channels[_OF_SHARE] / layout.spread(squares)
        rest = np.maximum(channels[_SQUARES] - slope**2 * layout.spread(squares), 0)
        of_slope = rest / layout.spread((batches - 1) * squares)
        unit = np.stack([scaled, 4 * scaled**2])
        is_padded = squares > 0
        moved, noise = (
            np.where(is_padded, np.sqrt(variance * layout.mean(parts / unit).sum(axis=0)), 0)
            for parts in (slope**2, of_slope)
        )
        net = np.where(moved > _OVER_NOISE * noise, np.sqrt(np.maximum(moved**2 - noise**2, 0)), 0)
        known = (batches >= _MIN_BATCHES) & np.isfinite(moved + noise)
        kept, every = torch.from_numpy(unpadded), torch.from_numpy(population)
        error = act_rmse(kept[0], kept[1], every[0], every[1], torch.from_numpy(layout.spread(eps))).numpy()
        return Padding(
            batches=batches,
            share=1 - count / total,
            scatter=np.sqrt(variance),
            shift=np.where(known, net, np.nan),
            noise=np.where(known, noise, np.nan),
            offset=np.sqrt(layout.mean(error**2)),
            unpadded=unpadded,
        )
