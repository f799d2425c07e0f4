"""From windows to a report: the layers' blocks and running statistics brought together, for all channels at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.capture import PATHS
from lightning_bnmonitor.diagnosis import METRICS, Circumstances, diagnose, distances, observations
from lightning_bnmonitor.layers import History, TrackedLayer, num_batches_tracked, running_stats
from lightning_bnmonitor.profile import Buffers, Profile, evaluate
from lightning_bnmonitor.report import LayerReport, Report
from lightning_bnmonitor.window import Blocks, Window

# |mean| / sqrt(var + eps) above which what a kernel saved is not exact enough:
_MAX_RATIO, _MAX_RATIO_SERIAL = 100.0, 10.0


class Assessed(NamedTuple):
    """One layer at the end of a window, or in it."""

    layer: TrackedLayer
    circumstances: Circumstances
    num_tracked: int | None
    """``num_batches_tracked``; None if it has none."""
    buffers: Tensor | None
    """Running statistics, ``(2, C)``; None if it has none."""
    parts: _Parts
    report: LayerReport


class Assessment(NamedTuple):
    """All layers, in the order of the report."""

    layers: list[Assessed]
    report: Report


class _Parts(NamedTuple):
    """What was found for one layer, before there is a diagnosis. Per channel ``(2, C)`` each: mean and variance."""

    num_samples: int
    population: Tensor
    now: Tensor
    z: Tensor
    history: History | None
    """What the running statistics are made of."""
    ratio: float
    """Largest absolute mean over sqrt(var + eps) of any channel."""
    observed: Mapping[str, float]
    metrics: Mapping[str, float]


def assess(
    layers: Sequence[TrackedLayer],
    windows: Mapping[torch.device, Window],
    reported: Collection[TrackedLayer],
    ended: bool,
) -> Assessment:
    """Where layers stand in their windows now.

    Args:
        layers: All that have a place in the windows, and any others.
        windows: The windows of all devices.
        reported: Those of them that are of interest.
        ended: Whether the windows have ended, and the running statistics are to be taken as they were then.
    """
    tracked, running = num_batches_tracked(layers), list(running_stats(layers))
    if ended:
        tracked = [layer.tracked_end if layer.window else now for layer, now in zip(layers, tracked, strict=True)]
        running = [layer.end if layer.window else now for layer, now in zip(layers, running, strict=True)]
    circumstances = [
        _circumstances(layer, count, buffers is not None)
        for layer, count, buffers in zip(layers, tracked, running, strict=True)
    ]
    parts: dict[TrackedLayer, _Parts] = {}
    for window in windows.values():
        own = sorted((layer.index, i) for i, layer in enumerate(layers) if layer.window is window)
        here = [layers[i] for _, i in own]
        found = _of_window(window, here, [circumstances[i] for _, i in own], [running[i] for _, i in own])
        parts |= zip(here, found, strict=True)
    assessed = [
        _assessed(layer, known, count, buffers, parts.get(layer) or _not_called(layer, buffers))
        for layer, known, count, buffers in zip(layers, circumstances, tracked, running, strict=True)
        if layer in reported
    ]
    report = Report((layer.report for layer in assessed), [layer.parts.metrics for layer in assessed])
    return Assessment(assessed, report)


def end_windows(assessment: Assessment, always_pass: bool) -> None:
    """Tell every layer what its next window goes on from, and how to look at it."""
    for layer, known, num_tracked, buffers, parts, _ in assessment.layers:
        history = parts.history if known.weights_known else None
        layer.end_window(buffers, num_tracked, history, known.updates_per_call)
        if layer.num_calls:
            layer.hook.by_pass = always_pass or parts.ratio > (_MAX_RATIO_SERIAL if layer.serial else _MAX_RATIO)


def _of_window(
    window: Window,
    layers: Sequence[TrackedLayer],
    circumstances: Sequence[Circumstances],
    running: Sequence[Tensor | None],
) -> list[_Parts]:
    """What the window of one device says, for all layers in the order of their channels."""
    blocks, population = window.blocks(), window.population()
    exact = torch.stack([population.mean, population.var])
    eps = np.array([layer.module.eps for layer in layers])
    end = _side_by_side(running, blocks)
    profile = evaluate(blocks, _buffers(layers, circumstances, blocks, end), eps)
    present = torch.from_numpy(np.where(profile.layers.spread(profile.num_batches > 1), profile.now, exact))
    channel_eps = torch.from_numpy(profile.layers.spread(eps))
    has_stats = np.array([known.has_running_stats for known in circumstances])
    metrics = distances(exact, present, end, channel_eps, profile.layers, has_stats & (population.num_samples > 0))
    observed = observations(profile, exact, end, has_stats, channel_eps)
    histories = _histories(layers, running, profile)
    ratios = profile.layers.maximum((exact[0].abs() / (exact[1] + channel_eps).sqrt()).numpy()).tolist()
    z, columns = torch.from_numpy(profile.z), [metrics[name].tolist() for name in METRICS]
    return [
        _Parts(
            num_samples=int(population.num_samples[i]),
            population=exact[:, own],
            now=present[:, own],
            z=z[:, own],
            history=history,
            ratio=ratio,
            observed=seen,
            metrics=dict(zip(METRICS, values, strict=True)),
        )
        for i, (own, seen, values, history, ratio) in enumerate(
            zip(profile.layers.slices, observed, zip(*columns, strict=True), histories, ratios, strict=True)
        )
    ]


def _histories(
    layers: Sequence[TrackedLayer], running: Sequence[Tensor | None], profile: Profile
) -> Iterator[History | None]:
    """What the buffers are made of now."""
    values = zip(profile.initial_weight.tolist(), *profile.noise.tolist(), strict=True)
    for layer, buffers, num_batches, history in zip(layers, running, profile.num_batches, values, strict=True):
        yield history if num_batches else layer.history_without_updates(buffers)


def _buffers(
    layers: Sequence[TrackedLayer], circumstances: Sequence[Circumstances], blocks: Blocks, end: Tensor
) -> Buffers:
    num_batches = blocks.num_batches.sum(axis=1)
    samples = blocks.num_samples.sum(axis=1) / np.maximum(num_batches, 1)
    histories = [
        layer.history or _estimated_history(layer, per_batch)
        for layer, per_batch in zip(layers, samples.tolist(), strict=True)
    ]
    history = np.array(histories).reshape(-1, 3)
    return Buffers(
        start=_side_by_side(
            [layer.start for layer in layers], blocks, torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
        ).numpy(),
        end=end.numpy(),
        initial_weight=history[:, 0],
        noise=history[:, 1:].T,
        rounding=np.array([_rounding(layer) for layer in layers]),
        known=np.array([known.weights_known for known in circumstances]),
    )


def _estimated_history(layer: TrackedLayer, samples_per_batch: float) -> History:
    """What the buffers are made of that were there before: so many batches like those of this window.

    Their expectation is not told apart from that of earlier batches: the initial values count as gone.
    """
    momentum, calls = layer.momentum or 0.0, (layer.tracked_before or 0) / layer.updates_per_call
    if not momentum or not calls or samples_per_batch <= 1:
        return 0.0, 0.0, 0.0
    squares = 1 / calls
    if layer.module.momentum is not None:
        squares = momentum / (2 - momentum) * (1 - (1 - momentum) ** (2 * calls))
    return 0.0, squares / samples_per_batch, squares / (samples_per_batch - 1)


def _side_by_side(buffers: Sequence[Tensor | None], blocks: Blocks, missing: Tensor | None = None) -> Tensor:
    """Running statistics of all layers in the flat channel space, ``(2, channels)``; ``missing`` if there are none."""
    missing = _nan(1) if missing is None else missing
    return torch.cat(
        [
            missing.expand(2, int(width)) if stats is None else stats
            for stats, width in zip(buffers, blocks.widths, strict=True)
        ],
        dim=1,
    )


def _rounding(layer: TrackedLayer) -> float:
    buffer = layer.module.running_mean
    return 0.0 if buffer is None else torch.finfo(buffer.dtype).eps / 2


def _circumstances(layer: TrackedLayer, num_tracked: int | None, has_running_stats: bool) -> Circumstances:
    module = layer.module
    return Circumstances(
        num_features=module.num_features,
        momentum=module.momentum,
        effective_momentum=layer.momentum,
        has_running_stats=has_running_stats,
        calls={**{path: layer.calls[path] for path in PATHS}, "skipped": layer.hook.skipped},
        training_calls=layer.training_calls,
        updates_per_call=layer.updates_of_a_call(num_tracked),
        assumed_updates=layer.updates_per_call,
        checkpointed=layer.hook.checkpointed,
        written_outside=layer.written_outside,
        interrupted=layer.interrupted,
    )


def _not_called(layer: TrackedLayer, buffers: Tensor | None) -> _Parts:
    """A layer that has no place in a window yet."""
    missing = _nan(layer.module.num_features)
    broken = 0 if buffers is None else int((~torch.isfinite(buffers)).any(dim=0).sum())
    observed = {"non_finite_channels": float(broken), "non_finite_running_stats": float(broken), "dead_channels": 0.0}
    return _Parts(
        0,
        missing,
        missing,
        torch.zeros_like(missing),
        layer.history_without_updates(buffers),
        math.nan,
        observed,
        dict.fromkeys(METRICS, math.nan),
    )


def _assessed(
    layer: TrackedLayer, known: Circumstances, num_tracked: int | None, buffers: Tensor | None, parts: _Parts
) -> Assessed:
    module = layer.module
    population, now, z = parts.population, parts.now, parts.z
    running = _nan(population.shape[1]) if buffers is None else buffers
    report = LayerReport(
        name=layer.name,
        type=type(module).__name__,
        num_features=population.shape[1],
        eps=module.eps,
        momentum=module.momentum,
        num_batches=layer.num_calls,
        num_samples=parts.num_samples,
        population_mean=population[0],
        population_var=population[1],
        running_mean=running[0],
        running_var=running[1],
        now_mean=now[0],
        now_var=now[1],
        z_mean=z[0],
        z_var=z[1],
        has_running_stats=buffers is not None,
        diagnosis=diagnose(known, parts.observed, parts.metrics),
    )
    return Assessed(layer, known, num_tracked, buffers, parts, report)


def _nan(width: int) -> Tensor:
    return torch.full((2, width), torch.nan, dtype=torch.float64, device="cpu")
