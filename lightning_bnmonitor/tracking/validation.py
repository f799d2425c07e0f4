"""What layers receive in validation beside training: are the running statistics bad, or the data different?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lightning_bnmonitor.diagnosis.diagnosis import FLAGS, WARNING
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.segments import FloatArray, Segments
from lightning_bnmonitor.statistics.window import Window
from lightning_bnmonitor.tracking import collectives as ranks
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer

_MIN_BATCHES = 4
_CHANCE = 3  # times its noise floor that a shift must exceed
_MEAN, _VAR = 0, 1


def with_validation(report: Report, layers: Sequence[TrackedLayer], all_ranks: bool) -> Report:
    """A report with how far validation was from training, from what the layers have put aside in validation.

    A layer's shift is the RMS error of the normalised activation that normalising its validation inputs by the present
    statistics of training makes. The variance of what validation batches say is taken from their differences, as that
    of training batches is: with V the variance of a batch's mean times the number of its values, the mean of N values
    has the variance V / N.

    Args:
        report: Of the window before it.
        layers: Those of the report.
        all_ranks: Whether all ranks call this, each with its own share of the validation data.
    """
    widths = [layer.width or layer.module.num_features for layer in layers]
    if not sum(widths):
        return report
    segments = Segments(np.array(widths, dtype=np.int64))
    share = _share(layers, segments)
    if all_ranks:
        gathered = ranks.gather(share.packed())
        shares = [ranks.Share.unpacked(part, segments) for part in gathered]
        merged = ranks.together(shares, segments) if shares else share
        share = ranks.Share.unpacked(ranks.broadcast(merged.packed()), segments)
    population = share.population(segments)
    eps = segments.spread(np.array([layer.module.eps for layer in layers]))
    with np.errstate(all="ignore"):
        variance = share.within / segments.spread(share.dof) / segments.spread(share.weight)
        unit = np.stack([population[_VAR] + eps, 4 * (population[_VAR] + eps) ** 2])
        noise = np.sqrt(segments.mean((variance / unit).sum(axis=0)))
    num_batches = share.weight[_MEAN] - share.weight[_VAR]
    shifted = {
        layer.name: _with_shift(report[layer.name], population[:, own], float(batches), float(chance))
        for layer, own, batches, chance in zip(layers, segments.slices, num_batches, noise, strict=True)
        if layer.name in report
    }
    summaries, described, is_trusted = report.layer_summaries(), [], True
    for name in report:
        layer = shifted.get(name, report[name])
        is_trusted &= not layer.needs_attention and not summaries[name]["eval_error"] > WARNING
        # What follows a layer that eval() normalises wrongly is another matter than the data.
        described.append(_flagged(layer) if is_trusted else layer)
    return Report(described, summaries.values(), report.rank)


def _share(layers: Sequence[TrackedLayer], segments: Segments) -> ranks.Share:
    """What this rank has seen in validation."""
    share = ranks.Share.empty(segments)
    by_device: dict[torch.device, list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.validation and layer.validation[0].mean.numel() == segments.widths[index]:
            by_device.setdefault(layer.validation[0].mean.device, []).append(index)
    for device, here in by_device.items():
        window = Window(torch.device("cpu") if device.type == "mps" else device)
        places = window.add_layers([int(segments.widths[index]) for index in here])
        window.update({place: layers[index].validation for place, index in zip(places, here, strict=True)})
        blocks = window.blocks()
        for place, index in zip(places, here, strict=True):
            count, batches, own = blocks.aside_samples[place], blocks.aside_batches[place], segments.slices[index]
            value, m2 = blocks.aside_value[:, window.channels(place)], blocks.aside_m2[:, window.channels(place)]
            share.num_samples[index], share.dof[index] = count, batches - 1
            share.weight[:, index] = count, count - batches
            share.mean[own], share.squares[own] = value[_MEAN], (count - batches) * value[_VAR] + m2[_MEAN]
            share.value[:, own], share.within[:, own] = value, m2
    return share


def _with_shift(layer: LayerReport, population: FloatArray, num_batches: float, noise: float) -> LayerReport:
    """A layer's report with what it received in validation."""
    if not num_batches:
        return layer
    layer = replace(layer, validation=torch.from_numpy(population.copy()))
    known = {"val_batches": num_batches, "val_shift": _rms(layer)}
    known["val_noise"] = math.hypot(noise, layer.evidence.get("now_error", 0.0))
    evidence = {**layer.evidence, **{name: value for name, value in known.items() if math.isfinite(value)}}
    return replace(layer, diagnosis=replace(layer.diagnosis, evidence=evidence))


def _rms(layer: LayerReport) -> float:
    return float(layer.val_shift.square().nanmean().sqrt())


def _flagged(layer: LayerReport) -> LayerReport:
    """A layer whose running statistics fit training, with the flag if they do not fit validation."""
    evidence = layer.evidence
    shift, noise = evidence.get("val_shift", 0.0), evidence.get("val_noise", math.inf)
    apart = shift > _CHANCE * noise and shift**2 - noise**2 > WARNING**2
    if not apart or evidence["val_batches"] < _MIN_BATCHES or not layer.has_running_stats:
        return layer
    flags = tuple(flag for flag in FLAGS if flag in (*layer.flags, "domain-shift"))
    return replace(layer, diagnosis=replace(layer.diagnosis, flags=flags))
