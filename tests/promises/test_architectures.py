"""Architectures that others wrote: no layer is missed, each is exact, and they train as without the tracker."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, LayerReport, Report
from tests.promises.architectures import ARCHITECTURES, Architecture

pytestmark = pytest.mark.slow
STEPS = 2  # the second with other weights, and a batch of another size


def seed() -> None:
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)


def rng_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def trainable(output: Any) -> list[Tensor]:
    """All tensors in a nested output that gradients go through."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else []
    return [tensor for part in parts for tensor in trainable(part)]


def loss_of(output: Any) -> Tensor:
    """Of everything that comes out: bounded, as some outputs are infinite by design, and steep at 0."""
    return torch.stack([(tensor.float().atan() - 1).square().mean() for tensor in trainable(output)]).sum()


class Received:
    """What each BatchNorm layer receives, in float64, by hooks of the test's own."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: dict[str, list[Tensor]] = {}
        self.serial: set[str] = set()  # layers whose inputs PyTorch sums value by value
        for name, layer in batch_norms(model).items():
            self.batches[name] = []
            layer.register_forward_hook(self.recording(name))

    def recording(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            (x,) = args
            self.batches[name].append(x.detach().double().clone())
            if not x.is_contiguous() or x[0, 0].numel() == 1:
                self.serial.add(name)

        return record

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of all values, in two passes."""
        values = torch.cat([batch.movedim(1, 0).flatten(1) for batch in self.batches[name]], dim=1)
        return values.mean(dim=1), values.var(dim=1)


@dataclass
class Run:
    """A training, and what it computed."""

    model: nn.Module
    received: Received
    report: Report | None
    parameters_before: dict[str, Tensor]
    losses: list[float]
    rng: list[Any]


def built(architecture: str) -> Architecture:
    """With the initial weights of PyTorch: others' are so small that variances in narrow layers would be below eps."""
    seed()
    model, inputs = ARCHITECTURES[architecture]()
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd | _BatchNorm):
            module.reset_parameters()
    return model.train(), inputs


@functools.cache
def train(architecture: str, monitored: bool) -> Run:
    """A training, from which several tests read."""
    model, inputs = built(architecture)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    with BatchNormTracker(model) if monitored else contextlib.nullcontext() as tracker:
        received = Received(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model(**inputs(step)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return Run(model, received, tracker.report() if tracker else None, before, losses, rng_states())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Of the module, so that all tests of one follow each other and read from the same training."""
    return request.param


def assert_exact(layer: LayerReport, mean: Tensor, var: Tensor, serial: bool) -> None:
    """Within the bounds of ``test_exactness.py``; the rounding of 2 batches averages out no better than of 1."""
    mean_error, var_error = (layer.population_mean - mean).abs(), (layer.population_var - var).abs()
    assert torch.all(mean_error <= 2e-8 * (var.sqrt() + mean.abs()) * (40 if serial else 4) + 1e-12)
    assert torch.all(var_error <= 2e-6 * (var + layer.eps))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Buffers included, bit by bit."""
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_no_layer_and_no_call_is_missed_and_every_layer_is_exact(architecture: str) -> None:
    run = train(architecture, monitored=True)
    assert batch_norms(run.model)
    assert run.report is not None
    assert sorted(run.report) == sorted(batch_norms(run.model))

    calls = {name: len(batches) for name, batches in run.received.batches.items()}
    assert sum(calls.values()) >= STEPS
    assert {name: layer.num_batches for name, layer in run.report.items()} == calls
    unused = {name for name, layer in run.report.items() if layer.verdict == "unused"}
    assert unused == {name for name, num in calls.items() if num == 0}

    for name, batches in run.received.batches.items():
        if batches:
            layer = run.report[name]
            assert layer.num_samples == sum(batch.numel() // batch.shape[1] for batch in batches)
            assert layer.evidence["calls_saved"] == len(batches)
            assert_exact(layer, *run.received.moments(name), serial=name in run.received.serial)


def test_training_is_bit_identical_without_the_tracker(architecture: str) -> None:
    run, unmonitored = train(architecture, monitored=True), train(architecture, monitored=False)
    assert_same_weights(run.model, unmonitored.model)
    assert run.losses == unmonitored.losses
    assert run.rng == unmonitored.rng
    assert np.isfinite(run.losses).all()
    after = dict(run.model.named_parameters())
    moved = [name for name, before in run.parameters_before.items() if not torch.equal(before, after[name])]
    assert len(moved) > len(after) / 2  # or the comparison would compare what was there before


def test_frozen_reimplementations_are_left_out() -> None:
    run = train("RT-DETR", monitored=True)
    modules = dict(run.model.named_modules())
    frozen = {name for name, module in modules.items() if type(module).__name__ == "RTDetrFrozenBatchNorm2d"}
    assert frozen
    assert not frozen & set(run.report)
    assert {type(modules[name]) for name in run.report} == {nn.BatchNorm2d}


def test_layers_that_are_made_and_never_called_are_named() -> None:
    report = train("DPT", monitored=True).report
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
    assert_same_weights(monitored, fit(architecture, tmp_path))
