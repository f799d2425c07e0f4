"""The layers' ``eval_error`` over all windows, in bounded memory and as a picture of bounded size."""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_bnmonitor.diagnosis.evidence import ALERT, WARNING
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.report.figures import shortened
from lightning_bnmonitor.report.report import Report

MAX_ROWS, MAX_COLUMNS = 60, 60
_LEVELS = (0.0, 0.03, WARNING, ALERT, 0.6, 1.5)  # the last is open above
_COLORS = ("#f6f4ea", "#dcd9c4", "#e9b44c", "#d1603d", "#8c2f5b", "#2b1243")  # ever darker
_MISSING = "#ffffff"
_DPI = 100
# In pixels. TensorBoard shows a picture 350 pixels wide: few columns take little room, for letters that can be read.
_CELL_HEIGHT, _CELL_WIDTH, _MIN_WIDTH, _MAX_WIDTH = 19, 28, 320, 600
_TOP, _LINE, _BOTTOM, _RIGHT = 40, 18, 98, 24
_CHARACTER = 8.4  # width in pixels
_NAMES = list(VERDICTS)  # what is remembered is the index of a name
_NO_VERDICT = len(_NAMES)


class Heatmap:
    """What is remembered of all windows: at most 60 rows of layers by 60 columns of windows.

    When a 61st column would begin, neighbouring columns are merged in pairs, and from then on a column holds twice as
    many windows: the largest error of them. More than 60 layers are grouped by the modules that they are in.
    """

    def __init__(self) -> None:
        self.rows: list[str] = []
        """Names of layers, or of groups of them."""
        self._row_of: dict[str, str] = {}  # of every layer
        self.steps: list[int] = []
        """The training step at the end of each column."""
        self._errors = np.empty((0, 0), dtype=np.float32)
        self._verdicts = np.empty((0, 0), dtype=np.uint8)  # indices, the last one for none
        self._stride = 1  # windows in a full column
        self._filled = 1  # in the last one

    def add(self, report: Report, step: int) -> bool:
        """Append a window that ended after so many training steps. Returns whether a column is full now."""
        errors, verdicts = self._place(report)
        if self._filled < self._stride:
            self._filled += 1
            self.steps[-1] = step
            both = np.stack([self._errors[:, -1], errors], axis=1), np.stack([self._verdicts[:, -1], verdicts], axis=1)
            self._errors[:, -1:], self._verdicts[:, -1:] = _paired(*both)
        else:
            if len(self.steps) == MAX_COLUMNS:
                self._errors, self._verdicts = _paired(self._errors, self._verdicts)
                self.steps, self._stride = self.steps[1::2], 2 * self._stride
            self.steps.append(step)
            self._errors = np.column_stack([self._errors, errors])
            self._verdicts = np.column_stack([self._verdicts, verdicts])
            self._filled = 1
        return self._filled == self._stride

    def state_dict(self) -> dict[str, Any]:
        """Everything, in tensors and primitives."""
        return {
            "rows": list(self.rows),
            "row_of": dict(self._row_of),
            "steps": list(self.steps),
            "errors": torch.from_numpy(self._errors.copy()),
            "verdicts": torch.from_numpy(self._verdicts.copy()),
            "names": list(_NAMES),
            "stride": self._stride,
            "filled": self._filled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.rows, self.steps, self._row_of = list(state["rows"]), list(state["steps"]), dict(state["row_of"])
        self._errors = state["errors"].numpy().copy()
        # Of other versions the verdicts may be others, or stand in another order.
        names = state.get("names", _NAMES)
        index = [_NAMES.index(name) if name in _NAMES else _NO_VERDICT for name in names] + [_NO_VERDICT]
        self._verdicts = np.array(index, dtype=np.uint8)[state["verdicts"].numpy()]
        self._stride, self._filled = state["stride"], state["filled"]

    def draw(self) -> NDArray[np.uint8]:
        """The picture, ``(height, width, 3)``: at most 1400 pixels high and 1000 wide.

        Raises:
            ValueError: If there is no layer in it.
        """
        if not self.rows:
            raise ValueError("There is no layer to draw.")
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure

        with mpl.rc_context(), mpl.style.context("default"):
            sizes = Counter(self._row_of.values())
            names = [shortened(row if sizes[row] == 1 else f"{row} ({sizes[row]})") for row in self.rows]
            left = 16 + _CHARACTER * max(map(len, names))
            plot_width = min(max(_CELL_WIDTH * len(self.steps), _MIN_WIDTH), _MAX_WIDTH)
            plot_height = _CELL_HEIGHT * len(names)
            width = left + plot_width + _RIGHT
            legend = textwrap.wrap(self._legend(), int((width - 16) / _CHARACTER), break_on_hyphens=False)
            height = _TOP + _LINE * len(legend) + plot_height + _BOTTOM
            fig = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
            canvas = FigureCanvasAgg(fig)
            plot = (left / width, _BOTTOM / height, plot_width / width, plot_height / height)
            ax = fig.add_axes(plot)
            colors = ListedColormap(_COLORS).with_extremes(bad=_MISSING)
            norm = BoundaryNorm(_LEVELS, len(_COLORS), extend="max")
            shown = np.ma.masked_invalid(np.where(np.isposinf(self._errors), 1e3, self._errors))
            # The colours themselves: with a norm, imshow gets some wrong before matplotlib 3.10.
            ax.imshow(colors(norm(shown)), aspect="auto", interpolation="nearest")
            self._mark(ax)
            ax.set_yticks([])  # drawn by hand, which takes half as long
            style: dict[str, Any] = {
                "fontsize": 10,
                "family": "monospace",
                "ha": "right",
                "va": "center",
                "parse_math": False,
            }
            for row, name in enumerate(names):
                ax.text(-0.5 - 5 * len(self.steps) / plot_width, row, name, **style)
            every = -(-len(self.steps) // (plot_width // 64)) or 1
            shown_steps = range(len(self.steps))[::-every][::-1]
            ax.set_xticks(shown_steps, [str(self.steps[index]) for index in shown_steps], fontsize=10)
            ax.set_xlabel("training step at the end of the window", fontsize=10)
            ax.tick_params(length=0)
            ax.hlines(np.arange(1, len(names)) - 0.5, -0.5, len(self.steps) - 0.5, color="white", linewidth=1)
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

    def _mark(self, ax: Any) -> None:
        """A letter where a verdict begins, and dots where it goes on."""
        previous = np.column_stack([np.full(len(self.rows), _NO_VERDICT), self._verdicts[:, :-1]])
        light = ~(self._errors >= ALERT)
        for index, verdict in enumerate(VERDICTS):
            if verdict == "healthy":
                continue
            its = self._verdicts == index
            begins = its & (previous != index)
            for marks, marker, size in ((begins, f"${VERDICTS[verdict].letter}$", 60), (its & ~begins, ".", 12)):
                for where, color in ((marks & light, "black"), (marks & ~light, "white")):
                    if where.any():
                        row, column = where.nonzero()
                        ax.scatter(column, row, s=size, marker=marker, color=color, linewidths=0)

    def _legend(self) -> str:
        present = [verdict for index, verdict in enumerate(VERDICTS) if (self._verdicts == index).any()]
        marks = [f"{VERDICTS[verdict].letter}={verdict}" for verdict in present if verdict != "healthy"]
        return "  ".join(marks) if marks else "all layers are healthy"

    def _place(self, report: Report) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Error and verdict of each row; the rows are put in the order of this report."""
        if not self._row_of.keys() >= report.keys():
            self._row_of = grouped([*report, *(name for name in self._row_of if name not in report)])
        before = {row: index for index, row in enumerate(self.rows)}
        in_order = [*report, *(name for name in self._row_of if name not in report)]
        self.rows = list(dict.fromkeys(self._row_of[name] for name in in_order))
        shape = (len(self.rows), len(self.steps))
        errors, verdicts = np.full(shape, math.nan, dtype=np.float32), np.full(shape, _NO_VERDICT, dtype=np.uint8)
        for index, row in enumerate(self.rows):
            if row in before:
                errors[index], verdicts[index] = self._errors[before[row]], self._verdicts[before[row]]
        self._errors, self._verdicts = errors, verdicts
        position = {row: index for index, row in enumerate(self.rows)}
        new_errors = np.full(len(self.rows), math.nan, dtype=np.float32)
        new_verdicts = np.full(len(self.rows), _NO_VERDICT, dtype=np.uint8)
        summaries = report.layer_summaries()
        for layer in reversed(report.worst()):
            index = position[self._row_of[layer.name]]
            new_errors[index] = np.fmax(new_errors[index], summaries[layer.name]["eval_error"])
            new_verdicts[index] = _NAMES.index(layer.verdict)
        return new_errors, new_verdicts


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


def _paired(errors: NDArray[np.float32], verdicts: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Columns merged in pairs: the larger error, and the verdict that comes with it."""
    first, second = errors[:, 0::2], errors[:, 1::2]
    later = (~(first > second) & ~np.isnan(second)) | np.isnan(first)
    later &= verdicts[:, 1::2] != _NO_VERDICT
    return np.fmax(first, second), np.where(later, verdicts[:, 1::2], verdicts[:, 0::2])
