"""From windows to a report: measured on each rank, described by rank 0 for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from lightning_bnmonitor.diagnosis.diagnosis import diagnose
from lightning_bnmonitor.diagnosis.evidence import (
    METRICS,
    calls_apart,
    distances,
    observations,
    of_several_windows,
)
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.analysis import Analysis
from lightning_bnmonitor.statistics.batching import Batching
from lightning_bnmonitor.statistics.blocks import Blocks, at_fixed_weights, pooled
from lightning_bnmonitor.statistics.borders import has_jump
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.group_moments import SeenGroups, no_groups, seen_together
from lightning_bnmonitor.statistics.pooling import PooledStatistics, error_of_one_rank, error_of_sampling, pool
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.exchange import Exchange, Frame, answer_of_rank_zero
from lightning_bnmonitor.tracking.measurement import (
    Ending,
    LayerState,
    Measurement,
    endings_of,
    measure,
    states_of,
)
from lightning_bnmonitor.tracking.paddings import KnownPadding, of_layers
from lightning_bnmonitor.tracking.told_groups import ToldGroups, with_groups
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import Windows, layout_of

_WITH_GROUPS = math.inf  # rank 0's answer if any rank has been told of groups of batches


class Seen(NamedTuple):
    """What all ranks have seen of layers, as rank 0 knows it."""

    everyone: PooledStatistics
    evidence: Sequence[Mapping[str, float]]
    """What follows from it for each layer."""


class Received(NamedTuple):
    """What a layer has received at fixed weights, on all ranks together."""

    samples_per_batch: float
    """Values per channel."""
    value: FloatArray
    """Mean of batch means and of unbiased batch variances, ``(2, C)``."""


def assess(
    layers: Sequence[TrackedLayer], windows: Windows, ended: bool = False, all_ranks: bool = False
) -> tuple[Report, list[Ending]]:
    """Where layers stand in their windows.

    Args:
        layers: Those that the report is about, in the order of the model's modules.
        windows: Where they lie.
        ended: Whether the windows have ended, and the running statistics are to be taken as they were then.
        all_ranks: Whether to report on all ranks together: all have to call this, and get the same report.

    Returns:
        The report, and what the next windows go on from, of this rank.
    """
    ordered = windows.in_order(layers)
    contrasts, inputs = windows.call_sites.contrasts(ordered), windows.probe.scores()
    measured = measure(states_of(ordered, ended), windows.blocks(ordered), contrasts, inputs)
    together = all_ranks and measured.analysis.layout.num_channels > 0
    padded, groups = _padded(windows, layers, together), windows.groups.seen(ordered, measured.analysis.layout)
    if together:
        exchange = _exchange(layers, ordered, windows)
        num_ranks = np.array([layer.counts.num_ranks for layer in ordered])
        left_out = np.array([layer.counts.left_out for layer in ordered])
        own = PooledStatistics.of_window(measured.analysis, num_ranks, left_out)
        shares, has_groups = exchange.gather_and_ask(own, has_groups=groups is not None)
        with exchange.answer() as answer:
            if shares and has_groups:
                answer.message = torch.full_like(answer.message, _WITH_GROUPS)
            elif shares:
                answer.message = exchange.packed(describe(measured, _seen(shares, measured), padded))
        if answer.message[0] == _WITH_GROUPS:
            reports = _with_groups(exchange, measured, shares, padded, groups)
        else:
            reports = exchange.unpacked(answer.message, _frames(measured.states, measured.blocks))
    else:
        reports = describe(measured, padded=padded, groups=groups)
    return Report(reports, rank=_rank(all_ranks)), list(endings_of(measured))


def _with_groups(
    exchange: Exchange,
    measured: Measurement,
    shares: Sequence[PooledStatistics],
    padded: KnownPadding,
    own: SeenGroups | None,
) -> list[LayerReport]:
    """What rank 0 says if any rank has been told of groups of batches: all tell it of theirs first."""
    layout = measured.analysis.layout
    groups = exchange.gather_groups(own or no_groups(layout))
    size = ToldGroups.packed_size(layout)
    with exchange.answer(more=size) as answer:
        if shares:
            seen, together = _seen(shares, measured), seen_together(groups, layout)
            told = _told(together, measured, seen.everyone.population(layout), seen.everyone.num_samples)
            reports = describe(measured, seen, padded, groups=together)
            answer.message = torch.cat([exchange.packed(reports), told.packed()])
    message, of_groups = answer.message[:-size], answer.message[-size:]
    reports = exchange.unpacked(message, _frames(measured.states, measured.blocks))
    return with_groups(reports, ToldGroups.unpacked(of_groups, layout.num_layers))


def compare(
    layers: Sequence[TrackedLayer],
    windows: Windows,
    are_averaged: bool,
    all_ranks: bool = False,
    as_known: Callable[[LayerState, Received], LayerState] | None = None,
) -> Report:
    """Running statistics against batches that were received at fixed weights and have updated nothing.

    Args:
        layers: Those that the report is about, in the order of the model's modules.
        windows: Where they lie.
        are_averaged: Whether the running statistics are the average of all these batches, rather than older.
        all_ranks: Whether to report on all ranks together: all have to call this, and get the same report.
        as_known: Adds what is known of a layer besides. It may set what the running statistics are made of.
    """
    ordered = windows.in_order(layers)
    states, blocks, layout = states_of(ordered), windows.blocks(ordered), layout_of(ordered)
    own = _received(blocks, layout)
    contrasts, inputs = windows.call_sites.contrasts(ordered), windows.probe.scores()
    together = all_ranks and layout.num_channels > 0
    padded = _padded(windows, layers, together)

    def described(everyone: PooledStatistics, evidence: Mapping[str, float]) -> list[LayerReport]:
        batches = everyone.as_batches(layout)
        counts = zip(batches.num_batches.tolist(), batches.num_samples.tolist(), layout.slices, strict=True)
        known = []
        for state, (num, samples, channels) in zip(states, counts, strict=True):
            receiving = _receiving(state, int(num), are_averaged)
            received = Received(samples / max(num, 1), batches.value[:, channels])
            known.append(as_known(receiving, received) if as_known is not None else receiving)
        measured = measure(known, at_fixed_weights(blocks, batches, are_averaged), contrasts, inputs, False)
        judged = _with_order(measured.judged, measure(known, blocks, with_earlier=False).judged)
        seen = Seen(everyone, [{**evidence, "one_pass": 1.0}] * len(states))
        return describe(measured._replace(judged=judged, blocks=blocks), seen, padded, at_fixed_weights=True)

    if together:
        exchange = _exchange(layers, ordered, windows)
        shares = exchange.gather(own)
        with exchange.answer() as answer:
            if shares:
                answer.message = exchange.packed(described(pool(shares, layout), {"ranks": float(len(shares))}))
        reports = exchange.unpacked(answer.message, _frames(states, blocks))
    else:
        reports = described(own, {})
    return Report(reports, rank=_rank(all_ranks))


class Precision(NamedTuple):
    """How well the statistics of what layers have received at fixed weights are known."""

    noise: float
    """What chance makes of them in the worst layer: an RMS error of the normalised activation."""
    num_samples: float
    """In all batches of the layer that was called first."""


def precision(layers: Sequence[TrackedLayer], windows: Windows, all_ranks: bool = False) -> Precision:
    """How well the statistics of what layers have received so far are known.

    Layers that were not called, or whose every channel has a value that is not finite, do not count; the noise is
    infinite if a layer was called once on each rank at most.

    Args:
        layers: In the order of the model's modules.
        windows: Where they lie.
        all_ranks: Whether all ranks call this, and get the same answer on all their data.
    """
    ordered = windows.in_order(layers)
    layout, eps = layout_of(ordered), np.array([layer.module.eps for layer in ordered])
    own = _received(windows.blocks(ordered), layout)

    def of(everyone: PooledStatistics) -> Precision:
        noise = error_of_sampling(everyone, layout, eps)
        is_alone = (everyone.num_samples > 0) & (everyone.dof < 1)
        called = everyone.batch_size[everyone.num_samples > 0]
        largest = np.max(np.where(is_alone, np.inf, np.nan_to_num(noise)), initial=0.0)
        return Precision(float(largest), float(called[0]) if len(called) else 0.0)

    if not all_ranks:
        return of(own)
    shares = _exchange(layers, ordered, windows).gather(own)
    with answer_of_rank_zero(len(Precision._fields)) as answer:
        if shares:
            answer.message = torch.tensor(of(pool(shares, layout)), dtype=torch.float64, device="cpu")
    return Precision(*answer.message.tolist())


def _with_order(judged: Analysis, in_order: Analysis) -> Analysis:
    """An analysis of batches as one block, with how they are made from their order in time, as far as it is known.

    That is of this rank, which may have none.
    """
    is_known = in_order.dof >= 1
    fields = zip(in_order.batching, judged.batching, strict=True)
    return replace(judged, batching=Batching(*(np.where(is_known, one, other) for one, other in fields)))


def _received(blocks: Blocks, layout: ChannelLayout) -> PooledStatistics:
    """What this rank has received at fixed weights."""
    with np.errstate(all="ignore"):
        return PooledStatistics.of_batches(pooled(blocks), blocks.first_bad, layout)


def describe(
    measured: Measurement,
    seen: Seen | None = None,
    padded: KnownPadding | None = None,
    at_fixed_weights: bool = False,
    groups: SeenGroups | None = None,
) -> list[LayerReport]:
    """The reports of layers.

    Args:
        measured: What the windows of this rank show.
        seen: What all ranks have seen, if that is to be the population.
        padded: What is known of padding, of all ranks likewise.
        at_fixed_weights: Whether the weights stayed as they were: the population then is what the layers receive now.
        groups: What was seen of groups of batches, of all ranks likewise.
    """
    states, blocks, analysis, judged, windows, running, eps, contrasts, *_ = measured
    layout, population, num_samples = analysis.layout, analysis.population, analysis.num_samples
    evidence: Sequence[Mapping[str, float]] = [{}] * len(states)
    if seen is not None:
        everyone, evidence = seen
        population, num_samples = everyone.population(layout), everyone.num_samples
        judged = replace(judged, first_bad=everyone.first_bad)
    moves = (analysis.num_batches > 1) & (not at_fixed_weights)
    exact = torch.from_numpy(population)
    now = torch.from_numpy(np.where(layout.spread(moves), analysis.now, population))
    has_stats = np.array([state.circumstances.has_running_stats for state in states], dtype=bool)
    channel_eps = torch.from_numpy(layout.spread(eps))
    metrics = distances(exact, now, running, channel_eps, layout, has_stats & (num_samples > 0))
    observed = observations(judged, exact, running, has_stats, channel_eps)
    together = of_several_windows(judged, analysis, windows, now, running, channel_eps)
    apart = calls_apart(contrasts, exact[1] + channel_eps, layout)
    numbers = torch.cat([exact, running, now, torch.from_numpy(judged.z), torch.from_numpy(judged.std_error)])
    rows = zip(*(metrics[name].tolist() for name in METRICS), strict=True)
    parts, counts = torch.split(numbers, layout.widths.tolist(), dim=-1), num_samples.tolist()
    paddings = of_layers(padded or KnownPadding(), [state.layer for state in states], population, layout, eps)
    orders = _of_order(measured)
    added = [
        {**more, **calls, **order, **padding.evidence}
        for more, calls, order, padding in zip(together, apart, orders, paddings, strict=True)
    ]
    unpadded = [padding.unpadded for padding in paddings]
    told = None if groups is None else _told(groups, measured, population, num_samples)
    of_groups = [((), None)] * len(states) if told is None else list(told.of_layers(layout))
    frames = _frames(states, blocks)
    described = zip(frames, states, observed, added, evidence, rows, counts, parts, unpadded, of_groups, strict=True)
    return [
        frame(
            num_batches=state.layer.num_calls,
            num_samples=int(count),
            has_running_stats=state.now.buffers is not None,
            diagnosis=diagnose(
                state.circumstances, {**own, **more, **of_all}, dict(zip(METRICS, values, strict=True)), shifts
            ),
            numbers=part,
            unpadded=kept,
            group_moments=moments,
        )
        for frame, state, own, more, of_all, values, count, part, kept, (shifts, moments) in described
    ]


def _told(groups: SeenGroups, measured: Measurement, population: FloatArray, num_samples: FloatArray) -> ToldGroups:
    return ToldGroups.of(groups, population, num_samples, measured.eps, measured.analysis.layout)


def _of_order(measured: Measurement) -> Iterator[dict[str, float]]:
    """What is known of the order in which the data came: a part of each layer's evidence."""
    for index, state in enumerate(measured.states):
        if measured.inputs is not None:
            yield {"order_score": measured.inputs.order, "group_score": measured.inputs.group}
        else:
            before, now = state.layer.edges, measured.edges.get(index)
            is_jump = before is not None and now is not None and has_jump(before, now)
            yield {"border_jump": 1.0} if is_jump else {}


def _receiving(state: LayerState, num_batches: int, are_averaged: bool) -> LayerState:
    """A layer that has received so many batches, on all ranks together, if its running statistics average them."""
    calls = dict.fromkeys(state.circumstances.calls, 0) | {"pass": num_batches}
    known = state.circumstances._replace(calls=calls, training_calls=num_batches)
    if are_averaged:
        known = known._replace(momentum=None, effective_momentum=1 / max(num_batches, 1))
    return state._replace(circumstances=known)


def _seen(shares: Sequence[PooledStatistics], measured: Measurement) -> Seen:
    """What all ranks have seen, from what each has, rank 0 first."""
    layout = measured.analysis.layout
    everyone = pool(shares, layout)
    errors = error_of_one_rank(shares[0], everyone, layout, measured.eps)
    evidence = [{"ranks": float(len(shares)), "rank_error": error} for error in errors.tolist()]
    for its, left_out in zip(evidence, everyone.left_out.tolist(), strict=True):
        its |= {"guarded_calls": left_out} if left_out else {}
    return Seen(everyone, evidence)


def _exchange(layers: Sequence[TrackedLayer], ordered: Sequence[TrackedLayer], windows: Windows) -> Exchange:
    position = {layer: index for index, layer in enumerate(ordered)}
    positions = np.array([position[layer] for layer in layers], dtype=np.int64)
    return Exchange(layout_of(ordered), positions, has_masks=windows.paddings is not None)


def _padded(windows: Windows, layers: Sequence[TrackedLayer], together: bool) -> KnownPadding:
    """What is known of padding: of this rank, or of all, on rank 0."""
    if windows.paddings is None:
        return KnownPadding(ends=windows.ends.share())
    return KnownPadding(windows.paddings.gathered(layers) if together else windows.paddings.sums())


def _rank(all_ranks: bool) -> int | None:
    return None if all_ranks or collectives.num_ranks() == 1 else collectives.rank()


def _frames(states: Sequence[LayerState], blocks: Blocks) -> list[Frame]:
    """What each rank knows of its layers by itself: their names, and how the batches went over the window."""
    used = (blocks.num_batches > 0).sum(axis=1).tolist()
    courses = (
        (torch.from_numpy(counts[:num].copy()), torch.from_numpy(blocks.value[:num, :, own].copy()))
        for counts, num, own in zip(blocks.num_batches, used, ChannelLayout(blocks.widths).slices, strict=True)
    )
    return [
        partial(
            LayerReport,
            name=state.layer.name,
            type=type(state.layer.module).__name__,
            eps=state.layer.module.eps,
            momentum=state.layer.module.momentum,
            blocks=None if state.layer.window is None else course,
        )
        for state, course in zip(states, courses, strict=True)
    ]
