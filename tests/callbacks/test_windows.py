"""Where the monitor's windows begin and end, whatever ends the epoch, against every value the layers received."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    BATCH_SIZE,
    JUDGED,
    LAYER_TAGS,
    LAYERS,
    SUMMARY_TAGS,
    Net,
    Recorder,
    Stream,
    close,
    events,
    num_batches,
    ours,
    steps_of,
    train_data,
    trainer_for,
    val_data,
    windows_of,
)

pytestmark = EXPECTED_WARNINGS


WINDOWS = {  # arguments of the monitor, of the Trainer, the windows in training batches, the steps where they end
    "two epochs, the last cut short": ({"every_n_epochs": 2}, {"max_epochs": 5}, windows_of(12, 30), [11, 23, 29]),
    "more epochs than there are": ({"every_n_epochs": 9}, {"max_epochs": 2}, [(0, 12)], [11]),
    "four batches across epochs": (
        {"every_n_train_batches": 4},
        {"max_epochs": 3},
        windows_of(4, 18),
        [3, 7, 11, 15, 17],
    ),
    "three batches across epochs of five": (
        {"every_n_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 5},
        windows_of(3, 10),
        [2, 5, 8, 9],
    ),
    "one batch": ({"every_n_train_batches": 1}, {}, windows_of(1, 6), [0, 1, 2, 3, 4, 5]),
    "max_steps in mid-epoch": ({}, {"max_epochs": -1, "max_steps": 9}, [(0, 6), (6, 9)], [5, 8]),
    "max_steps in mid-epoch of two": (
        {"every_n_epochs": 2},
        {"max_epochs": -1, "max_steps": 15},
        [(0, 12), (12, 15)],
        [11, 14],
    ),
    "max_steps in mid-window of batches": (
        {"every_n_train_batches": 4},
        {"max_epochs": -1, "max_steps": 10},
        [(0, 4), (4, 8), (8, 10)],
        [3, 7, 9],
    ),
    "limit_train_batches": ({}, {"max_epochs": 3, "limit_train_batches": 2}, windows_of(2, 6), [1, 3, 5]),
    "validation in mid-epoch": ({}, {"max_epochs": 2, "val_check_interval": 0.5}, windows_of(6, 12), [5, 11]),
    "validation in mid-window of batches": (
        {"every_n_train_batches": 4},
        {"max_epochs": 2, "val_check_interval": 0.5},
        windows_of(4, 12),
        [3, 7, 11],
    ),
    "validation by batches across epochs": (
        {},
        {"max_epochs": 2, "val_check_interval": 4, "check_val_every_n_epoch": None},
        windows_of(6, 12),
        [5, 11],
    ),
    "validation every other epoch": ({}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, windows_of(6, 24), None),
    "gradients accumulated unevenly": ({}, {"max_epochs": 2, "accumulate_grad_batches": 4}, windows_of(6, 12), [1, 3]),
    "gradients accumulated over a window of batches": (
        {"every_n_train_batches": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        windows_of(3, 12),
        [1, 2, 4, 5],
    ),
    "overfit_batches": ({}, {"max_epochs": 3, "overfit_batches": 2}, windows_of(2, 6), [1, 3, 5]),
    "sanity check": ({}, {"max_epochs": 2, "num_sanity_val_steps": 2}, windows_of(6, 12), [5, 11]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_covers_exactly_its_training_batches(tmp_path, case):
    arguments, options, windows, steps = WINDOWS[case]
    check_windows(tmp_path, Net(), train_data(), arguments, options, windows, steps)


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"max_epochs": 2}, windows_of(6, 12)),
        ({"max_epochs": 2, "limit_train_batches": 4}, windows_of(4, 8)),
        ({"max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 2}, windows_of(4, 8)),
    ],
)
def test_a_dataset_without_length_makes_the_same_windows(tmp_path, options, windows):
    steps = [end - 1 for _, end in windows]
    data = DataLoader(Stream(), batch_size=BATCH_SIZE)
    check_windows(tmp_path, Net(), data, {}, options, windows, steps)


class StopsAt(Net):
    """Ends some epochs early, by the way Lightning offers for that."""

    def __init__(self, last_batch: dict[int, int]) -> None:
        super().__init__()
        self.last_batch = last_batch  # by epoch, the number of batches in it

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.last_batch.get(self.current_epoch) else None


@pytest.mark.parametrize(
    ("every_n_epochs", "last_batch", "windows"),
    [
        (1, {0: 4, 1: 2}, [(0, 4), (4, 6), (6, 12)]),
        (1, {1: 0}, [(0, 6), (6, 12)]),  # an epoch without a batch is a window without a report
        (2, {1: 0}, [(0, 6), (6, 12)]),
        (2, {0: 4, 1: 2}, [(0, 6), (6, 12)]),
        (3, {0: 1, 2: 3}, [(0, 10)]),
    ],
)
def test_a_window_ends_with_an_epoch_that_on_train_batch_start_ends_early(
    tmp_path, every_n_epochs, last_batch, windows
):
    steps = [end - 1 for _, end in windows]
    arguments = {"every_n_epochs": every_n_epochs}
    check_windows(tmp_path, StopsAt(last_batch), train_data(), arguments, {"max_epochs": 3}, windows, steps)


class StopsInMidEpoch(Net):
    def training_step(self, batch, batch_idx):
        self.trainer.should_stop = self.current_epoch == 1 and batch_idx == 2
        return super().training_step(batch, batch_idx)


def test_a_window_ends_where_the_trainer_is_told_to_stop(tmp_path):
    windows = [(0, 6), (6, 9)]
    check_windows(tmp_path, StopsInMidEpoch(), train_data(), {}, {"max_epochs": 4}, windows, [5, 8])


def test_a_window_counts_batches_not_optimizer_steps_under_manual_optimization(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            halves = list(self.body[:4].parameters()), list(self.body[4:].parameters())
            return [torch.optim.SGD(half, lr=0.01) for half in halves]

    windows = windows_of(4, 12)
    arguments = {"every_n_train_batches": 4}
    check_windows(tmp_path, Manual(), train_data(), arguments, {"max_epochs": 2}, windows, [3, 7, 11])


def check_windows(tmp_path, model, data, arguments, options, windows, steps):
    """Fit, and compare every point in the event file, and the last report, with what the batches themselves say.

    Without pictures and texts, which have tests of their own.
    """
    recorder, monitor = Recorder(), BatchNormMonitor(dashboard=False, **arguments)
    trainer = trainer_for(tmp_path, recorder, monitor, logger=True, **options)
    trainer.fit(model, data, val_data())
    assert len(recorder.batches) == windows[-1][1]
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    expected = recorder.expected_of(windows)
    for tag in ours(scalars):
        logged_at = steps_of(scalars[tag])
        if tag == JUDGED:
            logged_at = list(dict.fromkeys(logged_at))  # validation may change it
        else:
            assert [value for _, value in scalars[tag]] == close([window[tag] for window in expected]), tag
        if steps is not None:
            assert logged_at == steps, tag
        if len(windows) == len(scalars["train_loss"]):  # windows of an epoch: where Lightning puts its own values
            assert logged_at == steps_of(scalars["train_loss"]), tag
    first, last = windows[-1]
    for name, layer in monitor.report().items():
        values = recorder.population((first, last), name)
        assert (layer.num_batches, layer.num_samples) == (last - first, values.shape[1])
        np.testing.assert_allclose(layer.population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.population_var, values.var(axis=1, ddof=1), rtol=1e-5)


def test_a_window_of_batches_is_logged_at_the_step_of_what_the_module_logs_in_its_last_batch(tmp_path):
    class LogsEveryBatch(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("batch_loss", loss, on_step=True, on_epoch=False)
            return loss

    monitor = BatchNormMonitor(every_n_train_batches=5)
    trainer = trainer_for(tmp_path, monitor, max_epochs=3, logger=True, log_every_n_steps=1)
    trainer.fit(LogsEveryBatch(), train_data())
    scalars = events(tmp_path)
    every_batch = steps_of(scalars["batch_loss"])
    assert steps_of(scalars["bn/eval_error_max"]) == [every_batch[last] for last in (4, 9, 14, 17)]


def test_a_layer_called_twice_in_a_batch_counts_both_calls_and_the_window_counts_one_batch(tmp_path):
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(2 * x)

    recorder, monitor = Recorder(), BatchNormMonitor(every_n_train_batches=4)
    trainer_for(tmp_path, recorder, monitor, logger=True, limit_train_batches=4).fit(Twice(), train_data())
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(3, close(value))] for tag, value in recorder.expected((0, 4)).items()
    }
    assert steps_of(scalars[JUDGED]) == [3]
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 8)


@pytest.mark.parametrize(
    ("model", "options", "windows"),
    [
        (Net, {"max_epochs": 2}, [(0, 6), (6, 12)]),
        (StopsInMidEpoch, {"max_epochs": 4}, [(0, 6), (6, 9)]),
        (Net, {"max_epochs": 4, "max_steps": 9, "val_check_interval": 3}, [None, (0, 6), (6, 9)]),
    ],
    ids=["at the end of an epoch", "after should_stop", "after max_steps"],
)
def test_a_window_is_closed_before_the_validation_that_follows_its_last_batch(tmp_path, model, options, windows):
    class Looks(Callback):
        seen = ()

        def on_validation_start(self, trainer, pl_module):
            value = trainer.callback_metrics.get("bn/eval_error_max")
            self.seen += (None if value is None else float(value),)

    recorder, looks = Recorder(), Looks()
    trainer_for(tmp_path, recorder, BatchNormMonitor(), looks, **options).fit(model(), train_data(), val_data())
    expected = [window["bn/eval_error_max"] for window in recorder.expected_of([w for w in windows if w])]
    assert looks.seen == (*(None for w in windows if not w), *map(close, expected))


def test_half_epoch_windows_are_fresh_in_each_validation_of_half_an_epoch(tmp_path):
    monitor = BatchNormMonitor(every_n_train_batches=3)
    checkpoint = ModelCheckpoint(monitor="bn/eval_error_max", save_top_k=-1, dirpath=tmp_path)
    trainer_for(tmp_path, monitor, checkpoint, max_epochs=2, val_check_interval=0.5).fit(
        Net(), train_data(), val_data()
    )
    assert len(set(map(float, checkpoint.best_k_models.values()))) == 4
