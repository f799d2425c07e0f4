"""Small fits with the monitor, and an independent reference: every value that training gave to every layer."""

import csv
import math
import re
import statistics
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bnmonitor import Report

LAYERS = ("body.wide", "body.narrow")
SUMMARY = (
    *("eval_error_max", "eval_error_p90", "eval_error_median", "act_rmse_max", "mean_shift_max"),
    "unhealthy_layers",
)
PER_LAYER = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
SUMMARY_TAGS = {f"bn/{name}" for name in SUMMARY}
LAYER_TAGS = {f"bn.{name}/{layer}" for name in PER_LAYER for layer in LAYERS}
JUDGED = "bn/unhealthy_layers"  # the one that rests on verdicts, which are tested elsewhere
BATCHES = 6  # training batches in an epoch, unless limited
BATCH_SIZE = 8


# ------------------------------------------------------------------------------------------------------ models and data


def body() -> nn.Sequential:
    """A network with a BatchNorm layer over (N, 4, 4) and one over (N, 3)."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv1d(1, 4, 3),
            wide=nn.BatchNorm1d(4),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            dropout=nn.Dropout(0.2),
            mid=nn.Linear(16, 3),
            narrow=nn.BatchNorm1d(3, momentum=0.3, eps=1e-3),
            out=nn.Linear(3, 1),
        )
    )


class Steps:
    """Training and validation steps that log one epoch value each; the base for modules of either package."""

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Net(Steps, LightningModule):
    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body() if network is None else network


def samples(num_batches: int = BATCHES, offset: float = 1.0, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    num = num_batches * BATCH_SIZE
    x = torch.randn(num, 1, 6, generator=generator) * 2 + offset
    return TensorDataset(x, torch.randn(num, 1, generator=generator))


def train_data(num_batches: int = BATCHES) -> DataLoader:
    return DataLoader(samples(num_batches), batch_size=BATCH_SIZE)


def val_data() -> DataLoader:
    """Inputs so far from those of training that counting any of them would show."""
    return DataLoader(samples(3, offset=100.0, seed=2), batch_size=BATCH_SIZE)


class Stream(IterableDataset):
    """The training data without a length."""

    def __iter__(self):
        return iter(samples())


# -------------------------------------------------------------------------------------------- the independent reference


class Call(NamedTuple):
    values: np.ndarray
    """What a layer received, (C, values) float64."""
    updates: bool
    """Whether that changed its running statistics."""


class Batch(NamedTuple):
    calls: dict[str, list[Call]]
    buffers: dict[str, tuple[np.ndarray, np.ndarray]]


class Recorder(Callback):
    """Every value that training gave to every BatchNorm layer, batch by batch, and the buffers after each batch."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.calls: dict[str, list[Call]] | None = None
        self.handles = []

    def on_fit_start(self, trainer, pl_module):
        self.layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self.store(name, args[0])))

    def store(self, name, x):
        if self.calls is not None:
            values = np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1)
            layer = self.layers[name]
            self.calls[name].append(Call(values, layer.training and layer.running_mean is not None))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls = defaultdict(list)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        buffers = {
            name: (layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy().copy())
            for name, layer in self.layers.items()
            if layer.running_mean is not None
        }
        self.batches.append(Batch(self.calls, buffers))
        self.calls = None

    def on_train_epoch_end(self, trainer, pl_module):
        self.calls = None

    def teardown(self, trainer, pl_module, stage):
        for handle in self.handles:
            handle.remove()

    def calls_in(self, window: tuple[int, int], layer: str) -> list[Call]:
        """A layer's calls in the training batches from the first to before the last."""
        return [call for batch in self.batches[slice(*window)] for call in batch.calls[layer]]

    def population(self, window: tuple[int, int], layer: str) -> np.ndarray:
        """What a layer received in them, (C, values) float64."""
        return np.concatenate([call.values for call in self.calls_in(window, layer)], axis=1)

    def layer_values(self, window: tuple[int, int], layer: str) -> dict[str, float]:
        """The four numbers of a layer, from every value by itself."""
        x, eps = self.population(window, layer), self.layers[layer].eps
        running_mean, running_var = self.batches[window[1] - 1].buffers[layer]
        mean, std = x.mean(axis=1), np.sqrt(x.var(axis=1, ddof=1) + eps)
        running_std = np.sqrt(running_var + eps)
        in_eval = (x - running_mean[:, None]) / running_std[:, None]
        error = in_eval - (x - mean[:, None]) / std[:, None]
        mean_square = error.var(axis=1, ddof=1) + error.mean(axis=1) ** 2
        now_mean, now_var = moments_now(self.calls_in(window, layer), eps)
        gain = 1 / running_std - 1 / np.sqrt(now_var + eps)
        mean_square_now = gain**2 * now_var + ((running_mean - now_mean) / running_std) ** 2
        return {
            "eval_error": math.sqrt(mean_square_now.mean()),
            "act_rmse": math.sqrt(mean_square.mean()),
            "mean_shift": math.sqrt((((running_mean - mean) / std) ** 2).mean()),
            "log_var_ratio": float(np.abs(2 * np.log(running_std / std)).mean()),
        }

    def expected_of(self, windows: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
        """What is to be :meth:`expected` of each of these windows."""
        return [self.expected(window) for window in windows]

    def expected(self, window: tuple[int, int], layers=LAYERS) -> dict[str, float]:
        """All that is to be logged for a window, but :data:`JUDGED`."""
        values = {layer: self.layer_values(window, layer) for layer in layers}
        errors = sorted(value["eval_error"] for value in values.values())
        summary = {
            "bn/eval_error_max": errors[-1],
            "bn/eval_error_p90": errors[math.ceil(0.9 * len(errors)) - 1],
            "bn/eval_error_median": statistics.median(errors),
            "bn/act_rmse_max": max(value["act_rmse"] for value in values.values()),
            "bn/mean_shift_max": max(value["mean_shift"] for value in values.values()),
        }
        return summary | {
            f"bn.{name}/{layer}": value for layer, metrics in values.items() for name, value in metrics.items()
        }


def moments_now(calls: list[Call], eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance at the end of a window of up to 32 updates, (C,) each, from the definition.

    The last eighth of the calls that updated the buffers, in whole pairs, is extrapolated to the window's end as far as
    the last three eighths agree on a direction. With fewer than two such calls: those of all values.
    """
    values = np.concatenate([call.values for call in calls], axis=1)
    updates = [call.values for call in calls if call.updates]
    assert len(updates) <= 32  # more: longer blocks than pairs
    if len(updates) < 2:
        return values.mean(axis=1), values.var(axis=1, ddof=1)
    values = np.concatenate(updates, axis=1)
    pairs = [updates[i : i + 2] for i in range(0, len(updates), 2)]
    runs, target = [], len(updates) / 8
    while pairs and len(runs) < 3:
        lengths = [sum(map(len, pairs[start:])) for start in range(len(pairs))]  # the longer first
        start = int(np.argmin([abs(length - target) for length in lengths]))
        runs.append([x for pair in pairs[start:] for x in pair])
        pairs, target = pairs[:start], len(runs[0])

    def averages(run):
        """Mean of a run's values, and the average of the unbiased variances of its calls."""
        sizes = np.array([x.shape[1] for x in run])
        variances = np.array([x.var(axis=1, ddof=1) for x in run])
        return np.stack([np.concatenate(run, axis=1).mean(axis=1), np.average(variances, axis=0, weights=sizes - 1)])

    a, *rest = map(averages, runs)
    now = a.copy()
    if len(rest) == 2:
        b, c = rest
        scaled = values.var(axis=1, ddof=1) + eps
        unit = np.stack([np.sqrt(scaled), 2 * scaled])
        first, second, third = map(len, runs)
        for f in range(2):
            late, early, k = ((a - b) / unit)[f], ((b - c) / unit)[f], (second + third) / (first + second)
            trust = np.clip(k * (late @ early) / max(k**2 * (late @ late), early @ early), 0, 1)
            now[f] += trust * first / (first + second) * (a - b)[f]

    between = sum(
        x.shape[1] * (x.mean(axis=1) - np.concatenate(pair, axis=1).mean(axis=1)) ** 2
        for pair in (updates[i : i + 2] for i in range(0, len(updates), 2))
        for x in pair
    ) / (len(updates) // 2)
    share = (len(updates) - 1) / (values.shape[1] - 1)
    return now[0], np.maximum(now[1] + share * (between - now[1]), 0)


def close(value):
    """To what float32 kernels and float32 event files leave of it."""
    return pytest.approx(value, rel=1e-5, abs=2e-6)


# -------------------------------------------------------------------------------------------------------------- running


def trainer_for(tmp_path: Path, *callbacks: Callback, trainer_class=Trainer, **kwargs) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "logger": False,
        "default_root_dir": tmp_path,
    }
    return trainer_class(callbacks=list(callbacks), **(defaults | kwargs))


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the only event file under a folder: (step, value) by tag."""
    (file,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def ours(tags) -> set[str]:
    """The tags that Lightning and the module do not log, those of validation apart."""
    others = {"epoch", "step", "train_loss", "val_loss", "batch_loss", "hp_metric"}
    return {tag for tag in tags if tag not in others and not re.search(r"\bval_(error|shift)", tag)}


def steps_of(points: list[tuple[int, float]]) -> list[int]:
    return [step for step, _ in points]


def hooks_of(model: nn.Module) -> int:
    """Hooks of any kind on any module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def optimizer_hooks() -> int:
    return len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks)


def num_batches(report: Report) -> dict[str, int]:
    return {name: layer.num_batches for name, layer in report.items()}


class OnTrainBatchEnd(Callback):
    """Calls a function after each training batch, with the number of batches so far."""

    def __init__(self, function) -> None:
        self.function = function
        self.count = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        self.function(self.count)


def read_csv(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def windows_of(size: int, total: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]
