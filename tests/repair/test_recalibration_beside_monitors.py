"""Recalibration while trackers and monitors are attached: they count and flag nothing of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, Report, recalibrate
from tests.repair.exact_population import C, assert_written, data, moments
from tests.repair.small_models import Net, single, trained


def feed(model: nn.Module, num_batches: int = 12, mean: float = 3.0) -> list[Tensor]:
    batches = [torch.randn(32, C) * 2 + mean for _ in range(num_batches)]
    for x in batches:
        model(x)
    return batches


def assert_population(report: Report, name: str, received: list[Tensor]) -> None:
    assert report[name].num_batches == len(received)
    mean, var = moments(received)
    np.testing.assert_allclose(report[name].population_mean.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(report[name].population_var.numpy(), var, rtol=1e-4)


def resumed(tracker: BatchNormTracker, model: nn.Module) -> BatchNormTracker:
    """Another tracker in the place of this one, by way of a checkpoint."""
    state = pickle.loads(pickle.dumps(tracker.state_dict()))
    tracker.detach()
    twin = BatchNormTracker(model)
    twin.load_state_dict(state)
    return twin.attach()


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_in_the_middle_of_an_open_window(through_a_checkpoint: bool, momentum: float | None) -> None:
    model = single(momentum=momentum)
    tracker = BatchNormTracker(model).attach()
    feed(model)
    tracker.reset()
    first = feed(model)
    recalibrate(model, [torch.randn(64, C) * 2 + 3 for _ in range(50)])
    if through_a_checkpoint:
        tracker = resumed(tracker, model)
    received = first + feed(model)
    report = tracker.report()
    assert_population(report, "0", received)
    assert report["0"].verdict == "healthy"
    assert report["0"].flags == ()
    assert report["0"].evidence["updates_per_call"] == 1
    tracker.reset()
    second = feed(model)
    report = tracker.report()
    assert_population(report, "0", second)
    assert (report["0"].verdict, report["0"].flags) == ("healthy", ())
    tracker.detach()


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["closed", "reset"])
def test_between_two_windows(through_a_checkpoint: bool, kind: str) -> None:
    model = single()
    tracker = BatchNormTracker(model).attach()
    feed(model)
    tracker.close()
    if kind == "reset":
        tracker.reset()
    recalibrate(model, [torch.randn(64, C) * 2 + 3 for _ in range(50)])
    if through_a_checkpoint:
        tracker = resumed(tracker, model)
    if kind == "closed":
        tracker.reset()
    received = feed(model)
    report = tracker.report()
    assert_population(report, "0", received)
    assert (report["0"].verdict, report["0"].flags) == ("healthy", ())
    tracker.detach()


def test_a_stale_layer_is_healthy_in_the_next_window_after_it() -> None:
    def window(repaired: bool) -> bool:
        torch.manual_seed(0)
        model = trained(nn.Sequential(nn.BatchNorm1d(C, momentum=0.01)))
        with BatchNormTracker(model) as tracker:
            feed(model, mean=30.0)
            tracker.close()
            if repaired:
                recalibrate(model, [torch.randn(64, C) * 2 + 30 for _ in range(50)])
            tracker.reset()
            feed(model, mean=30.0)
            return tracker.report()["0"].verdict == "healthy"

    assert not window(repaired=False)
    assert window(repaired=True)


def test_calibration_is_not_counted_wherever_the_tracker_hangs() -> None:
    model = nn.Sequential(trained(Net()), nn.Identity())
    whole, part = BatchNormTracker(model).attach(), BatchNormTracker(model[0].a).attach()
    feed(model, 3)
    recalibrate(model[0], data())
    feed(model, 2)
    assert [layer.num_batches for layer in whole.report().values()] == [5, 5, 5]
    assert [layer.num_batches for layer in part.report().values()] == [5]
    assert whole.report()["0.a"].flags == ()
    whole.detach()
    part.detach()


@pytest.mark.parametrize("closed", [False, True])
def test_restored_it_is_not_taken_for_a_write_from_outside(closed: bool) -> None:
    model = single()
    with BatchNormTracker(model) as tracker:
        feed(model)
        tracker.close()
        if not closed:
            tracker.reset()
        recalibrate(model, data()).restore()
        if closed:
            tracker.reset()
        feed(model, 50)
        assert tracker.report()["0"].flags == ()
        assert tracker.report()["0"].verdict == "healthy"


def test_what_is_written_from_outside_after_it_is_told() -> None:
    model = single()
    with BatchNormTracker(model) as tracker:
        feed(model)
        tracker.close()
        recalibrate(model, data())
        with torch.no_grad():
            model[0].running_mean.add_(1)
        tracker.reset()
        feed(model)
        assert "written-outside" in tracker.report()["0"].flags


def test_a_pass_that_failed_leaves_the_window_as_it_was() -> None:
    reports = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = single()
        with BatchNormTracker(model) as tracker:
            feed(model)
            if fails:
                with pytest.raises(RuntimeError, match="batch 10"):
                    recalibrate(model, [*data(), None])
            feed(model)
            reports.append(tracker.report().to_dict())
    assert reports[0] == reports[1]


class LitNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(C), nn.Linear(C, 1)
        self.received: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.received.append(batch[0].clone())
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recalibrates(Callback):
    """In the middle of each epoch, and at its end."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 10:
            recalibrate(pl_module, self.batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recalibrate(pl_module, self.batches)


@pytest.mark.parametrize("monitor_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_in_a_training_with_the_monitor(monitor_first: bool, tmp_path: Path) -> None:
    x = torch.randn(20 * 32, C) * 2 + 3
    model, monitor, reports = LitNet(), BatchNormMonitor(on_unhealthy="ignore"), []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch:
                reports.append((monitor.report(), pl_module.received))
                pl_module.received = []

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            reports.append((monitor.report(), pl_module.received))

    callbacks = [monitor, Recalibrates(list(x.split(64)))]
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*(callbacks if monitor_first else callbacks[::-1]), Look()],
    )
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=32, shuffle=True))
    assert len(reports) == 3
    for report, received in reports:
        assert len(received) == 20
        assert_population(report, "norm", received)
        assert (report["norm"].verdict, report["norm"].flags) == ("healthy", ())
    assert_written(model.norm, [x])
