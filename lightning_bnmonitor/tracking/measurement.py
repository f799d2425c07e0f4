"""From windows and running statistics to numbers: what is measured on this rank, for all layers at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.capture.batch_moments import PATHS
from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.statistics.analysis import Analysis, analyse, of_the_last
from lightning_bnmonitor.statistics.blocks import Blocks
from lightning_bnmonitor.statistics.borders import Edges, edges_of
from lightning_bnmonitor.statistics.call_contrasts import CallContrasts
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.joined_windows import ENOUGH, KeptWindow, fewest, joined, kept_window
from lightning_bnmonitor.statistics.noise import LastBatch, RunningStats
from lightning_bnmonitor.statistics.probe import Scores
from lightning_bnmonitor.tracking.buffers import History, Snapshot, snapshots
from lightning_bnmonitor.tracking.call_counts import effective_momentum
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import Windows

_DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # besides samples and channels
_DIFFERENCE = 0.01  # share of the variance by which parts of a window differ, to be compared with those of the next


class LayerState(NamedTuple):
    """Where one layer stands on this rank now, or stood when its window ended."""

    layer: TrackedLayer
    circumstances: Circumstances
    now: Snapshot
    """Its running statistics: no buffers if they do not have the width of what it received."""


class Measurement(NamedTuple):
    """What the windows of this rank show of layers."""

    states: Sequence[LayerState]
    blocks: Blocks
    analysis: Analysis
    """What was received in these windows alone; what tells of noise is that of ``judged``."""
    judged: Analysis
    """Of these windows, and of as many before as it takes to judge short ones."""
    windows: FloatArray
    """How many windows of each layer that is, ``(L,)``."""
    running: Tensor
    """Running statistics, ``(2, C)``; NaN if a layer has none."""
    eps: FloatArray
    """Of each layer, ``(L,)``."""
    contrasts: CallContrasts | None
    """Of those layers that are called several times in a step; None if there are none."""
    inputs: Scores | None
    """How far what the model was given is from random order; None if that is not known."""
    edges: Mapping[int, Edges]
    """Of the windows of those layers, by index, whose parts differ while nothing is known of the model's inputs."""


class Ending(NamedTuple):
    """What a layer's next window goes on from."""

    state: LayerState
    history: History | None
    """What the running statistics are made of."""
    ratio: float
    """Largest absolute mean over sqrt(var + eps) of any channel; NaN if it was not called."""
    earlier: Sequence[KeptWindow]
    """The windows before that it was judged by, or may be, too."""
    edges: Edges | None
    """Those of this window, if its parts differ and it is not known why."""


def states_of(layers: Sequence[TrackedLayer], ended: bool = False) -> list[LayerState]:
    """Where layers stand now, or, if their windows have ended, stood then."""
    states = []
    for layer, now in zip(layers, snapshots([layer.module for layer in layers]), strict=True):
        width = layer.width or layer.module.num_features
        if ended and (layer.window is not None or layer.end is not None):
            now = layer.end or Snapshot()
        if now.buffers is not None and now.buffers.shape[1] != width:
            now = now._replace(buffers=None)
        states.append(LayerState(layer, _circumstances(layer, now), now))
    return states


def measure(
    states: Sequence[LayerState],
    blocks: Blocks,
    contrasts: CallContrasts | None = None,
    inputs: Scores | None = None,
    with_earlier: bool = True,
) -> Measurement:
    """What the blocks of layers, and the contrasts of their calls, say beside their running statistics.

    Args:
        states: Where the layers stand.
        blocks: What they have received.
        contrasts: How their calls within a step differ.
        inputs: How far what the model was given is from random order.
        with_earlier: Whether short windows are to be judged together with those before.
    """
    eps = np.array([state.layer.module.eps for state in states])
    missing = torch.full((2, 1), torch.nan, dtype=torch.float64, device="cpu")
    running = _side_by_side([state.now.buffers for state in states], blocks, missing)
    stats, windows = _running_stats(states, blocks, running), np.ones(len(states))
    if earlier := _needed_of_earlier(states, blocks) if with_earlier else {}:
        since = _since_the_first(stats, ChannelLayout(blocks.widths), earlier)
        judged = analyse(joined(blocks, earlier), since, eps)
        analysis = of_the_last(judged, blocks, stats, eps)
        for layer, its in earlier.items():
            windows[layer] += len(its)
    else:
        judged = analysis = analyse(blocks, stats, eps)
    edges = {} if inputs is not None else dict(_edges_of(blocks, analysis, eps))
    return Measurement(states, blocks, analysis, judged, windows, running, eps, contrasts, inputs, edges)


def keep_short_windows(layers: Sequence[TrackedLayer], windows: Windows) -> None:
    """Keep of windows that have ended, if they were too short to be judged alone, what the next ones need of them."""
    called = [layer for layer in layers if layer.window is not None and 0 < layer.counts.updating < ENOUGH]
    for layer in layers:
        if layer.counts.updating >= ENOUGH:
            layer.earlier = ()
    if not called:
        return
    blocks = windows.blocks(called)
    num_batches, layout = blocks.num_batches.sum(axis=1), ChannelLayout(blocks.widths)
    samples = blocks.num_samples.sum(axis=1) / np.maximum(num_batches, 1)
    for index, layer in enumerate(called):
        start = layer.start.buffers
        if not num_batches[index] or start is None:
            continue
        initial_weight, *noise = layer.start.history or _estimated_history(layer, samples[index])
        window = kept_window(blocks, index, start.numpy(), initial_weight, noise)
        is_usable = np.isfinite(window.value).all() and start.shape[1] == layout.widths[index]
        layer.earlier = fewest([*layer.earlier, window], ENOUGH - 1) if is_usable else ()


def endings_of(measured: Measurement) -> Iterator[Ending]:
    """What the next windows go on from."""
    analysis = measured.analysis
    mean, var = analysis.population
    with np.errstate(invalid="ignore"):
        ratios = analysis.layout.maximum(abs(mean) / np.sqrt(var + analysis.layout.spread(measured.eps))).tolist()
    histories = map(History, analysis.initial_weight.tolist(), *analysis.noise.tolist())
    columns = zip(measured.states, analysis.num_batches.tolist(), histories, ratios, strict=True)
    for layer, (state, num_batches, history, ratio) in enumerate(columns):
        updated: History | None = history
        if not num_batches:  # something else may have written them
            start = state.layer.start
            is_same = start.buffers is None or start.has_same_buffers(state.now)
            updated = start.history if is_same else None
        earlier = fewest(state.layer.earlier, ENOUGH - num_batches)
        if not state.circumstances.weights_known:
            updated = _history_of_updates(state, float(analysis.samples_per_batch[layer]))
        yield Ending(state, updated, ratio, earlier, measured.edges.get(layer))


def _edges_of(blocks: Blocks, analysis: Analysis, eps: FloatArray) -> Iterator[tuple[int, Edges]]:
    layout, batching = analysis.layout, analysis.batching
    with np.errstate(invalid="ignore"):
        differ = (batching.ordering_ratio > batching.ordering_limit) & (batching.ordering_share > _DIFFERENCE)
        differ &= analysis.num_batches >= ENOUGH
    for layer in differ.nonzero()[0].tolist():
        scaled = analysis.population[1, layout.slices[layer]] + eps[layer]
        if (edges := edges_of(blocks, layer, scaled)) is not None:
            yield layer, edges


def _needed_of_earlier(states: Sequence[LayerState], blocks: Blocks) -> dict[int, Sequence[KeptWindow]]:
    """The earlier windows that those layers are judged by, too, whose present one is short; by their index."""
    needed = {}
    for index, (state, num) in enumerate(zip(states, blocks.num_batches.sum(axis=1).tolist(), strict=True)):
        if 0 < num < ENOUGH and state.layer.earlier and state.circumstances.weights_known:
            needed[index] = fewest(state.layer.earlier, ENOUGH - num)
    return needed


def _since_the_first(
    stats: RunningStats, layout: ChannelLayout, earlier: Mapping[int, Sequence[KeptWindow]]
) -> RunningStats:
    """Running statistics from when the first of the earlier windows began."""
    start, initial_weight, noise = stats.start.copy(), stats.initial_weight.copy(), stats.noise.copy()
    for layer, (first, *_) in earlier.items():
        start[:, layout.slices[layer]] = first.start
        initial_weight[layer], noise[:, layer] = first.initial_weight, first.noise
    return stats._replace(start=start, initial_weight=initial_weight, noise=noise)


def _running_stats(states: Sequence[LayerState], blocks: Blocks, end: Tensor) -> RunningStats:
    num_batches = blocks.num_batches.sum(axis=1)
    samples = blocks.num_samples.sum(axis=1) / np.maximum(num_batches, 1)
    layers = [state.layer for state in states]
    histories = [
        layer.start.history or _estimated_history(layer, per_batch)
        for layer, per_batch in zip(layers, samples.tolist(), strict=True)
    ]
    history = np.array(histories, dtype=float).reshape(-1, 3)
    initial = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
    starts = [layer.start.buffers for layer in layers]
    return RunningStats(
        start=_side_by_side(starts, blocks, initial).numpy(),
        end=end.numpy(),
        initial_weight=history[:, 0],
        noise=history[:, 1:].T,
        rounding=np.array([_rounding(layer) for layer in layers]),
        known=np.array([state.circumstances.weights_known for state in states], dtype=bool),
        last=LastBatch(
            np.array([layer.counts.last_num_samples or math.nan for layer in layers]),
            np.array([layer.counts.momentum or math.nan for layer in layers]),
        ),
        exact=np.array(
            [float(its.assumed_updates).is_integer() and not its.normalises_in_parts for its in layers], dtype=bool
        ),
    )


def _estimated_history(layer: TrackedLayer, samples_per_batch: float) -> History:
    """What the buffers are made of that were there before: so many batches like those of this window.

    Their expectation is not told apart from that of earlier batches: the initial values count as gone.
    """
    momentum, calls = layer.counts.momentum or 0.0, (layer.start.num_tracked or 0) / layer.assumed_updates
    if not momentum or not calls or samples_per_batch <= 1:
        return History(0.0, 0.0, 0.0)
    squares = 1 / calls
    if layer.module.momentum is not None:
        squares = momentum / (2 - momentum) * (1 - (1 - momentum) ** (2 * calls))
    return History(0.0, squares / samples_per_batch, squares / (samples_per_batch - 1))


def _history_of_updates(state: LayerState, samples_per_batch: float) -> History | None:
    """What running statistics are made of that each call has updated more often than was assumed, but all alike.

    What is left of the initial values is known by the number of updates.
    """
    layer, momentum, tracked = state.layer, state.layer.module.momentum, state.now.num_tracked
    is_known = state.circumstances.updates_twice and momentum == layer.counts.momentum and samples_per_batch > 1
    if not is_known or layer.start.history is None or momentum is None or tracked is None:
        return None
    kept = (1 - momentum) ** (tracked - (layer.start.num_tracked or 0))
    effective = effective_momentum(momentum, state.circumstances.updates_per_call)
    squares = effective / (2 - effective) * (1 - kept**2)
    before = layer.start.history
    return History(
        kept * before.initial_weight,
        kept**2 * before.noise_of_mean + squares / samples_per_batch,
        kept**2 * before.noise_of_var + squares / (samples_per_batch - 1),
    )


def _side_by_side(buffers: Sequence[Tensor | None], blocks: Blocks, missing: Tensor) -> Tensor:
    """Running statistics of all layers side by side, ``(2, C)``; ``missing`` where there are none of that width."""
    parts = [
        missing.expand(2, width) if stats is None or stats.shape[1] != width else stats
        for stats, width in zip(buffers, blocks.widths.tolist(), strict=True)
    ]
    return torch.cat(parts, dim=1) if parts else missing[:, :0]


def _rounding(layer: TrackedLayer) -> float:
    buffer = layer.module.running_mean
    return 0.0 if buffer is None else torch.finfo(buffer.dtype).eps / 2


def _circumstances(layer: TrackedLayer, now: Snapshot) -> Circumstances:
    module, counts, updates = layer.module, layer.counts, layer.updates_of_a_call(now)
    return Circumstances(
        num_features=module.num_features,
        momentum=module.momentum,
        effective_momentum=counts.momentum,
        has_running_stats=now.buffers is not None,
        calls={**{path: counts.paths[path] for path in PATHS}, "skipped": layer.hook.skipped},
        training_calls=counts.training,
        updates_per_call=updates,
        updates_of_repeated=layer.updates_of_repeated(updates),
        assumed_updates=layer.assumed_updates_of_a_call,
        checkpointed=layer.hook.checkpointed,
        written_outside=layer.written_outside,
        has_frozen_weights=layer.has_fixed_weights,
        own_forward=bool(layer.hook.own_forward),
        interrupted=layer.interrupted,
        num_tracked=now.num_tracked,
        call_shift_before=layer.call_shift,
        bad_before=layer.bad,
        calls_per_model_call=layer.calls_per_model_call,
        calls_in_eval_mode=layer.hook.calls_in_eval_mode,
        steps_in_eval_mode=layer.gate.steps_in_eval_mode,
        left_out=counts.left_out,
        dimensions=next((number for kind, number in _DIMENSIONS.items() if isinstance(module, kind)), 2),
        has_initial_stats=now.buffers is not None and now.is_initial,
        normalises_in_parts=layer.normalises_in_parts,
    )


def is_inexact(ending: Ending) -> bool:
    """Whether what a kernel saved is not exact enough: |mean| / sqrt(var + eps) exceeds 100, 10 if it sums serially."""
    limit = 10.0 if ending.state.layer.counts.serial else 100.0
    return not math.isnan(ending.ratio) and ending.ratio > limit
