"""What layers receive of each group of batches: a mean and a variance for each, merged as the batches come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.group_order import MAX_GROUPS, OTHER, GroupOrder, orders_together
from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.scores import MEAN, VAR
from lightning_bnmonitor.statistics.side_by_side import on_device

ROWS = 2
"""What is kept of each group per channel, of mean and variance each: its mean and the sum of squares about it."""
MAX_NAMES = MAX_GROUPS + 1
_NAME_BYTES = 128
MAX_LETTERS = _NAME_BYTES // 4 - 1
"""Of the name of a group."""


class GroupMoments(NamedTuple):
    """Batches of each group pooled, of each layer; flat over the layers' channels. Those of no group are not here."""

    num_batches: FloatArray
    """Calls, ``(G, L)``."""
    num_samples: FloatArray
    """Values per channel in them, ``(G, L)``."""
    value: FloatArray
    """Mean of the batch means, weighted by n, and of the unbiased batch variances, by n - 1, ``(G, 2, C)``."""
    m2: FloatArray
    """The weighted sum of their squared deviations from it, ``(G, 2, C)``."""

    @property
    def weight(self) -> FloatArray:
        """Sum of n and of n - 1, ``(G, 2, L)``."""
        return np.stack([self.num_samples, self.num_samples - self.num_batches], axis=1)

    def population(self, layout: ChannelLayout) -> FloatArray:
        """Mean and unbiased variance of all values of each group, ``(G, 2, C)``; NaN without, or of just one."""
        count, degrees = layout.spread(self.num_samples), layout.spread(self.num_samples - self.num_batches)
        with np.errstate(all="ignore"):
            var = (degrees * np.where(degrees > 0, self.value[:, VAR], 0) + self.m2[:, MEAN]) / (count - 1)
            moments = np.where(count[:, None] > [[0], [1]], np.stack([self.value[:, MEAN], var], axis=1), np.nan)
        return np.where(np.isfinite(self.value + self.m2).all(axis=1, keepdims=True), moments, np.nan)

    def selected(self, order: NDArray[np.int64], layout: ChannelLayout) -> GroupMoments:
        """That of the layers of a layout in another order."""
        columns = layout.columns(order)
        return GroupMoments(
            self.num_batches[:, order], self.num_samples[:, order], self.value[..., columns], self.m2[..., columns]
        )


class SeenGroups(NamedTuple):
    """What one rank has seen of groups, or several have together."""

    names: tuple[str, ...]
    """Of the G groups."""
    order: GroupOrder
    """How their batches came."""
    moments: GroupMoments
    """What layers received of each."""

    def packed(self) -> Tensor:
        """All of it as one float64 tensor, of nine groups, however many there are; the first number is finite."""
        missing = MAX_NAMES - len(self.names)

        def padded(values: FloatArray) -> FloatArray:
            return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)).ravel()

        *of_groups, moments_of_time = self.order
        parts = [moments_of_time, *map(padded, of_groups), *map(padded, self.moments)]
        return torch.from_numpy(np.concatenate([*parts, packed_names(self.names)]))

    @classmethod
    def unpacked(cls, packed: Tensor, layout: ChannelLayout) -> SeenGroups:
        """What was :meth:`packed` of these layers."""
        of_layers, of_channels = (MAX_NAMES, layout.num_layers), (MAX_NAMES, 2, layout.num_channels)
        shapes = [(3,), *[(MAX_NAMES,)] * 4, of_layers, of_layers, of_channels, of_channels]
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
        *parts, names = np.split(packed.numpy(), ends)
        told = unpacked_names(names)
        moments_of_time, *rest = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        of_groups = [part[: len(told)] for part in rest]
        order = GroupOrder._make([*of_groups[:4], moments_of_time])
        return cls(told, order, GroupMoments._make(of_groups[4:]))


def no_groups(layout: ChannelLayout) -> SeenGroups:
    """What a rank has seen that was told of none."""
    nothing, of_channels = np.zeros(0), np.zeros((0, 2, layout.num_channels))
    of_layers = np.zeros((0, layout.num_layers))
    moments = GroupMoments(of_layers, of_layers, of_channels, of_channels)
    return SeenGroups((), GroupOrder(nothing, nothing, nothing, nothing, np.zeros(3)), moments)


def packed_names(names: Sequence[str]) -> FloatArray:
    """At most nine names as the bytes of float64 numbers."""
    encoded = [b"." + name.encode(errors="replace").ljust(_NAME_BYTES - 1, b"\0") for name in names]
    return np.frombuffer(b"".join(encoded).ljust(MAX_NAMES * _NAME_BYTES, b"\0"), dtype=np.float64)


def unpacked_names(packed: FloatArray) -> tuple[str, ...]:
    """What was packed by :func:`packed_names`."""
    text = packed.tobytes()
    parts = (text[start : start + _NAME_BYTES] for start in range(0, len(text), _NAME_BYTES))
    return tuple(part[1:].rstrip(b"\0").decode() for part in parts if part.startswith(b"."))


PACKED_NAMES = MAX_NAMES * _NAME_BYTES // 8
"""Numbers that names are packed into."""


@torch.no_grad()
def with_batches(
    rows: Tensor, weights: Tensor, batches: Tensor, batch_weights: Tensor, groups: Sequence[int]
) -> Tensor:
    """Add batches to what is kept of groups.

    Args:
        rows: Value and sum of squares of each group, ``(2, G, 2, C)`` float64.
        weights: Sums of n and n - 1, ``(G, 2, C)``.
        batches: Means and unbiased variances of batches, ``(N, 2, C)``.
        batch_weights: n and n - 1 of each, ``(N, 2, C)``; or of one, if they are alike.
        groups: The number of each batch's group, counted from 1; 0 for none.

    Returns:
        The same of all batches so far, in new memory.
    """
    num_groups, width = rows.shape[1], 2 * rows.shape[-1]
    numbers = np.arange(1, num_groups + 1)
    members = np.equal.outer(numbers, [*numbers, *groups]).astype(float)
    value, m2 = rows.view(2, num_groups, width)
    _, value, m2 = merge_moments(
        torch.cat([weights.reshape(num_groups, width), batch_weights.reshape(-1, width)]),
        torch.cat([value, batches.reshape(-1, width)]),
        m2,
        on_device(members, rows.device),
    )
    return torch.stack([value, m2]).view(rows.shape)


def seen_together(shares: Sequence[SeenGroups], layout: ChannelLayout) -> SeenGroups:
    """What several ranks have seen: groups by name, the first eight, and all others as one."""
    names: list[str] = []
    for share in shares:
        for name in share.names:
            if name not in names and (name == OTHER or len(set(names) - {OTHER}) < MAX_GROUPS):
                names.append(name)
    if any(name not in names for share in shares for name in share.names) and OTHER not in names:
        names.append(OTHER)
    position = [
        [names.index(name) if name in names else names.index(OTHER) for name in share.names] for share in shares
    ]
    members = np.equal.outer(np.arange(len(names)), [index for its in position for index in its]).astype(float)
    parts = GroupMoments(*(np.concatenate(fields) for fields in zip(*(its.moments for its in shares), strict=True)))
    flat = (layout.spread(parts.weight), parts.value, parts.m2)
    weights, values, m2 = (torch.from_numpy(part.reshape(len(part), -1)) for part in flat)
    _, value, m2 = merge_moments(weights, values, m2, torch.from_numpy(members))
    shape = len(names), 2, layout.num_channels
    moments = GroupMoments(
        members @ parts.num_batches,
        members @ parts.num_samples,
        value.numpy().reshape(shape),
        m2.numpy().reshape(shape),
    )
    order = orders_together([share.order for share in shares], position, len(names))
    return SeenGroups(tuple(names), order, moments)
