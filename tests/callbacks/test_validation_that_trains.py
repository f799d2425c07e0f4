"""Validation in training mode is named as what has changed the running statistics."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.diagnosis.flags import FLAGS

FLAG = "updated-in-validation"


class Net(LightningModule):
    """Validates as it should."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class AllTraining(Net):
    def validation_step(self, batch, batch_idx):
        self.train()
        super().validation_step(batch, batch_idx)


class LayersTraining(Net):
    def validation_step(self, batch, batch_idx):
        self.net.train()
        super().validation_step(batch, batch_idx)


class NeverInEval(Net):
    def on_validation_model_eval(self):
        """Not what Lightning does."""


def dropout_alone(model):
    """As the remedy says."""
    [code] = re.findall("`(for .*?)`", FLAGS[FLAG].prescribe({}))
    exec(code, {"nn": nn}, {"model": model})


class DropoutAlone(Net):
    def validation_step(self, batch, batch_idx):
        dropout_alone(self)
        super().validation_step(batch, batch_idx)


def fitted(module, **options):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(320, 8)), 16)
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=3, callbacks=[monitor], enable_model_summary=False, **(quiet | options))
    trainer.fit(module, loader, loader)
    return monitor.report()["net.1"]


@pytest.mark.parametrize("kind", [AllTraining, LayersTraining, NeverInEval])
def test_it_is_named_and_what_to_do(kind, capsys):
    layer = fitted(kind())
    assert FLAG in layer.flags
    assert layer.needs_attention
    assert "it ran in training mode" in layer.explanation
    assert "`train()`" in layer.remedy
    assert "Validation has updated its running statistics" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Net, DropoutAlone])
def test_other_validations_are_not(kind):
    layer = fitted(kind())
    assert FLAG not in layer.flags
    assert "val_error" in layer.evidence


def test_dropout_alone_is_any_kind_of_it_also_where_several_modules_share_one():
    shared = nn.Dropout()
    parts = [nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(nn.BatchNorm1d(2), shared), nn.Dropout2d()]
    model = nn.Sequential(*parts, nn.AlphaDropout())
    dropout_alone(model)
    assert [module for module in model.modules() if module.training] == [shared, parts[2], model[3]]


def test_within_an_epoch_it_is_seen_too():
    assert FLAG in fitted(AllTraining(), val_check_interval=5).flags
    assert FLAG not in fitted(Net(), val_check_interval=5).flags
