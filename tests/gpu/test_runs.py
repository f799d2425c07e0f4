"""Whole runs on the device: a Lightning fit in mixed precision, resuming, validation, and the repairs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, attribute_eval_gap, recalibrate
from tests.gpu.training import DEVICE, ON_CUDA, Received, assert_exact, images, moments, network, paths, train

ACCELERATOR = "gpu" if ON_CUDA else "cpu"


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network().cpu()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(num_batches):
    return DataLoader(TensorDataset(torch.cat([images(step).cpu() for step in range(num_batches)])), 32)


def trainer(folder, **options):
    return Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        precision="bf16-mixed",
        logger=TensorBoardLogger(folder),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        **options,
    )


def test_a_lightning_fit_in_mixed_precision(tmp_path):
    seed_everything(0, verbose=False)
    model, monitor = Regression(), BatchNormMonitor(on_unhealthy="ignore")
    received = Received(model)
    run = trainer(tmp_path, max_epochs=1, callbacks=[monitor], limit_val_batches=0)
    run.fit(model, loader(90))
    assert_exact(monitor.report(), received.batches, "saved" if ON_CUDA else None, mean_bound=1e-5)
    assert run.callback_metrics["bn/eval_error_max"].item() >= 0


def test_validation_of_a_fit_is_compared_with_training(tmp_path):
    seed_everything(0, verbose=False)
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    run = trainer(tmp_path, max_epochs=2, callbacks=[monitor])
    run.fit(Regression(), loader(40), loader(4))
    assert monitor.report()["net.1"].num_batches == 40
    assert monitor.report()["net.1"].evidence["val_batches"] == 4
    assert 0 <= run.callback_metrics["bn/val_shift_max"].item() < 1


def test_a_fit_that_is_resumed_has_the_report_of_one_that_was_not(tmp_path):
    monitors = []
    for checkpoint in (None, tmp_path / "epoch=0.ckpt"):
        seed_everything(0, verbose=False)
        monitors.append(BatchNormMonitor(every_n_epochs=2, on_unhealthy="ignore"))
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        run = trainer(tmp_path, max_epochs=2, callbacks=[monitors[-1], saving], limit_val_batches=0)
        run.fit(Regression(), loader(40), ckpt_path=checkpoint)
    whole, resumed = (monitor.report() for monitor in monitors)
    for name, layer in whole.items():
        assert resumed[name].num_batches == layer.num_batches == 80
        for moment in ("population_mean", "population_var"):
            torch.testing.assert_close(getattr(resumed[name], moment), getattr(layer, moment), rtol=1e-4, atol=1e-4)
        assert resumed[name].verdict == layer.verdict


def test_a_state_in_mid_window_is_gone_on_from():
    model = network()
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        train(model, range(90))
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = BatchNormTracker(model)
    other.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    with other:
        train(model, range(90, 180))
    assert_exact(other.report(), received.batches, "saved" if ON_CUDA else None)


def test_validation_on_shifted_data():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).to(DEVICE)
    with BatchNormTracker(model) as tracker:
        train(model, 80)
        model.eval()
        for shift in (0.0, 1.0):  # images have a standard deviation of 1
            tracker.start_validation()
            with torch.no_grad():
                for step in range(100, 116):
                    model(images(step) + shift)
            assert tracker.validation_report()["0"].evidence["val_shift"] == pytest.approx(shift, abs=0.05)


def test_recalibration_writes_exact_statistics_and_can_be_taken_back():
    model, batches = network(), [images(step).cpu() for step in range(20)]
    train(model, 5)
    before = copy.deepcopy(model.state_dict())
    result = recalibrate(model, batches)
    mean, var, _ = moments([model[0](x.to(DEVICE)).detach() for x in batches])
    torch.testing.assert_close(model[1].running_mean.cpu().double(), torch.from_numpy(mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.cpu().double(), torch.from_numpy(var), rtol=1e-5, atol=0)
    result.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recalibration_under_autocast():
    model, batches = network(), [images(step) for step in range(20)]

    def forward(model, x):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return model(x)

    received = Received(model)
    with BatchNormTracker(model.eval()):
        recalibrate(model, batches, forward)
    mean, var, _ = moments(received.batches["1"])
    torch.testing.assert_close(model[1].running_mean.cpu().double(), torch.from_numpy(mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.cpu().double(), torch.from_numpy(var), rtol=1e-5, atol=0)


def test_attribution_names_the_layer_that_was_spoiled_and_leaves_the_model_as_it_was():
    model = network()
    recalibrate(model, [images(step) for step in range(8)])
    model.eval()
    with torch.no_grad():
        batches = [(images(step), model(images(step))) for step in range(8)]
    with torch.no_grad():
        model[4].running_mean += 2
    before = copy.deepcopy(model.state_dict())
    found = attribute_eval_gap(model, batches, lambda y, batch: (y - batch[1]).square().mean(dim=1), progress=False)
    assert found.worst == "4"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_a_model_in_eval_mode_within_training_goes_by_the_pass(capture):
    model = network()
    model[1].eval()
    received = Received(model)
    with BatchNormTracker(model, capture=capture) as tracker:
        train(model, 80)
    assert paths(tracker.report(), "1") == {"pass": 80}
    assert_exact(tracker.report(), received.batches)
