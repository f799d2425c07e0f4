"""What a window has shown: plain values per layer, and tables of them."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from lightning_bnmonitor import divergence
from lightning_bnmonitor.diagnosis import METRICS, Diagnosis

_EXPLAINED = 3  # layers in need of attention that a printed report explains


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
    now_mean: Tensor
    """Mean at the end of the window, with the weights as they are then; with too few batches the population's."""
    now_var: Tensor
    """Unbiased variance at the end of the window; with too few batches the population's."""
    z_mean: Tensor
    """The running mean against the window's, over what its sampling noise explains; 0 if it cannot be told."""
    z_var: Tensor
    """The running variance against the batches' in the window, over what its sampling noise explains; 0 likewise."""
    has_running_stats: bool
    """Whether the module has buffers; if not, ``eval()`` normalises by the batch, too."""
    diagnosis: Diagnosis
    """Verdict, flags, evidence."""

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
        """RMS error of the normalised activation that ``eval()`` makes with the weights at the end of the window.

        That is the running statistics against :attr:`now_mean` and :attr:`now_var`. Infinite in a channel that was
        called and whose running statistics are not finite: it gives NaN in ``eval()``.
        """
        broken = ~(torch.isfinite(self.running_mean) & torch.isfinite(self.running_var))
        comparable = self.has_running_stats and self.num_samples > 0
        now = self.now_mean, self.now_var, self.running_mean, self.running_var
        return torch.where(broken & comparable, torch.inf, divergence.act_rmse(*now, self.eps))

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
        """What verdict, explanation and remedy rest on. What could not be told is absent.

        Errors are RMS errors of the normalised activation in ``eval()``, over the channels.

        - ``eval_error``, ``act_rmse``, ``mean_shift``, ``log_var_ratio``: see :meth:`summary`.
        - ``noise_error``: what the sampling noise of the running statistics makes of it: the floor that is reached
          however long one trains. ``now_error``: what the noise of the present statistics adds to ``eval_error``.
        - ``warmup_error``: what is left of the initial values makes; their weight is ``initial_weight``.
        - ``lag_error``: the running statistics being those of earlier weights or data makes, chance taken off;
          0 where it may be chance. ``drift_error``: the same of the window's statistics against the present ones.
        - ``z_mean``, ``z_var``: RMS over channels of :attr:`z_mean` and :attr:`z_var`, about 1 if only chance is at
          work. ``max_score``: the largest deviation of any channel in any of the tests, on the scale of a standard
          normal variable: an effect in few channels shows here.
        - ``batches``: batches that updated the running statistics; ``samples_per_batch``: values per channel in them;
          ``batch_size``: samples in them; ``degrees_of_freedom``: of the variance between batches.
        - ``drift_per_batch``: how far the inputs' mean and variance move per batch; ``jitter``: by how much those of
          a batch differ by sampling noise; ``severity``: ``eval_error`` squared over ``jitter`` squared
          (m / (2 - m) is what momentum m makes by itself; above 1 the last batch's statistics would serve better).
        - ``ordering_ratio``, ``ordering_limit``: variance between parts of the window over that expected from
          neighbouring batches, and what chance explains of it; ``ordering_share``: its share of the variance,
          ``trend_share``: the part of that which is a steady movement.
        - ``grouping_ratio``, ``grouping_limit``: variance of batch means over that of as many independent samples, and
          what chance explains of it; ``grouping_share``: its share of the variance.
        - ``momentum``, ``effective_momentum``: the module's, and that of the last call, all its updates together.
        - ``recommended_momentum``, ``recommended_error``, ``recommended_batch_size``, ``compensated_momentum``,
          ``batches_to_go``: the numbers of the remedy.
        - ``updates_per_call``: updates of the buffers for each call that was to update them (1; 2 under activation
          checkpointing); ``assumed_updates_per_call``: what was assumed, where that is something else.
        - ``calls_saved``, ``calls_traced``, ``calls_pass``: calls whose batch moments were read off the kernel, were
          computed in a compiled graph, and were computed by a pass over the input.
        - ``calls_skipped``: calls that could not be looked at and are not in ``num_batches``: within a transform of
          ``torch.func`` (``vmap``, ``grad``), while tracing, of fake tensors, and of anything but ``(N, C, *)``.
        - ``calls_not_updating``: calls in training mode that left the running statistics as they were.
        - ``num_features``; ``dead_channels``: channels whose variance is at most a thousandth of ``eps``;
          ``non_finite_channels``: channels with a value or a running statistic that is not finite,
          ``non_finite_running_stats``: with such a running statistic; ``first_bad_batch``, ``first_bad_channel``: the
          first call in the window with such a value, counted from 1, and the first such channel in it, from 0.
        """
        return dict(self.diagnosis.evidence)

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
        scalars = ("name", "type", "num_features", "eps", "momentum", "num_batches", "num_samples", "has_running_stats")
        words = ("verdict", "needs_attention", "explanation", "remedy")
        moments = ("population_mean", "population_var", "running_mean", "running_var", "now_mean", "now_var")
        per_channel = (*moments, *METRICS, "kl", "z_mean", "z_var")
        return {
            **{field: _jsonable(getattr(self, field)) for field in (*scalars, *words, *per_channel)},
            "flags": list(self.flags),
            "summary": _jsonable(self.summary()),
            "evidence": _jsonable(self.evidence),
        }

    @property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.population_mean, self.population_var, self.running_mean, self.running_var

    def __repr__(self) -> str:
        numbers = ", ".join(f"{metric}={value:.3g}" for metric, value in self.summary().items())
        kind = f"{self.type}({self.num_features})"
        return f"LayerReport({self.name!r}, {kind}, {self.verdict!r}, num_batches={self.num_batches}, {numbers})"


class Report(Mapping[str, LayerReport]):
    """All monitored layers in one window, by name: in the order of their first call, then those never called.

    (Compiled code does not tell the order of its calls: layers first called by it come in the order of the modules.)
    Empty if the model has no BatchNorm.

    Args:
        layers: The layers' reports.
        summaries: Their :meth:`LayerReport.summary` in the same order, where it is known already.
    """

    def __init__(self, layers: Iterable[LayerReport], summaries: Iterable[Mapping[str, float]] | None = None) -> None:
        self._layers = {layer.name: layer for layer in layers}
        known = summaries or (layer.summary() for layer in self._layers.values())
        self._summaries = {name: dict(summary) for name, summary in zip(self._layers, known, strict=True)}

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
        """At most ``n`` layers: those that need attention first, the larger ``eval_error`` before the smaller.

        Raises:
            ValueError: If ``n`` is negative.
        """
        if n is not None and n < 0:
            raise ValueError(f"`n` must not be negative, got {n}.")

        def goodness(layer: LayerReport) -> tuple[bool, float]:
            error = self._summaries[layer.name]["eval_error"]
            return not layer.needs_attention, math.inf if math.isnan(error) else -error

        return sorted(self._layers.values(), key=goodness)[:n]

    @property
    def unhealthy(self) -> list[LayerReport]:
        """The layers that need attention, the worst first."""
        return [layer for layer in self.worst() if layer.needs_attention]

    def summary(self) -> dict[str, float]:
        """The model in six numbers, over the layers that were called and have running statistics.

        ``eval_error_max``, ``eval_error_p90`` (not exceeded by 90 % of the layers), ``eval_error_median``,
        ``act_rmse_max`` and ``mean_shift_max``: absent if there is no such layer. ``unhealthy_layers``: the number of
        layers that need attention; absent if there is no layer at all.
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
        if self._layers:
            summary["unhealthy_layers"] = float(len(self.unhealthy))
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
        """What :meth:`__str__` says, in Markdown; names are escaped."""
        table = self._table("github", _escape)
        items = [
            f"- **{_escape(layer.name)}**: {layer.verdict}. {_escape(layer.diagnosis.explanation)} {layer.remedy}"
            for layer in self.unhealthy[:_EXPLAINED]
        ]
        return "\n\n".join(part for part in (self._headline, table, "\n".join(items)) if part)

    def brief(self, n: int | None = 10) -> str:
        """One sentence on the model, the table of the ``n`` worst layers, and the first three of them explained.

        Raises:
            ValueError: If ``n`` is negative.
        """
        worst = self.worst(n)
        table = [self._table("simple", layers=worst)] if worst else []
        texts = [
            textwrap.fill(f"{layer.explanation} {layer.remedy}", 120, subsequent_indent="  ", break_long_words=False)
            for layer in worst[:_EXPLAINED]
            if layer.needs_attention
        ]
        return "\n\n".join([self._headline, *table, *texts])

    def __str__(self) -> str:
        """:meth:`brief` with all layers."""
        return self.brief(None)

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li>{html.escape(f'{layer.explanation} {layer.remedy}')}</li>" for layer in self.unhealthy[:_EXPLAINED]
        )
        explained = f"<ul>{items}</ul>" if items else ""
        return f"<p>{html.escape(self._headline)}</p>{self._table('html') if self._layers else ''}{explained}"

    def __repr__(self) -> str:
        return f"Report({list(self._layers.values())!r})"

    @property
    def _headline(self) -> str:
        if not self._layers:
            return "No BatchNorm layer was monitored."
        layers = f"{len(self)} BatchNorm layer{'s' * (len(self) > 1)}"
        unhealthy = self.unhealthy
        if not unhealthy:
            return f"None of {layers} needs attention."
        verdicts = Counter(layer.verdict for layer in unhealthy)
        listed = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        return f"{len(unhealthy)} of {layers} need{'s' * (len(unhealthy) == 1)} attention: {listed}."

    def _table(
        self, style: str, escape: Callable[[str], str] = str, layers: Sequence[LayerReport] | None = None
    ) -> str:
        rows = [
            [
                escape(layer.name),
                ", ".join([layer.verdict, *layer.flags]),
                *(_number(value) for value in (self._summaries[layer.name]["eval_error"], self._floor(layer))),
                *(_number(self._summaries[layer.name][metric]) for metric in METRICS[1:]),
                layer.num_features,
                layer.num_batches,
                layer.num_samples,
            ]
            for layer in (self.worst() if layers is None else layers)
        ]
        headers = ["layer", "verdict", "eval_error", "noise", *METRICS[1:], "channels", "batches", "samples"]
        align = ("left", "left", *["right"] * (len(headers) - 2))
        return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align if rows else None)

    @staticmethod
    def _floor(layer: LayerReport) -> float:
        return layer.diagnosis.evidence.get("noise_error", math.nan)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.replace("&", "&amp;").splitlines()))


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
