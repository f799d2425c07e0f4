"""How large histories get in event files: of many layers and windows, with numbers as random as can be."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_bnmonitor import LayerReport, Report
from lightning_bnmonitor.callbacks import dashboard
from lightning_bnmonitor.callbacks.dashboard import Dashboard
from lightning_bnmonitor.callbacks.scalars import Scalars
from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.page.document import METRICS, cells, decode, encode
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.kept_windows import INDEX_OF_CAUSE, Row
from tests.report.made_reports import tracked

pytestmark = [pytest.mark.slow, pytest.mark.long]
OF_VALIDATION = ("val_error", "val_shift", "val_error_noise", "val_noise")


def names(num_layers):
    return [f"encoder.stage{index // 100}.block{index // 4}.norm{index % 4}" for index in range(num_layers)]


class Varied:
    """Reports of layers whose numbers all differ, by chance, with as much evidence as a real layer has."""

    def __init__(self, num_layers, channels):
        self.rng, self.channels, self.names = np.random.default_rng(0), channels, names(num_layers)
        torch.manual_seed(0)
        (self.real,) = tracked(nn.BatchNorm1d(channels), [torch.randn(32, channels) for _ in range(20)]).values()
        self.evidence = {**self.real.evidence, **dict.fromkeys(OF_VALIDATION, 0.1)}
        self.level = self.rng.lognormal(-3, 1, size=num_layers)

    def window(self, number):
        decline = 1 + 20 * math.exp(-number / 5)
        return Report(self.layer(name, level * decline) for name, level in zip(self.names, self.level, strict=True))

    def of_any_magnitude(self, number):
        """Metrics of which nothing is known but that they are between a millionth and a thousand."""
        return 10 ** self.rng.uniform(-6, 3, size=(len(self.names), len(METRICS)))

    def row(self, number, numbers):
        """What is kept of a window, without the reports that it is taken from: the causes by chance, no groups."""
        numbers[:, METRICS.index("group_shift")] = math.nan
        causes = self.rng.choice(list(INDEX_OF_CAUSE), size=len(self.names)).tolist()
        cells = {
            name: (cause, bool(own[0] > 0.1), own.tolist())
            for name, cause, own in zip(self.names, causes, numbers, strict=True)
        }
        return Row(100 * number, f"window {number}", cells)

    def layer(self, name, level) -> LayerReport:
        chance = self.rng.lognormal(0, 0.3, size=len(self.evidence))
        evidence = {key: value * by for (key, value), by in zip(self.evidence.items(), chance.tolist(), strict=True)}
        evidence |= {"eval_error": level * chance[0], "val_error": level * chance[1], "num_features": self.channels}
        sick = bool(evidence["eval_error"] > 0.1)
        diagnosis = Diagnosis("warming-up" if sick else "healthy", (), sick, evidence)
        numbers, values = (torch.from_numpy(self.rng.lognormal(size=(rows, self.channels))) for rows in (10, 4))
        return dataclasses.replace(
            self.real, name=name, diagnosis=diagnosis, numbers=numbers, validation=values[:2], val_running=values[2:]
        )


def test_an_event_of_1000_layers_in_400_windows_is_at_most_three_megabytes_whatever_is_in_it():
    reports, history = Varied(1000, 2), History()
    history.add(reports.window(0), 0)
    for number in range(1, 399):
        history.windows.append(reports.row(number, reports.of_any_magnitude(number)))
    history.add(reports.window(399), 39900)
    data = history.encoded()
    assert 2e6 < len(data) < 3e6
    assert len(encode(history.document())) == len(data)  # the file has what the event has
    found, kept = cells(decode(data)), history.windows.cells()
    np.testing.assert_array_equal(found.cause, kept.cause)
    for name in kept.metrics:
        np.testing.assert_allclose(found.metrics[name], kept.metrics[name], rtol=2**-3)
    for number in range(400, 420):  # and no more than that, however long it goes on
        history.windows.append(reports.row(number, reports.of_any_magnitude(number)))
    assert len(history.encoded()) < len(data)


def test_a_run_of_200_layers_in_50_windows_is_at_most_twenty_megabytes_with_everything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "_SHARE", math.inf)
    reports, history = Varied(200, 160), History()  # nearly as many channels as are kept
    logger, shown = TensorBoardLogger(tmp_path), Dashboard("bn", history, validates=True)
    trainer, scalars = SimpleNamespace(callback_metrics={}, loggers=[logger]), Scalars("bn", per_layer=True)
    for number in range(50):
        report = reports.window(number)
        shown.tell([logger])
        assert scalars.log_window(trainer, report, number)
        history.add(report, number)
        shown.show([logger], report, number, per_layer=True)
        scalars.log_validation(trainer, report, number, is_of_window=True)
    shown.finish([logger])
    logger.finalize("success")
    (path,) = tmp_path.rglob("*tfevents*")
    assert 1e6 < path.stat().st_size < 20e6
