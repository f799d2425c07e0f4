"""What loggers can show beyond scalars: the history as events and as a picture, a text, a layout of charts, a page."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_bnmonitor.callbacks.chart_layout import set_layout, tag_of
from lightning_bnmonitor.callbacks.history_events import HistoryEvents, takes_events
from lightning_bnmonitor.callbacks.lightning_package import Logger
from lightning_bnmonitor.callbacks.page_file import log_page, takes_files
from lightning_bnmonitor.report.heatmap import draw, windows_in_column
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.report import Report

_SHARE = 0.01  # of the time since the beginning that may go into drawing, and as much into events
_GROWTH = 8  # the heatmap is drawn again when the windows have grown by one in so many: all of them take linear room
_NUM_LAYERS = 10  # in a text
Made = TypeVar("Made")


class Dashboard:
    """Events, heatmap, text and layout for one ``fit``, on the rank that logs.

    A heatmap holds all windows so far, and so does an event (:class:`~.history_events.HistoryEvents`). They are made at
    the end of the first window and of the last, and between them whenever the windows have grown by an eighth, or a
    sixteenth, in at most 1 % of the time each, so that any number of short windows costs little and fills no disk. All
    of it waits for the validation that follows a window. What takes files gets the page when all is over.

    Args:
        prefix: What all tags begin with.
        history: All windows; each is added before it is shown here.
        validates: Whether there are scalars of validation.
    """

    def __init__(self, prefix: str, history: History, validates: bool = False) -> None:
        self._prefix = prefix
        self._history = history
        self._validates = validates
        self._events = HistoryEvents(history)
        self._verdicts: dict[str, str] = {}  # what is the matter with the layers, in the last window,
        self._verdicts_before: dict[str, str] = {}  # and in the one before
        self._drawn = 0  # windows that there were when it was
        self._undrawn: int | None = None  # the step of a window that is not in a picture yet
        self._untold: tuple[str, int] | None = None  # the text of a window that may still be validated, and its step
        self._is_first = True
        self._began = time.monotonic()
        self._spent = {"heatmap": 0.0, "history": 0.0}  # seconds
        self._refused: set[tuple[int, str]] = set()  # what loggers failed to take

    def show(self, loggers: Sequence[Logger], report: Report, step: int, per_layer: bool) -> None:
        """A window has ended at a training step, and is in the history: log it when it is known how it was validated.

        Args:
            loggers: All loggers: each gets what it has a method for.
            report: The report of the window.
            step: The step to log at.
            per_layer: Whether there are scalars for each layer.
        """
        self._verdicts_before = self._verdicts
        self._write(report, step)
        self._undrawn = step
        for logger in loggers if report else ():
            if self._is_first:
                self._try(logger, "charts", partial(set_layout, logger, self._prefix, per_layer, self._validates))

    def validated(self, loggers: Sequence[Logger], report: Report) -> None:
        """Log the last window, with what a validation after it has added."""
        if self._untold is not None:
            self._write(report, self._untold[1])
            self.tell(loggers)

    def tell(self, loggers: Sequence[Logger]) -> None:
        """Log the last window, if it is not logged yet: no validation follows."""
        if self._untold is None:
            return
        (text, step), self._untold = self._untold, None
        for logger in loggers if self._history.windows.layers else ():
            self._try(logger, "report", partial(_log_text, logger, f"{self._prefix}/report", text, step))
        windows = self._history.windows.num_windows
        if self._is_first or (self._may_spend("history") and self._events.is_due()):
            self._write_events(loggers, is_last=False)
        is_due = windows % windows_in_column(windows) == 0 and _GROWTH * windows >= (_GROWTH + 1) * self._drawn
        if self._is_first or (is_due and self._may_spend("heatmap")):
            self._drawn = windows
            self._draw(loggers)
        self._is_first = False

    def finish(self, loggers: Sequence[Logger]) -> None:
        """Log what is not logged yet."""
        self.tell(loggers)
        self._write_events(loggers, is_last=True)
        self._draw(loggers)
        takers = [logger for logger in loggers if takes_files(logger)]
        if not takers or not len(self._history) or (page := self._made("page", self._history.page)) is None:
            return
        for logger in takers:
            self._try(logger, "page", partial(log_page, logger, self._prefix, page))

    def state_dict(self) -> dict[str, Any]:
        """The verdicts of the last window, in primitives."""
        return {"verdicts": dict(self._verdicts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._verdicts = dict(state["verdicts"])

    def _write_events(self, loggers: Sequence[Logger], is_last: bool) -> None:
        """Write what is due of the history."""
        takers = [logger for logger in loggers if takes_events(logger) and not self._has_refused(logger, "history")]
        if not takers:
            return
        began = time.monotonic()
        for write in self._made("history", partial(self._events.take, is_last)) or ():
            for logger in takers:
                self._try(logger, "history", partial(write, logger))
        self._spent["history"] += time.monotonic() - began

    def _draw(self, loggers: Sequence[Logger]) -> None:
        """Draw the heatmap, if a window has ended since it was drawn."""
        step, self._undrawn = self._undrawn, None
        takers = [logger for logger in loggers if _takes_images(logger) and not self._has_refused(logger, "heatmap")]
        if step is None or not takers or not self._history.windows.layers:
            return
        began = time.monotonic()
        image = self._made("heatmap", partial(draw, self._history.windows))
        if image is None:
            return
        for logger in takers:
            self._try(logger, "heatmap", partial(_log_image, logger, f"{self._prefix}/heatmap", image, step))
        self._spent["heatmap"] += time.monotonic() - began

    def _may_spend(self, what: str) -> bool:
        return self._spent[what] <= _SHARE * (time.monotonic() - self._began)

    def _write(self, report: Report, step: int) -> None:
        self._untold = report.to_markdown(_NUM_LAYERS, self._verdicts_before or None), step
        self._verdicts = {name: layer.diagnosis.cause for name, layer in report.items()}

    @staticmethod
    def _made(what: str, make: Callable[[], Made]) -> Made | None:
        """What is to be logged; None, and a warning, if it could not be made: no reason not to train either."""
        try:
            return make()
        except Exception as error:
            warnings.warn(f"The BatchNorm {what} could not be made: {error!r}", stacklevel=8)
            return None

    def _has_refused(self, logger: Logger, what: str) -> bool:
        return (id(logger), what) in self._refused

    def _try(self, logger: Logger, what: str, log: Callable[[], None]) -> None:
        """Log unless it failed before: what a logger cannot take is no reason not to train."""
        if self._has_refused(logger, what):
            return
        try:
            log()
        except Exception as error:
            self._refused.add((id(logger), what))
            warnings.warn(f"{type(logger).__name__} did not log the BatchNorm {what}: {error!r}", stacklevel=7)


def _takes_images(logger: Logger) -> bool:
    try:
        experiment: Any = getattr(logger, "experiment", None)
    except Exception:  # what cannot be written to takes nothing
        return False
    return hasattr(type(experiment), "add_image") or hasattr(type(logger), "log_image")


def _log_image(logger: Any, tag: str, image: NDArray[np.uint8], step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(type(experiment), "add_image"):
        experiment.add_image(tag_of(logger, tag), image, step, dataformats="HWC")
    else:
        logger.log_image(key=tag, images=[image], step=step)


def _log_text(logger: Any, tag: str, text: str, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(type(experiment), "add_text"):
        experiment.add_text(tag_of(logger, tag), text, step)
    elif hasattr(type(logger), "log_text"):
        logger.log_text(key=tag, columns=["report"], data=[[text]], step=step)
