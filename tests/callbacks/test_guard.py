"""The guard in a Trainer: what is validated, averaged and saved has no NaN, and the user is told of the batch."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS
BATCH = 32


class Net(LightningModule):
    """Skips the step of a batch whose loss is not finite: by returning no loss, or as a scaler does."""

    def __init__(self, skips: str = "no loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.skips = skips
        self.net = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8, momentum=0.2),
            nn.ReLU(),
            nn.BatchNorm1d(8, momentum=0.2),
            nn.Linear(8, 1),
        )
        self.is_bad = False

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.is_bad = not loss.isfinite()
        return None if self.is_bad and self.skips == "no loss" else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.skips != "as a scaler":
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer_closure()
        return None if self.is_bad else optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(num_batches: int, bad: tuple[int, ...] = ()) -> DataLoader:
    x = torch.randn(num_batches * BATCH, 4, generator=torch.Generator().manual_seed(1))
    for index in bad:
        x[index * BATCH + 3, 2] = math.nan
    return DataLoader(TensorDataset(x), batch_size=BATCH)


class Seen(Callback):
    """Remembers what others find at the ends of batches, which may average it."""

    def __init__(self) -> None:
        self.were_finite: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.were_finite.append(all(buffer.isfinite().all() for buffer in pl_module.buffers()))


def fit(model: Net, callbacks: list[Callback], num_epochs: int, bad: tuple[int, ...], path=None) -> Trainer:
    trainer = Trainer(
        max_epochs=num_epochs, callbacks=callbacks, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=path,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )  # fmt: skip
    trainer.fit(model, data(30, bad), data(4))
    return trainer


def test_nothing_changes_as_long_as_all_is_finite():
    models = [Net(), Net()]
    for model, callbacks in zip(models, ([BatchNormMonitor(guard=True)], []), strict=True):
        fit(model, callbacks, 2, bad=())
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("skips", ["no loss", "as a scaler"])
def test_the_last_batch_of_an_epoch_is_bad(skips, tmp_path):
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss", every_n_epochs=1)
    monitor, seen, model = BatchNormMonitor(guard=True), Seen(), Net(skips)
    with pytest.warns(UserWarning, match="NaN or Inf") as caught:
        trainer = fit(model, [seen, monitor, saved], 2, bad=(3, 29), path=tmp_path)
    assert trainer.callback_metrics["val_loss"].isfinite()
    state = torch.load(saved.best_model_path)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert state["net.1.num_batches_tracked"] % 28 == 0
    if skips == "as a scaler":
        assert all(seen.were_finite)
    for layer in monitor.report().values():
        assert (layer.verdict, layer.flags, layer.needs_attention) == ("healthy", ("guarded",), False)
        assert layer.evidence["guarded_calls"] == 2
        assert (layer.evidence["first_bad_batch"], layer.num_batches) == (4, 28)
    told = [str(warning.message) for warning in caught if "put back" in str(warning.message)]
    assert told == [
        "BatchNorm layer net.1 (and 1 more) was given NaN or Inf 2 times, first in batch 4 of the window: the running "
        "statistics were put back as they were before. `BatchNormMonitor.report()` says what to do."
    ]
    assert monitor.report().summary()["unhealthy_layers"] == 0


def test_without_it_they_are_lost():
    monitor, model = BatchNormMonitor(on_unhealthy="ignore"), Net()
    fit(model, [monitor], 1, bad=(3,))
    assert monitor.report()["net.1"].verdict == "non-finite"
    assert model.net[1].running_mean.isnan().any()


@pytest.mark.parametrize(("on_unhealthy", "is_told"), [("warn", True), ("raise", True), ("ignore", False)])
def test_whom_it_tells(on_unhealthy, is_told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(), [BatchNormMonitor(guard=True, on_unhealthy=on_unhealthy)], 1, bad=(3,))
    assert any("put back" in str(warning.message) for warning in caught) == is_told


def test_a_resumed_window_knows_of_them(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=20, filename="{step}")
    with pytest.warns(UserWarning, match="NaN or Inf"):
        fit(Net(), [BatchNormMonitor(guard=True), saved], 1, bad=(3,), path=tmp_path)
    trainer = Trainer(
        max_epochs=1, callbacks=[resumed := BatchNormMonitor(guard=True)], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="once, first in batch 4 of the window"):
        trainer.fit(Net(), data(30), data(4), ckpt_path=tmp_path / "step=20.ckpt")
    report = resumed.report()["net.1"]
    assert (report.num_batches, report.flags) == (29, ("guarded",))
    assert report.evidence["guarded_calls"] == 1


def test_bad_values_of_the_argument():
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match=f"`guard` must be True or False, got {value!r}"):
            BatchNormMonitor(guard=value)


def test_a_copy_keeps_it():
    assert copy.deepcopy(BatchNormMonitor(guard=True))._guard
