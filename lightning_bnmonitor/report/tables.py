"""Tables of layers, for consoles, Markdown and HTML, and what their cells have to be for each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from lightning_bnmonitor.diagnosis.evidence import METRICS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.report.layer_report import LayerReport

_ERRORS = {"eval_error": "eval_error", "noise": "noise_error"}  # headers of columns, and the evidence in them
_VALIDATION = {"val_error": "val_error", "val_shift": "val_shift"}
_DISTANCES = {metric: metric for metric in METRICS[1:]}
_COUNTS = ("channels", "batches", "samples")
_CHANGES = 10  # layers whose change of verdict is listed


def layer_table(
    layers: Sequence[LayerReport],
    style: str = "simple",
    escape: Callable[[str], str] = str,
    badge: Callable[[str], str] | None = None,
    brief: bool = False,
) -> str:
    """A table of layers, a row for each; empty without layers.

    Args:
        layers: In the order of the rows.
        style: One of ``tabulate``'s.
        escape: What makes a name safe where the table is shown.
        badge: What stands before a verdict.
        brief: Whether to leave out distances from the whole window, and numbers of channels, batches and samples.
    """
    if not layers:
        return ""
    from tabulate import tabulate

    columns = dict(_ERRORS)
    known = {name for layer in layers for name in layer.diagnosis.evidence}
    columns |= {header: name for header, name in _VALIDATION.items() if name in known}
    columns |= {} if brief else _DISTANCES
    rows = []
    for layer in layers:
        mark = "" if badge is None else badge(layer.verdict)
        errors = [_number(layer.diagnosis.evidence.get(name, math.nan)) for name in columns.values()]
        counts = [] if brief else [layer.num_features, layer.num_batches, layer.num_samples]
        verdict = mark + ", ".join([layer.verdict, *layer.flags])
        rows.append([escape(layer.name), verdict, *errors, *map(str, counts)])
    headers = ["layer", "verdict", *columns, *(() if brief else _COUNTS)]
    align = ("left", "left", *["right"] * (len(headers) - 2))
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def changes(layers: Sequence[LayerReport], since: Mapping[str, str]) -> str:
    """A list, in Markdown, of the layers whose cause is another one than in ``since``; empty if there are none."""
    changed = [layer for layer in layers if since.get(layer.name, layer.diagnosis.cause) != layer.diagnosis.cause]
    if not changed:
        return ""
    lines = [f"- {escaped(layer.name)}: {since[layer.name]} → {layer.diagnosis.cause}" for layer in changed[:_CHANGES]]
    if len(changed) > _CHANGES:
        lines.append(f"- and {len(changed) - _CHANGES} more")
    return "\n".join(["Changed since the last window:", "", *lines])


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on GitHub and in TensorBoard: not all know the same escapes."""
    text = re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(text.split()))
    # What begins a heading, a list or a rule, at the beginning; what HTML, tables, formulas and strikethroughs are of.
    special = r"^[#+=-]|(?<=^\d)[.)](?=\s|$)|&(?=[#\w])|[<>|~$]"
    return re.sub(special, lambda match: f"&#{ord(match.group())};", text)


def badge(verdict: str) -> str:
    """A verdict's letter on its colour, as in the figures, in HTML."""
    known = VERDICTS[verdict]
    box = "display: inline-block; width: 1.3em; text-align: center; border-radius: 3px; margin-right: 0.5em"
    return f'<span style="background: {known.color}; color: white; {box}">{known.letter}</span>'


def code_as_html(text: str) -> str:
    """Text in HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
