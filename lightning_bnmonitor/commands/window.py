"""One window of a run's document: what is said of it, and its layers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lightning_bnmonitor.page.document import ABSENT, AVERAGED, METRICS, cells


class Window(NamedTuple):
    """One window of a run."""

    step: int
    """The training step at its end."""
    headline: str
    layers: list[dict[str, Any]]
    """Of each layer ``name``, ``cause``, ``needs_attention`` and what is known of its metrics, the worst first."""
    text: str
    """What is printed of it."""

    @property
    def num_unhealthy(self) -> int:
        """Layers that need attention, be it with their averaged weights."""
        return len({layer["name"].removesuffix(AVERAGED) for layer in self.layers if layer["needs_attention"]})

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, the layers by name."""
        layers = {
            layer["name"]: {key: _jsonable(value) for key, value in layer.items() if key != "name"}
            for layer in self.layers
        }
        return {"step": self.step, "headline": self.headline, "layers": layers}


def window_at(document: Mapping[str, Any], step: int | None) -> Window:
    """The window that a training step lies in, of merged ones all that were merged; the last one for None.

    Args:
        document: Of a run.
        step: The step.

    Raises:
        ValueError: If the run has no such window, or the document lacks what it should have.
    """
    try:
        if not document["layers"]["name"]:
            raise ValueError("No BatchNorm layer was monitored in this run.")
        steps = document["windows"]["step"]
        index = len(steps) - 1 if step is None else bisect_left(steps, step)
        if step is not None and (step < 0 or index == len(steps)):
            raise ValueError(f"Step {step} is in none of its windows, the last of which ended at step {steps[-1]}.")
        layers = _layers(document, index)
        said = document["windows"]["headline"][index]
        is_last = index == document["latest"]["window"]
        text = document["latest"]["text"] if is_last else f"{said}\n\n{_table(layers)}"
        return Window(steps[index], said, layers, text)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"Its data are damaged: {error!r}.") from error


def _layers(document: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    all_cells = cells(document)
    found = []
    for position, name in enumerate(document["layers"]["name"]):
        if (cause := all_cells.cause[index, position]) == ABSENT:
            continue
        values = {metric: float(values[index, position]) for metric, values in all_cells.metrics.items()}
        found.append(
            {
                "name": name,
                "cause": document["causes"][cause]["name"],
                "needs_attention": bool(all_cells.attention[index, position]),
                **{metric: values[metric] for metric in METRICS if not math.isnan(values.get(metric, math.nan))},
            }
        )
    return sorted(found, key=lambda layer: (not layer["needs_attention"], -layer.get("eval_error", -math.inf)))


def _table(layers: list[dict[str, Any]]) -> str:
    from tabulate import tabulate

    known = [metric for metric in METRICS if any(metric in layer for layer in layers)]
    rows = [
        [layer["name"], layer["cause"], *(f"{layer[m]:.4f}" if m in layer else "-" for m in known)] for layer in layers
    ]
    align = ("left", "left", *["right"] * len(known))
    return tabulate(rows, headers=["layer", "cause", *known], disable_numparse=True, colalign=align)


def _jsonable(value: Any) -> Any:
    return "Infinity" if isinstance(value, float) and np.isposinf(value) else value
