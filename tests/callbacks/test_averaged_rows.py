"""Averaged weights have layers of their own in the report: as they are validated and saved."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, PreciseBatchNorm, Report
from lightning_bnmonitor.commands.window import window_at
from lightning_bnmonitor.report.heatmap import draw
from lightning_bnmonitor.report.history import History
from tests.callbacks.event_files import events
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.lightning_versions import averaging

pytestmark = EXPECTED_WARNINGS
AVERAGED = {"net.1 (averaged)", "net.4 (averaged)"}


class Net(LightningModule):
    """Learns fast, so that averaged weights are others than those that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Received(Callback):
    """What the layers receive in each validation, and their running statistics there; to be called last."""

    def __init__(self) -> None:
        self.validations: list[dict[str, list[torch.Tensor]]] = []
        self.running: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.validations.append({"net.1": [], "net.4": []})
            layers = {name: pl_module.get_submodule(name) for name in self.validations[-1]}
            stats = {name: torch.stack([each.running_mean, each.running_var]) for name, each in layers.items()}
            self.running.append({name: each.double() for name, each in stats.items()})
        with torch.no_grad():
            x = batch[0]
            for index, module in enumerate(copy.deepcopy(pl_module.net)):  # which nobody looks at
                if f"net.{index}" in self.validations[-1]:
                    self.validations[-1][f"net.{index}"].append(x.double())
                x = module(x)


def data(num_batches: int) -> DataLoader:
    x = torch.randn(num_batches * 32, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=32)


def fit(callbacks, tmp_path, model=None, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
    }
    trainer = Trainer(callbacks=callbacks, **defaults | options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="BatchNorm gets exact running statistics of")
        trainer.fit(model or Net(), data(30), data(6), ckpt_path=ckpt_path)
    return trainer


def val_error(received: list[torch.Tensor], running: torch.Tensor) -> float:
    """By the definition: the RMS over values and channels of what is normalised otherwise."""
    values, eps = torch.cat(received).numpy(), 1e-5
    mean, var = values.mean(axis=0), values.var(axis=0, ddof=1)
    right = (values - mean) / np.sqrt(var + eps)
    wrong = (values - running[0].numpy()) / np.sqrt(running[1].numpy() + eps)
    scale = (len(values) - 1) / len(values)  # of the error in the spread, to that of a population
    bias = (right.mean(axis=0) - wrong.mean(axis=0)) ** 2
    return float(np.sqrt((bias + ((right - wrong).var(axis=0)) / scale).mean()))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_rows_of_what_is_validated(tmp_path, use_buffers, is_first, interval):
    monitor, received = BatchNormMonitor(on_unhealthy="ignore"), Received()
    average = averaging("EMAWeightAveraging")(use_buffers=use_buffers, decay=0.9)
    callbacks = [monitor, average] if is_first else [average, monitor]
    fit([*callbacks, received], tmp_path, val_check_interval=interval)
    report = monitor.report()
    assert list(report) == ["net.1", "net.4", "net.1 (averaged)", "net.4 (averaged)"]
    for name in ("net.1", "net.4"):
        trained, averaged = report[name], report[f"{name} (averaged)"]
        assert "val_error" not in trained.evidence
        assert "val_shift" not in trained.evidence
        assert trained.validation is None
        assert trained.num_batches == 30
        assert (averaged.verdict, averaged.averaged_of, averaged.num_batches) == ("averaged", name, 0)
        assert math.isnan(averaged.summary()["eval_error"])
        assert averaged.population_mean.isnan().all()
        calls, running = received.validations[-1][name], received.running[-1][name]
        torch.testing.assert_close(averaged.running_mean, running[0])
        torch.testing.assert_close(averaged.running_var, running[1])
        assert averaged.evidence["val_error"] == pytest.approx(val_error(calls, running), rel=1e-3)
        channels = averaged.val_error.square().mean().sqrt()
        assert averaged.evidence["val_error"] == pytest.approx(float(channels))
        assert averaged.evidence["val_shift"] == pytest.approx(float(averaged.val_shift.square().mean().sqrt()))
        assert "averaged weights" in averaged.explanation
    if not use_buffers:  # those of training beside averaged weights
        torch.testing.assert_close(report["net.1 (averaged)"].running_mean, report["net.1"].running_mean)


def test_what_is_trained_is_told_as_without_averaging(tmp_path):
    alone, beside = (BatchNormMonitor(on_unhealthy="ignore", validation_batches=0) for _ in range(2))
    fit([alone], tmp_path, val_check_interval=0.5)
    average = averaging("WeightAveraging")(use_buffers=True)
    fit([beside, average], tmp_path, val_check_interval=0.5)
    assert {**beside.report().to_dict(), "remarks": []} == alone.report().to_dict()
    looking = BatchNormMonitor(on_unhealthy="ignore")
    fit([average, looking], tmp_path, val_check_interval=0.5)
    report = looking.report()
    for name, layer in alone.report().items():
        assert (report[name].verdict, report[name].flags) == (layer.verdict, layer.flags)
        assert report[name].evidence == pytest.approx(layer.evidence, rel=1e-6, abs=1e-12)  # merged at other times
        torch.testing.assert_close(report[name].numbers, layer.numbers, equal_nan=True)


@pytest.mark.parametrize("is_repaired", [False, True])
@pytest.mark.parametrize("validates", [False, True])
def test_weights_that_nobody_has_looked_at_are_said_to_be_what_fit_has_left(tmp_path, capsys, validates, is_repaired):
    monitor, average = BatchNormMonitor(on_unhealthy="ignore"), averaging("EMAWeightAveraging")(decay=0.97)
    precise = [PreciseBatchNorm(restore=True)] if is_repaired else []
    fit([monitor, average, *precise], tmp_path, limit_val_batches=None if validates else 0)
    is_said = not (validates or is_repaired)
    assert ("has left other weights in the model" in " ".join(capsys.readouterr().out.split())) == is_said
    assert len(monitor.report().remarks) == is_said


def test_weights_that_training_has_left_are_not_said_to_be_others(tmp_path):
    fit([monitor := BatchNormMonitor(on_unhealthy="ignore")], tmp_path, limit_val_batches=0)
    assert monitor.report().remarks == ()


def test_averaged_weights_without_statistics_of_their_own_need_attention_once(tmp_path):
    class Shifted(Net):
        """Weights in front of a layer that move steadily: the average is behind, and so is what it makes."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) - 3 * self.net[0].bias.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    monitor = BatchNormMonitor(on_unhealthy="ignore", dashboard=False)
    average = averaging("EMAWeightAveraging")(use_buffers=False, decay=0.97)
    logger = TensorBoardLogger(tmp_path)
    trainer = fit([average, monitor], tmp_path, Shifted(), logger=logger, log_every_n_steps=1)
    report = monitor.report()
    averaged = report["net.1 (averaged)"]
    assert averaged.flags == ("other-weights",)
    assert averaged.needs_attention
    assert "averaged weights need statistics of their own" in averaged.explanation
    assert "PreciseBatchNorm(restore=True)" in averaged.remedy
    unhealthy = {layer.averaged_of or layer.name for layer in report.unhealthy}
    assert report["net.1"].needs_attention
    assert trainer.callback_metrics["bn/unhealthy_layers"] == len(unhealthy) < len(report.unhealthy)
    assert str(report).startswith(f"{len(unhealthy)} of 2 BatchNorm layers need")
    assert trainer.callback_metrics["bn/val_error_max"] == pytest.approx(averaged.evidence["val_error"])
    logged = events(logger.log_dir).scalars
    assert logged["bn.val_error_averaged/net.1"][-1][1] == pytest.approx(averaged.evidence["val_error"])
    assert not [tag for tag in logged if tag.startswith("bn.val_error/")]
    assert "bn.eval_error/net.1" in logged


def test_histories_pages_and_pictures_have_them(tmp_path):
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    average = averaging("EMAWeightAveraging")(decay=0.9)
    fit([average, monitor], tmp_path, max_epochs=3)
    history = monitor.history
    windows = history.to_dict()["windows"]
    assert [set(window["layers"]) > AVERAGED for window in windows] == [True] * 3
    assert {windows[-1]["layers"][name]["cause"] for name in AVERAGED} <= {"averaged", "other-weights"}
    assert draw(history.windows).ndim == 3
    history.to_html(tmp_path / "page.html")
    shown = window_at(history.document(), None)
    assert {layer["name"] for layer in shown.layers} == set(monitor.report())
    assert shown.num_unhealthy == monitor.report().summary()["unhealthy_layers"]
    assert history.channels()["layers"].keys() == set(monitor.report())
    again = History()
    again.load_state_dict(history.state_dict())
    assert again.to_json() == history.to_json()
    for layer in monitor.report().values():
        layer.plot()
        layer.to_dict()
    monitor.report().plot()


def test_groups_are_those_of_the_layers_that_are_trained(tmp_path):
    monitor = BatchNormMonitor(group=lambda batch, batch_idx: "ab"[batch_idx % 2])
    fit([averaging("EMAWeightAveraging")(decay=0.9), monitor], tmp_path)
    report = monitor.report()
    assert report.keys() >= AVERAGED
    for name, layer in report.items():
        assert set(layer.groups) == (set() if name in AVERAGED else {"a", "b"})


def test_exact_statistics_of_averaged_weights_are_known_to_be_that(tmp_path):
    monitor, precise = BatchNormMonitor(on_unhealthy="ignore"), PreciseBatchNorm(restore=True)
    average = averaging("EMAWeightAveraging")(use_buffers=False, decay=0.97)
    fit([monitor, precise, average], tmp_path)
    report = monitor.report()
    for name in AVERAGED:
        assert report[name].flags == ()
        assert report[name].evidence["val_error"] < 0.15  # of 192 samples
    assert "val_error" not in report["net.1"].evidence


SAID = {
    "EMAWeightAveraging": "averaged weights of EMAWeightAveraging, which are validated and saved: before each",
    "StochasticWeightAveraging": "weights in training, before each validation, and of the averaged weights of Sto",
}


@pytest.mark.parametrize("name", SAID)
def test_exact_statistics_of_which_weights_is_said_once(tmp_path, name):
    is_swapped = name == "EMAWeightAveraging"
    average = averaging(name)() if is_swapped else StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = Trainer(
        max_epochs=2, callbacks=[PreciseBatchNorm(num_batches=2), average], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(), data(4), data(2))
    said = [str(each.message) for each in caught if "BatchNorm gets exact running statistics of" in str(each.message)]
    assert len(said) == 1
    assert SAID[name] in said[0]


def test_stochastic_weight_averaging_has_no_rows_of_its_own(tmp_path):
    # What is validated are the weights that are trained, and in the last epoch these are the average.
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    fit([monitor, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], tmp_path)
    assert set(monitor.report()) == {"net.1", "net.4"}
    assert "val_error" in monitor.report()["net.1"].evidence


def test_resumed_it_goes_on_as_before(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    monitors = [BatchNormMonitor(on_unhealthy="ignore") for _ in range(2)]
    fit([monitors[0], averaging("EMAWeightAveraging")(decay=0.9), saved], tmp_path)
    average = averaging("EMAWeightAveraging")(decay=0.9)
    fit([monitors[1], average], tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert monitors[1].report().to_dict() == monitors[0].report().to_dict()
    assert monitors[1].history.to_json() == monitors[0].history.to_json()


def test_a_validation_alone_is_of_what_it_is_of(tmp_path):
    monitor, average = BatchNormMonitor(on_unhealthy="ignore"), averaging("EMAWeightAveraging")(decay=0.9)
    model = Net()
    trainer = fit([monitor, average], tmp_path, model)
    before = copy.deepcopy(model.state_dict())
    reports: list[Report] = []
    monitor._print = lambda trainer, report, of: reports.append(report)
    trainer.validate(model, data(6))
    assert list(reports[0]) == ["net.1", "net.4"]
    assert "val_error" in reports[0]["net.1"].evidence
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_loop_can_tell():
    model, batches = nn.Sequential(nn.BatchNorm1d(3)), list(torch.randn(20, 16, 3))
    for is_closed in (True, False):
        with BatchNormTracker(model) as tracker:
            for x in batches:
                model(x)
            trained = tracker.close() if is_closed else tracker.report()
            tracker.before_averaged()
            own = [buffer.clone() for buffer in model.buffers()]
            model[0].running_mean += 2  # of other weights
            tracker.start_validation()
            model.eval()
            for x in batches:
                model(x)
            report = tracker.validation_report()
            for buffer, value in zip(model.buffers(), own, strict=True):
                buffer.copy_(value)
            model.train()
        assert list(report) == ["0", "0 (averaged)"]
        assert report["0"].to_dict() == trained["0"].to_dict()
        assert report["0 (averaged)"].flags == ("other-weights",)
        assert report["0 (averaged)"].evidence["val_error"] == pytest.approx(2, rel=0.1)
