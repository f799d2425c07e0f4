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

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import diagnose_validation
from lightning_bnmonitor.diagnosis.evidence import Evidence
from lightning_bnmonitor.diagnosis.flags import is_shifted
from lightning_bnmonitor.report.layer_report import LayerReport
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


def with_validation(report: Report, layers: Sequence[TrackedLayer], all_ranks: bool, num_loaders: int) -> Report:
    """A report with how far validation was from training, by what the layers have received in it.

    Of several loaders, a layer is told of the one whose data differ most.

    Args:
        report: Of the window before it.
        layers: Those of the report.
        all_ranks: Whether all ranks call this, each with its own part of the validation data.
        num_loaders: Validation loaders, as many on all ranks.
    """
    layout = layout_of(layers)
    if not layout.num_channels or not num_loaders:
        return report
    received = [_received(layers, loader, layout) for loader in range(num_loaders)]
    if all_ranks:
        received = _of_all_ranks(received, layout)
    eps = np.array([layer.module.eps for layer in layers])
    by_layer: dict[str, tuple[LayerReport, Evidence]] = {name: (layer, {}) for name, layer in report.items()}
    for loader, statistics in enumerate(received):
        population, noise = statistics.population(layout), error_of_sampling(statistics, layout, eps)
        num_batches = statistics.weight[MEAN] - statistics.weight[VAR]
        for index, (layer, own) in enumerate(zip(layers, layout.slices, strict=True)):
            if layer.name not in report or not num_batches[index]:
                continue
            known = replace(report[layer.name], validation=torch.from_numpy(population[:, own].copy()))
            evidence = _evidence(known, float(num_batches[index]), float(noise[index]))
            if num_loaders > 1:
                evidence |= {"val_loader": float(loader)}
            if _severity(evidence) >= _severity(by_layer[layer.name][1]):
                by_layer[layer.name] = known, evidence
    diagnoses = diagnose_validation(
        (layer.diagnosis, evidence, layer.has_running_stats) for layer, evidence in by_layer.values()
    )
    described = (
        replace(layer, diagnosis=diagnosis) for (layer, _), diagnosis in zip(by_layer.values(), diagnoses, strict=True)
    )
    return Report(described, rank=report.rank)


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


def _of_all_ranks(received: Sequence[PooledStatistics], layout: ChannelLayout) -> list[PooledStatistics]:
    """What all ranks have received of each loader: a gather to rank 0, and a broadcast of what it makes of it."""
    size = PooledStatistics.packed_size(layout)
    gathered = collectives.gather(torch.cat([part.packed() for part in received]))
    with answer_of_rank_zero(size * len(received)) as answer:
        if gathered:
            ranks = [_split(message, size, layout) for message in gathered]
            answer.message = torch.cat([pool(loader, layout).packed() for loader in zip(*ranks, strict=True)])
    return _split(answer.message, size, layout)


def _split(message: Tensor, size: int, layout: ChannelLayout) -> list[PooledStatistics]:
    return [PooledStatistics.unpacked(part, layout) for part in torch.split(message, size)]


def _evidence(layer: LayerReport, num_batches: float, noise: float) -> dict[str, float]:
    known = {
        "val_batches": num_batches,
        "val_shift": float(layer.val_shift.square().nanmean().sqrt()),
        "val_noise": math.hypot(noise, layer.evidence.get("now_error", 0.0)),
    }
    return {name: value for name, value in known.items() if math.isfinite(value)}


def _severity(evidence: Evidence) -> tuple[bool, bool, float]:
    return bool(evidence), is_shifted(evidence), evidence.get("val_shift", 0.0)
