"""From windows to a report: the layers' blocks and running statistics brought together, for all channels at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.capture.batch_moments import PATHS
from lightning_bnmonitor.diagnosis.diagnosis import METRICS, Circumstances, diagnose, distances, observations
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.analysis import Buffers, Profile, evaluate
from lightning_bnmonitor.statistics.segments import FloatArray, Segments
from lightning_bnmonitor.statistics.stationary import Part, as_one_block
from lightning_bnmonitor.statistics.window import Blocks, Window
from lightning_bnmonitor.tracking import collectives as ranks
from lightning_bnmonitor.tracking.findings import Finding, pack, packed_size, unpack
from lightning_bnmonitor.tracking.placement import Placement
from lightning_bnmonitor.tracking.tracked_layer import History, TrackedLayer, num_batches_tracked, running_stats

# |mean| / sqrt(var + eps) above which what a kernel saved is not exact enough:
_MAX_RATIO, _MAX_RATIO_SERIAL = 100.0, 10.0


class Standing(NamedTuple):
    """Where one layer stands on this rank now, or stood when its window ended."""

    layer: TrackedLayer
    width: int
    """Channels."""
    circumstances: Circumstances
    num_tracked: int | None
    """``num_batches_tracked``; None if it has none."""
    buffers: Tensor | None
    """Running statistics, ``(2, C)``; None if it has none."""


class Ending(NamedTuple):
    """What a layer's next window goes on from."""

    standing: Standing
    history: History | None
    """What the running statistics are made of."""
    ratio: float
    """Largest absolute mean over sqrt(var + eps) of any channel; NaN if it was not called."""


class _Measured(NamedTuple):
    """What the window of one device shows, for its layers in the order of their channels."""

    standings: list[Standing]
    blocks: Blocks
    profile: Profile
    end: Tensor
    """Running statistics, ``(2, channels)``; NaN if a layer has none."""
    eps: FloatArray
    """Of each layer."""
    moves: bool
    """Whether the weights may have changed in it."""


class _AllRanks(NamedTuple):
    """What all ranks have seen of one layer."""

    num_samples: float
    population: FloatArray
    """Mean and variance, ``(2, C)``."""
    first_bad: FloatArray
    """The first call with a value that is not finite, ``(C,)``."""
    evidence: Mapping[str, float]


def assess(
    layers: Sequence[TrackedLayer],
    placement: Placement,
    ended: bool,
    all_ranks: bool,
    part: Part | None = None,
) -> tuple[Report, list[Ending]]:
    """Where layers stand in their windows.

    Args:
        layers: Those that the report is about, in the order of the model's modules.
        placement: Their places. All that have one are in the order of the report.
        ended: Whether they have ended, and the running statistics are to be taken as they were then.
        all_ranks: Whether to report on all ranks together: all have to call this, and get the same report.
        part: If the weights stayed as they were and nothing was updated: what part in the running statistics the
            batches are to be taken to have. Now is the population then.
    """
    ordered = [*placement.layers, *(layer for layer in layers if layer.window is None)]
    standings = dict(zip(ordered, _standings(ordered, ended, part), strict=True))
    measured = [_measure(window, standings.values(), part) for window in placement.windows.values()]
    elsewhere = [standing for standing in standings.values() if standing.layer.window is None]
    position = {layer: index for index, layer in enumerate(ordered)}

    def find(seen: Mapping[TrackedLayer, _AllRanks]) -> tuple[list[Finding], list[int]]:
        found = dict(finding for window in measured for finding in _findings(window, seen))
        found |= {standing.layer: _not_called(standing, seen.get(standing.layer)) for standing in elsewhere}
        return [found[layer] for layer in layers], [position[layer] for layer in layers]

    findings, positions = _exchange([standings[layer] for layer in layers], measured, find) if all_ranks else find({})
    in_order = sorted(zip(positions, layers, findings, strict=True), key=lambda item: item[0])
    summaries = [{name: finding.diagnosis.evidence.get(name, math.nan) for name in METRICS} for *_, finding in in_order]
    alone = None if all_ranks or ranks.num_ranks() == 1 else ranks.rank()
    blocks = {layer: own for window in measured for layer, own in _blocks(window)}
    report = Report((_report(layer, finding, blocks.get(layer)) for _, layer, finding in in_order), summaries, alone)
    endings = [ending for window in measured for ending in _endings(window)]
    return report, endings + [Ending(s, s.layer.history_without_updates(s.buffers), math.nan) for s in elsewhere]


def end_windows(endings: Iterable[Ending], always_pass: bool) -> None:
    """Tell every layer what its next window goes on from, and how to look at it."""
    for (layer, _, known, num_tracked, buffers), history, ratio in endings:
        layer.end_window(buffers, num_tracked, history if known.weights_known else None, known.updates_per_call)
        if layer.num_calls:
            layer.hook.by_pass = always_pass or ratio > (_MAX_RATIO_SERIAL if layer.serial else _MAX_RATIO)


def _exchange(
    standings: Sequence[Standing],
    measured: Sequence[_Measured],
    find: Callable[[Mapping[TrackedLayer, _AllRanks]], tuple[list[Finding], list[int]]],
) -> tuple[list[Finding], list[int]]:
    """What rank 0 finds when it knows what all ranks have seen, on all ranks."""
    widths = [standing.width for standing in standings]
    if not sum(widths):
        return find({})
    layers = Segments(np.array(widths, dtype=np.int64))
    gathered = ranks.gather(_share(standings, measured, layers).packed())
    message = torch.full((packed_size(widths),), math.nan, dtype=torch.float64, device="cpu")
    try:
        if gathered:
            message = pack(*find(_seen(standings, layers, [ranks.Share.unpacked(part, layers) for part in gathered])))
    finally:  # the others wait, whatever happens
        message = ranks.broadcast(message)
    if message[0].isnan():
        raise RuntimeError("Rank 0 could not report on the BatchNorm layers: see its error.")
    return unpack(message, widths)


def _share(standings: Sequence[Standing], measured: Sequence[_Measured], layers: Segments) -> ranks.Share:
    """What this rank has seen of layers."""
    share = ranks.Share.empty(layers)
    where = {
        standing.layer: (index, own) for index, (standing, own) in enumerate(zip(standings, layers.slices, strict=True))
    }
    for window in measured:
        profile = window.profile
        theirs = ranks.Share.of(profile, np.array([standing.layer.num_ranks for standing in window.standings]))
        for index, (standing, own) in enumerate(zip(window.standings, profile.layers.slices, strict=True)):
            if standing.layer in where:
                share.put(*where[standing.layer], theirs, index, own)
    return share


def _seen(
    standings: Sequence[Standing], layers: Segments, shares: Sequence[ranks.Share]
) -> dict[TrackedLayer, _AllRanks]:
    """What all ranks have seen, by layer."""
    eps = np.array([standing.layer.module.eps for standing in standings])
    everyone = ranks.together(shares, layers)
    apart, population = ranks.difference(shares[0], everyone, layers, eps), everyone.population(layers)
    return {
        standing.layer: _AllRanks(
            everyone.num_samples[index],
            population[:, own],
            everyone.first_bad[own],
            {"ranks": float(len(shares)), "rank_error": float(apart[index])},
        )
        for index, (standing, own) in enumerate(zip(standings, layers.slices, strict=True))
    }


def _standings(layers: Sequence[TrackedLayer], ended: bool, part: Part | None) -> Iterator[Standing]:
    tracked, running = num_batches_tracked(layers), running_stats(layers)
    for layer, num_tracked, buffers in zip(layers, tracked, running, strict=True):
        width = layer.width or layer.module.num_features
        if ended and (layer.window or layer.end is not None):
            num_tracked, buffers = layer.tracked_end, layer.end
        buffers = _fitting(buffers, width)
        circumstances = _circumstances(layer, num_tracked, buffers is not None)
        if part == "average":
            average = 1 / max(layer.num_calls, 1)
            circumstances = circumstances._replace(momentum=None, effective_momentum=average)
        yield Standing(layer, width, circumstances, num_tracked, buffers)


def _measure(window: Window, standings: Iterable[Standing], part: Part | None) -> _Measured:
    here = sorted((s for s in standings if s.layer.window is window), key=lambda standing: standing.layer.index)
    blocks, eps = window.blocks(), np.array([standing.layer.module.eps for standing in here])
    blocks = blocks if part is None else as_one_block(blocks, part)
    end = _side_by_side([standing.buffers for standing in here], blocks, _nan(2, 1))
    return _Measured(here, blocks, evaluate(blocks, _buffers(here, blocks, end), eps), end, eps, part is None)


def _findings(window: _Measured, seen: Mapping[TrackedLayer, _AllRanks]) -> Iterator[tuple[TrackedLayer, Finding]]:
    """What the window of one device says of its layers; of those that all ranks have told of, with what they have."""
    standings, _, profile, end, eps, moves = window
    layers, exact, num_samples = profile.layers, profile.population, profile.num_samples
    if seen:
        exact, num_samples, first_bad = exact.copy(), num_samples.copy(), profile.first_bad.copy()
        for index, (standing, own) in enumerate(zip(standings, layers.slices, strict=True)):
            if (all_ranks := seen.get(standing.layer)) is not None:
                num_samples[index], exact[:, own], first_bad[own], _ = all_ranks
        profile = replace(profile, first_bad=first_bad)
    population = torch.from_numpy(exact)
    present = torch.from_numpy(np.where(layers.spread(moves & (profile.num_batches > 1)), profile.now, exact))
    channel_eps = torch.from_numpy(layers.spread(eps))
    has_stats = np.array([standing.circumstances.has_running_stats for standing in standings])
    metrics = distances(population, present, end, channel_eps, layers, has_stats & (num_samples > 0))
    observed = observations(profile, population, end, has_stats, channel_eps)
    numbers = torch.cat([population, end, present, torch.from_numpy(profile.z), torch.from_numpy(profile.std_error)])
    parts = torch.split(numbers, layers.widths.tolist(), dim=1)
    rows = zip(*(metrics[name].tolist() for name in METRICS), strict=True)
    for standing, known, part, values, count in zip(standings, observed, parts, rows, num_samples, strict=True):
        layer = standing.layer
        if layer in seen:
            known |= seen[layer].evidence if moves else {"ranks": seen[layer].evidence["ranks"]}
        diagnosis = diagnose(standing.circumstances, known, dict(zip(METRICS, values, strict=True)))
        yield layer, Finding(part, layer.num_calls, int(count), standing.buffers is not None, diagnosis)


def _not_called(standing: Standing, seen: _AllRanks | None) -> Finding:
    """What is found of a layer that has no place in a window of this rank."""
    layer, width, known, _, buffers = standing
    population, running = _nan(2, width), _nan(2, width) if buffers is None else buffers
    broken = 0 if buffers is None else int((~torch.isfinite(buffers)).any(dim=0).sum())
    observed = {"non_finite_channels": float(broken), "non_finite_running_stats": float(broken), "dead_channels": 0.0}
    metrics = dict.fromkeys(METRICS, math.nan)
    if seen is not None:
        population = torch.from_numpy(seen.population)
        one = Segments(np.array([width], dtype=np.int64))
        comparable = np.array([buffers is not None and seen.num_samples > 0])
        eps = torch.full((width,), layer.module.eps, dtype=torch.float64, device="cpu")
        values = distances(population, population, running, eps, one, comparable)
        metrics = {name: float(value[0]) for name, value in values.items()}
        observed |= seen.evidence
    numbers = torch.cat([population, running, population, torch.zeros_like(population), _nan(2, width)])
    num_samples = 0 if seen is None else int(seen.num_samples)
    return Finding(numbers, layer.num_calls, num_samples, buffers is not None, diagnose(known, observed, metrics))


def _blocks(window: _Measured) -> Iterator[tuple[TrackedLayer, tuple[Tensor, Tensor]]]:
    """Batches and batch statistics of each layer's blocks on one device, which stay if the window goes on."""
    num_batches = torch.from_numpy(window.blocks.num_batches)
    values = torch.split(torch.from_numpy(window.blocks.value.copy()), window.blocks.widths.tolist(), dim=-1)
    for standing, batches, value in zip(window.standings, num_batches, values, strict=True):
        yield standing.layer, (batches, value)


def _endings(window: _Measured) -> Iterator[Ending]:
    profile = window.profile
    mean, var = profile.population
    with np.errstate(invalid="ignore"):
        ratios = profile.layers.maximum(abs(mean) / np.sqrt(var + profile.layers.spread(window.eps))).tolist()
    histories = zip(profile.initial_weight.tolist(), *profile.noise.tolist(), strict=True)
    for standing, num_batches, history, ratio in zip(
        window.standings, profile.num_batches, histories, ratios, strict=True
    ):
        updated = history if num_batches else standing.layer.history_without_updates(standing.buffers)
        yield Ending(standing, updated, ratio)


def _buffers(standings: Sequence[Standing], blocks: Blocks, end: Tensor) -> Buffers:
    num_batches = blocks.num_batches.sum(axis=1)
    samples = blocks.num_samples.sum(axis=1) / np.maximum(num_batches, 1)
    layers = [standing.layer for standing in standings]
    histories = [
        layer.history or _estimated_history(layer, per_batch)
        for layer, per_batch in zip(layers, samples.tolist(), strict=True)
    ]
    history = np.array(histories).reshape(-1, 3)
    initial = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
    return Buffers(
        start=_side_by_side([_fitting(layer.start, layer.width) for layer in layers], blocks, initial).numpy(),
        end=end.numpy(),
        initial_weight=history[:, 0],
        noise=history[:, 1:].T,
        rounding=np.array([_rounding(layer) for layer in layers]),
        known=np.array([standing.circumstances.weights_known for standing in standings]),
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


def _fitting(buffers: Tensor | None, width: int) -> Tensor | None:
    """Running statistics, unless the layer has been given another width than what it has received."""
    return None if buffers is None or buffers.shape[1] != width else buffers


def _side_by_side(buffers: Sequence[Tensor | None], blocks: Blocks, missing: Tensor) -> Tensor:
    """Running statistics of all layers in the flat channel space, ``(2, channels)``; ``missing`` if there are none."""
    return torch.cat(
        [
            missing.expand(2, width) if stats is None else stats
            for stats, width in zip(buffers, blocks.widths.tolist(), strict=True)
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


def _report(layer: TrackedLayer, finding: Finding, blocks: tuple[Tensor, Tensor] | None) -> LayerReport:
    return LayerReport(
        name=layer.name,
        type=type(layer.module).__name__,
        eps=layer.module.eps,
        momentum=layer.module.momentum,
        num_batches=finding.num_batches,
        num_samples=finding.num_samples,
        has_running_stats=finding.has_running_stats,
        diagnosis=finding.diagnosis,
        numbers=finding.numbers,
        blocks=blocks,
    )


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
