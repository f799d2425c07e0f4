r"""What layers receive in validation: against the running statistics with which it is normalised, and against training.

A layer's *error* is the RMS error of the normalised activation that the running statistics, as validation began, make
on its validation inputs (:attr:`~lightning_bnmonitor.report.layer_values.LayerValues.val_error`); its *shift* is what
the present statistics of training would make there (:attr:`~..report.layer_values.LayerValues.val_shift`). What chance
makes of them is told by :mod:`~lightning_bnmonitor.statistics.evaluation`. What follows is decided in ``diagnosis/``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.evidence import Evidence
from lightning_bnmonitor.diagnosis.rules import net_error, net_shift
from lightning_bnmonitor.diagnosis.validation import Standing, Validated, diagnose_validation
from lightning_bnmonitor.report.averaged_rows import averaged_row
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.blocks import PooledBatches
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.divergence import act_rmse
from lightning_bnmonitor.statistics.evaluation import EvaluationNoise, TrainingNoise, evaluation_noise, scatter_of_calls
from lightning_bnmonitor.statistics.pooled_calls import PooledCalls
from lightning_bnmonitor.statistics.pooling import PooledStatistics, pool
from lightning_bnmonitor.statistics.scores import MEAN, VAR
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.exchange import answer_of_rank_zero
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import layout_of

_OF_LAYERS = 10  # fields of a comparison that have a value for each layer


class Comparison(NamedTuple):
    """What layers have received of one validation loader, against the rest; NaN where a layer was not called."""

    num_batches: FloatArray
    """Calls that were looked at, ``(L,)``; 0 if there were none."""
    error: FloatArray
    """RMS over channels of the error, ``(L,)``."""
    error_noise: FloatArray
    """What chance makes of it, ``(L,)``."""
    shift: FloatArray
    """RMS over channels of the shift, ``(L,)``."""
    shift_noise: FloatArray
    """What chance makes of it, ``(L,)``."""
    misfit: FloatArray
    """RMS error that the running statistics, as validation began, make on what is received in training, ``(L,)``."""
    standing: FloatArray
    """What the running statistics were, ``(L,)``: of :class:`~lightning_bnmonitor.diagnosis.validation.Standing`."""
    is_updated: FloatArray
    """Whether the running statistics have changed since, ``(L,)`` of 0 and 1."""
    scatter: FloatArray
    """How far the means of its calls are from the mean of all, where eval() normalises by the batch, ``(L,)``."""
    scatter_of_training: FloatArray
    """What that is at most of random batches as large as those of training, ``(L,)``."""
    population: FloatArray
    """Mean and unbiased variance, ``(2, C)``."""
    running: FloatArray
    """Running statistics as validation began, ``(2, C)``."""

    def packed(self) -> Tensor:
        """All of it as one tensor, of which the first number is not NaN."""
        return torch.from_numpy(np.concatenate([field.ravel() for field in self]))

    @staticmethod
    def packed_size(layout: ChannelLayout) -> int:
        """Numbers in what is :meth:`packed`."""
        return _OF_LAYERS * layout.num_layers + 4 * layout.num_channels

    @classmethod
    def unpacked(cls, packed: Tensor, layout: ChannelLayout) -> Comparison:
        """What was :meth:`packed` of these layers."""
        of_layers, of_channels = np.split(packed.numpy(), [_OF_LAYERS * layout.num_layers])
        return cls(*of_layers.reshape(_OF_LAYERS, -1), *of_channels.reshape(2, 2, -1))


def with_validation(
    report: Report, layers: Sequence[TrackedLayer], all_ranks: bool, num_loaders: int, are_averaged: bool = False
) -> Report:
    """A report with how far validation was from training, by what the layers have received in it.

    Of several loaders, a layer is told of the one whose data differ most.

    Args:
        report: Of the window before it. Of several ranks, validation is compared with the report of rank 0.
        layers: Those of the report.
        all_ranks: Whether all ranks call this, each with its own part of the validation data.
        num_loaders: Validation loaders, as many on all ranks.
        are_averaged: Whether validation had averaged weights: it is then told of layers of their own, after the others.
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
    rows: list[LayerReport] = []
    validated: list[Validated] = []
    for name, layer in report.items():
        row, its = layer, Validated(layer.diagnosis, {}, Standing.ABSENT, math.nan)
        if name in index:
            row, its = _validated(layer, index[name], layout.slices[index[name]], comparisons)
        if are_averaged:
            rows.append(layer)
            validated.append(Validated(layer.diagnosis, {}, Standing.REPAIRED))  # nothing is known of it there
            if row.validation is None:
                continue
            row = averaged_row(row)
            its = its._replace(diagnosis=row.diagnosis)
        rows.append(row)
        validated.append(its)
    diagnoses = diagnose_validation(validated)
    described = [replace(row, diagnosis=diagnosis) for row, diagnosis in zip(rows, diagnoses, strict=True)]
    described.sort(key=lambda row: row.averaged_of is not None)
    return Report(described, report.rank, report.remarks)


def _validated(
    layer: LayerReport, position: int, own: slice, comparisons: Sequence[Comparison]
) -> tuple[LayerReport, Validated]:
    """A layer's report with what came in validation, if anything did, and what a diagnosis needs.

    ``position`` is the layer's in the comparisons, ``own`` are its channels.
    """
    loader, evidence = _worst(position, own, comparisons)
    any_loader = comparisons[0]
    standing = Standing(int(any_loader.standing[position]))
    if loader is not None:
        layer = _with_values(layer, comparisons[loader], own, standing)
    misfit, is_updated = float(any_loader.misfit[position]), bool(any_loader.is_updated[position])
    return layer, Validated(layer.diagnosis, evidence, standing, misfit, is_updated)


def _with_values(layer: LayerReport, comparison: Comparison, own: slice, standing: Standing) -> LayerReport:
    """A layer's report with what came in validation, and the running statistics there if they had a part in it."""
    received, running = (torch.from_numpy(part[:, own].copy()) for part in (comparison.population, comparison.running))
    return replace(layer, validation=received, val_running=None if standing == Standing.ABSENT else running)


def _worst(layer: int, own: slice, comparisons: Sequence[Comparison]) -> tuple[int | None, Evidence]:
    """Of the loaders by which a layer was called, the one whose data differ most; and what that says.

    ``own`` are the layer's channels.
    """
    worst: tuple[int | None, Evidence] = None, {}
    for loader, comparison in enumerate(comparisons):
        if not comparison.num_batches[layer]:
            continue
        non_finite = np.count_nonzero(~np.isfinite(comparison.population[0, own]))
        known = {
            "val_non_finite": float(non_finite or math.nan),
            "val_batches": float(comparison.num_batches[layer]),
            "val_error": float(comparison.error[layer]),
            "val_error_noise": float(comparison.error_noise[layer]),
            "val_shift": float(comparison.shift[layer]),
            "val_noise": float(comparison.shift_noise[layer]),
            "val_scatter": float(comparison.scatter[layer]),
            "train_scatter": float(comparison.scatter_of_training[layer]),
            "val_loader": float(loader) if len(comparisons) > 1 else math.nan,
        }
        evidence = {name: value for name, value in known.items() if not math.isnan(value)}
        if worst[0] is None or _severity(evidence) > _severity(worst[1]):
            worst = loader, evidence
    return worst


def _severity(evidence: Evidence) -> tuple[float, float]:
    """What certainly differs, whatever from, comes first."""
    certain = max(net_error(evidence), net_shift(evidence)) if "val_non_finite" not in evidence else math.inf
    return certain, max(evidence.get("val_error", 0.0), evidence.get("val_shift", 0.0))


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
    batches = PooledBatches(counts[0], counts[1], counts[2], value, m2)
    received = PooledStatistics.of_batches(batches, none_bad, layout)
    return received._replace(within=side_by_side([its.between_neighbours for its in calls]))


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
    population, running = statistics.population(layout), _running(layers, layout)
    noise = _noise(report, layers, statistics, layout)
    standing = np.zeros(layout.num_layers)
    error, shift, misfit = (np.full(layout.num_layers, np.nan) for _ in range(3))
    scatter, scatter_of_training = _scatters(report, layers, statistics, layout)
    own_forward = {type(layer.module) for layer in layers if layer.hook.own_forward}
    comparison = Comparison(
        *(statistics.weight[MEAN] - statistics.weight[VAR], error, noise.of_error, shift, noise.of_shift),
        *(
            misfit,
            standing,
            np.array([layer.hook.trained_in_validation for layer in layers], dtype=float),
            scatter,
            scatter_of_training,
            population,
            running,
        ),
    )
    for index, (layer, own) in enumerate(zip(layers, layout.slices, strict=True)):
        if layer.name in report:
            # What makes its output without a BatchNorm kernel may do anything with its running statistics.
            standing[index] = Standing.ABSENT if type(layer.module) in own_forward else layer.val_standing
            validated = _with_values(report[layer.name], comparison, own, Standing(int(standing[index])))
            error[index], shift[index] = _rms(validated.val_error), _rms(validated.val_shift)
            misfit[index] = _misfit(validated)
    return comparison


def _scatters(
    report: Report, layers: Sequence[TrackedLayer], received: PooledStatistics, layout: ChannelLayout
) -> tuple[FloatArray, FloatArray]:
    """Of layers that eval() normalises by the batch: how far calls are apart, and how far those of training may be."""
    by_batch = [layer.name in report and not report[layer.name].has_running_stats for layer in layers]
    values = [
        report[its.name].num_samples / max(report[its.name].num_batches, 1) if its.name in report else 0
        for its in layers
    ]
    with np.errstate(all="ignore"):
        samples = np.array(values) / (received.num_samples / received.batch_size)
        of_training = np.where(by_batch, 1 / np.sqrt(samples), np.nan)
    eps = np.array([layer.module.eps for layer in layers])
    return np.where(np.isfinite(of_training), scatter_of_calls(received, layout, eps), np.nan), of_training


def _misfit(layer: LayerReport) -> float:
    if layer.val_running is None:
        return math.nan
    mean, var = layer.val_running
    return _rms(act_rmse(layer.now_mean, layer.now_var, mean, var, layer.eps))


def _noise(
    report: Report, layers: Sequence[TrackedLayer], received: PooledStatistics, layout: ChannelLayout
) -> EvaluationNoise:
    """What chance makes of it all, by what the report of training says of chance."""
    evidence = [report[layer.name].evidence if layer.name in report else {} for layer in layers]

    def of_training(name: str, otherwise: float = math.nan) -> FloatArray:
        return np.array([its.get(name, otherwise) for its in evidence])

    # Neither constants nor exact statistics have the noise of a running average.
    is_average = np.array([layer.val_standing in (Standing.TRAINED, Standing.OTHER) for layer in layers], dtype=bool)
    training = TrainingNoise(
        jitter=of_training("jitter"),
        samples_per_batch=of_training("samples_per_batch"),
        num_batches=of_training("batches"),
        noise_error=np.where(is_average, of_training("noise_error", 0.0), 0.0),
        now_error=of_training("now_error", 0.0),
    )
    return evaluation_noise(training, received, layout, np.array([layer.module.eps for layer in layers]))


def _running(layers: Sequence[TrackedLayer], layout: ChannelLayout) -> FloatArray:
    """Running statistics as validation began, ``(2, C)``; NaN where there were none."""
    parts = [np.full((2, width), np.nan) for width in layout.widths.tolist()]
    for index, layer in enumerate(layers):
        if layer.val_running is not None and layer.val_running.shape == parts[index].shape:
            parts[index] = layer.val_running.numpy()
    return np.concatenate(parts, axis=1)


def _rms(channels: Tensor) -> float:
    return float(channels.square().nanmean().sqrt())
