"""Figures of reports for papers and notebooks: all layers of a model, all channels of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.evidence import ALERT, WARNING
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.report.layer_values import LayerValues

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LABELS = 60  # layers that are named, channels that are drawn
_FLOOR, _CEILING = 1e-3, 10.0  # errors outside are drawn at these
_EXACT, _NOISE = "#333333", "#bbbbbb"


def plot_layers(layers: Sequence[LayerValues], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The layers' ``eval_error`` in their order, by verdict, over their noise floors; see :meth:`Report.plot`.

    Args:
        layers: The layers.
        ax: Where to draw; None makes a figure.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        width = min(max(8.0, 2.0 + 0.22 * len(layers)), 16.0)
        height = 3.8 + 0.075 * max((len(shortened(layer.name)) for layer in layers), default=0)
        fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    else:
        fig = _figure(ax)
    errors, floors = (
        [layer.diagnosis.evidence.get(name, math.nan) for layer in layers] for name in ("eval_error", "noise_error")
    )
    position = np.arange(len(layers))
    ax.bar(position, np.nan_to_num(floors), width=0.7, color=_NOISE, alpha=0.6, label="sampling noise explains")
    shown = np.clip(np.nan_to_num(errors, nan=math.nan, posinf=_CEILING), _FLOOR, _CEILING)
    verdicts = np.array([layer.diagnosis.verdict for layer in layers])
    for verdict, style in VERDICTS.items():
        its = (verdicts == verdict) & ~np.isnan(shown)
        if its.any():
            ax.scatter(position[its], shown[its], s=90, color=style.color, zorder=3, edgecolors="white", linewidths=0.8)
            label = f"{style.letter}: {verdict}"
            ax.scatter(position[its], shown[its], s=22, color="white", marker=f"${style.letter}$", zorder=4)
            ax.scatter([], [], s=60, color=style.color, marker=f"${style.letter}$", label=label)
    for level, name in ((WARNING, "warning"), (ALERT, "alert")):
        ax.axhline(level, color=_EXACT, linewidth=0.8, linestyle="--" if level == WARNING else "-", zorder=1)
        right = ("axes fraction", "data")
        ax.annotate(f" {name} {level}", (1, level), xycoords=right, va="center", fontsize=8, color=_EXACT)
    ax.set_yscale("log")
    largest = float(np.nanmax([*shown, 0.4])) if len(layers) else 0.4
    ax.set_ylim(_FLOOR, min(max(1.0, 1.6 * largest), 1.6 * _CEILING))
    ax.set_xlim(-0.7, len(layers) - 0.3)
    every = -(-len(layers) // _MAX_LABELS) or 1
    names = [shortened(layer.name) for layer in layers]
    ax.set_xticks(position[::every], names[::every], rotation=90, fontsize=8, parse_math=False)
    ax.set_ylabel("eval_error: RMS error of the\nnormalised activation in eval()")
    _legend_above(ax, 4)
    return fig, ax


def plot_channels(layer: LayerValues, ax: Any = None) -> tuple[Figure, Any]:
    """One layer, channel by channel and over the window; see :meth:`LayerReport.plot`.

    Args:
        layer: The layer.
        ax: Four axes, in any array; None makes a figure.

    Raises:
        ValueError: If ``ax`` are not four.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
        fig.suptitle(f"{layer.name}: {layer.diagnosis.verdict}", x=0.01, ha="left", parse_math=False)
    elif np.size(ax) != 4:
        raise ValueError(f"`ax` must be four axes, got {np.size(ax)}.")
    else:
        fig = _figure(np.ravel(ax)[0])
    of_means, of_stds, mean_course, std_course = np.ravel(ax)
    std, running_std = _std(layer.population_var), _std(layer.running_var)
    means = layer.population_mean, layer.running_mean, layer.running_mean_stderr
    stds = std, running_std, layer.running_var_stderr / (2 * running_std)
    error = torch.nan_to_num(layer.eval_error, nan=-1.0)
    chosen = error.argsort(descending=True, stable=True)[:_MAX_LABELS].sort().values
    of_means.bar(
        np.arange(len(chosen)),
        2 * _at(std, chosen),
        bottom=_at(layer.population_mean - std, chosen),
        color=_NOISE,
        alpha=0.4,
        width=0.8,
        label="exact ± std",
    )
    of_means.use_sticky_edges = False
    few = f"the {len(chosen)} worst of {layer.num_features} channels" if len(chosen) < layer.num_features else "channel"
    color, course = VERDICTS[layer.diagnosis.verdict].color, layer.course
    for axes, values, name in ((of_means, means, "mean"), (of_stds, stds, "std")):
        _draw_channels(axes, values, chosen, color)
        axes.set(ylabel=name, xlabel=few)
    worst = int(error.argmax()) if len(error) else 0
    middle = course.num_batches.cumsum(0) - course.num_batches / 2
    for axes, batches, values, name in (
        (mean_course, course.mean, means, "mean"),
        (std_course, _std(course.var), stds, "std"),
    ):
        _draw_course(axes, middle, batches, values, worst, color)
        axes.set(ylabel=name, xlabel=f"batch in the window (channel {worst})")
    return fig, ax


def _draw_channels(axes: Axes, values: tuple[Tensor, Tensor, Tensor], channels: Tensor, color: str) -> None:
    """Exact and running values of channels, with two of the latter's standard errors."""
    exact, running, stderr = values
    position = np.arange(len(channels))
    axes.plot(position, _at(exact, channels), "_", color=_EXACT, markersize=9, label="exact")
    axes.errorbar(
        position,
        _at(running, channels),
        np.nan_to_num(2 * _at(stderr, channels)),
        fmt="o",
        color=color,
        markersize=4,
        capsize=2,
        label="running ± 2 standard errors",
    )
    every = -(-len(channels) // 16) or 1
    axes.set_xticks(position[::every], channels.tolist()[::every], fontsize=8)
    _legend_above(axes, 3)


def _draw_course(
    axes: Axes, time: Tensor, batches: Tensor, values: tuple[Tensor, Tensor, Tensor], channel: int, color: str
) -> None:
    """Values of a channel over the window, beside its exact and its running value."""
    exact, running, stderr = values
    axes.plot(time.numpy(), _at(batches, channel), "o-", color=_EXACT, markersize=4, label="batches")
    axes.axhline(float(_at(exact, channel)), color=_EXACT, linewidth=0.8, linestyle=":", label="exact")
    level, half = float(_at(running, channel)), 2 * float(np.nan_to_num(_at(stderr, channel)))
    axes.axhline(level, color=color, linewidth=1.5, linestyle="--", label="running ± 2 standard errors")
    axes.axhspan(level - half, level + half, color=color, alpha=0.2, linewidth=0)
    _legend_above(axes, 3)


def plot_contributions(
    states: Sequence[tuple[str, float]], steps: Sequence[Sequence[tuple[str, float]]], ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Levels, and what leads from each to the next, as a waterfall; see :meth:`Attribution.plot`.

    Args:
        states: Names and levels, from the top down.
        steps: Between each two of them, names and the reductions that lead there. What is not finite is not drawn.
        ax: Where to draw; None makes a figure.
    """
    rows: list[tuple[str, float, float, str, str]] = []  # name, from, to, colour, text
    for index, (name, level) in enumerate(states):
        rows.append((name, level, level, _EXACT, f"{level:.4g}"))
        here = steps[index] if index < len(steps) else ()
        for number, (step, reduction) in enumerate(here):
            start = level - sum(reduction for _, reduction in here[:number])
            if not math.isfinite(start):  # then from below
                start = states[index + 1][1] + sum(reduction for _, reduction in here[number:])
            text = "nan" if math.isnan(reduction) else f"{-reduction:+.4g}"
            rows.append((step, start, start - reduction, VERDICTS["healthy" if index else "lagging"].color, text))
    if ax is None:
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(9, 1.2 + 0.35 * len(rows)), layout="constrained")
    else:
        fig = _figure(ax)
    ax.use_sticky_edges = False  # there is text at the ends
    before = math.nan
    for position, (_, start, end, color, text) in enumerate(rows):
        if not (math.isfinite(start) and math.isfinite(end)):
            ax.annotate(text, (0.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            before = math.nan
            continue
        if color == _EXACT:
            ax.plot(end, position, "D", color=color, markersize=5)
        else:
            ax.barh(position, end - start, left=start, color=color, height=0.6, edgecolor=color)
        if math.isfinite(before):
            ax.plot([before, start], [position - 1, position], color=_NOISE, linewidth=0.8, zorder=0)
        right = (max(start, end), position)
        ax.annotate(text, right, (7, 0), textcoords="offset points", va="center", fontsize=8, color=_EXACT)
        before = end
    ax.set_yticks(range(len(rows)), [shortened(name) for name, *_ in rows], fontsize=8, parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.15)
    ax.set_xlabel("loss")
    return fig, ax


def shortened(name: str, length: int = 40) -> str:
    """The end of a name that is too long, on one line, in letters that matplotlib's own font has."""
    name = " ".join(name.split())
    drawable = (letter.isprintable() and (letter < "\u0530" or "\u2000" < letter < "\u2300") for letter in name)
    name = "".join(letter if is_drawable else "?" for letter, is_drawable in zip(name, drawable, strict=True))
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _legend_above(ax: Axes, num_columns: int) -> None:
    ax.legend(
        fontsize=8,
        ncols=num_columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        borderaxespad=0.3,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _std(var: Tensor) -> Tensor:
    return var.clamp_min(0).sqrt()


def _at(values: Tensor, channels: Any) -> Any:
    """Values of channels, NaN where they are not finite: matplotlib leaves these out."""
    values = values[..., channels]
    return torch.where(torch.isfinite(values), values, torch.nan).numpy()


def _figure(ax: Axes) -> Figure:
    """The figure of axes, also of those in subfigures of it."""
    from matplotlib.figure import Figure

    fig = ax.figure.figure  # that of a subfigure is the whole one; get_figure(root=True) is new in matplotlib 3.10
    assert isinstance(fig, Figure)
    return fig
