r"""Which groups the batches of a window were of, and whether they came mixed.

Groups that come one after another cannot be told from weights that move: what differs between them may be either. So it
is asked how they came. Of T batches, :math:`T_g` of a group g came in :math:`R_g` runs of consecutive batches, at times
t whose sum is :math:`S_g`. In random order

.. math:: \operatorname{E} R_g = \frac{T_g (T - T_g + 1)}{T}, \qquad \operatorname{E} S_g = T_g\, \bar t, \qquad
    \operatorname{Var} S_g = T_g \Bigl(1 - \frac{T_g}{T}\Bigr) s_t^2 .

A group is *mixed* with the others if :math:`R_g \ge \min(4, \operatorname{E} R_g / 2)` and :math:`S_g` is within three
standard deviations, with the variance times :math:`\varphi_g = \max(1, \operatorname{E} R_g / R_g)`: batches in runs
are as good as fewer batches. All of it is summed over ranks, which train at the same time: a group that is one rank's
own is mixed with those of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_bnmonitor.statistics.channel_layout import BoolArray, FloatArray

MAX_GROUPS = 8
OTHER = "other"
"""All groups from the ninth on."""
_ENOUGH_RUNS = 4
_DEVIATIONS = 3


class GroupOrder(NamedTuple):
    """How the batches of groups came."""

    num_batches: FloatArray
    """T_g, ``(G,)``."""
    runs: FloatArray
    """R_g, ``(G,)``."""
    expected_runs: FloatArray
    """Those of a random order, ``(G,)``."""
    times: FloatArray
    """S_g, ``(G,)``."""
    moments_of_time: FloatArray
    """Sum of 1, t and t squared over all batches, ``(3,)``."""

    @property
    def inflation(self) -> FloatArray:
        """By how much runs enlarge a variance, ``(G,)``."""
        with np.errstate(all="ignore"):
            return np.where(self.runs > 0, np.maximum(self.expected_runs / self.runs, 1), 1)

    @property
    def is_mixed(self) -> BoolArray:
        """Whether a group came mixed with the others, ``(G,)``."""
        count, total, squares = self.moments_of_time
        with np.errstate(all="ignore"):
            mean, variance = total / count, (squares - total**2 / count) / (count - 1)
            late = self.times - self.num_batches * mean
            expected = self.num_batches * (1 - self.num_batches / count) * variance * self.inflation
            is_even = late**2 <= _DEVIATIONS**2 * expected
        mixed: BoolArray = is_even & (self.runs >= np.minimum(_ENOUGH_RUNS, self.expected_runs / 2))
        return mixed & (self.num_batches > 0)


class GroupLog:
    """The groups of a window's batches, in the order in which they came: at most 8, and one for all others."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """The number of a group is its position here, counted from 1."""
        self._sums: list[list[float]] = []  # of each group: T_g, R_g, S_g
        self._last = 0
        self._squares = 0.0  # of the times

    def number(self, name: str) -> int:
        """The number of a group."""
        if name not in self.names and len(set(self.names) - {OTHER}) >= MAX_GROUPS:
            name = OTHER
        if name not in self.names:
            self.names.append(name)
            self._sums.append([0.0, 0.0, 0.0])
        return self.names.index(name) + 1

    def add(self, number: int) -> None:
        """Count a batch of a group."""
        time = sum(count for count, *_ in self._sums)
        sums = self._sums[number - 1]
        sums[0] += 1
        sums[1] += number != self._last
        sums[2] += time
        self._last, self._squares = number, self._squares + time**2

    @property
    def order(self) -> GroupOrder:
        """How they came."""
        count, runs, times = np.array(self._sums, dtype=float).reshape(-1, 3).T
        total = count.sum()
        expected = count * (total - count + 1) / max(total, 1)
        return GroupOrder(count, runs, expected, times, np.array([total, times.sum(), self._squares]))

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, in primitives."""
        return {"names": list(self.names), "sums": [list(sums) for sums in self._sums], "squares": self._squares}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.names, self._squares = list(state["names"]), state["squares"]
        self._sums = [list(sums) for sums in state["sums"]]
        self._last = 0


def orders_together(orders: Sequence[GroupOrder], position: Sequence[Sequence[int]], num_groups: int) -> GroupOrder:
    """How batches came on several ranks.

    Args:
        orders: Of each rank.
        position: Of each rank, which group of all ranks each of its own is.
        num_groups: Groups of all ranks.
    """
    sums = np.zeros((4, num_groups))
    for order, its in zip(orders, position, strict=True):
        for field, values in enumerate(order[:4]):
            np.add.at(sums[field], list(its), values)
    num_batches, runs, expected_runs, times = sums
    moments_of_time = np.sum([order.moments_of_time for order in orders], axis=0)
    return GroupOrder(num_batches, runs, expected_runs, times, moments_of_time)
