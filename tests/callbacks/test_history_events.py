"""The documents in event files: what is in them, when they are written, and what `monitor.history` has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bnmonitor import BatchNormMonitor, Report
from lightning_bnmonitor.callbacks import dashboard
from lightning_bnmonitor.callbacks.history_events import HistoryEvents
from lightning_bnmonitor.page.document import cells, decode
from lightning_bnmonitor.report.history import History
from tests.callbacks.dashboard_fits import BATCHES, LAYERS, STEPS, Look, Net, board, data, fit
from tests.callbacks.event_files import events
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import Net as Validated
from tests.callbacks.recorded_fits import train_data, trainer_for, val_data
from tests.report.made_reports import layer

pytestmark = EXPECTED_WARNINGS

RUN, CHANNELS = "batchnorm/history", "batchnorm/channels"


@pytest.fixture
def always(monkeypatch):
    """Whatever time it takes."""
    monkeypatch.setattr(dashboard, "_SHARE", float("inf"))


def test_the_last_event_has_all_windows_and_says_what_the_report_and_the_text_say(run):
    found = run.events.documents[RUN]
    assert (found[0][0], found[-1][0]) == (STEPS[0], STEPS[-1])
    last, report = found[-1][1], run.reports[-1]
    assert last["prefix"] == "bn"
    assert last["windows"] == {"step": STEPS, "headline": [str(each).splitlines()[0] for each in run.reports]}
    assert last["layers"]["name"] == list(report)
    errors = cells(last).metrics["eval_error"]
    expected = [[its.summary()["eval_error"] for its in each.values()] for each in run.reports]
    np.testing.assert_array_equal(errors, torch.tensor(expected).bfloat16().float())
    assert last["latest"]["text"] == report.brief()
    for (_, text), said in zip(run.events.texts["bn/report"], last["windows"]["headline"], strict=True):
        assert text.startswith(f"**{said}**")


def test_the_last_event_of_channels_has_the_last_window_of_all_layers(run):
    step, last = run.events.documents[CHANNELS][-1]
    assert step == STEPS[-1]
    assert list(last["layers"]) == list(run.reports[-1])
    for its in last["layers"].values():
        assert its["latest"]["step"] == STEPS[-1]
        assert its["worst"]["step"] == STEPS[0]  # they get warm


def test_the_history_of_the_monitor_is_that_in_the_files(tmp_path):
    monitor, logger = BatchNormMonitor(), board(tmp_path)
    assert len(monitor.history) == 0
    fit(logger, monitor)
    found = events(logger.log_dir).documents
    assert monitor.history.document() == found[RUN][-1][1]
    assert monitor.history.channels() == found[CHANNELS][-1][1]


def test_without_dashboard_or_logger_there_is_a_history_all_the_same():
    monitor = BatchNormMonitor(dashboard=False)
    fit(False, monitor)
    assert monitor.history.windows.steps == STEPS[:2]
    fit(False, monitor, max_epochs=1)
    assert monitor.history.windows.steps == STEPS[:1]  # of the last fit


def test_an_event_waits_for_the_validation_after_its_window(tmp_path, always):
    monitor, logger = BatchNormMonitor(), board(tmp_path)
    trainer_for(tmp_path, monitor, logger=logger, max_epochs=2).fit(Validated(), train_data(), val_data())
    found = events(logger.log_dir).documents
    assert [step for step, _ in found[RUN]] == [5, 11]
    for windows, (_, whole) in enumerate(found[RUN], start=1):
        assert not np.isnan(cells(whole).metrics["val_error"]).any()
        assert len(whole["windows"]["step"]) == windows
    for its in found[CHANNELS][-1][1]["layers"].values():
        assert {"val_mean", "val_var", "val_error"} <= its["latest"]["values"].keys()


def windows_written(num_windows, layers=()):
    """Of which windows a history and its channels are written, if there is time."""
    history = History()
    history.add(Report(layers), 0)
    written = {"history": [], "channels": []}
    due = HistoryEvents(history)
    for step in range(1, num_windows + 1):
        history.windows.num_windows = step
        for kind in due._due(is_last=False):
            written[kind.split("/")[1]].append(step)
            due._written[kind] = step
    return written


def test_it_is_written_at_each_of_the_first_windows_and_then_after_a_sixteenth_more():
    written = windows_written(400)
    assert written["history"][:20] == [*range(1, 18), 19, 21, 23]
    assert all(
        later <= -(-early * 17 // 16) for early, later in zip(written["history"], written["history"][1:], strict=False)
    )
    assert len(written["history"]) < 75
    assert written["channels"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    wide = layer("a", mean=[0.0] * 9000, var=[1.0] * 9000, running_mean=[0.0] * 9000, running_var=[1.0] * 9000)
    assert windows_written(400, [wide]) == {**written, "channels": [1, 4, 16, 64, 256]}


def test_of_many_short_windows_all_are_in_the_last_event_and_tensorboard_reads_it(tmp_path):
    logger, monitor = board(tmp_path), BatchNormMonitor(every_n_train_batches=1, on_unhealthy="ignore")
    look = Look(monitor)
    fit(logger, monitor, look, loader=data(300), max_epochs=1)
    accumulator = EventAccumulator(logger.log_dir)  # as TensorBoard's own loader keeps them
    accumulator.Reload()
    kept = accumulator.Tensors(RUN)
    assert len(kept) <= 10
    assert kept[-1].step == 299
    last = decode(kept[-1].tensor_proto.string_val[0])
    assert last["windows"]["step"] == list(range(300))
    expected = [[its.summary()["eval_error"] for its in report.values()] for report in look.reports]
    np.testing.assert_array_equal(cells(last).metrics["eval_error"], torch.tensor(expected).bfloat16().float())
    assert len(events(logger.log_dir).documents[RUN]) < 75


@pytest.mark.filterwarnings("ignore:No BatchNorm layer")
def test_a_model_without_batch_norm_has_an_event_that_says_so(tmp_path):
    monitor, logger = BatchNormMonitor(), board(tmp_path)
    fit(logger, monitor, model=NoLayers())
    found = events(logger.log_dir)
    assert (found.images, found.texts, found.layouts) == ({}, {}, [])
    last = found.documents[RUN][-1][1]
    assert last["layers"]["name"] == []
    assert set(last["windows"]["headline"]) == {"No BatchNorm layer was monitored."}


class NoLayers(Net):
    def __init__(self):
        super().__init__()
        for name in LAYERS:
            delattr(self, name)

    def training_step(self, batch, batch_idx):
        return self.out(torch.ones(8, 3)).square().mean()


def test_two_monitors_write_to_tags_of_their_own(tmp_path):
    logger = board(tmp_path, prefix="exp")
    fit(logger, BatchNormMonitor(), BatchNormMonitor(log_key_prefix="z", include="slow"))
    found = events(logger.log_dir).documents
    assert set(found) == {f"{kind}/{prefix}" for kind in (RUN, CHANNELS) for prefix in ("exp-bn", "exp-z")}
    assert found[f"{RUN}/exp-bn"][-1][1]["layers"]["name"] == list(LAYERS)
    assert found[f"{RUN}/exp-z"][-1][1]["layers"]["name"] == ["slow"]


def test_a_window_that_training_cuts_short_is_in_an_event_of_its_own(tmp_path, always):
    logger, monitor = board(tmp_path), BatchNormMonitor(every_n_train_batches=BATCHES)
    fit(logger, monitor, loader=data(BATCHES + 3), max_epochs=1)
    assert [step for step, _ in events(logger.log_dir).documents[RUN]] == [BATCHES - 1, BATCHES + 2]
