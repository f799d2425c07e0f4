"""What a window has shown: plain values per layer, and tables of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from lightning_bnmonitor import divergence

METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
"""What :meth:`LayerReport.summary` has one number for."""


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One BatchNorm layer in one window. Tensors are ``(C,)`` float64 on the CPU; derived ones are computed on access.

    A channel that received a value that is not finite is NaN in this window, and the others are exact.
    """

    name: str
    """Name of the module in the model, ``(root)`` if it is the model."""
    type: str
    """Class name of the module."""
    num_features: int
    """Channels C."""
    eps: float
    """``eps`` of the module."""
    momentum: float | None
    """``momentum`` of the module now, in PyTorch's convention; None is a cumulative average."""
    num_batches: int
    """Calls counted, on this rank."""
    num_samples: int
    """Values per channel."""
    population_mean: Tensor
    """Exact mean of all values received, NaN if there were none."""
    population_var: Tensor
    """Exact unbiased variance of all values received, NaN if there were fewer than two."""
    running_mean: Tensor
    """The module's buffer, NaN if it has none."""
    running_var: Tensor
    """The module's buffer, NaN if it has none."""
    has_running_stats: bool
    """Whether the module has buffers; if not, ``eval()`` normalises by the batch, too."""
    counters: Mapping[str, float]
    """What was counted: see :attr:`evidence`."""

    @property
    def mean_shift(self) -> Tensor:
        """Signed distance of the running mean from the population's, in population standard deviations."""
        return divergence.mean_shift(self.population_mean, self.population_var, self.running_mean, self.eps)

    @property
    def log_var_ratio(self) -> Tensor:
        """Log of the running variance over the population's; positive: too large. NaN in dead channels."""
        return divergence.log_var_ratio(self.population_var, self.running_var, self.eps)

    @property
    def act_rmse(self) -> Tensor:
        """RMS error that ``eval()`` would have made on this window's values, in units of the normalised activation."""
        return divergence.act_rmse(*self._moments, self.eps)

    @property
    def kl(self) -> Tensor:
        """Kullback-Leibler divergence of the running statistics from the population's, in nats; NaN if dead."""
        return divergence.kl(*self._moments, self.eps)

    @property
    def eval_error(self) -> Tensor:
        """RMS error of the normalised activation that ``eval()`` makes, against the population of this window.

        Infinite in a channel that was called and whose running statistics are not finite: it gives NaN in ``eval()``.
        """
        broken = ~(torch.isfinite(self.running_mean) & torch.isfinite(self.running_var))
        comparable = self.has_running_stats and self.num_samples > 0
        return torch.where(broken & comparable, torch.inf, self.act_rmse)

    @property
    def evidence(self) -> dict[str, float]:
        """What the numbers rest on.

        - ``calls_saved``, ``calls_traced``, ``calls_pass``: calls whose batch moments were read off the kernel, were
          computed in a compiled graph, and were computed by a pass over the input.
        - ``calls_skipped``: calls that could not be looked at and are not in ``num_batches``: within a transform of
          ``torch.func`` (``vmap``, ``grad``), while tracing, of fake tensors, and of anything but ``(N, C, *)``.
        - ``updates_per_call``: updates of the buffers for each call that was to update them (1; 2 under activation
          checkpointing). Absent if no call was, or if ``num_batches_tracked`` was reset meanwhile.
        - ``dead_channels``: channels whose variance is at most a thousandth of ``eps``.
        - ``non_finite_channels``: channels with a population or a running statistic that is not finite.
        """
        known = [self.population_mean, self.population_var] if self.num_samples > 1 else []
        known += [self.running_mean, self.running_var] if self.has_running_stats else []
        finite = [torch.isfinite(values) for values in known] or [
            torch.ones(self.num_features, dtype=torch.bool, device="cpu")
        ]
        return {
            **self.counters,
            "dead_channels": float(divergence.is_dead(self.population_var, self.eps).sum()),
            "non_finite_channels": float(self.num_features - torch.stack(finite).all(dim=0).sum()),
        }

    def summary(self) -> dict[str, float]:
        """One number for each of ``eval_error``, ``act_rmse``, ``mean_shift`` and ``log_var_ratio``.

        The RMS over channels (for ``log_var_ratio`` the mean absolute value), those that are NaN left out. NaN if none
        is left: the layer was not called, or has no running statistics.
        """
        return {
            "eval_error": _rms(self.eval_error),
            "act_rmse": _rms(self.act_rmse),
            "mean_shift": _rms(self.mean_shift),
            "log_var_ratio": float(self.log_var_ratio.abs().nanmean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON's types, per channel as lists; what JSON lacks as "NaN", "Infinity" and "-Infinity"."""
        per_channel = ("population_mean", "population_var", "running_mean", "running_var", "kl", *METRICS)
        scalars = ("name", "type", "num_features", "eps", "momentum", "num_batches", "num_samples")
        return {
            **{field: _jsonable(getattr(self, field)) for field in (*scalars, *per_channel)},
            "summary": _jsonable(self.summary()),
            "evidence": _jsonable(self.evidence),
        }

    @property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.population_mean, self.population_var, self.running_mean, self.running_var

    def __repr__(self) -> str:
        numbers = ", ".join(f"{metric}={value:.3g}" for metric, value in self.summary().items())
        return (
            f"LayerReport({self.name!r}, {self.type}({self.num_features}), num_batches={self.num_batches}, {numbers})"
        )


class Report(Mapping[str, LayerReport]):
    """All monitored layers in one window, by name: in the order of their first call, then those never called.

    (Compiled code does not tell the order of its calls: layers first called by it come in the order of the modules.)
    Empty if the model has no BatchNorm.

    Args:
        layers: The layers' reports.
    """

    def __init__(self, layers: Iterable[LayerReport]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._summaries = {name: layer.summary() for name, layer in self._layers.items()}

    def __getitem__(self, name: str) -> LayerReport:
        try:
            return self._layers[name]
        except KeyError:
            raise KeyError(f"No layer {name!r} in this report. The layers are: {', '.join(self._layers)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def worst(self, n: int | None = None) -> list[LayerReport]:
        """The layers with the largest ``eval_error`` first, at most ``n``; layers that have none come last.

        Raises:
            ValueError: If ``n`` is negative.
        """
        if n is not None and n < 0:
            raise ValueError(f"`n` must not be negative, got {n}.")

        def badness(layer: LayerReport) -> float:
            error = self._summaries[layer.name]["eval_error"]
            return math.inf if math.isnan(error) else -error

        return sorted(self._layers.values(), key=badness)[:n]

    def summary(self) -> dict[str, float]:
        """The model in five numbers, over the layers that were called and have running statistics.

        ``eval_error_max``, ``eval_error_p90`` (not exceeded by 90 % of the layers), ``eval_error_median``,
        ``act_rmse_max`` and ``mean_shift_max``. Empty if there is no such layer.
        """
        values = {
            metric: [s[metric] for s in self._summaries.values() if not math.isnan(s[metric])] for metric in METRICS
        }
        summary = {}
        if errors := values["eval_error"]:
            summary["eval_error_max"] = max(errors)
            summary["eval_error_p90"] = float(np.quantile(errors, 0.9, method="inverted_cdf"))
            summary["eval_error_median"] = float(np.median(errors))
        for metric in ("act_rmse", "mean_shift"):
            if values[metric]:
                summary[f"{metric}_max"] = max(values[metric])
        return summary

    def layer_summaries(self) -> dict[str, dict[str, float]]:
        """:meth:`LayerReport.summary` of each layer."""
        return {name: dict(summary) for name, summary in self._summaries.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON's types: ``summary``, and ``layers`` by name as of :meth:`LayerReport.to_dict`."""
        return {
            "summary": _jsonable(self.summary()),
            "layers": {name: layer.to_dict() for name, layer in self._layers.items()},
        }

    def to_markdown(self) -> str:
        """The table, the worst layer first; names are escaped."""
        return self._table("github", lambda name: re.sub(r"([\\`*\[\]<>|])", r"\\\1", name))

    def __str__(self) -> str:
        return self._table("simple") if self._layers else "No BatchNorm layer was monitored."

    def _repr_html_(self) -> str:
        return self._table("html")

    def __repr__(self) -> str:
        return f"Report({list(self._layers.values())!r})"

    def _table(self, style: str, escape: Callable[[str], str] = str) -> str:
        rows = [
            [
                escape(layer.name),
                layer.num_features,
                layer.num_batches,
                layer.num_samples,
                *self._summaries[layer.name].values(),
            ]
            for layer in self.worst()
        ]
        headers = ["layer", "channels", "batches", "samples", *METRICS]
        cells = [[cell if not isinstance(cell, float) else _number(cell) for cell in row] for row in rows]
        align = ("left", *["right"] * (len(headers) - 1))
        return tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True, colalign=align if rows else None)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _rms(values: Tensor) -> float:
    return float(values.square().nanmean().sqrt())


def _jsonable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [_jsonable(element) for element in value.tolist()]
    if isinstance(value, Mapping):
        return {key: _jsonable(element) for key, element in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
