"""Runs with a fault in one place, and what a report of them must tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

MARKS = [
    pytest.mark.usefixtures("everything_restored"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
]
"""Of every module of tests about faults."""

C = 3
BATCHES = 6  # in an epoch


# ------------------------------------------------------------------------------------------ the independent expectation


def moments(batches):
    """Mean and unbiased variance of all values of (N, C, *) batches, in two float64 passes."""
    arrays = [np.moveaxis(batch.detach().double().numpy(), 1, 0).reshape(batch.shape[1], -1) for batch in batches]
    values = np.concatenate(arrays, axis=1)
    with np.errstate(invalid="ignore"):
        mean = values.mean(axis=1)
        return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def assert_population(layer, batches, bound=1e-5):
    """The report of a layer tells of exactly these calls."""
    assert layer.num_batches == len(batches)
    assert layer.num_samples == sum(batch.numel() // batch.shape[1] for batch in batches)
    if batches:
        mean, var = moments(batches)
        assert np.all(np.abs(layer.population_mean.numpy() - mean) <= bound * np.sqrt(var))
        assert np.all(np.abs(layer.population_var.numpy() - var) <= bound * (var + layer.eps))


def act_rmse(batches, running_mean, running_var, eps):
    """RMS error of the normalised activation, value by value."""
    x = np.concatenate([batch.detach().double().numpy() for batch in batches])
    mean, var = moments(batches)
    running_mean, running_var = running_mean.detach().double().numpy(), running_var.detach().double().numpy()
    error = (x - running_mean) / np.sqrt(running_var + eps) - (x - mean) / np.sqrt(var + eps)
    return np.sqrt((error.var(axis=0, ddof=1) + error.mean(axis=0) ** 2).mean())


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def optimizer_hooks():
    return len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks)


def layer_of(tracker):
    (layer,) = tracker.report().values()
    return layer


def feed(model, num_batches=5, size=8, dtype=torch.float32):
    batches = [(torch.randn(size, C) * 2 + 3).to(dtype) for _ in range(num_batches)]
    for x in batches:
        model(x)
    return batches


def single(**kwargs):
    return nn.Sequential(nn.BatchNorm1d(C, **kwargs))


# ------------------------------------------------------------------------------------------------------ runs that break


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


class FailingSGD(torch.optim.SGD):
    error = None

    def step(self, closure=None):
        super().step(closure)
        if self.error is not None:
            raise self.error


class Net(LightningModule):
    """Has a fault in one place in one training batch, and records what its BatchNorm layers have received."""

    def __init__(self, place=None, batch=None, error=None):
        super().__init__()
        self.a, self.linear, self.b = nn.BatchNorm1d(C), nn.Linear(C, 2), nn.BatchNorm1d(2)
        self.place, self.batch, self.error = place, batch, error
        self.num, self.seen = 0, []  # of each training batch, what each layer has received
        for name in ("a", "b"):
            getattr(self, name).register_forward_hook(lambda _, args, __, name=name: self.record(name, args[0]))

    def record(self, name, x):
        if self.trainer.training:
            self.seen[-1].setdefault(name, []).append(x.detach().clone())

    def is_due(self, place):
        return self.trainer.training and (place, self.num - 1) == (self.place, self.batch)

    def fail_if(self, place):
        if self.is_due(place):
            raise self.error

    def forward(self, x):
        self.fail_if("before the first layer")
        x = self.linear(self.a(x))
        self.fail_if("between two layers")
        if self.is_due("one value per channel"):
            x = x[:1]
        x = self.b(x)
        self.fail_if("after the last layer")
        return x

    def training_step(self, batch, batch_idx):
        self.num += 1
        self.seen.append({})
        y = self(batch[0])
        if self.is_due("backward"):
            y = FailsInBackward.apply(y, self.error)
        self.optimizers().optimizer.error = self.error if self.is_due("optimizer step") else None
        self.log("train_loss", y.mean(), on_step=False, on_epoch=True)
        return y.square().mean()

    def validation_step(self, batch, batch_idx):
        self(batch[0] + 100)

    def configure_optimizers(self):
        return FailingSGD(self.parameters(), lr=0.01)

    def received(self, name, first, last):
        return [x for batch in self.seen[first:last] for x in batch.get(name, [])]

    def assert_reported(self, report, first, last):
        assert set(report) == {"a", "b"}
        for name in report:
            assert_population(report[name], self.received(name, first, last))


def data(num_batches=BATCHES):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(num_batches * 8, C, generator=generator) + 1), batch_size=8)


def trainer_for(tmp_path, *callbacks, **kwargs):
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0}
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **(defaults | quiet | kwargs))


def assert_usable(tmp_path, model, monitor):
    """Another fit of the same model with the same monitor is as if nothing had happened."""
    model.train()  # an exception in validation leaves it in eval mode, which Lightning then trains in
    model.place, first = None, len(model.seen)
    before = hooks_of(model), optimizer_hooks()
    trainer_for(tmp_path, monitor, max_epochs=1).fit(model, data())
    assert len(model.seen) == first + BATCHES
    model.assert_reported(monitor.report(), first, first + BATCHES)
    assert (hooks_of(model), optimizer_hooks()) == before


class BoomError(Exception):
    pass


def failing_callback(hook, error, epoch):
    class Fails(Callback):
        pass

    def fail(self, trainer, *args, **kwargs):
        if trainer.current_epoch == epoch:
            raise error

    setattr(Fails, hook, fail)
    return Fails()


def raising_once(function, error, monkeypatch, module):
    """Replace a function of the package by one that raises when it is called for the first time."""
    errors = [error]

    def broken(*args, **kwargs):
        if errors:
            raise errors.pop()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, function.__name__, broken)


# --------------------------------------------------------------------------------------------- loggers, disks, warnings


class Memory(DummyLogger):
    def __init__(self, error=None):
        super().__init__()
        self.error, self.logged = error, []

    def log_metrics(self, metrics, step=None):
        if self.error is not None and any(name.startswith("bn") for name in metrics):
            raise self.error
        self.logged.append((step, metrics))

    def finalize(self, status):
        pass
