"""What a window has shown of all layers: a mapping, tables, texts."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bnmonitor.diagnosis.evidence import METRICS
from lightning_bnmonitor.report.averaged_rows import one_of_each
from lightning_bnmonitor.report.figures import plot_layers
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.layer_report import LayerReport, jsonable
from lightning_bnmonitor.report.summaries import headline, paragraphs
from lightning_bnmonitor.report.tables import badge, changes, code_as_html, escaped, layer_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Report(Mapping[str, LayerReport]):
    """All monitored layers in one window, by name: in the order of their first call, then those never called.

    After a validation with averaged weights, each layer that was called there stands in it once more, at the end, as
    ``"<name> (averaged)"``: with ``val_error`` and ``val_shift``, and nothing of training.
    (Compiled code does not tell the order of its calls: layers first called by it come in the order of the modules.)
    Empty if the model has no BatchNorm.

    Args:
        layers: The layers' reports.
        rank: The rank that it tells of alone; None if it tells of all there are.
        remarks: What is to be said of all layers, sentence by sentence.
    """

    def __init__(self, layers: Iterable[LayerReport], rank: int | None = None, remarks: Iterable[str] = ()) -> None:
        self.rank = rank
        self.remarks = tuple(remarks)
        self._layers = {layer.name: layer for layer in layers}

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
            error = layer.evidence.get("eval_error", math.nan)
            return not layer.needs_attention, math.inf if math.isnan(error) else -error

        return sorted(self._layers.values(), key=goodness)[:n]

    @property
    def unhealthy(self) -> list[LayerReport]:
        """The layers that need attention, the worst first; with averaged weights, too, if there are any."""
        return [layer for layer in self.worst() if layer.needs_attention]

    def summary(self) -> dict[str, float]:
        """The model in a few numbers, over the layers that were called and have running statistics.

        ``eval_error_max``, ``eval_error_p90`` (not exceeded by 90 % of the layers), ``eval_error_median``,
        ``act_rmse_max`` and ``mean_shift_max``: absent if there is no such layer. ``unhealthy_layers``: the number of
        layers that need attention; absent if there is no layer at all. ``val_error_max``: the largest error of the
        running statistics in validation, ``val_shift_max``: the largest distance of validation from training; absent
        before validation. ``call_shift_max``: how far the calls of a step differ at most; absent if there is one.
        ``group_shift_max``: how far a group of batches is from all at most; absent without groups.
        """
        # How a `forward` of its own uses running statistics is not known, nor what they should be.
        evidence = [layer.diagnosis.evidence for layer in self._layers.values() if layer.verdict != "own-forward"]
        more = ("val_error", "val_shift", "call_shift", "group_shift")
        values = {name: [its[name] for its in evidence if name in its] for name in (*METRICS, *more)}
        summary = {}
        if errors := values["eval_error"]:
            summary["eval_error_max"] = max(errors)
            summary["eval_error_p90"] = float(np.quantile(errors, 0.9, method="inverted_cdf"))
            summary["eval_error_median"] = float(np.median(errors))
        for metric in ("act_rmse", "mean_shift", *more):
            if values[metric]:
                summary[f"{metric}_max"] = max(values[metric])
        if self._layers:
            summary["unhealthy_layers"] = float(sum(layer.needs_attention for layer in one_of_each(self.values())))
        return summary

    def layer_summaries(self) -> dict[str, dict[str, float]]:
        """:meth:`LayerReport.summary` of each layer."""
        return {name: layer.summary() for name, layer in self._layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """In JSON types: ``rank``, ``remarks``, ``summary``, and ``layers`` as of :meth:`LayerReport.to_dict`."""
        return {
            "rank": self.rank,
            "remarks": list(self.remarks),
            "summary": jsonable(self.summary()),
            "layers": {name: layer.to_dict() for name, layer in self._layers.items()},
        }

    def to_html(self, path: str | Path) -> None:
        """Write TensorBoard's page "BatchNorm" with this window in it: one file that needs nothing else."""
        history = History()
        history.add(self, 0)
        history.to_html(path)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The layers' ``eval_error`` in their order over the noise floors, by verdict, as a matplotlib figure.

        Args:
            ax: The axes to draw in; None makes a figure.

        Returns:
            The figure and the axes.
        """
        return plot_layers(list(self.values()), ax)

    def to_markdown(self, n: int | None = None, since: Mapping[str, str] | None = None) -> str:
        """What :meth:`brief` says, in Markdown, with the first columns of the table; names are escaped.

        Args:
            n: Layers in the table, the worst first; None for all.
            since: Verdicts by name, of an earlier window: changes are listed before the table.

        Raises:
            ValueError: If ``n`` is negative.
        """
        worst = self.worst(n)
        said = paragraphs(self.worst()) if worst else []
        # The names of groups may be anything; all else that is said has no such letter.
        texts = [each.text.replace("<", "&lt;") for each in said]
        items = [f"- **{each.listed(escaped)}**: {each.cause}. {text}" for each, text in zip(said, texts, strict=True)]
        table = layer_table(worst, "github", escaped, brief=True)
        news = changes(self.worst(), since or {})
        parts = (f"**{self._headline}**", news, table, "\n".join(items), *(self.remarks if worst else ()))
        return "\n\n".join(part for part in parts if part)

    def brief(self, n: int | None = 10) -> str:
        """One sentence on the model, the table of the ``n`` worst layers, and the first three causes explained.

        What is explained is that of all layers, not of these alone. With ``n=0`` it is the sentence alone.

        Raises:
            ValueError: If ``n`` is negative.
        """
        worst = self.worst(n)
        table = [layer_table(worst)] if worst else []
        texts = [
            textwrap.fill(
                f"{each.listed()}: {each.cause}. {each.text}", 120, subsequent_indent="  ", break_long_words=False
            )
            for each in (paragraphs(self.worst()) if worst else ())
        ]
        remarks = [textwrap.fill(remark, 120, break_long_words=False) for remark in (self.remarks if worst else ())]
        return "\n\n".join([self._headline, *table, *texts, *remarks])

    def __str__(self) -> str:
        """:meth:`brief` with all layers."""
        return self.brief(None)

    def _repr_html_(self) -> str:
        # Colours are those of the page around it, whether light or dark.
        said = [
            (each.listed(html.escape), html.escape(f"{each.cause}. {each.text}")) for each in paragraphs(self.worst())
        ]
        items = "".join(f"<li><strong>{names}</strong>: {code_as_html(text)}</li>" for names, text in said)
        table = layer_table(self.worst(), "unsafehtml", html.escape, badge)
        table = table.replace("<table>", '<table style="color: inherit; font-size: inherit">')
        explained = f"<ul>{items}</ul>" if items else ""
        remarks = "".join(f"<p>{code_as_html(html.escape(remark))}</p>" for remark in self.remarks)
        return f"<p><strong>{html.escape(self._headline)}</strong></p>{table}{explained}{remarks}"

    def __repr__(self) -> str:
        return f"Report({list(self._layers.values())!r})"

    @property
    def _headline(self) -> str:
        return headline(list(self.values()), self.rank)
