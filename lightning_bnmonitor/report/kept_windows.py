"""The numbers of all windows, in bounded memory: one cause and a few metrics of each layer in each window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.page.document import ABSENT, ATTENTION, METRICS, Cells, as_float32, bfloat16

MAX_WINDOWS, MAX_CELLS = 400, 400_000
_FLAG_LETTER, _FLAG_COLOR = "!", "#AA3377"
_ERRORS = [METRICS.index("eval_error"), METRICS.index("val_error")]  # by the larger of which a window is bad
CAUSES: tuple[Mapping[str, str], ...] = (
    *(
        {"name": name, "letter": verdict.letter * (name != "healthy"), "color": verdict.color, "kind": "verdict"}
        for name, verdict in VERDICTS.items()
    ),
    *({"name": name, "letter": _FLAG_LETTER, "color": _FLAG_COLOR, "kind": "flag"} for name in FLAGS),
)
"""What can be the matter with a layer: verdicts, then flags."""
INDEX_OF_CAUSE = {cause["name"]: index for index, cause in enumerate(CAUSES)}


class Row(NamedTuple):
    """A window."""

    step: int
    """The training step at its end."""
    headline: str
    """What is said of it in a sentence."""
    layers: Mapping[str, tuple[str, bool, Sequence[float]]]
    """Of each layer, in the model's order: cause, whether it needs attention, and :data:`METRICS`, NaN if not known."""


class KeptWindows:
    """At most 400 windows (and 400 000 layers in windows), oldest first.

    When there would be more, neighbours are merged in pairs, and from then on each stands for twice as many windows: of
    each layer the worse one is kept, whole. That is one in which it needs attention; of two such, the one with the
    larger error. The last window always stands for itself.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        """Names of all layers: in the order of the last window, then those that it lacks."""
        self.num_windows = 0
        """Windows so far, merged or not."""
        self.stride = 1
        """For how many windows one that was merged stands."""
        self.steps: list[int] = []
        """The training step at the end of each window; of merged ones, of the last."""
        self.starts: list[int] = []
        """Which window each is, counted from 0; of merged ones, the first."""
        self.headlines: list[str] = []
        """Of each window; of merged ones, that of the one in which more layers need attention."""
        self.causes = np.empty((0, 0), dtype=np.uint8)
        """``(W, L)``, as in the document of a run."""
        self.bits = np.empty((len(METRICS), 0, 0), dtype=np.uint16)
        """Metrics as bfloat16, ``(M, W, L)``."""

    def append(self, window: Row) -> None:
        """Add a window."""
        if len(self.steps) > 1 and self.starts[-1] - self.starts[-2] < self.stride:
            self._merge(len(self.steps) - 2)  # what was the last window joins those before it
        self._put(window, self.num_windows)
        self.num_windows += 1
        while len(self.steps) > max(min(MAX_WINDOWS, MAX_CELLS // max(len(self.layers), 1)), 2):
            self.stride *= 2
            self._merge(0)

    def replace_last(self, window: Row) -> None:
        """Put another window in the place of the last one."""
        for values in (self.steps, self.starts, self.headlines):
            values.pop()
        self.causes, self.bits = self.causes[:-1], self.bits[:, :-1]
        self._put(window, self.num_windows - 1)

    def cells(self) -> Cells:
        """What is known of each layer in each window, ``(W, L)`` each."""
        is_there, values = self.causes != ABSENT, as_float32(self.bits)
        metrics = {name: each for name, each in zip(METRICS, values, strict=True) if not np.isnan(each).all()}
        causes = np.where(is_there, self.causes & (ATTENTION - 1), ABSENT).astype(np.uint8)
        return Cells(causes, is_there & (self.causes >= ATTENTION), metrics)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in tensors and primitives."""
        return {
            "layers": list(self.layers),
            "num_windows": self.num_windows,
            "stride": self.stride,
            "steps": list(self.steps),
            "starts": list(self.starts),
            "headlines": list(self.headlines),
            "causes": torch.from_numpy(self.causes.copy()),
            "names": [cause["name"] for cause in CAUSES],
            "metrics": {
                name: torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
                for name, bits in zip(METRICS, self.bits, strict=True)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.layers, self.steps, self.starts = list(state["layers"]), list(state["steps"]), list(state["starts"])
        self.num_windows, self.stride, self.headlines = state["num_windows"], state["stride"], list(state["headlines"])
        # Of other versions the causes may be others, or stand in another order.
        index = np.full(256, ABSENT, dtype=np.uint8)
        for before, name in enumerate(state["names"]):
            if name in INDEX_OF_CAUSE:
                index[before], index[before + ATTENTION] = INDEX_OF_CAUSE[name], INDEX_OF_CAUSE[name] + ATTENTION
        self.causes = index[state["causes"].numpy()]
        self.bits = np.empty((len(METRICS), *self.causes.shape), dtype=np.uint16)
        for row, name in enumerate(METRICS):
            bits = state["metrics"].get(name)  # of an earlier version, some may be missing
            self.bits[row] = bfloat16([np.nan]) if bits is None else bits.view(torch.int16).numpy().view(np.uint16)

    def _put(self, window: Row, start: int) -> None:
        before = {name: index for index, name in enumerate(self.layers)}
        self.layers = [*window.layers, *(name for name in self.layers if name not in window.layers)]
        known = [before.get(name, -1) for name in self.layers]
        if known != list(range(len(before))):
            # What is not known is in the last place, as -1 says.
            self.causes = np.pad(self.causes, ((0, 0), (0, 1)), constant_values=ABSENT)[:, known]
            self.bits = np.pad(self.bits, ((0, 0), (0, 0), (0, 1)), constant_values=bfloat16([np.nan]))[:, :, known]
        row = np.full(len(self.layers), ABSENT, dtype=np.uint8)
        values = np.full((len(METRICS), len(self.layers)), np.nan)
        if window.layers:
            causes, attention, numbers = zip(*window.layers.values(), strict=True)
            row[: len(causes)] = [INDEX_OF_CAUSE[cause] for cause in causes]
            row[: len(causes)] += ATTENTION * np.array(attention, dtype=np.uint8)
            values[:, : len(causes)] = np.transpose(numbers)
        self.steps.append(window.step)
        self.starts.append(start)
        self.headlines.append(window.headline)
        self.causes = np.concatenate([self.causes, row[None]])
        self.bits = np.concatenate([self.bits, bfloat16(values)[:, None]], axis=1)

    def _merge(self, first: int) -> None:
        """Merge windows in pairs, from one on; what is left over stays alone."""
        end = len(self.steps) - (len(self.steps) - first) % 2
        early, late = np.arange(first, end, 2), np.arange(first + 1, end, 2)
        rank, error = badness(self.causes, self.bits)
        is_late = (rank[late] > rank[early]) | ((rank[late] == rank[early]) & (error[late] >= error[early]))
        kept, rest = [*range(first)], [*range(end, len(self.steps))]
        causes = np.where(is_late, self.causes[late], self.causes[early])
        bits = np.where(is_late, self.bits[:, late], self.bits[:, early])
        unhealthy = (rank == 1).sum(axis=1)
        told = np.where(unhealthy[late] >= unhealthy[early], late, early)
        self.headlines = [self.headlines[index] for index in [*kept, *told.tolist(), *rest]]
        self.steps = [self.steps[index] for index in [*kept, *late.tolist(), *rest]]
        self.starts = [self.starts[index] for index in [*kept, *early.tolist(), *rest]]
        self.causes = np.concatenate([self.causes[kept], causes, self.causes[rest]])
        self.bits = np.concatenate([self.bits[:, kept], bits, self.bits[:, rest]], axis=1)


def badness(causes: NDArray[np.uint8], bits: NDArray[np.uint16]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """How bad each layer is in each window, ``(W, L)``: by the first of these, where that is equal by the second.

    -1 if it was not in that window, 1 if it needs attention; the larger of ``eval_error`` and ``val_error``, -1 if
    neither is known.
    """
    rank = np.where(causes == ABSENT, -1, causes >= ATTENTION).astype(np.int8)
    error = np.fmax(*as_float32(bits[_ERRORS]))
    return rank, np.where(np.isnan(error), np.float32(-1), error)
