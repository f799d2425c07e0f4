"""What a window has shown of one layer: its numbers, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_bnmonitor.diagnosis.evidence import METRICS
from lightning_bnmonitor.report.figures import plot_channels
from lightning_bnmonitor.report.layer_values import LayerValues

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LayerReport(LayerValues):
    """One BatchNorm layer in one window. Tensors are ``(C,)`` float64 on the CPU; derived ones are computed on access.

    A channel that received a value that is not finite is NaN in this window, and the others are exact.
    """

    @property
    def verdict(self) -> str:
        """What is the matter with the layer, in a word: ``healthy``, ``noisy``, ``lagging``, ..."""
        return self.diagnosis.verdict

    @property
    def flags(self) -> tuple[str, ...]:
        """What else is to be said: ``dead-channels``, ``written-outside``, ..."""
        return self.diagnosis.flags

    @property
    def needs_attention(self) -> bool:
        """Whether something should be done."""
        return self.diagnosis.needs_attention

    @property
    def explanation(self) -> str:
        """What was found and what it means, with this layer's numbers; all of them are in :attr:`evidence`."""
        return f"{self.name}: {self.verdict}. {self.diagnosis.explanation}"

    @property
    def remedy(self) -> str:
        """What to do about it; empty if there is nothing to do."""
        return self.diagnosis.remedy

    @property
    def evidence(self) -> dict[str, float]:
        """The numbers that verdict, explanation and remedy rest on; what could not be told is absent.

        What each of them is stands in :data:`lightning_bnmonitor.diagnosis.evidence.EVIDENCE`. Errors are RMS errors of
        the normalised activation in ``eval()``, over the channels.
        """
        return dict(self.diagnosis.evidence)

    def summary(self) -> dict[str, float]:
        """One number for each of ``eval_error``, ``act_rmse``, ``mean_shift`` and ``log_var_ratio``.

        The RMS over channels (for ``log_var_ratio`` the mean absolute value), those that are NaN left out. NaN if none
        is left: the layer was not called, or has no running statistics.
        """
        return {metric: self.diagnosis.evidence.get(metric, math.nan) for metric in METRICS}

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """The layer channel by channel, and its worst channel over the window, as a matplotlib figure.

        Above: the exact mean and standard deviation of each channel, and the running ones with two standard errors,
        which is as far as chance puts them; of more than 60 channels, the 60 with the largest ``eval_error``. Below, of
        the channel where that is largest: mean and standard deviation of the batches by block, beside the running ones.

        Args:
            ax: Four axes, in any array, to draw in; None makes a figure.

        Returns:
            The figure and the four axes.

        Raises:
            ValueError: If ``ax`` are not four axes.
        """
        return plot_channels(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """All but the course, in JSON's types (lists per channel); what JSON lacks: "NaN", "Infinity", "-Infinity"."""
        scalars = ("name", "type", "num_features", "eps", "momentum", "num_batches", "num_samples", "has_running_stats")
        words = ("verdict", "needs_attention", "explanation", "remedy")
        moments = ("population_mean", "population_var", "running_mean", "running_var", "now_mean", "now_var")
        per_channel = (*moments, *METRICS, "kl", "z_mean", "z_var", "val_error", "val_shift")
        errors = ("running_mean_stderr", "running_var_stderr")
        unpadded = {} if self.unpadded is None else dict(zip(("mean", "var"), self.unpadded, strict=True))
        return {
            **{field: jsonable(getattr(self, field)) for field in (*scalars, *words, *per_channel, *errors)},
            **{f"unpadded_{moment}": jsonable(values) for moment, values in unpadded.items()},
            "flags": list(self.flags),
            "summary": jsonable(self.summary()),
            "evidence": jsonable(self.evidence),
            "groups": {name: jsonable(values._asdict()) for name, values in self.groups.items()},
        }

    def __repr__(self) -> str:
        numbers = ", ".join(f"{metric}={value:.3g}" for metric, value in self.summary().items())
        kind = f"{self.type}({self.num_features})"
        return f"LayerReport({self.name!r}, {kind}, {self.verdict!r}, num_batches={self.num_batches}, {numbers})"


def jsonable(value: Any) -> Any:
    """A value, or what it contains, in JSON's types."""
    if isinstance(value, Tensor):
        return [jsonable(element) for element in value.tolist()]
    if isinstance(value, Mapping):
        return {key: jsonable(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
