"""What a window has shown of all layers: a mapping, tables, texts."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from lightning_bnmonitor.diagnosis.diagnosis import METRICS
from lightning_bnmonitor.report.figures import STYLES, plot_layers
from lightning_bnmonitor.report.layer_report import LayerReport, jsonable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EXPLAINED = 3  # layers in need of attention that a printed report explains
_ERRORS = ("eval_error", "noise")
_CHANGES = 10  # layers whose change of verdict is listed


class Report(Mapping[str, LayerReport]):
    """All monitored layers in one window, by name: in the order of their first call, then those never called.

    (Compiled code does not tell the order of its calls: layers first called by it come in the order of the modules.)
    Empty if the model has no BatchNorm.

    Args:
        layers: The layers' reports.
        summaries: Their :meth:`LayerReport.summary` in the same order, where it is known already.
        rank: The rank that it tells of alone; None if it tells of all there are.
    """

    def __init__(
        self,
        layers: Iterable[LayerReport],
        summaries: Iterable[Mapping[str, float]] | None = None,
        rank: int | None = None,
    ) -> None:
        self.rank = rank
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
        """The model in a few numbers, over the layers that were called and have running statistics.

        ``eval_error_max``, ``eval_error_p90`` (not exceeded by 90 % of the layers), ``eval_error_median``,
        ``act_rmse_max`` and ``mean_shift_max``: absent if there is no such layer. ``unhealthy_layers``: the number of
        layers that need attention; absent if there is no layer at all. ``val_shift_max``: the largest distance of
        validation from training; absent before validation.
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
        if shifts := [layer.diagnosis.evidence.get("val_shift", math.nan) for layer in self._layers.values()]:
            summary |= {} if all(map(math.isnan, shifts)) else {"val_shift_max": float(np.nanmax(shifts))}
        if self._layers:
            summary["unhealthy_layers"] = float(len(self.unhealthy))
        return summary

    def layer_summaries(self) -> dict[str, dict[str, float]]:
        """:meth:`LayerReport.summary` of each layer."""
        return {name: dict(summary) for name, summary in self._summaries.items()}

    def to_dict(self) -> dict[str, Any]:
        """In JSON types: ``rank``, ``summary``, and ``layers`` by name as of :meth:`LayerReport.to_dict`."""
        return {
            "rank": self.rank,
            "summary": jsonable(self.summary()),
            "layers": {name: layer.to_dict() for name, layer in self._layers.items()},
        }

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The layers' ``eval_error`` in their order over the noise floors, by verdict, as a matplotlib figure.

        Args:
            ax: The axes to draw in; None makes a figure.

        Returns:
            The figure and the axes.
        """
        errors = [self._summaries[name]["eval_error"] for name in self]
        return plot_layers(list(self.values()), errors, ax)

    def to_markdown(self, n: int | None = None, since: Mapping[str, str] | None = None) -> str:
        """What :meth:`brief` says, in Markdown, with the first columns of the table; names are escaped.

        Args:
            n: Layers in the table, the worst first; None for all.
            since: Verdicts by name, of an earlier window: changes are listed before the table.

        Raises:
            ValueError: If ``n`` is negative.
        """
        worst = self.worst(n)
        items = [
            f"- **{_escape(layer.name)}**: {layer.verdict}. {_escape(layer.diagnosis.explanation)} {layer.remedy}"
            for layer in worst[:_EXPLAINED]
            if layer.needs_attention
        ]
        table = self._table("github", _escape, worst, columns=_ERRORS) if worst else ""
        parts = (f"**{self._headline}**", self._changes(since or {}), table, "\n".join(items))
        return "\n\n".join(part for part in parts if part)

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
        # Colours are those of the page around it, whether light or dark.
        items = "".join(
            f"<li><strong>{html.escape(layer.name)}</strong>: {layer.verdict}. "
            f"{_code(html.escape(f'{layer.diagnosis.explanation} {layer.remedy}'))}</li>"
            for layer in self.unhealthy[:_EXPLAINED]
        )
        table = self._table("unsafehtml", html.escape, badge=_badge) if self._layers else ""
        table = table.replace("<table>", '<table style="color: inherit; font-size: inherit">')
        explained = f"<ul>{items}</ul>" if items else ""
        return f"<p><strong>{html.escape(self._headline)}</strong></p>{table}{explained}"

    def __repr__(self) -> str:
        return f"Report({list(self._layers.values())!r})"

    @property
    def _headline(self) -> str:
        if not self._layers:
            return "No BatchNorm layer was monitored."
        layers = f"{len(self)} BatchNorm layer{'s' * (len(self) > 1)}"
        alone = "" if self.rank is None else f" (rank {self.rank} alone)"
        shifted = [name for name, layer in self._layers.items() if "domain-shift" in layer.flags]
        more = f" Validation differs from training in {len(shifted)} of them, first in {shifted[0]}." if shifted else ""
        unhealthy = self.unhealthy
        if not unhealthy:
            return f"None of {layers} needs attention{alone}.{more}"
        verdicts = Counter(layer.verdict for layer in unhealthy)
        listed = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        return f"{len(unhealthy)} of {layers} need{'s' * (len(unhealthy) == 1)} attention{alone}: {listed}.{more}"

    def _changes(self, since: Mapping[str, str]) -> str:
        changed = [layer for layer in self.worst() if since.get(layer.name, layer.verdict) != layer.verdict]
        if not changed:
            return ""
        lines = [f"- {_escape(layer.name)}: {since[layer.name]} → {layer.verdict}" for layer in changed[:_CHANGES]]
        if len(changed) > _CHANGES:
            lines.append(f"- and {len(changed) - _CHANGES} more")
        return "\n".join(["Changed since the last window:", "", *lines])

    def _table(
        self,
        style: str,
        escape: Callable[[str], str] = str,
        layers: Sequence[LayerReport] | None = None,
        badge: Callable[[str], str] | None = None,
        columns: Sequence[str] = (*_ERRORS, *METRICS[1:], "channels", "batches", "samples"),
    ) -> str:
        if any("val_shift" in layer.diagnosis.evidence for layer in self._layers.values()):
            columns = (*_ERRORS, "val_shift", *columns[len(_ERRORS) :])
        rows = []
        for layer in self.worst() if layers is None else layers:
            cells = {name: _number(value) for name, value in self._summaries[layer.name].items()}
            for name, number in (("noise", "noise_error"), ("val_shift", "val_shift")):
                cells[name] = _number(layer.diagnosis.evidence.get(number, math.nan))
            cells |= {"channels": str(layer.num_features), "batches": str(layer.num_batches)}
            cells["samples"] = str(layer.num_samples)
            words = [escape(layer.name), ", ".join([layer.verdict, *layer.flags])]
            if badge is not None:
                words[1] = badge(layer.verdict) + words[1]
            rows.append([*words, *(cells[name] for name in columns)])
        headers = ["layer", "verdict", *columns]
        align = ("left", "left", *["right"] * len(columns))
        return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align if rows else None)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on GitHub and in TensorBoard: not all know the same escapes."""
    text = re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(text.split()))
    # What begins a heading, a list or a rule, at the beginning; what HTML, tables, formulas and strikethroughs are of.
    special = r"^[#+=-]|(?<=^\d)[.)](?=\s|$)|&(?=[#\w])|[<>|~$]"
    return re.sub(special, lambda match: f"&#{ord(match.group())};", text)


def _badge(verdict: str) -> str:
    """A verdict's letter on its colour, as in the figures."""
    color, letter = STYLES[verdict]
    box = "display: inline-block; width: 1.3em; text-align: center; border-radius: 3px; margin-right: 0.5em"
    return f'<span style="background: {color}; color: white; {box}">{letter}</span>'


def _code(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
