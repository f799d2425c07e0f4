"""From windows to a report: measured on each rank, described by rank 0 for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from lightning_bnmonitor.statistics.blocks import Blocks, at_fixed_weights
from lightning_bnmonitor.statistics.borders import has_jump
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.group_moments import SeenGroups, no_groups, seen_together
from lightning_bnmonitor.statistics.pooling import PooledStatistics, error_of_one_rank, pool
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.exchange import Exchange, Frame
from lightning_bnmonitor.tracking.measurement import (
    Ending,
    LayerState,
    Measurement,
    endings_of,
    measure,
    states_of,
)
from lightning_bnmonitor.tracking.told_groups import ToldGroups, with_groups
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import Windows, layout_of

_WITH_GROUPS = math.inf  # rank 0's answer if any rank has been told of groups of batches


class Seen(NamedTuple):
    """What all ranks have seen of layers, as rank 0 knows it."""

    everyone: PooledStatistics
    evidence: Sequence[Mapping[str, float]]
    """What follows from it for each layer."""


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
    layout = measured.analysis.layout
    if all_ranks and layout.num_channels:
        exchange = _exchange(layers, ordered)
        num_ranks = np.array([layer.counts.num_ranks for layer in ordered])
        own_groups = windows.groups.seen(ordered, layout)
        shares, has_groups = exchange.gather(
            PooledStatistics.of_window(measured.analysis, num_ranks), own_groups is not None
        )
        with exchange.answer() as answer:
            if shares and has_groups:
                answer.message = torch.full_like(answer.message, _WITH_GROUPS)
            elif shares:
                answer.message = exchange.packed(describe(measured, _seen(shares, measured)))
        if answer.message[0] == _WITH_GROUPS:
            reports = _with_groups_of_all_ranks(exchange, measured, shares, own_groups)
        else:
            reports = exchange.unpacked(answer.message, _frames(measured.states, measured.blocks))
    else:
        reports = describe(measured, groups=windows.groups.seen(ordered, layout))
    return Report(reports, rank=_rank(all_ranks)), list(endings_of(measured))


def _with_groups_of_all_ranks(
    exchange: Exchange, measured: Measurement, shares: Sequence[PooledStatistics], own: SeenGroups | None
) -> list[LayerReport]:
    """What rank 0 says if any rank has been told of groups of batches: all tell it of theirs first."""
    layout = measured.analysis.layout
    groups = exchange.gather_groups(own or no_groups(layout))
    size = ToldGroups.packed_size(layout)
    with exchange.answer(more=size) as answer:
        if shares:
            seen, together = _seen(shares, measured), seen_together(groups, layout)
            told = _told(together, measured, seen.everyone.population(layout), seen.everyone.num_samples)
            reports = describe(measured, seen, groups=together)
            answer.message = torch.cat([exchange.packed(reports), told.packed()])
    message, of_groups = answer.message[:-size], answer.message[-size:]
    reports = exchange.unpacked(message, _frames(measured.states, measured.blocks))
    return with_groups(reports, ToldGroups.unpacked(of_groups, layout.num_layers))


def compare(layers: Sequence[TrackedLayer], windows: Windows, are_averaged: bool, all_ranks: bool = False) -> Report:
    """Running statistics against batches that were received at fixed weights and have updated nothing.

    Args:
        layers: Those that the report is about, in the order of the model's modules.
        windows: Where they lie.
        are_averaged: Whether the running statistics are the average of all these batches, rather than older.
        all_ranks: Whether to report on all ranks together: all have to call this, and get the same report.
    """
    ordered = windows.in_order(layers)
    states, blocks, layout = states_of(ordered), windows.blocks(ordered), layout_of(ordered)
    own = PooledStatistics.of_batches(blocks.beside, blocks.first_bad, layout)

    def described(pooled: PooledStatistics, evidence: Mapping[str, float]) -> list[LayerReport]:
        batches = pooled.as_batches(layout)
        received = [
            _receiving(state, int(num), are_averaged)
            for state, num in zip(states, batches.num_batches.tolist(), strict=True)
        ]
        measured = measure(received, at_fixed_weights(blocks, batches, are_averaged), with_earlier=False)
        return describe(measured, Seen(pooled, [evidence] * len(states)), at_fixed_weights=True)

    if all_ranks and layout.num_channels:
        exchange = _exchange(layers, ordered)
        shares, _ = exchange.gather(own)
        with exchange.answer() as answer:
            if shares:
                answer.message = exchange.packed(described(pool(shares, layout), {"ranks": float(len(shares))}))
        mine = at_fixed_weights(blocks, own.as_batches(layout), are_averaged)
        reports = exchange.unpacked(answer.message, _frames(states, mine))
    else:
        reports = described(own, {})
    return Report(reports, rank=_rank(all_ranks))


def describe(
    measured: Measurement,
    seen: Seen | None = None,
    at_fixed_weights: bool = False,
    groups: SeenGroups | None = None,
) -> list[LayerReport]:
    """The reports of layers.

    Args:
        measured: What the windows of this rank show.
        seen: What all ranks have seen, if that is to be the population.
        at_fixed_weights: Whether the weights stayed as they were: the population then is what the layers receive now.
        groups: What was seen of groups of batches.
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
    orders = _of_order(measured)
    added = [{**more, **calls, **order} for more, calls, order in zip(together, apart, orders, strict=True)]
    told = None if groups is None else _told(groups, measured, population, num_samples)
    of_groups = [((), None)] * len(states) if told is None else list(told.of_layers(layout))
    described = zip(
        _frames(states, blocks), states, observed, added, evidence, rows, counts, parts, of_groups, strict=True
    )
    return [
        frame(
            num_batches=state.layer.num_calls,
            num_samples=int(count),
            has_running_stats=state.now.buffers is not None,
            diagnosis=diagnose(
                state.circumstances, {**own, **more, **of_all}, dict(zip(METRICS, values, strict=True)), shifts
            ),
            numbers=part,
            group_moments=moments,
        )
        for frame, state, own, more, of_all, values, count, part, (shifts, moments) in described
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
    return Seen(everyone, [{"ranks": float(len(shares)), "rank_error": error} for error in errors.tolist()])


def _exchange(layers: Sequence[TrackedLayer], ordered: Sequence[TrackedLayer]) -> Exchange:
    position = {layer: index for index, layer in enumerate(ordered)}
    return Exchange(layout_of(ordered), np.array([position[layer] for layer in layers], dtype=np.int64))


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
