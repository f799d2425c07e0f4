"""What is done when a window ends and layers need attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from lightning_bnmonitor.arguments import check_choice
from lightning_bnmonitor.diagnosis.rules import has_unlike_groups
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report

OnUnhealthy = Literal["warn", "ignore", "raise"]
_MAX_LAYERS_WARNED_OF = 5


class UnhealthyBatchNormError(RuntimeError):
    """Layers need attention, and ``BatchNormMonitor(on_unhealthy="raise")`` was asked for.

    Args:
        report: The report of the window at whose end it was raised.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(report.brief())
        self.report = report

    def __reduce__(self) -> tuple[type[UnhealthyBatchNormError], tuple[Report]]:
        return type(self), (self.report,)


class Alarm:
    """Warns of each layer and cause once, or raises, or neither.

    Raises:
        ValueError: If ``on_unhealthy`` is unknown.
    """

    def __init__(self, on_unhealthy: OnUnhealthy) -> None:
        check_choice("on_unhealthy", on_unhealthy, get_args(OnUnhealthy))
        self._on_unhealthy = on_unhealthy
        self._warned_of: set[tuple[str, str]] = set()  # layer and cause

    def state(self) -> list[list[str]]:
        """Layers and causes that were warned of, in primitives."""
        return [list(pair) for pair in sorted(self._warned_of)]

    def restore(self, state: Iterable[Sequence[str]]) -> None:
        """Go on from a :meth:`state`: what was warned of then is not warned of again, and all else is."""
        self._warned_of = {(name, verdict) for name, verdict in state}

    def react(self, report: Report, may_warn: bool) -> None:
        """Warn of the layers that need attention (if this rank may), or raise UnhealthyBatchNormError.

        And warn of those whose running statistics a guard has put back.
        """
        if self._on_unhealthy == "raise" and report.unhealthy:
            raise UnhealthyBatchNormError(report)
        if self._on_unhealthy == "warn" and may_warn:
            news = [layer for layer in report.unhealthy if (layer.name, layer.diagnosis.cause) not in self._warned_of]
            self._warned_of.update((layer.name, layer.diagnosis.cause) for layer in news)
            if news:
                warnings.warn(_warning(news), stacklevel=6)
        if self._on_unhealthy != "ignore" and may_warn:
            guarded = [layer for layer in report.values() if "guarded" in layer.flags]
            news = [layer for layer in guarded if (layer.name, "guarded") not in self._warned_of]
            self._warned_of.update((layer.name, "guarded") for layer in news)
            if news:
                warnings.warn(_warning_of_guarded(news), stacklevel=6)


def _warning(layers: Sequence[LayerReport]) -> str:
    """The warning, in one line: the report has the rest."""
    listed = ", ".join(f"{layer.name} ({_matter(layer)})" for layer in layers[:_MAX_LAYERS_WARNED_OF])
    if len(layers) > _MAX_LAYERS_WARNED_OF:
        listed += f" and {len(layers) - _MAX_LAYERS_WARNED_OF} more"
    return f"BatchNorm layers need attention: {listed}. `BatchNormMonitor.report()` says why, and what to do."


def _warning_of_guarded(layers: Sequence[LayerReport]) -> str:
    """The warning of batches that are not finite, in the order of the layers' first calls: it begins at the first."""
    first, evidence = layers[0].name, layers[0].diagnosis.evidence
    count = round(evidence["guarded_calls"])
    times = "once" if count == 1 else f"{count} times"
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    batch = f"first in batch {evidence['first_bad_batch']:.0f} of the window"
    return (
        f"BatchNorm layer {first}{more} was given NaN or Inf {times}, {batch}: the running statistics were put back as "
        "they were before. `BatchNormMonitor.report()` says what to do."
    )


def _matter(layer: LayerReport) -> str:
    """What is the matter, and by how much."""
    evidence, cause = layer.diagnosis.evidence, layer.diagnosis.cause
    if cause == "grouped-batches" and has_unlike_groups(evidence):
        return f"{cause}, group_shift {evidence['group_shift']:.2g}"
    names = ("eval_error", "val_error") if cause == layer.verdict else ("val_error", "call_shift", "eval_error")
    numbers = (f", {name} {evidence[name]:.2g}" for name in names if name in evidence)
    return cause + next(numbers, "")
