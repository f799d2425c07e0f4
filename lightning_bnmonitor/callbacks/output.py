"""Where the numbers of windows and validations go: loggers, ``trainer.callback_metrics``, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning_bnmonitor.arguments import check_bool
from lightning_bnmonitor.callbacks.dashboard import Dashboard
from lightning_bnmonitor.callbacks.lightning_package import Trainer
from lightning_bnmonitor.callbacks.scalars import Scalars
from lightning_bnmonitor.callbacks.unhealthy import Alarm, OnUnhealthy
from lightning_bnmonitor.compat import batches_that_stepped
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.report import Report


class Output:
    """Scalars, what loggers show beyond them, and what is done about layers that need attention.

    Args:
        log_key_prefix: What the logged names begin with.
        per_layer: Whether to log scalars for each layer; ``"auto"``: up to 100 layers.
        dashboard: Whether to log more than scalars, on rank 0.
        on_unhealthy: What to do if layers need attention.

    Raises:
        ValueError: If one of them is unknown, or ``log_key_prefix`` empty.
    """

    def __init__(self, log_key_prefix: str, per_layer: bool | str, dashboard: bool, on_unhealthy: OnUnhealthy) -> None:
        check_bool("dashboard", dashboard)
        self._prefix = log_key_prefix
        self._has_dashboard = dashboard
        self._scalars = Scalars(log_key_prefix, per_layer)
        self._alarm = Alarm(on_unhealthy)
        self._dashboard: Dashboard | None = None
        self.history = History(log_key_prefix)
        """Of all windows of the last ``fit``."""

    def begin(self, trainer: Trainer, validates: bool) -> None:
        """A ``fit`` begins, with scalars of validation or without."""
        self._alarm.restore([])
        self._scalars.summary = {}
        self.history = History(self._prefix)
        # Not where nothing is logged: it holds what only rank 0 shows.
        shows = self._has_dashboard and trainer.is_global_zero
        self._dashboard = Dashboard(self._prefix, self.history, validates) if shows else None

    def publish(self, trainer: Trainer) -> None:
        """Put the last summary into ``trainer.callback_metrics``."""
        self._scalars.publish(trainer)

    def show_window(self, trainer: Trainer, report: Report, batches_over: int) -> None:
        """Log a window whose last batch was so many batches ago, and react to it."""
        step = max(batches_that_stepped(trainer) - batches_over, 0)
        has_layers = self._scalars.log_window(trainer, report, step)
        if self._dashboard is not None:
            self._dashboard.tell(trainer.loggers)  # of the window before
        self.history.add(report, step)
        if self._dashboard is not None:
            self._dashboard.show(trainer.loggers, report, step, has_layers)
        self.react(trainer, report)

    def show_validation(self, trainer: Trainer, report: Report, is_of_window: bool) -> None:
        """Log how far validation was from training; if it followed a window's last batch, react to what it has found.

        (In mid-window too little is known of training: what is warming up may be healthy at the window's end.)
        """
        self._scalars.log_validation(trainer, report, batches_that_stepped(trainer), is_of_window)
        if not is_of_window:
            return
        if len(self.history):
            self.history.update(report)
        if self._dashboard is not None:
            self._dashboard.validated(trainer.loggers, report)
        self.react(trainer, report)

    def react(self, trainer: Trainer, report: Report) -> None:
        """Do what was asked for if layers need attention."""
        self._alarm.react(report, may_warn=trainer.is_global_zero)

    def no_validation_follows(self, trainer: Trainer) -> None:
        """An epoch has ended: what waits for a validation is shown as it is."""
        if self._dashboard is not None:
            self._dashboard.tell(trainer.loggers)

    def finish(self, trainer: Trainer) -> None:
        """Draw what is not drawn yet."""
        if self._dashboard is not None:
            self._dashboard.finish(trainer.loggers)

    def state_dict(self) -> dict[str, Any]:
        """What the next windows are shown with, in tensors and primitives."""
        return {
            "warned_of": self._alarm.state(),
            "summary": dict(self._scalars.summary),
            "history": self.history.state_dict(),
            "dashboard": None if self._dashboard is None else self._dashboard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._alarm.restore(state["warned_of"])
        self._scalars.summary = dict(state["summary"])
        if "history" in state:
            try:
                self.history.load_state_dict(state["history"])
            except ValueError as error:  # of another version: no reason not to train
                warnings.warn(f"The BatchNorm history in the checkpoint is left out: {error}", stacklevel=2)
        if self._dashboard is not None and (shown := state.get("dashboard")) is not None:
            self._dashboard.load_state_dict(shown)

    def end(self) -> None:
        """The ``fit`` is over: of all that is shown the history alone is kept."""
        self._dashboard = None


def without_weights_left(report: Report) -> Report:
    """A report of training which says that the model has other weights now, unless it tells of averaged ones, too."""
    if any(layer.averaged_of is not None for layer in report.values()):
        return report
    remark = (
        "`fit` has left other weights in the model than those that it has trained (averaged ones, perhaps): the "
        "running statistics are not theirs, and what is said here is not of them. Add `PreciseBatchNorm(restore=True)` "
        "to the Trainer's callbacks, or recompute the running statistics "
        "(`lightning_bnmonitor.recalibrate(model, loader)`)."
    )
    return Report(report.values(), report.rank, [*report.remarks, remark])
