"""What loggers can show beyond scalars: a heatmap and a text for each window, and a layout of charts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bnmonitor.callbacks.chart_layout import set_layout, tag_of
from lightning_bnmonitor.callbacks.lightning_package import Logger
from lightning_bnmonitor.report.heatmap import Heatmap
from lightning_bnmonitor.report.report import Report

_SHARE = 0.01  # of the time since the beginning that may go into drawing
_NUM_LAYERS = 10  # in a text


class Dashboard:
    """Heatmap, text and layout for one ``fit``, on the rank that logs.

    A heatmap holds all windows so far. It is drawn at the end of the first window and of the last, and between them as
    often as takes at most 1 % of the time, so that any number of short windows costs little and fills no disk.

    Args:
        prefix: What all tags begin with.
        validates: Whether there are scalars of validation.
    """

    def __init__(self, prefix: str, validates: bool = False) -> None:
        self._prefix = prefix
        self._validates = validates
        self._heatmap = Heatmap()
        self._verdicts: dict[str, str] = {}  # what is the matter with the layers, in the last window,
        self._verdicts_before: dict[str, str] = {}  # and in the one before
        self._undrawn: int | None = None  # the step of a window that is not in a picture yet
        self._untold: tuple[str, int] | None = None  # the text of a window that may still be validated, and its step
        self._is_first = True
        self._began, self._spent = time.monotonic(), 0.0  # seconds
        self._refused: set[tuple[int, str]] = set()  # what loggers failed to take

    def show(self, loggers: Sequence[Logger], report: Report, step: int, per_layer: bool) -> None:
        """Log a window that ended at a training step.

        Args:
            loggers: All loggers: each gets what it has a method for.
            report: The report of the window.
            step: The step to log at.
            per_layer: Whether there are scalars for each layer.
        """
        self.tell(loggers)
        if not report:
            return
        is_full = self._heatmap.add(report, step)
        self._verdicts_before = self._verdicts
        self._write(report, step)
        self._undrawn = step
        for logger in loggers:
            if self._is_first:
                self._try(logger, "charts", partial(set_layout, logger, self._prefix, per_layer, self._validates))
        if self._is_first or (is_full and self._spent <= _SHARE * (time.monotonic() - self._began)):
            self.draw(loggers)
        self._is_first = False

    def validated(self, loggers: Sequence[Logger], report: Report) -> None:
        """Log the text of the last window, with what a validation after it has added."""
        if self._untold is not None:
            self._write(report, self._untold[1])
            self.tell(loggers)

    def tell(self, loggers: Sequence[Logger]) -> None:
        """Log the text of the last window, if it is not logged yet: no validation follows."""
        if self._untold is None:
            return
        (text, step), self._untold = self._untold, None
        for logger in loggers:
            self._try(logger, "report", partial(_log_text, logger, f"{self._prefix}/report", text, step))

    def finish(self, loggers: Sequence[Logger]) -> None:
        """Log what is not logged yet."""
        self.tell(loggers)
        self.draw(loggers)

    def draw(self, loggers: Sequence[Logger]) -> None:
        """Draw the heatmap, if a window has ended since it was drawn."""
        step, self._undrawn = self._undrawn, None
        takers = [
            logger for logger in loggers if _takes_images(logger) and (id(logger), "heatmap") not in self._refused
        ]
        if step is None or not takers:
            return
        began = time.monotonic()
        try:
            image = self._heatmap.draw()
        except Exception as error:  # no reason not to train either
            warnings.warn(f"The BatchNorm heatmap could not be drawn: {error!r}", stacklevel=7)
            return
        tag = f"{self._prefix}/heatmap"
        for logger in takers:
            self._try(logger, "heatmap", partial(_log_image, logger, tag, image, step))
        self._spent += time.monotonic() - began

    def state_dict(self) -> dict[str, Any]:
        """The windows so far and the verdicts of the last, in tensors and primitives."""
        return {"heatmap": self._heatmap.state_dict(), "verdicts": dict(self._verdicts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._heatmap.load_state_dict(state["heatmap"])
        self._verdicts = dict(state["verdicts"])

    def _write(self, report: Report, step: int) -> None:
        self._untold = report.to_markdown(_NUM_LAYERS, self._verdicts_before or None), step
        self._verdicts = {name: layer.diagnosis.cause for name, layer in report.items()}

    def _try(self, logger: Logger, what: str, log: Callable[[], None]) -> None:
        """Log unless it failed before: what a logger cannot take is no reason not to train."""
        if (id(logger), what) in self._refused:
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
