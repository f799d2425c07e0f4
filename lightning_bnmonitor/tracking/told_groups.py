"""What is told of the groups that batches are of: of each layer, by rank 0 for all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.groups import GroupShift
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.group_moments import (
    MAX_NAMES,
    PACKED_NAMES,
    SeenGroups,
    packed_names,
    unpacked_names,
)
from lightning_bnmonitor.statistics.group_shifts import group_shifts

_COLUMNS = 4  # of a group in a layer: batches, values per channel, shift, noise


class ToldGroups(NamedTuple):
    """How far groups are from all, flat over the layers' channels."""

    names: tuple[str, ...]
    """Of the G groups."""
    table: FloatArray
    """Batches, values per channel, shift and noise, ``(4, G, L)``."""
    moments: FloatArray
    """Mean and unbiased variance of each group, ``(G, 2, C)``."""

    @classmethod
    def of(
        cls, seen: SeenGroups, population: FloatArray, num_samples: FloatArray, eps: FloatArray, layout: ChannelLayout
    ) -> ToldGroups:
        """What follows from what was seen: see :func:`~lightning_bnmonitor.statistics.group_shifts.group_shifts`."""
        counts = seen.moments.num_batches, seen.moments.num_samples
        shifts = group_shifts(seen, population, num_samples, eps, layout)
        return cls(seen.names, np.stack([*counts, *shifts]), seen.moments.population(layout))

    def packed(self) -> Tensor:
        """All of it as one float64 tensor, of nine groups, however many there are."""
        missing = MAX_NAMES - len(self.names)
        table = np.pad(self.table, [(0, 0), (0, missing), (0, 0)])
        moments = np.pad(self.moments, [(0, missing), (0, 0), (0, 0)])
        return torch.from_numpy(np.concatenate([packed_names(self.names), table.ravel(), moments.ravel()]))

    @staticmethod
    def packed_size(layout: ChannelLayout) -> int:
        """Numbers in what is :meth:`packed`."""
        return PACKED_NAMES + MAX_NAMES * (_COLUMNS * layout.num_layers + 2 * layout.num_channels)

    @classmethod
    def unpacked(cls, packed: Tensor, num_layers: int) -> ToldGroups:
        """What was :meth:`packed` of so many layers."""
        size = PACKED_NAMES, PACKED_NAMES + MAX_NAMES * _COLUMNS * num_layers
        encoded, table, moments = np.split(packed.numpy(), size)
        names = unpacked_names(encoded)
        shaped = table.reshape(_COLUMNS, MAX_NAMES, num_layers), moments.reshape(MAX_NAMES, 2, -1)
        return cls(names, shaped[0][:, : len(names)], shaped[1][: len(names)])

    def of_layers(self, layout: ChannelLayout) -> Iterator[tuple[tuple[GroupShift, ...], Tensor]]:
        """Of each layer the groups that it received, and their moments, ``(G, 2, C)``."""
        for layer, own in enumerate(layout.slices):
            received = [group for group in range(len(self.names)) if self.table[0, group, layer]]
            shifts = []
            for group in received:
                num_batches, num_samples, shift, noise = self.table[:, group, layer].tolist()
                shifts.append(GroupShift(self.names[group], round(num_batches), round(num_samples), shift, noise))
            yield tuple(shifts), torch.from_numpy(self.moments[received][..., own].copy())


def with_groups(reports: Sequence[LayerReport], told: ToldGroups) -> list[LayerReport]:
    """Reports of layers with what is told of their groups."""
    layout = ChannelLayout(np.array([report.num_features for report in reports], dtype=np.int64))
    return [
        replace(report, diagnosis=replace(report.diagnosis, groups=groups), group_moments=moments)
        for report, (groups, moments) in zip(reports, told.of_layers(layout), strict=True)
    ]
