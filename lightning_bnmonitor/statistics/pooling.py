"""What several ranks have seen, as if one had; how far one of them is from all; and what chance makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.statistics.analysis import Analysis
from lightning_bnmonitor.statistics.blocks import PooledBatches
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.noise import ROUNDING
from lightning_bnmonitor.statistics.scores import MEAN, VAR, exceeds_chance, squared_score

_OF_LAYERS = 5  # fields that have a value for each layer; the others have one for each channel


class PooledStatistics(NamedTuple):
    """What one rank has seen of its layers, or several have together; flat over the layers' channels.

    A population of all values, and the batches that tell of its noise: those that updated the running statistics, or,
    where nothing is updated, all.
    """

    num_samples: FloatArray
    """Values per channel in all calls, ``(L,)``."""
    dof: FloatArray
    """Degrees of freedom of ``within``, ``(L,)``."""
    batch_size: FloatArray
    """Samples in the batches, ``(L,)``: their sum."""
    weight: FloatArray
    """Of the batches, the sum of n (mean) and of n - 1 (variance), ``(2, L)``."""
    left_out: FloatArray
    """Calls that were left out as a value in them was not finite, ``(L,)``."""
    mean: FloatArray
    """Mean of all values, ``(C,)``; 0 if there are none."""
    squares: FloatArray
    """Sum of squared deviations from it, ``(C,)``."""
    value: FloatArray
    """Mean of batch means and of unbiased batch variances, ``(2, C)``; 0 if there are none."""
    within: FloatArray
    """Weighted sum of squares of these within blocks of consecutive batches, ``(2, C)``."""
    first_bad: FloatArray
    """The first call with a value that is not finite, ``(C,)``; inf if none."""

    @classmethod
    def of_window(
        cls, analysis: Analysis, num_ranks: NDArray[np.int64], left_out: NDArray[np.int64]
    ) -> PooledStatistics:
        """What one rank's window holds.

        Of layers whose moments were taken over several ranks (SyncBatchNorm), ``(L,)``, each of these has the same in
        its window: it contributes its own part of them. ``left_out`` are calls that are in none of it, ``(L,)``.
        """
        layout = analysis.layout
        count, part = layout.spread(analysis.num_samples), layout.spread(1 / num_ranks)
        updated = analysis.num_batches > 0
        samples = np.where(updated, analysis.samples_per_batch * analysis.num_batches, 0)
        weight = np.stack([samples, samples - analysis.num_batches])
        mean, var = analysis.population
        return cls(
            num_samples=analysis.num_samples / num_ranks,
            dof=analysis.dof / num_ranks,
            batch_size=np.where(updated, analysis.batch_size * analysis.num_batches, 0) / num_ranks,
            weight=weight / num_ranks,
            left_out=left_out / num_ranks,
            mean=np.where(count > 0, mean, 0),
            squares=np.where(count > 1, var * (count - 1), 0) * part,
            value=np.where(layout.spread(weight) > 0, analysis.reference, 0),
            within=analysis.within * part,
            first_bad=analysis.first_bad,
        )

    @classmethod
    def of_batches(cls, batches: PooledBatches, first_bad: FloatArray, layout: ChannelLayout) -> PooledStatistics:
        """What batches hold that are the population themselves, as nothing is updated by them."""
        weight = batches.weight
        return cls(
            num_samples=batches.num_samples,
            dof=np.maximum(batches.num_batches - 1, 0),
            batch_size=batches.batch_size,
            weight=weight,
            left_out=np.zeros_like(batches.num_samples),
            mean=batches.value[MEAN],
            squares=layout.spread(weight[VAR]) * batches.value[VAR] + batches.m2[MEAN],
            value=batches.value,
            within=batches.m2,
            first_bad=first_bad,
        )

    def as_batches(self, layout: ChannelLayout) -> PooledBatches:
        """The batches as one block, whose noise scale is that of the batches of each rank about their own mean."""
        num_batches = self.weight[MEAN] - self.weight[VAR]
        scale = np.divide(num_batches - 1, self.dof, out=np.zeros_like(self.dof), where=self.dof > 0)
        m2 = self.within * layout.spread(scale)
        return PooledBatches(num_batches, self.weight[MEAN], self.batch_size, self.value, m2)

    def selected(self, order: NDArray[np.int64], layout: ChannelLayout) -> PooledStatistics:
        """That of the layers of a layout in another order."""
        columns = layout.columns(order)
        return PooledStatistics(
            *(field[..., order] for field in self[:_OF_LAYERS]), *(field[..., columns] for field in self[_OF_LAYERS:])
        )

    def packed(self) -> Tensor:
        """All of it as one float64 tensor."""
        return torch.from_numpy(np.concatenate([part.ravel() for part in self]))

    @classmethod
    def unpacked(cls, packed: Tensor, layout: ChannelLayout) -> PooledStatistics:
        """What was :meth:`packed` of these layers."""
        shapes = cls._shapes(layout)
        parts = np.split(packed.numpy(), np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
        return cls(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    @classmethod
    def packed_size(cls, layout: ChannelLayout) -> int:
        """Numbers in what is :meth:`packed`."""
        return sum(int(np.prod(shape, dtype=int)) for shape in cls._shapes(layout))

    @staticmethod
    def _shapes(layout: ChannelLayout) -> list[tuple[int, ...]]:
        of_layers, of_channels = (layout.num_layers,), (layout.num_channels,)
        both = (2, *of_channels)
        rows = [of_layers, of_layers, of_layers, (2, *of_layers), of_layers]
        return [*rows, of_channels, of_channels, both, both, of_channels]

    def population(self, layout: ChannelLayout) -> FloatArray:
        """Mean and unbiased variance of all values, ``(2, C)``; NaN where there are none, or just one."""
        count = layout.spread(self.num_samples)
        with np.errstate(invalid="ignore", divide="ignore"):
            population = np.where(count > [[0], [1]], [self.mean, self.squares / (count - 1)], np.nan)
        return np.where(np.isfinite(self.mean + self.squares), population, np.nan)


def pool(ranks: Sequence[PooledStatistics], layout: ChannelLayout) -> PooledStatistics:
    """What several ranks have seen, as if one had."""
    stacked = PooledStatistics(*map(np.stack, zip(*ranks, strict=True)))
    members = torch.ones(1, len(ranks), dtype=torch.float64)

    def merged(count: FloatArray, centre: FloatArray, spread: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights, means, m2 = (torch.from_numpy(part.reshape(len(ranks), -1)) for part in (count, centre, spread))
        _, means, m2 = merge_moments(weights, means, m2, members)
        return means.numpy().reshape(centre.shape[1:]), m2.numpy().reshape(centre.shape[1:])

    mean, squares = merged(layout.spread(stacked.num_samples), stacked.mean, stacked.squares)
    value, _ = merged(layout.spread(stacked.weight), stacked.value, np.zeros_like(stacked.value))
    return PooledStatistics(
        num_samples=stacked.num_samples.sum(axis=0),
        dof=stacked.dof.sum(axis=0),
        batch_size=stacked.batch_size.sum(axis=0),
        weight=stacked.weight.sum(axis=0),
        left_out=stacked.left_out.sum(axis=0),
        mean=mean,
        squares=squares,
        value=value,
        within=stacked.within.sum(axis=0),
        first_bad=np.fmin.reduce(stacked.first_bad),
    )


def error_of_sampling(statistics: PooledStatistics, layout: ChannelLayout, eps: FloatArray) -> FloatArray:
    r"""RMS error of the normalised activation that the sampling noise of pooled means and variances makes.

    .. math:: \sqrt{\operatorname{mean}\Bigl(\frac{V_\mu}{G_\mu s} + \frac{V_\sigma}{4\, G_\sigma s^2}\Bigr)}

    With G the sums of weights (n for the mean, n - 1 for the variance), V the noise scales from the differences between
    batches, and s the population variance plus ``eps``. By simulation it is right within 20 %.

    Args:
        statistics: Of batches received at fixed weights.
        layout: Which channels are whose.
        eps: Of each layer, ``(L,)``.

    Returns:
        ``(L,)``; NaN with fewer than two batches.
    """
    with np.errstate(all="ignore"):
        scaled = statistics.population(layout)[VAR] + layout.spread(eps)
        variance = statistics.within / layout.spread(statistics.dof) / layout.spread(statistics.weight)
        error: FloatArray = np.sqrt(layout.mean((variance / np.stack([scaled, 4 * scaled**2])).sum(axis=0)))
    return error


def error_of_one_rank(
    one: PooledStatistics, everyone: PooledStatistics, layout: ChannelLayout, eps: FloatArray
) -> FloatArray:
    r"""RMS error of the normalised activation that one rank's data make against all ranks', chance taken off.

    With x the mean of the batch means (variances) that updated running statistics, and G their weight, the difference
    :math:`x_1 - x` has under chance the variance :math:`V (1/G_1 - 1/G)`, V from within the blocks of all ranks.

    Args:
        one: What that rank has seen.
        everyone: What all have.
        layout: Which channels are whose.
        eps: Of each layer, ``(L,)``.

    Returns:
        ``(L,)``; 0 where it may be chance, or where no running statistics were updated.
    """
    with np.errstate(all="ignore"):
        scaled = everyone.population(layout)[VAR] + layout.spread(eps)
        apart, variance = one.value - everyone.value, 1 / one.weight - 1 / everyone.weight
        floor = layout.spread(everyone.weight) * np.square(ROUNDING * everyone.value)
        scale = np.maximum(everyone.within / layout.spread(everyone.dof), floor)
        expected = scale * layout.spread(variance)
        z = np.where(apart == 0, 0, np.clip(apart / np.sqrt(expected), -1e100, 1e100))
        counted = exceeds_chance(layout, squared_score(z, layout.spread(everyone.dof))[None])[0]
        comparable = (variance > 0) & (one.weight > 0) & (everyone.dof > 0)
        excess = layout.mean((apart**2 - expected) / np.stack([scaled, 4 * scaled**2]))
        error: FloatArray = np.sqrt(np.where(counted & comparable, np.maximum(excess, 0), 0).sum(axis=0))
    return error
