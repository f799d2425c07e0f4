"""The numbers of a window and of a validation, for loggers and for callbacks that watch a metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch

from lightning_bnmonitor.arguments import check_bool_or, check_name
from lightning_bnmonitor.callbacks.lightning_package import Logger, Trainer
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report

_MAX_LAYERS_LOGGED = 100
_OF_VALIDATION = ("val_error_max", "val_shift_max")


class Scalars:
    """What is logged, and what is in ``trainer.callback_metrics``.

    Not by ``self.log``: it costs milliseconds a key, and is late for a callback that runs in validation.

    Args:
        log_key_prefix: What the names begin with.
        per_layer: Whether to log the numbers of each layer; ``"auto"``: up to 100 layers.

    Raises:
        ValueError: If ``log_key_prefix`` is empty, or ``per_layer`` unknown.
    """

    def __init__(self, log_key_prefix: str, per_layer: bool | str) -> None:
        check_name("log_key_prefix", log_key_prefix)
        check_bool_or("per_layer", per_layer, "auto")
        self._prefix = log_key_prefix
        self._per_layer = per_layer
        self.summary: dict[str, float] = {}  # of the last window, and of the validation after it

    def publish(self, trainer: Trainer) -> None:
        """Put the summary into ``trainer.callback_metrics``."""
        metrics = {name: torch.tensor(value, device="cpu") for name, value in self.summary.items()}
        trainer.callback_metrics.update(metrics)

    def log_window(self, trainer: Trainer, report: Report, step: int) -> bool:
        """Publish and log the report of a window at a step. Returns whether there are numbers of layers among them."""
        self.summary = {f"{self._prefix}/{name}": value for name, value in report.summary().items()}
        of_layers = {
            f"{self._prefix}.{metric}/{name}": value
            for name, layer in (report.items() if self._logs_layers(report) else ())
            for metric, value in {**layer.summary(), **_of_groups(layer)}.items()
            if not math.isnan(value)
        }
        self._log(trainer, self.summary | of_layers, step)
        return bool(of_layers)

    def log_validation(self, trainer: Trainer, report: Report, step: int, is_of_window: bool) -> None:
        """Publish and log at a step how far validation was from training and from the running statistics.

        The number of layers that need attention, too, if validation has changed it since the window that it followed.
        """
        summary = {f"{self._prefix}/{name}": value for name, value in report.summary().items()}
        wanted = {f"{self._prefix}/{name}" for name in _OF_VALIDATION}
        count = f"{self._prefix}/unhealthy_layers"
        if is_of_window and summary.get(count) != self.summary.get(count):
            wanted.add(count)
        largest = {name: value for name, value in summary.items() if name in wanted}
        if not largest:
            return
        self.summary |= largest
        of_layers = {
            self._tag(metric, layer): layer.evidence[metric]
            for layer in (report.values() if self._logs_layers(report) else ())
            for metric in ("val_error", "val_shift")
            if metric in layer.evidence
        }
        self._log(trainer, largest | of_layers, step)

    def _tag(self, metric: str, layer: LayerReport) -> str:
        if layer.averaged_of is None:
            return f"{self._prefix}.{metric}/{layer.name}"
        return f"{self._prefix}.{metric}_averaged/{layer.averaged_of}"

    def _log(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        self.publish(trainer)
        for logger in trainer.loggers if metrics else ():
            log_scalars(logger, metrics, step)

    def _logs_layers(self, report: Report) -> bool:
        trained = sum(layer.averaged_of is None for layer in report.values())
        return self._per_layer is True or (self._per_layer == "auto" and trained <= _MAX_LAYERS_LOGGED)


def _of_groups(layer: LayerReport) -> dict[str, float]:
    evidence = layer.diagnosis.evidence
    return {"group_shift": evidence["group_shift"]} if "group_shift" in evidence else {}


def log_scalars(logger: Logger, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics; warn if the logger fails."""
    try:
        logger.log_metrics(dict(metrics), step=step)
    except Exception as error:  # a full disk, a name that it refuses: no reason not to train
        cause = error.__cause__ or error
        warnings.warn(f"{type(logger).__name__} did not log the BatchNorm metrics: {cause!r}", stacklevel=7)
