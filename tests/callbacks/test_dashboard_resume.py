"""The dashboard in resumed runs, second fits and copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.page.document import encode
from tests.callbacks.dashboard_fits import (
    BATCHES,
    LAYERS,
    OURS,
    STEPS,
    At,
    C,
    Net,
    Save,
    StoppedError,
    board,
    data,
    fit,
    verdicts,
)
from tests.callbacks.event_files import events, pixels
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


def of_monitor(path):
    (state,) = [
        state
        for key, state in torch.load(path, weights_only=True)["callbacks"].items()
        if key.startswith("BatchNormMonitor")
    ]
    return state


def interrupted(folder, path, at=2 * BATCHES + 5, **options):
    """Saves, and breaks in the third epoch, before the quick layer is said to be healthy."""

    def save_and_stop(trainer):
        trainer.save_checkpoint(path)
        raise StoppedError

    with pytest.raises(StoppedError):
        fit(folder, BatchNormMonitor(**options), At(at, save_and_stop), max_epochs=4)


def test_a_resumed_run_goes_on_with_the_history(tmp_path, run):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path)
    saved = of_monitor(path)["history"]["windows"]
    assert saved["steps"] == STEPS[:2]
    assert sorted(saved["layers"]) == sorted(LAYERS)
    fit(logger, BatchNormMonitor(), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.at("bn/report") == STEPS[2:]
    assert found.at("bn/heatmap") == STEPS[2:]
    assert found.texts["bn/report"] == run.events.texts["bn/report"][2:]
    assert "quick: warming-up → healthy" in found.texts["bn/report"][0][1]
    assert found.categories() == OURS
    resumed, whole = found.images["bn/heatmap"][-1], run.events.images["bn/heatmap"][-1]
    assert resumed[0] == whole[0]
    np.testing.assert_array_equal(pixels(resumed[1]), pixels(whole[1]))


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_made_with_or_without_dashboard_loads_without_or_with(tmp_path, run, before):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path, dashboard=before)
    assert (of_monitor(path)["dashboard"] is not None) == before
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The BatchNorm statistics")
        fit(logger, BatchNormMonitor(dashboard=not before), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.at("bn/eval_error_max") == STEPS[2:]
    assert dict(found.scalars)["bn/eval_error_max"] == run.events.scalars["bn/eval_error_max"][2:]
    if before:
        assert (found.images, found.texts, found.layouts, found.documents) == ({}, {}, [], {})
        return
    assert found.at("bn/heatmap") == STEPS[2:]
    assert found.documents["batchnorm/history"][-1][1]["windows"]["step"] == STEPS
    assert "Changed" not in found.texts["bn/report"][0][1]  # which the dashboard itself remembers


def test_a_checkpoint_from_before_there_was_a_dashboard_loads(tmp_path, run):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.pop("dashboard", None)
        state.pop("history", None)
    torch.save(checkpoint, path)
    assert "dashboard" not in of_monitor(path)
    fit(logger, BatchNormMonitor(), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.scalars["bn/eval_error_max"] == run.events.scalars["bn/eval_error_max"][2:]
    assert found.at("bn/heatmap") == STEPS[2:]
    assert found.documents["batchnorm/history"][-1][1]["windows"]["step"] == STEPS[2:]


def test_a_history_of_another_format_is_left_out_and_told_of(tmp_path, run):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "history" in state:
            state["history"]["rest"] = torch.tensor(list(encode({"format": 3})), dtype=torch.uint8)
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="history in the checkpoint is left out: The data have format 3"):
        fit(logger, BatchNormMonitor(), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.scalars["bn/eval_error_max"] == run.events.scalars["bn/eval_error_max"][2:]
    assert found.documents["batchnorm/history"][-1][1]["windows"]["step"] == STEPS[2:]


@pytest.mark.slow
def test_the_state_of_a_hundred_windows_is_small(tmp_path):
    path = tmp_path / "saved.ckpt"
    names = {f"layer{index}": 0.1 for index in range(10)}
    monitor = BatchNormMonitor(every_n_train_batches=1, on_unhealthy="ignore", per_layer=False)
    fit(board(tmp_path), monitor, At(101, Save(path)), model=Net(names), loader=data(102), max_epochs=1)
    state = of_monitor(path)
    assert len(state["history"]["windows"]["steps"]) > 30
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() <= 1024 * C * len(names) + 64 * 1024


def test_a_second_fit_begins_a_new_history(tmp_path, run):
    monitor, first, second = BatchNormMonitor(), board(tmp_path), board(tmp_path, version="second")
    fit(first, monitor)
    fit(second, monitor, max_epochs=3)
    found = events(second.log_dir)
    assert found.texts["bn/report"] == run.events.texts["bn/report"][:3]
    assert found.at("bn/heatmap")[0] == STEPS[0]
    assert found.images["bn/heatmap"][0] == run.events.images["bn/heatmap"][0]
    assert found.categories() == OURS


def test_a_copy_made_in_mid_fit_has_the_report_and_changes_nothing(tmp_path, run):
    logger, monitor, twins = board(tmp_path), BatchNormMonitor(), []

    def copies(_):
        twins.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    fit(logger, monitor, At(2 * BATCHES + 5, copies), max_epochs=4)
    found = events(logger.log_dir)
    assert found.texts == run.events.texts
    assert found.images["bn/heatmap"][-1] == run.events.images["bn/heatmap"][-1]
    assert len(twins) == 2
    for number, twin in enumerate(twins):
        assert verdicts(twin.report()) == verdicts(run.reports[1])
        again = board(tmp_path, version=f"again {number}")
        fit(again, twin, max_epochs=1)
        assert events(again.log_dir).texts["bn/report"] == run.events.texts["bn/report"][:1]
