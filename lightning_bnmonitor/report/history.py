"""What is remembered of all windows of a run: the source of the page, of event files and of the heatmap."""

from __future__ import annotations

import copy
import csv
import html
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import ALERT, EVIDENCE, WARNING
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.groups import GroupShift
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.page.document import (
    ABSENT,
    FORMAT,
    METRICS,
    MOST_DIGITS,
    decode,
    encode,
    with_digits,
)
from lightning_bnmonitor.page.html import page
from lightning_bnmonitor.page.planes import packed
from lightning_bnmonitor.report.channel_values import ChannelValues, channel_values, largest_share
from lightning_bnmonitor.report.kept_windows import CAUSES, INDEX_OF_CAUSE, KeptWindows, Row
from lightning_bnmonitor.report.layer_report import LayerReport, jsonable
from lightning_bnmonitor.report.summaries import headline

MAX_BYTES = 2_900_000
"""Of a run's document, encoded."""
_LEAST_DIGITS = 2  # an error of 12 %
_EVIDENCE_OF = tuple("noise_error" if metric == "noise" else metric for metric in METRICS)


class WindowReport(Protocol):
    """What a history takes of a :class:`~lightning_bnmonitor.Report`."""

    rank: int | None

    def values(self) -> Iterable[LayerReport]:
        """The layers."""

    def brief(self) -> str:
        """What is printed."""


class _Seen(NamedTuple):
    """One layer in one window."""

    step: int
    diagnosis: Diagnosis
    channels: ChannelValues | LayerReport | None
    """None of the last window, which has its report; a copy of a layer's report until its channels are asked for."""

    @property
    def error(self) -> float:
        """The larger of ``eval_error`` and ``val_error``; -1 if neither is known."""
        return max(self.diagnosis.evidence.get(name, -1.0) for name in ("eval_error", "val_error"))


class History:
    """What is remembered of all windows of a run, at most 400 (and 400 000 layers in windows).

    When there would be more, neighbours are merged in pairs, and from then on each stands for twice as many windows: of
    each layer the worse one is kept, whole. That is one in which it needs attention; of two such, the one with the
    larger error. The last window always stands for itself, and of each layer the window of its largest error is kept
    (``eval_error``, or ``val_error`` if that is larger). Of these two, values per channel are kept, too, of at most
    32 768 channels of the model. In a notebook a history shows itself as the page of :meth:`to_html`.

    Args:
        prefix: What the logged names begin with.

    Example::

        >>> history = History()
        >>> history.to_dict()["windows"]
        []
    """

    def __init__(self, prefix: str = "bn") -> None:
        self.prefix = prefix
        self.windows = KeptWindows()
        """Cause and metrics of each layer in each window."""
        self._layers: dict[str, tuple[str, int]] = {}  # class and number of channels of each
        self._report: WindowReport | None = None  # of the last window, unless that was loaded
        self._text = ""  # what is printed of the last window, if it was loaded
        self._latest: dict[str, _Seen] = {}  # the last window, without channels
        self._worst: dict[str, _Seen] = {}  # of all windows but the last
        self._digits = MOST_DIGITS  # of the metrics in documents

    def __len__(self) -> int:
        return len(self.windows.steps)

    def add(self, report: WindowReport, step: int) -> None:
        """Append a window that ended after so many training steps."""
        self._worst = self._worst_so_far()
        self.windows.append(self._row(report, step))

    def update(self, report: WindowReport) -> None:
        """Put a report to which a validation has added in the place of the last window's.

        Raises:
            ValueError: If there is no window yet.
        """
        if not self.windows.steps:
            raise ValueError("There is no window to update: `add` one before.")
        self.windows.replace_last(self._row(report, self.windows.steps[-1]))

    def document(self) -> dict[str, Any]:
        """The run as the page takes it: see :mod:`lightning_bnmonitor.page.document`."""
        windows, texts = self.windows, _Texts()
        evidence = {name for seen in self._latest.values() for name in seen.diagnosis.evidence}
        worst = self._worst_so_far()
        kinds, channels = (
            zip(*(self._layers[name] for name in windows.layers), strict=True) if self._layers else ((), ())
        )
        return {
            "format": FORMAT,
            "prefix": self.prefix,
            "windows": {"step": list(windows.steps), "headline": list(windows.headlines)},
            "layers": {"name": list(windows.layers), "type": list(kinds), "channels": list(channels)},
            "causes": [dict(cause) for cause in CAUSES],
            "thresholds": {"warning": WARNING, "alert": ALERT},
            "cause": packed(windows.causes),
            "metrics": self._metrics(),
            "latest": {
                "window": len(self) - 1,
                "text": self._printed(),
                "layers": [texts.latest(self._latest.get(name)) for name in windows.layers],
            },
            "worst": {"layers": [texts.worst(worst.get(name)) for name in windows.layers]},
            "texts": list(texts.index),
            "evidence": {name: meaning for name, meaning in EVIDENCE.items() if name in evidence},
        }

    def encoded(self) -> bytes:
        """:meth:`document` as bytes, at most 2.9 MB: where they would be more, metrics lose binary digits.

        They are within 0.4 % of their values, then 0.8 %, 1.6 %, ..., and stay so. Of 1000 layers in 400 windows all
        metrics are within 1.6 % if they vary by chance, by a third, and nothing is known of groups (else within 6 %).
        """
        document = self.document()
        while len(data := encode(document)) > MAX_BYTES and self._digits > _LEAST_DIGITS:
            self._digits -= 1
            document["metrics"] = self._metrics()
        return data

    def channels(self) -> dict[str, Any]:
        """Values per channel, of the last window and of each layer's worst one, as the page takes them.

        Of layers that are in the last window; none right after :meth:`load_state_dict`, whose last window has none.
        """
        worst, most, layers = self._worst_channels(), self._most_channels(), {}
        for layer in self._report.values() if self._report is not None else ():
            latest = channel_values(layer, self.windows.steps[-1], most).to_dict()
            layers[layer.name] = {"latest": latest, "worst": worst.get(layer.name)}
        return {"format": FORMAT, "layers": layers}

    @property
    def num_channels(self) -> int:
        """Channels of which values are kept, of one window."""
        most = self._most_channels()
        return sum(min(channels, most) for _, channels in self._layers.values())

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types: of each window its step, a sentence, and what is known of the layers.

        ``{"windows": [{"step", "headline", "layers": {name: {"cause", "needs_attention", metric: value}}}]}``.
        """
        windows, cells = self.windows, self.windows.cells()
        rows = []
        for index, (step, said) in enumerate(zip(windows.steps, windows.headlines, strict=True)):
            layers = {
                name: {
                    "cause": CAUSES[cells.cause[index, layer]]["name"],
                    "needs_attention": bool(cells.attention[index, layer]),
                    **{
                        metric: jsonable(float(values[index, layer]))
                        for metric, values in cells.metrics.items()
                        if not math.isnan(values[index, layer])
                    },
                }
                for layer, name in enumerate(windows.layers)
                if cells.cause[index, layer] != ABSENT
            }
            rows.append({"step": step, "headline": said, "layers": layers})
        return {"windows": rows}

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_csv(self) -> str:
        """A table with a row for each layer in each window; what is not known is empty."""
        text = io.StringIO()
        known = list(self.windows.cells().metrics)
        writer = csv.DictWriter(text, ["step", "layer", "cause", "needs_attention", *known], lineterminator="\n")
        writer.writeheader()
        for window in self.to_dict()["windows"]:
            for name, layer in window["layers"].items():
                writer.writerow({"step": window["step"], "layer": name, **layer})
        return text.getvalue()

    def to_html(self, path: str | Path) -> None:
        """Write the page that TensorBoard shows, with its data in it: one file that needs nothing else."""
        Path(path).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """What :meth:`to_html` writes."""
        run = {"history": self.document(), "channels": self.channels()}
        return page({"run": run}, "BatchNorm")

    def _repr_html_(self) -> str:
        # In a frame: neither the notebook's styles nor its scripts are the page's.
        return f'<iframe srcdoc="{html.escape(self.page())}" style="width: 100%; height: 720px; border: 0"></iframe>'

    def state_dict(self) -> dict[str, Any]:
        """Everything but the channels of the last window, in tensors and primitives."""
        channels = self._worst_channels()
        rest = {
            "format": FORMAT,
            "layers": self._layers,
            "text": self._printed(),
            "latest": {name: _as_json(seen, None) for name, seen in self._latest.items()},
            "worst": {name: _as_json(seen, channels.get(name)) for name, seen in self._worst_so_far().items()},
        }
        compressed = torch.from_numpy(np.frombuffer(encode(rest), dtype=np.uint8).copy())
        return {"windows": self.windows.state_dict(), "rest": compressed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: If it is of another format.
        """
        rest = decode(state["rest"].numpy().tobytes())
        self.windows.load_state_dict(state["windows"])
        self._layers = {name: (kind, channels) for name, (kind, channels) in rest["layers"].items()}
        self._text, self._report = rest["text"], None
        self._latest, self._worst = (
            {name: seen for name, kept in rest[which].items() if (seen := _from_json(kept)) is not None}
            for which in ("latest", "worst")
        )

    def _row(self, report: WindowReport, step: int) -> Row:
        """A window of which the report is; it is the last one now."""
        layers = list(report.values())
        self._layers |= {layer.name: (layer.type, layer.num_features) for layer in layers}
        self._report = report
        self._latest = {layer.name: _Seen(step, layer.diagnosis, None) for layer in layers}
        cells = {}
        for layer in layers:
            evidence = layer.diagnosis.evidence
            numbers = [evidence.get(name, math.nan) for name in _EVIDENCE_OF]
            cells[layer.name] = layer.diagnosis.cause, layer.needs_attention, numbers
        return Row(step, headline(layers, report.rank), cells)

    def _metrics(self) -> dict[str, str]:
        """As in the document."""
        known = self.windows.cells().metrics
        every = zip(METRICS, self.windows.bits, strict=True)
        return {name: packed(with_digits(bits, self._digits)) for name, bits in every if name in known}

    def _worst_so_far(self) -> dict[str, _Seen]:
        """The window of the largest error of each layer of which an error is known; of equal ones the first."""
        before, reports = self._worst, {layer.name: layer for layer in self._report.values()} if self._report else {}
        worse = {
            name: seen._replace(channels=copy.copy(reports[name]) if name in reports else None)
            for name, seen in self._latest.items()
            if seen.error > (before[name].error if name in before else -1.0)
        }
        return before | worse

    def _worst_channels(self) -> dict[str, dict[str, Any]]:
        """The channels of each layer in its worst window, where they are known."""
        most, known = self._most_channels(), {}
        for name, seen in self._worst_so_far().items():
            channels = seen.channels
            if isinstance(channels, LayerReport):
                channels = channel_values(channels, seen.step, most)
                if name in self._worst and self._worst[name].step == seen.step:  # next time it is here, and smaller
                    self._worst[name] = seen._replace(channels=channels)
            if channels is not None:
                known[name] = channels.to_dict()
        return known

    def _printed(self) -> str:
        return self._text if self._report is None else self._report.brief()

    def _most_channels(self) -> int:
        return largest_share(channels for _, channels in self._layers.values())


class _Texts:
    """What is said of layers, each text once."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def latest(self, seen: _Seen | None) -> dict[str, Any] | None:
        """A layer in the last window; None if it was not in that."""
        if seen is None:
            return None
        return {**self._said(seen), "evidence": {name: _short(of) for name, of in seen.diagnosis.evidence.items()}}

    def worst(self, seen: _Seen | None) -> dict[str, Any] | None:
        """A layer in its worst window; None if nothing is known of its error."""
        return None if seen is None else {"window": seen.step, **self._said(seen)}

    def _said(self, seen: _Seen) -> dict[str, Any]:
        diagnosis = seen.diagnosis
        return {
            "cause": INDEX_OF_CAUSE[diagnosis.cause],
            "words": ", ".join([diagnosis.verdict, *diagnosis.flags]),
            "explanation": self._number(diagnosis.explanation),
            "remedy": self._number(diagnosis.remedy),
        }

    def _number(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index)) if text else -1


def _short(value: float) -> Any:
    """A number of the evidence: four significant digits, counts in full."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return int(value)
    return jsonable(float(f"{value:.4g}"))


def _as_json(seen: _Seen, channels: dict[str, Any] | None) -> dict[str, Any]:
    diagnosis = seen.diagnosis
    said = {"verdict": diagnosis.verdict, "flags": diagnosis.flags, "needs_attention": bool(diagnosis.needs_attention)}
    evidence = {name: jsonable(value) for name, value in diagnosis.evidence.items()}
    groups = [[jsonable(value) for value in group] for group in diagnosis.groups]
    return {"step": seen.step, "diagnosis": {**said, "evidence": evidence, "groups": groups}, "channels": channels}


def _from_json(kept: Mapping[str, Any]) -> _Seen | None:
    """What :func:`_as_json` was given; None if another version has said of it what this one does not know."""
    said = kept["diagnosis"]
    if said["verdict"] not in VERDICTS or not FLAGS.keys() >= set(said["flags"]):
        return None
    evidence = {name: float(value) for name, value in said["evidence"].items()}
    groups = [
        GroupShift(name, batches, samples, float(shift), float(noise))
        for name, batches, samples, shift, noise in said.get("groups", ())  # versions before had none
    ]
    diagnosis = Diagnosis(said["verdict"], tuple(said["flags"]), said["needs_attention"], evidence, tuple(groups))
    channels = kept["channels"] and ChannelValues.from_dict(kept["channels"])
    return _Seen(kept["step"], diagnosis, channels)
