r"""What layers receive in validation beside training: are the running statistics bad, or the data different?

A layer's *shift* is the RMS error of the normalised activation that normalising its validation inputs by the present
statistics of training makes (:attr:`~lightning_bnmonitor.report.layer_values.LayerValues.val_shift`). Its noise floor
is that of the means and variances of validation (:func:`~lightning_bnmonitor.statistics.pooling.error_of_sampling`) and
that of the present statistics together. Whether it is a flag is decided in ``diagnosis/``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import diagnose_validation
from lightning_bnmonitor.diagnosis.evidence import Evidence
from lightning_bnmonitor.diagnosis.flags import is_shifted
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.blocks import PooledBatches
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.pooled_calls import PooledCalls
from lightning_bnmonitor.statistics.pooling import PooledStatistics, error_of_sampling, pool
from lightning_bnmonitor.statistics.scores import MEAN, VAR
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.exchange import answer_of_rank_zero
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import layout_of


class Comparison(NamedTuple):
    """What layers have received of one validation loader, against training; NaN where a layer was not called."""

    num_batches: FloatArray
    """Calls that were looked at, ``(L,)``; 0 if there were none."""
    shift: FloatArray
    """RMS over channels of the shift, ``(L,)``."""
    noise: FloatArray
    """What chance makes of it, ``(L,)``."""
    population: FloatArray
    """Mean and unbiased variance, ``(2, C)``."""

    def packed(self) -> Tensor:
        """All of it as one tensor, of which the first number is not NaN."""
        return torch.from_numpy(np.concatenate([field.ravel() for field in self]))

    @staticmethod
    def packed_size(layout: ChannelLayout) -> int:
        """Numbers in what is :meth:`packed`."""
        return 3 * layout.num_layers + 2 * layout.num_channels

    @classmethod
    def unpacked(cls, packed: Tensor, layout: ChannelLayout) -> Comparison:
        """What was :meth:`packed` of these layers."""
        layers = layout.num_layers
        num_batches, shift, noise, population = np.split(packed.numpy(), [layers, 2 * layers, 3 * layers])
        return cls(num_batches, shift, noise, population.reshape(2, -1))


def with_validation(report: Report, layers: Sequence[TrackedLayer], all_ranks: bool, num_loaders: int) -> Report:
    """A report with how far validation was from training, by what the layers have received in it.

    Of several loaders, a layer is told of the one whose data differ most.

    Args:
        report: Of the window before it. Of several ranks, validation is compared with the report of rank 0.
        layers: Those of the report.
        all_ranks: Whether all ranks call this, each with its own part of the validation data.
        num_loaders: Validation loaders, as many on all ranks.
    """
    layout = layout_of(layers)
    if not layout.num_channels or not num_loaders:
        return report
    received = [_received(layers, loader, layout) for loader in range(num_loaders)]
    if all_ranks:
        comparisons = _of_all_ranks(report, layers, received, layout)
    else:
        comparisons = [_compared(report, layers, statistics, layout) for statistics in received]
    index = {layer.name: position for position, layer in enumerate(layers)}
    worst = {name: _worst(index[name], comparisons) if name in index else (None, {}) for name in report}
    diagnoses = diagnose_validation(
        (layer.diagnosis, worst[name][1], layer.has_running_stats) for name, layer in report.items()
    )
    described = []
    for (name, layer), diagnosis in zip(report.items(), diagnoses, strict=True):
        loader, _ = worst[name]
        validation = layer.validation
        if loader is not None:
            own = comparisons[loader].population[:, layout.slices[index[name]]]
            validation = torch.from_numpy(own.copy())
        described.append(replace(layer, diagnosis=diagnosis, validation=validation))
    return Report(described, rank=report.rank)


def _worst(layer: int, comparisons: Sequence[Comparison]) -> tuple[int | None, Evidence]:
    """Of the loaders by which a layer was called, the one whose data differ most; and what that says."""
    worst: tuple[int | None, Evidence] = None, {}
    for loader, comparison in enumerate(comparisons):
        if not comparison.num_batches[layer]:
            continue
        known = {
            "val_batches": float(comparison.num_batches[layer]),
            "val_shift": float(comparison.shift[layer]),
            "val_noise": float(comparison.noise[layer]),
            "val_loader": float(loader) if len(comparisons) > 1 else math.nan,
        }
        evidence = {name: value for name, value in known.items() if math.isfinite(value)}
        severity = [(is_shifted(its), its.get("val_shift", 0.0)) for its in (evidence, worst[1])]
        if worst[0] is None or severity[0] > severity[1]:
            worst = loader, evidence
    return worst


def _received(layers: Sequence[TrackedLayer], loader: int, layout: ChannelLayout) -> PooledStatistics:
    """What this rank has received of one loader."""
    calls = [layer.validation.get(loader, PooledCalls()) for layer in layers]
    fits = [
        its.value is not None and its.value.shape[1] == width
        for its, width in zip(calls, layout.widths.tolist(), strict=True)
    ]
    counts = np.array(
        [
            (its.num_batches, its.num_samples, its.batch_size) if fit else (0, 0, 0)
            for its, fit in zip(calls, fits, strict=True)
        ],
        dtype=float,
    ).T

    def side_by_side(values: list[Tensor | None]) -> FloatArray:
        parts = [
            own.cpu().numpy() if fit and own is not None else np.zeros((2, width))
            for own, fit, width in zip(values, fits, layout.widths.tolist(), strict=True)
        ]
        return np.concatenate(parts, axis=1)

    value, m2 = side_by_side([its.value for its in calls]), side_by_side([its.m2 for its in calls])
    none_bad = np.full(layout.num_channels, np.inf)
    return PooledStatistics.of_batches(PooledBatches(counts[0], counts[1], counts[2], value, m2), none_bad, layout)


def _of_all_ranks(
    report: Report, layers: Sequence[TrackedLayer], received: Sequence[PooledStatistics], layout: ChannelLayout
) -> list[Comparison]:
    """What all ranks have received, compared by rank 0: a gather to it, and a broadcast of what it finds."""
    gathered = collectives.gather(torch.cat([part.packed() for part in received]))
    size = Comparison.packed_size(layout)
    with answer_of_rank_zero(size * len(received)) as answer:
        if gathered:
            parts = [torch.split(message, PooledStatistics.packed_size(layout)) for message in gathered]
            ranks = [[PooledStatistics.unpacked(part, layout) for part in of_rank] for of_rank in parts]
            pooled = [pool(of_loader, layout) for of_loader in zip(*ranks, strict=True)]
            found = [_compared(report, layers, statistics, layout) for statistics in pooled]
            answer.message = torch.cat([comparison.packed() for comparison in found])
    return [Comparison.unpacked(part, layout) for part in torch.split(answer.message, size)]


def _compared(
    report: Report, layers: Sequence[TrackedLayer], statistics: PooledStatistics, layout: ChannelLayout
) -> Comparison:
    """What layers have received of one loader against a report of training."""
    eps = np.array([layer.module.eps for layer in layers])
    population, noise = statistics.population(layout), error_of_sampling(statistics, layout, eps)
    shift = np.full(layout.num_layers, np.nan)
    for index, (layer, own) in enumerate(zip(layers, layout.slices, strict=True)):
        if layer.name in report:
            validated = replace(report[layer.name], validation=torch.from_numpy(population[:, own]))
            shift[index] = float(validated.val_shift.square().nanmean().sqrt())
            noise[index] = math.hypot(noise[index], validated.evidence.get("now_error", 0.0))
    num_batches = statistics.weight[MEAN] - statistics.weight[VAR]
    return Comparison(num_batches, shift, noise, population)
