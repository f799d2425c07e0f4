"""Architectures that others wrote: no layer is missed, each is exact, and they train as without the tracker."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor
from tests.promises.architectures import ARCHITECTURES, Architecture
from tests.promises.recorded_training import (
    Training,
    assert_exact,
    assert_identical,
    batch_norms,
    loss_of,
    seed,
    train,
)

pytestmark = pytest.mark.slow
STEPS = 2  # the second with other weights, and a batch of another size


def built(architecture: str) -> Architecture:
    """With the initial weights of PyTorch: others' are so small that variances in narrow layers would be below eps."""
    seed()
    model, inputs = ARCHITECTURES[architecture]()
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd | _BatchNorm):
            module.reset_parameters()
    return model.train(), inputs


@functools.cache
def trained(architecture: str, monitored: bool) -> Training:
    """A training, from which several tests read."""
    _, inputs = built(architecture)
    return train(lambda: built(architecture)[0], inputs, monitored, STEPS)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Of the module, so that all tests of one follow each other and read from the same training."""
    return request.param


def test_no_layer_and_no_call_is_missed_and_every_layer_is_exact(architecture: str) -> None:
    training = trained(architecture, monitored=True)
    received, report = training.received.batches, training.report
    assert received
    assert sorted(report) == sorted(received) == sorted(batch_norms(training.model))
    assert sum(len(batches) for batches in received.values()) >= STEPS
    unused = {name for name, batches in received.items() if not batches}
    assert unused == {name for name, layer in report.items() if layer.verdict == "unused"}
    for name in received.keys() - unused:
        assert training.calls(name) == {"calls_saved": len(received[name])}
        assert_exact(report[name], received[name], serial=name in training.received.serial)


def test_training_is_bit_identical_without_the_tracker(architecture: str) -> None:
    training = trained(architecture, monitored=True)
    assert_identical(training.computed, trained(architecture, monitored=False).computed)
    assert torch.isfinite(training.scalars).all()
    fresh, after = dict(built(architecture)[0].named_parameters()), dict(training.model.named_parameters())
    moved = [name for name, before in fresh.items() if not torch.equal(before, after[name])]
    assert len(moved) > len(after) / 2  # or the comparison would compare what was there before


def test_frozen_reimplementations_are_left_out() -> None:
    training = trained("RT-DETR", monitored=True)
    modules = dict(training.model.named_modules())
    frozen = {name for name, module in modules.items() if type(module).__name__ == "RTDetrFrozenBatchNorm2d"}
    assert frozen
    assert not frozen & set(training.report)
    assert {type(modules[name]) for name in training.report} == {nn.BatchNorm2d}


def test_layers_that_are_made_and_never_called_are_named() -> None:
    report = trained("DPT", monitored=True).report
    first = "neck.fusion_stage.layers.0.residual_layer1"
    assert [name for name, layer in report.items() if layer.verdict == "unused"] == [
        f"{first}.batch_norm1",
        f"{first}.batch_norm2",
    ]


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.model(**batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(architecture: str, folder: Path, *callbacks: BatchNormMonitor) -> Module:
    model, inputs = built(architecture)
    module = Module(model)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([inputs(step) for step in range(STEPS)], batch_size=None))
    return module


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("architecture", ["MobileViT", "Wav2Vec2-Conformer"])
def test_in_a_trainer_all_layers_are_reported_and_the_weights_are_those_without(
    architecture: str, tmp_path: Path
) -> None:
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    monitored = fit(architecture, tmp_path, monitor)
    assert sorted(monitor.report()) == sorted(batch_norms(monitored))
    assert_identical(monitored.state_dict(), fit(architecture, tmp_path).state_dict())
