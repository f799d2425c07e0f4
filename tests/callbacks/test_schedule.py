"""When training is over: both callbacks know it before the Trainer acts on it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm
from lightning_bnmonitor.callbacks.schedule import is_training_over

BATCHES, BATCH_SIZE = 4, 8


class Net(LightningModule):
    """Told to stop in the batch of this number, if any."""

    def __init__(self, stops_at=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.stops_at = stops_at

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.current_epoch * BATCHES + batch_idx == self.stops_at:
            self.trainer.should_stop = True
        self.log("constant", 1.0, on_step=False, on_epoch=True)
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SkipsRest(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


def data():
    return DataLoader(TensorDataset(torch.randn(BATCHES * BATCH_SIZE, 3)), BATCH_SIZE)


def fit(tmp_path, model, *callbacks, validates=True, **options):
    options = {"max_epochs": 3, "num_sanity_val_steps": 0} | options
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = Trainer(
        default_root_dir=tmp_path, callbacks=list(callbacks), accelerator="cpu", devices=1, **quiet, **options
    )
    trainer.fit(model, data(), data() if validates else None)
    return trainer


class Asks(Callback):
    """Asks whenever a callback may, and notes after how many training batches."""

    def __init__(self):
        self.num_batches = 0
        self.answers = []

    def ask(self, trainer, epoch_ended):
        self.answers.append((self.num_batches, is_training_over(trainer, epoch_ended)))

    def on_train_batch_end(self, trainer, *_):
        self.num_batches += 1

    def on_validation_start(self, trainer, pl_module):
        self.ask(trainer, trainer.is_last_batch)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ask(trainer, True)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Net, {}),
        (SkipsRest, {}),
        (Net, {"max_epochs": -1, "max_steps": 6}),
        (Net, {"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 2}),
        (lambda: Net(stops_at=4), {}),
        (lambda: Net(stops_at=5), {}),
        (lambda: Net(stops_at=7), {}),
        (lambda: Net(stops_at=1), {"min_epochs": 1}),
        (lambda: Net(stops_at=1), {"min_epochs": 2}),
        (lambda: Net(stops_at=1), {"min_epochs": 9}),
        (lambda: Net(stops_at=1), {"min_steps": 6}),
        (lambda: Net(stops_at=1), {"min_steps": 2, "min_epochs": 2}),
    ],
)
def test_training_is_over_if_no_batch_follows(tmp_path, model, options):
    asks = Asks()
    fit(tmp_path, model(), asks, val_check_interval=0.5, **options)
    assert asks.answers
    for num_batches, answer in asks.answers:
        assert answer == (num_batches == asks.num_batches), asks.answers


class Notes(Callback):
    """Notes something at a hook."""

    def __init__(self, hook, what):
        self.noted = []
        setattr(self, hook, lambda trainer, *_: self.noted.append(what(trainer)))


@pytest.mark.parametrize("how", ["told", "early stopping"])
def test_running_statistics_are_not_repaired_where_training_goes_on_to_min_epochs(tmp_path, how):
    precise = PreciseBatchNorm()
    stop = EarlyStopping("constant", patience=1, check_on_train_epoch_end=True)
    notes = Notes("on_train_epoch_start", lambda _: precise.recalibration is not None)
    model, others = (Net(stops_at=1), []) if how == "told" else (Net(), [stop])
    fit(tmp_path, model, precise, notes, *others, validates=False, min_epochs=4, max_epochs=5)
    assert notes.noted == [False] * 4
    assert precise.recalibration is not None


def test_a_window_ends_before_the_last_validation_when_training_was_told_to_stop_before_min_epochs(tmp_path):
    notes = Notes("on_validation_epoch_end", lambda trainer: "bn/eval_error_max" in trainer.callback_metrics)
    monitor = BatchNormMonitor(every_n_train_batches=100, on_unhealthy="ignore")
    fit(tmp_path, Net(stops_at=1), monitor, notes, min_epochs=2)
    assert notes.noted == [False, True]
    assert monitor.report()["net.1"].num_batches == 2 * BATCHES
