"""What ranks tell each other at the end of a window: what they have seen to rank 0, and its reports to all.

Two collectives, whose size grows with channels: neither with batches nor with blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import EVIDENCE
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.group_moments import SeenGroups
from lightning_bnmonitor.statistics.pooling import PooledStatistics
from lightning_bnmonitor.tracking import collectives

_ROWS = 10  # of numbers of each channel
_OTHERS = ("position", "num_batches", "num_samples", "has_running_stats", "verdict", "flags", "needs_attention")
_COLUMNS = len(_OTHERS) + len(EVIDENCE)

Frame = partial[LayerReport]
"""A layer's report without what rank 0 tells of it."""


class Answer:
    """What rank 0 says, as one float64 tensor; NaN throughout as long as it has said nothing."""

    def __init__(self, size: int) -> None:
        self.message = torch.full((size,), math.nan, dtype=torch.float64, device="cpu")


@contextmanager
def answer_of_rank_zero(size: int) -> Iterator[Answer]:
    """A context in which rank 0 sets the message, of so many numbers; after it, all ranks have it.

    Raises:
        RuntimeError: On the other ranks, if rank 0 has failed within the context: none is left waiting.
    """
    answer = Answer(size)
    try:
        yield answer
    finally:  # the others wait, whatever happens
        answer.message = collectives.broadcast(answer.message)
    if answer.message[:1].isnan().any():
        raise RuntimeError("Rank 0 could not report on the BatchNorm layers: see its error.")


class Exchange:
    """An exchange about layers, which each rank has in an order of its own: they tell of them in that of the model.

    Args:
        layout: The layers in the order of this rank's report.
        positions: Where each layer of the model is in it, ``(L,)``.
        has_masks: Whether masks tell which values count, on all ranks alike.
    """

    def __init__(self, layout: ChannelLayout, positions: NDArray[np.int64], has_masks: bool = False) -> None:
        self._layout = layout
        self._in_model = ChannelLayout(layout.widths[positions])
        self._positions = positions
        self._rows = _ROWS + 2 * has_masks
        self._back = np.argsort(positions)

    def gather(self, own: PooledStatistics) -> list[PooledStatistics]:
        """What each rank has seen, rank 0 first; an empty list on all ranks but 0. In and out in this rank's order."""
        shares, _ = self.gather_and_ask(own, has_groups=False)
        return shares

    def gather_and_ask(self, own: PooledStatistics, has_groups: bool) -> tuple[list[PooledStatistics], bool]:
        """The same, and, on rank 0, whether any of them was told of groups of batches."""
        flag = torch.tensor([has_groups], dtype=torch.float64, device="cpu")
        messages = collectives.gather(torch.cat([own.selected(self._positions, self._layout).packed(), flag]))
        shares = (PooledStatistics.unpacked(message[:-1], self._in_model) for message in messages)
        any_groups = any(bool(message[-1]) for message in messages)
        return [share.selected(self._back, self._in_model) for share in shares], any_groups

    def gather_groups(self, own: SeenGroups) -> list[SeenGroups]:
        """What each rank has seen of groups; as :meth:`gather`."""
        moments = own.moments.selected(self._positions, self._layout)
        messages = collectives.gather(own._replace(moments=moments).packed())
        shares = (SeenGroups.unpacked(message, self._in_model) for message in messages)
        return [share._replace(moments=share.moments.selected(self._back, self._in_model)) for share in shares]

    def answer(self, more: int = 0) -> AbstractContextManager[Answer]:
        """:func:`answer_of_rank_zero`, for reports of these layers, and so many numbers after them."""
        size = self._rows * self._layout.num_channels + _COLUMNS * self._layout.num_layers
        return answer_of_rank_zero(size + more)

    def packed(self, reports: Sequence[LayerReport]) -> Tensor:
        """What was found of the layers, and the order in which it is to be reported."""
        table, numbers = [], []
        for position in self._positions.tolist():
            report = reports[position]
            table.append(
                [
                    *(position, report.num_batches, report.num_samples, report.has_running_stats),
                    list(VERDICTS).index(report.verdict),
                    sum(2**bit for bit, flag in enumerate(FLAGS) if flag in report.flags),
                    report.needs_attention,
                    *(report.evidence.get(name, math.nan) for name in EVIDENCE),
                ]
            )
            unpadded = report.unpadded if report.unpadded is not None else report.numbers[:2] * math.nan
            numbers.append(torch.cat([report.numbers, unpadded])[: self._rows].flatten())
        return torch.cat([torch.tensor(table, dtype=torch.float64, device="cpu").flatten(), *numbers])

    def unpacked(self, message: Tensor, frames: Sequence[Frame]) -> list[LayerReport]:
        """The reports that rank 0 has :meth:`packed`, in its order.

        Args:
            message: What it said.
            frames: Of each layer, in this rank's order, a report without what is in the message.
        """
        sizes = [self._rows * width for width in self._in_model.widths.tolist()]
        table, *numbers = torch.split(message, [_COLUMNS * len(frames), *sizes])
        in_model = [frames[position] for position in self._positions.tolist()]
        rows = table.view(-1, _COLUMNS).tolist()
        values = [part.view(self._rows, -1) for part in numbers]
        reports = [_told(frame, row, own) for frame, row, own in zip(in_model, rows, values, strict=True)]
        order = sorted(range(len(rows)), key=lambda index: rows[index][0])
        return [reports[index] for index in order]


def _told(frame: Frame, row: Sequence[float], numbers: Tensor) -> LayerReport:
    """A layer's report as rank 0 has told it."""
    _, num_batches, num_samples, has_running_stats, verdict, flags, needs_attention, *evidence = row
    diagnosis = Diagnosis(
        verdict=list(VERDICTS)[int(verdict)],
        flags=tuple(flag for bit, flag in enumerate(FLAGS) if int(flags) & 2**bit),
        needs_attention=bool(needs_attention),
        evidence={name: value for name, value in zip(EVIDENCE, evidence, strict=True) if not math.isnan(value)},
    )
    numbers, unpadded = numbers[:_ROWS], numbers[_ROWS:]
    return frame(
        numbers=numbers,
        unpadded=unpadded if unpadded.isfinite().any() else None,
        num_batches=int(num_batches),
        num_samples=int(num_samples),
        has_running_stats=bool(has_running_stats),
        diagnosis=diagnosis,
    )
