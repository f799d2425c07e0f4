"""A validation that an exception interrupts is forgotten."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor


class BrokenError(Exception):
    pass


class Net(LightningModule):
    def __init__(self, breaks=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.breaks = breaks

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        if self.breaks and batch_idx == 1:
            raise BrokenError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("validation_batches", [2, 16])
def test_the_next_fit_compares_its_validation_with_training(tmp_path, validation_batches):
    loader = DataLoader(TensorDataset(torch.randn(64, 3)), 8)

    def fit(monitor, model):
        trainer = Trainer(
            max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, callbacks=[monitor], accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
        )  # fmt: skip
        trainer.fit(model, loader, loader)

    monitor = BatchNormMonitor(validation_batches=validation_batches, on_unhealthy="ignore")
    with pytest.raises(BrokenError):
        fit(monitor, Net(breaks=True))
    fit(monitor, Net())
    assert monitor.report()["net.1"].evidence["val_batches"] == min(validation_batches, len(loader))
