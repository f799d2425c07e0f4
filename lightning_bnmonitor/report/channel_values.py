"""What is kept of the channels of a layer in one window: of all of them, or of the worst where there are too many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.page.planes import packed, unpacked
from lightning_bnmonitor.report.layer_report import jsonable
from lightning_bnmonitor.report.layer_values import LayerValues

MAX_CHANNELS = 32_768
"""Of a model, in one window."""
_EXACT = ("exact_mean", "exact_var", "running_mean", "running_var", "stderr_mean", "stderr_var", "eval_error")
_ROWS = (4, 5, 2, 3, 8, 9)  # where these, but for the last, are in `LayerValues.numbers`
_SPREAD_OF = {"exact_mean": "exact_var", "running_mean": "exact_var", "val_mean": "val_var"}
_DIGITS, _DIGITS_OF_ERRORS = 10, 6  # binary, that are kept


class ChannelValues(NamedTuple):
    """What is kept of the channels of a layer in one window."""

    step: int
    """The training step at its end."""
    num_channels: int
    """Of the layer."""
    chosen: list[int] | None
    """Which of them are kept; None: all."""
    values: dict[str, NDArray[np.float32]]
    """One value for each of these, by name."""
    course: dict[str, Any] | None
    """How the channel with the largest ``eval_error`` went over the window, in JSON's types."""

    def to_dict(self) -> dict[str, Any]:
        """As in the document of the channels."""
        values = {name: packed(values.view(np.uint32)) for name, values in self.values.items()}
        return {
            "step": self.step,
            "of": self.num_channels,
            "index": self.chosen,
            "values": values,
            "course": self.course,
        }

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> ChannelValues:
        """From :meth:`to_dict`."""
        count = kept["of"] if kept["index"] is None else len(kept["index"])
        values = {name: unpacked(text, count).view(np.float32) for name, text in kept["values"].items()}
        return cls(kept["step"], kept["of"], kept["index"], values, kept["course"])


def channel_values(layer: LayerValues, step: int, most: int) -> ChannelValues:
    """The channels of a layer in a window that ended at a training step, at most so many of them.

    If there are more, those with the largest ``eval_error``, in their order.
    """
    error = layer.eval_error
    values = dict(zip(_EXACT, [*layer.numbers[list(_ROWS)], error], strict=True))
    if layer.validation is not None:
        values |= {"val_mean": layer.validation[0], "val_var": layer.validation[1], "val_error": layer.val_error}
    known = torch.nan_to_num(error, nan=-1.0, posinf=torch.inf)
    chosen = None
    if layer.num_features > most:
        chosen = known.argsort(descending=True, stable=True)[:most].sort().values
        values = {name: each[chosen] for name, each in values.items()}
    return ChannelValues(
        step,
        layer.num_features,
        None if chosen is None else chosen.tolist(),
        {name: _rounded(each, values.get(_SPREAD_OF.get(name, ""), each), name) for name, each in values.items()},
        _course(layer, int(known.argmax())) if layer.num_features else None,
    )


def largest_share(channels: Iterable[int]) -> int:
    """How many channels each layer may keep, so that all layers together keep at most :data:`MAX_CHANNELS`.

    What a layer does not need is the others'. At least one.

    Args:
        channels: Of each layer.
    """
    left, ordered = MAX_CHANNELS, sorted(channels)
    for index, count in enumerate(ordered):
        share = left // (len(ordered) - index)
        if count > share:
            return max(share, 1)
        left -= count
    return max(ordered, default=1)


def _rounded(values: Tensor, spread: Tensor, name: str) -> NDArray[np.float32]:
    """Values to a thousandth, of means to a thousandth of the standard deviation; of errors to a hundredth.

    What is left takes half the room when it is compressed.
    """
    exact, scale = values.numpy(), np.abs(spread.numpy())
    digits = _DIGITS_OF_ERRORS if "err" in name else _DIGITS
    with np.errstate(all="ignore"):
        unit = np.exp2(np.floor(np.log2(np.sqrt(scale) if name in _SPREAD_OF else scale)) - digits)
        rounded = np.round(exact / unit) * unit
        return np.where(np.isfinite(rounded), rounded, exact).astype(np.float32)


def _course(layer: LayerValues, channel: int) -> dict[str, Any] | None:
    course = layer.course
    if not len(course.num_batches):
        return None
    mean, var = (_short(values[:, channel].tolist()) for values in (course.mean, course.var))
    return {"channel": channel, "batches": [int(n) for n in course.num_batches.tolist()], "mean": mean, "var": var}


def _short(values: list[float]) -> list[Any]:
    return [jsonable(float(f"{value:.6g}")) for value in values]
