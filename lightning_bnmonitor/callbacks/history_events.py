"""When a history is written to TensorBoard's event files, for the tab "BatchNorm"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_bnmonitor.callbacks.chart_layout import tag_of
from lightning_bnmonitor.compat import file_writer
from lightning_bnmonitor.page.document import encode
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.tensorboard.events import CHANNELS, HISTORY, summary, tag

_GROWTH = 16  # it is written again when the windows have grown by one in so many
_MANY_CHANNELS = 8192


class HistoryEvents:
    """What is due of a history: each event has all windows, so that the last one suffices.

    The run at the first window, then whenever the windows have grown by a sixteenth; the values per channel whenever
    they have doubled, of many channels when they are four times as many: that is a megabyte or two each time.

    Args:
        history: The windows.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._written = {HISTORY: 0, CHANNELS: 0}  # windows that there were when it was

    def is_due(self) -> bool:
        """Whether anything is to be written."""
        return any(self._due(is_last=False))

    def take(self, is_last: bool) -> list[Callable[[Any], None]]:
        """What is due, each a function that writes it with a logger.

        Args:
            is_last: Whether no more windows follow: then it is all that is not written yet.
        """
        kinds = list(self._due(is_last))
        self._written |= dict.fromkeys(kinds, self._history.windows.num_windows)
        return [self._writing(kind) for kind in kinds]

    def _due(self, is_last: bool) -> Iterator[str]:
        now, run, channels = self._history.windows.num_windows, self._written[HISTORY], self._written[CHANNELS]
        if now > run and (is_last or _GROWTH * now >= (_GROWTH + 1) * run):
            yield HISTORY
        factor = 4 if self._history.num_channels > _MANY_CHANNELS else 2
        if now > channels and (is_last or now >= factor * channels):
            yield CHANNELS

    def _writing(self, kind: str) -> Callable[[Any], None]:
        data = self._history.encoded() if kind == HISTORY else encode(self._history.channels())
        step = self._history.windows.steps[-1]

        def write(logger: Any) -> None:
            writer = file_writer(logger.experiment)
            if writer is not None:
                writer.add_summary(summary(tag(kind, tag_of(logger, self._history.prefix)), data), step)

        return write


def takes_events(logger: Any) -> bool:
    """Whether a logger writes to TensorBoard's event files."""
    try:
        return file_writer(getattr(logger, "experiment", None)) is not None
    except Exception:  # what cannot be written to takes nothing
        return False
