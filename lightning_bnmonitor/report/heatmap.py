"""The picture of a history: the layers' ``eval_error`` over all windows, of bounded size."""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bnmonitor.diagnosis.evidence import ALERT, WARNING
from lightning_bnmonitor.page.document import ABSENT
from lightning_bnmonitor.report.figures import shortened
from lightning_bnmonitor.report.kept_windows import CAUSES, KeptWindows, badness

MAX_ROWS, MAX_COLUMNS = 60, 60
_LEVELS = (0.0, 0.03, WARNING, ALERT, 0.6, 1.5)  # the last is open above
_COLORS = ("#f6f4ea", "#dcd9c4", "#e9b44c", "#d1603d", "#8c2f5b", "#2b1243")  # ever darker
_MISSING = "#ffffff"
_DPI = 100
# In pixels. TensorBoard shows a picture 350 pixels wide: few columns take little room, for letters that can be read.
_CELL_HEIGHT, _CELL_WIDTH, _MIN_WIDTH, _MAX_WIDTH = 19, 28, 320, 600
_TOP, _LINE, _BOTTOM, _RIGHT = 40, 18, 98, 24
_CHARACTER = 8.4  # width in pixels


class Table(NamedTuple):
    """What the picture shows: at most 60 rows of layers by 60 columns of windows."""

    rows: list[str]
    """Names of layers, or of groups of them."""
    sizes: list[int]
    """Layers in each row."""
    steps: list[int]
    """The training step at the end of each column."""
    errors: NDArray[np.float32]
    """The largest ``eval_error``, ``(rows, columns)``; NaN if none is known."""
    causes: NDArray[np.uint8]
    """The cause of the worst: an index into ``CAUSES``, or ``ABSENT``."""


def table(windows: KeptWindows) -> Table:
    """All windows in at most 60 columns, each of equally many, and all layers in at most 60 rows.

    More than 60 layers are grouped by the modules that they are in.
    """
    row_of = grouped(windows.layers)
    sizes = Counter(row_of.values())
    number = {row: index for index, row in enumerate(dict.fromkeys(row_of.values()))}
    row = np.array([number[row_of[name]] for name in windows.layers], dtype=int)
    column = np.array(windows.starts, dtype=int) // windows_in_column(windows.num_windows, windows.stride)
    shape = len(number), 1 + int(column.max(initial=-1))
    cells = windows.cells()
    window, layer = (cells.cause != ABSENT).nonzero()
    where = row[layer], column[window]
    errors, causes = np.full(shape, math.nan, dtype=np.float32), np.full(shape, ABSENT, dtype=np.uint8)
    if "eval_error" in cells.metrics:
        np.fmax.at(errors, where, cells.metrics["eval_error"][window, layer])
    # Of those that share a cell the last one stays: the worst.
    rank, error = (values[window, layer] for values in badness(windows.causes, windows.bits))
    order = np.lexsort((-layer, window, error, rank))
    causes[where[0][order], where[1][order]] = cells.cause[window, layer][order]
    steps = {int(place): step for place, step in zip(column, windows.steps, strict=True)}
    return Table(list(number), [sizes[name] for name in number], list(steps.values()), errors, causes)


def windows_in_column(num_windows: int, stride: int = 1) -> int:
    """For how many windows a column of the picture stands: a power of two, at least those that were merged."""
    while num_windows > stride * MAX_COLUMNS:
        stride *= 2
    return stride


def draw(windows: KeptWindows) -> NDArray[np.uint8]:
    """The picture, ``(height, width, 3)``: at most 1400 pixels high and 1000 wide.

    Raises:
        ValueError: If there is no layer in it.
    """
    if not windows.layers:
        raise ValueError("There is no layer to draw.")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    rows, sizes, steps, errors, causes = table(windows)
    with mpl.rc_context(), mpl.style.context("default"):
        names = [shortened(row if size == 1 else f"{row} ({size})") for row, size in zip(rows, sizes, strict=True)]
        left = 16 + _CHARACTER * max(map(len, names))
        plot_width = min(max(_CELL_WIDTH * len(steps), _MIN_WIDTH), _MAX_WIDTH)
        plot_height = _CELL_HEIGHT * len(names)
        width = left + plot_width + _RIGHT
        legend = textwrap.wrap(_legend(causes), int((width - 16) / _CHARACTER), break_on_hyphens=False)
        height = _TOP + _LINE * len(legend) + plot_height + _BOTTOM
        fig = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas = FigureCanvasAgg(fig)
        plot = (left / width, _BOTTOM / height, plot_width / width, plot_height / height)
        ax = fig.add_axes(plot)
        colors = ListedColormap(_COLORS).with_extremes(bad=_MISSING)
        norm = BoundaryNorm(_LEVELS, len(_COLORS), extend="max")
        shown = np.ma.masked_invalid(np.where(np.isposinf(errors), 1e3, errors))
        # The colours themselves: with a norm, imshow gets some wrong before matplotlib 3.10.
        ax.imshow(colors(norm(shown)), aspect="auto", interpolation="nearest")
        _mark(ax, errors, causes)
        ax.set_yticks([])  # drawn by hand, which takes half as long
        style: dict[str, Any] = {
            "fontsize": 10,
            "family": "monospace",
            "ha": "right",
            "va": "center",
            "parse_math": False,
        }
        for row, name in enumerate(names):
            ax.text(-0.5 - 5 * len(steps) / plot_width, row, name, **style)
        every = -(-len(steps) // (plot_width // 64)) or 1
        shown_steps = range(len(steps))[::-every][::-1]
        ax.set_xticks(shown_steps, [str(steps[index]) for index in shown_steps], fontsize=10)
        ax.set_xlabel("training step at the end of the window", fontsize=10)
        ax.tick_params(length=0)
        ax.hlines(np.arange(1, len(names)) - 0.5, -0.5, len(steps) - 0.5, color="white", linewidth=1)
        bar = fig.add_axes((plot[0], 28 / height, plot[2], 12 / height))
        scale = fig.colorbar(ScalarMappable(norm, colors), bar, orientation="horizontal", ticks=_LEVELS)
        scale.ax.set_xticklabels([f"{level:g}" for level in _LEVELS], fontsize=9)
        fig.text(8 / width, 1 - 22 / height, "eval_error of BatchNorm layers", fontsize=12)
        for line, text in enumerate(legend):
            y = 1 - (_TOP + _LINE * line) / height
            fig.text(8 / width, y, text.replace("=", " "), fontsize=10, family="monospace")
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        return np.ascontiguousarray(pixels[..., :3])


def _mark(ax: Any, errors: NDArray[np.float32], causes: NDArray[np.uint8]) -> None:
    """A letter where a cause begins, and dots where it goes on."""
    previous = np.column_stack([np.full(len(causes), ABSENT), causes[:, :-1]])
    light = ~(errors >= ALERT)
    for index in np.unique(causes[causes != ABSENT]).tolist():
        if not (letter := CAUSES[index]["letter"]):
            continue
        its = causes == index
        begins = its & (previous != index)
        for marks, marker, size in ((begins, f"${letter}$", 60), (its & ~begins, ".", 12)):
            for where, color in ((marks & light, "black"), (marks & ~light, "white")):
                if where.any():
                    row, column = where.nonzero()
                    ax.scatter(column, row, s=size, marker=marker, color=color, linewidths=0)


def _legend(causes: NDArray[np.uint8]) -> str:
    present = [CAUSES[index] for index in np.unique(causes[causes != ABSENT]).tolist()]
    marks = [f"{cause['letter']}={cause['name']}" for cause in present if cause["letter"]]
    return "  ".join(marks) if marks else "all layers are healthy"


def grouped(names: Iterable[str]) -> dict[str, str]:
    """The row of each layer: its own name if there are at most 60, or else that of a module that it is in.

    These modules are as high in the hierarchy as still gives more than 60, and so many consecutive ones share a row as
    leaves 60: with the same parent, unless there are more than 60 parents.
    """
    paths = {name: tuple(name.split(".")) for name in names}
    if len(paths) <= MAX_ROWS:
        return {name: name for name in paths}
    depth = next(depth for depth in count(1) if len({path[:depth] for path in paths.values()}) > MAX_ROWS)
    modules = list(dict.fromkeys(path[:depth] for path in paths.values()))
    families: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for module in modules:
        families[module[:-1]].append(module)
    if len(families) > MAX_ROWS:
        families = {(): modules}
    size = next(size for size in count(2) if sum(-(-len(each) // size) for each in families.values()) <= MAX_ROWS)
    rows: dict[tuple[str, ...], str] = {}
    for parent, family in families.items():
        for start in range(0, len(family), size):
            run = family[start : start + size]
            is_all = parent and parent not in modules and 1 < len(run) == len(family)
            rows |= dict.fromkeys(run, ".".join(parent) if is_all else _named(run[0], run[-1]))
    return {name: rows[path[:depth]] for name, path in paths.items()}


def _named(first: tuple[str, ...], last: tuple[str, ...]) -> str:
    """A run of modules."""
    if first == last:
        return ".".join(first)
    return f"{'.'.join(first)} to {last[-1] if first[:-1] == last[:-1] else '.'.join(last)}"
