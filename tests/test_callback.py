"""The monitor in real Trainer runs: what it logs and where, when its windows end, and what it leaves behind."""

import copy
import csv
import math
import pickle
import random
import signal
import statistics
import warnings
from collections import OrderedDict, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, Report, UnhealthyBatchNormError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
]

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
    return {tag for tag in tags if tag not in others and "val_shift" not in tag}


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


# ------------------------------------------------------------------------------------------------------- what is logged


def test_event_file_has_one_point_a_window_of_each_documented_tag_with_exact_values_at_lightnings_own_step(tmp_path):
    recorder, monitor = Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=3, logger=True)
    trainer.fit(Net(), train_data(), val_data())
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    epoch_end_steps = steps_of(scalars["train_loss"])
    assert epoch_end_steps == steps_of(scalars["val_loss"]) == [5, 11, 17]
    for tag in SUMMARY_TAGS | LAYER_TAGS:
        assert steps_of(scalars[tag]) == epoch_end_steps, tag
    for tag in SUMMARY_TAGS - {JUDGED} | LAYER_TAGS:
        expected = [recorder.expected((start, start + BATCHES))[tag] for start in (0, 6, 12)]
        assert all(math.isfinite(value) for _, value in scalars[tag])
        assert [value for _, value in scalars[tag]] == close(expected), tag


def test_log_var_ratio_of_a_layer_is_a_mean_of_magnitudes(tmp_path):
    """Channels of both signs must not cancel."""

    class Opposite(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            var = trainer.model.body.narrow.running_var
            var.copy_(torch.tensor([1e-6, 1e6, 1.0]))

    recorder = Recorder()
    trainer = trainer_for(tmp_path, Opposite(), recorder, BatchNormMonitor(), logger=True)
    trainer.fit(Net(), train_data())
    ((_, value),) = events(tmp_path)["bn.log_var_ratio/body.narrow"]
    assert value == close(recorder.expected((0, BATCHES))["bn.log_var_ratio/body.narrow"])
    assert value > 5


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard", "both"])
def test_metrics_reach_every_logger_there_is(tmp_path, logger):
    tensorboard, in_csv = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    loggers = {"none": False, "csv": in_csv, "tensorboard": tensorboard, "both": [tensorboard, in_csv]}[logger]
    recorder, monitor, judgements = Recorder(), BatchNormMonitor(), []
    judge = OnTrainBatchEnd(lambda count: judgements.append(len(monitor.report().unhealthy)) if count % 6 == 0 else 0)
    trainer = trainer_for(tmp_path, recorder, monitor, judge, max_epochs=2, logger=loggers)
    trainer.fit(Net(), train_data(), val_data())
    windows = [recorder.expected((0, 6)), recorder.expected((6, 12))]
    expected = {tag: [(5, close(windows[0][tag])), (11, close(windows[1][tag]))] for tag in windows[0]}
    expected[JUDGED] = list(zip([5, 11], judgements, strict=True))
    if logger in ("tensorboard", "both"):
        scalars = events(tmp_path / "tb")
        assert {tag: scalars[tag] for tag in ours(scalars)} == expected
    if logger in ("csv", "both"):
        rows = read_csv(tmp_path / "csv")
        logged = {tag: [(int(row["step"]), float(row[tag])) for row in rows if row[tag]] for tag in ours(rows[0])}
        assert logged == expected
    if logger == "none":
        assert not list(tmp_path.iterdir())
    ours_in_callback_metrics = {name: trainer.callback_metrics[name] for name in ours(trainer.callback_metrics)}
    windows[1][JUDGED] = judgements[1]
    assert ours_in_callback_metrics == {tag: close(windows[1][tag]) for tag in SUMMARY_TAGS}


def read_csv(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    ("num_layers", "per_layer", "logged"),
    [(100, "auto", True), (101, "auto", False), (101, True, True), (2, False, False)],
)
def test_per_layer_auto_logs_up_to_a_hundred_layers_and_true_and_false_override_it(
    tmp_path, num_layers, per_layer, logged
):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 1), *[nn.BatchNorm1d(1) for _ in range(num_layers)])
    trainer = trainer_for(tmp_path, BatchNormMonitor(per_layer=per_layer), logger=True)
    trainer.fit(Net(network), train_data(1))
    names = [f"body.{index + 2}" for index in range(num_layers)] if logged else []
    assert ours(events(tmp_path)) == SUMMARY_TAGS | {f"bn.{metric}/{name}" for metric in PER_LAYER for name in names}
    assert SUMMARY_TAGS.issubset(trainer.callback_metrics)


def test_log_key_prefix_begins_every_name(tmp_path):
    trainer = trainer_for(tmp_path, BatchNormMonitor(log_key_prefix="norms"), logger=True)
    trainer.fit(Net(), train_data())
    renamed = {"norms" + tag.removeprefix("bn") for tag in SUMMARY_TAGS | LAYER_TAGS}
    assert ours(events(tmp_path)) == renamed
    assert set(trainer.callback_metrics) == {"train_loss", *(f"norms/{name}" for name in SUMMARY)}


@pytest.mark.parametrize(
    ("arguments", "monitored"),
    [
        ({"include": "body.w*"}, ["body.wide"]),
        ({"include": ["*narrow"]}, ["body.narrow"]),
        ({"include": ["*narrow", "*wide"]}, ["body.wide", "body.narrow"]),
        ({"exclude": "*wide"}, ["body.narrow"]),
        ({"exclude": ["body.narrow"]}, ["body.wide"]),
        ({"include": "body.*", "exclude": ["*.narrow"]}, ["body.wide"]),
    ],
)
def test_include_and_exclude_choose_layers_by_pattern(tmp_path, arguments, monitored):
    recorder, monitor = Recorder(), BatchNormMonitor(**arguments)
    trainer_for(tmp_path, recorder, monitor, logger=True).fit(Net(), train_data())
    assert list(monitor.report()) == monitored
    expected = recorder.expected((0, BATCHES), layers=monitored)
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(5, close(value))] for tag, value in expected.items()
    }
    assert JUDGED in scalars


# -------------------------------------------------------------------------------------------------------------- windows


def windows_of(size: int, total: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


WINDOWS = {  # arguments of the monitor, of the Trainer, the windows in training batches, the steps where they end
    "one epoch by default": ({}, {"max_epochs": 3}, windows_of(6, 18), [5, 11, 17]),
    "two epochs, the last cut short": ({"every_n_epochs": 2}, {"max_epochs": 5}, windows_of(12, 30), [11, 23, 29]),
    "more epochs than there are": ({"every_n_epochs": 9}, {"max_epochs": 2}, [(0, 12)], [11]),
    "three batches": ({"every_n_train_batches": 3}, {"max_epochs": 2}, windows_of(3, 12), [2, 5, 8, 11]),
    "four batches across epochs": (
        {"every_n_train_batches": 4},
        {"max_epochs": 3},
        windows_of(4, 18),
        [3, 7, 11, 15, 17],
    ),
    "three batches across epochs of five": (
        {"every_n_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 5},
        windows_of(3, 10),
        [2, 5, 8, 9],
    ),
    "more batches than there are": ({"every_n_train_batches": 99}, {"max_epochs": 2}, [(0, 12)], [11]),
    "one batch": ({"every_n_train_batches": 1}, {}, windows_of(1, 6), [0, 1, 2, 3, 4, 5]),
    "max_steps in mid-epoch": ({}, {"max_epochs": -1, "max_steps": 9}, [(0, 6), (6, 9)], [5, 8]),
    "max_steps in the first epoch": ({}, {"max_epochs": -1, "max_steps": 4}, [(0, 4)], [3]),
    "max_steps in mid-epoch of two": (
        {"every_n_epochs": 2},
        {"max_epochs": -1, "max_steps": 15},
        [(0, 12), (12, 15)],
        [11, 14],
    ),
    "max_steps in mid-window of batches": (
        {"every_n_train_batches": 4},
        {"max_epochs": -1, "max_steps": 10},
        [(0, 4), (4, 8), (8, 10)],
        [3, 7, 9],
    ),
    "limit_train_batches": ({}, {"max_epochs": 3, "limit_train_batches": 2}, windows_of(2, 6), [1, 3, 5]),
    "limit_train_batches by share": ({}, {"max_epochs": 2, "limit_train_batches": 0.5}, windows_of(3, 6), [2, 5]),
    "validation in mid-epoch": ({}, {"max_epochs": 2, "val_check_interval": 0.5}, windows_of(6, 12), [5, 11]),
    "validation in mid-window of batches": (
        {"every_n_train_batches": 4},
        {"max_epochs": 2, "val_check_interval": 0.5},
        windows_of(4, 12),
        [3, 7, 11],
    ),
    "validation by batches across epochs": (
        {},
        {"max_epochs": 2, "val_check_interval": 4, "check_val_every_n_epoch": None},
        windows_of(6, 12),
        [5, 11],
    ),
    "validation every other epoch": ({}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, windows_of(6, 24), None),
    "gradients accumulated": ({}, {"max_epochs": 2, "accumulate_grad_batches": 3}, windows_of(6, 12), [1, 3]),
    "gradients accumulated unevenly": ({}, {"max_epochs": 2, "accumulate_grad_batches": 4}, windows_of(6, 12), [1, 3]),
    "gradients accumulated over a window of batches": (
        {"every_n_train_batches": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        windows_of(3, 12),
        [1, 2, 4, 5],
    ),
    "overfit_batches": ({}, {"max_epochs": 3, "overfit_batches": 2}, windows_of(2, 6), [1, 3, 5]),
    "sanity check": ({}, {"max_epochs": 2, "num_sanity_val_steps": 2}, windows_of(6, 12), [5, 11]),
    "min_epochs beyond max_steps": ({}, {"max_epochs": 2, "max_steps": 8}, [(0, 6), (6, 8)], [5, 7]),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_covers_exactly_its_training_batches(tmp_path, case):
    arguments, options, windows, steps = WINDOWS[case]
    check_windows(tmp_path, Net(), train_data(), BatchNormMonitor(**arguments), options, windows, steps)


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"max_epochs": 2}, windows_of(6, 12)),
        ({"max_epochs": 2, "limit_train_batches": 4}, windows_of(4, 8)),
        ({"max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 2}, windows_of(4, 8)),
    ],
)
def test_a_dataset_without_length_makes_the_same_windows(tmp_path, options, windows):
    steps = [end - 1 for _, end in windows]
    data = DataLoader(Stream(), batch_size=BATCH_SIZE)
    check_windows(tmp_path, Net(), data, BatchNormMonitor(), options, windows, steps)


class StopsAt(Net):
    """Ends some epochs early, by the way Lightning offers for that."""

    def __init__(self, last_batch: dict[int, int]) -> None:
        super().__init__()
        self.last_batch = last_batch  # by epoch, the number of batches in it

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.last_batch.get(self.current_epoch) else None


@pytest.mark.parametrize(
    ("every_n_epochs", "last_batch", "windows"),
    [
        (1, {0: 4, 1: 2}, [(0, 4), (4, 6), (6, 12)]),
        (1, {1: 0}, [(0, 6), (6, 12)]),  # an epoch without a batch is a window without a report
        (2, {1: 0}, [(0, 6), (6, 12)]),
        (2, {0: 4, 1: 2}, [(0, 6), (6, 12)]),
        (3, {0: 1, 2: 3}, [(0, 10)]),
    ],
)
def test_a_window_ends_with_an_epoch_that_on_train_batch_start_ends_early(
    tmp_path, every_n_epochs, last_batch, windows
):
    steps = [end - 1 for _, end in windows]
    monitor = BatchNormMonitor(every_n_epochs=every_n_epochs)
    check_windows(tmp_path, StopsAt(last_batch), train_data(), monitor, {"max_epochs": 3}, windows, steps)


class StopsInMidEpoch(Net):
    def training_step(self, batch, batch_idx):
        self.trainer.should_stop = self.current_epoch == 1 and batch_idx == 2
        return super().training_step(batch, batch_idx)


def test_a_window_ends_where_the_trainer_is_told_to_stop(tmp_path):
    windows = [(0, 6), (6, 9)]
    check_windows(tmp_path, StopsInMidEpoch(), train_data(), BatchNormMonitor(), {"max_epochs": 4}, windows, [5, 8])


def test_a_window_counts_batches_not_optimizer_steps_under_manual_optimization(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            halves = list(self.body[:4].parameters()), list(self.body[4:].parameters())
            return [torch.optim.SGD(half, lr=0.01) for half in halves]

    windows = windows_of(4, 12)
    monitor = BatchNormMonitor(every_n_train_batches=4)
    check_windows(tmp_path, Manual(), train_data(), monitor, {"max_epochs": 2}, windows, [3, 7, 11])


def check_windows(tmp_path, model, data, monitor, options, windows, steps):
    """Fit, and compare every point in the event file, and the last report, with what the batches themselves say."""
    recorder = Recorder()
    trainer = trainer_for(tmp_path, recorder, monitor, logger=True, **options)
    trainer.fit(model, data, val_data())
    assert len(recorder.batches) == windows[-1][1]
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    expected = [recorder.expected(window) for window in windows]
    for tag in ours(scalars):
        if tag != JUDGED:
            assert [value for _, value in scalars[tag]] == close([window[tag] for window in expected]), tag
        if steps is not None:
            assert steps_of(scalars[tag]) == steps, tag
        if len(windows) == len(scalars["train_loss"]):  # windows of an epoch: where Lightning puts its own values
            assert steps_of(scalars[tag]) == steps_of(scalars["train_loss"]), tag
    first, last = windows[-1]
    for name, layer in monitor.report().items():
        values = recorder.population((first, last), name)
        assert (layer.num_batches, layer.num_samples) == (last - first, values.shape[1])
        np.testing.assert_allclose(layer.population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.population_var, values.var(axis=1, ddof=1), rtol=1e-5)


def test_a_window_of_batches_is_logged_at_the_step_of_what_the_module_logs_in_its_last_batch(tmp_path):
    class LogsEveryBatch(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("batch_loss", loss, on_step=True, on_epoch=False)
            return loss

    monitor = BatchNormMonitor(every_n_train_batches=5)
    trainer = trainer_for(tmp_path, monitor, max_epochs=3, logger=True, log_every_n_steps=1)
    trainer.fit(LogsEveryBatch(), train_data())
    scalars = events(tmp_path)
    every_batch = steps_of(scalars["batch_loss"])
    assert steps_of(scalars["bn/eval_error_max"]) == [every_batch[last] for last in (4, 9, 14, 17)]


def test_gradient_accumulation_does_not_change_what_is_counted(tmp_path):
    def counted(accumulate_grad_batches):
        monitor = BatchNormMonitor()
        trainer = trainer_for(tmp_path, monitor, accumulate_grad_batches=accumulate_grad_batches)
        trainer.fit(Net(), train_data())
        assert trainer.global_step == math.ceil(BATCHES / accumulate_grad_batches)
        return num_batches(monitor.report())

    assert counted(1) == counted(3) == counted(4) == dict.fromkeys(LAYERS, BATCHES)


def test_a_layer_called_twice_in_a_batch_counts_both_calls_and_the_window_counts_one_batch(tmp_path):
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(2 * x)

    monitor = BatchNormMonitor(every_n_train_batches=4)
    check_windows_of_calls(tmp_path, Twice(), monitor)


def check_windows_of_calls(tmp_path, model, monitor):
    recorder = Recorder()
    trainer_for(tmp_path, recorder, monitor, logger=True, limit_train_batches=4).fit(model, train_data())
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(3, close(value))] for tag, value in recorder.expected((0, 4)).items()
    }
    assert steps_of(scalars[JUDGED]) == [3]
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 8)


# ----------------------------------------------------------------------- callback_metrics, for checkpoints and stopping


@pytest.mark.parametrize(
    ("arguments", "options", "validates", "saved"),
    [
        ({}, {"max_epochs": 3}, True, {0: (0, 6), 1: (6, 12), 2: (12, 18)}),
        ({}, {"max_epochs": 3}, False, {0: (0, 6), 1: (6, 12), 2: (12, 18)}),
        ({}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, True, {1: (6, 12), 3: (18, 24)}),
        (
            {"every_n_epochs": 2},
            {"max_epochs": 4, "check_val_every_n_epoch": 2},
            True,
            {1: (0, 12), 3: (12, 24)},
        ),
        ({"every_n_train_batches": 3}, {"max_epochs": 2}, True, {0: (3, 6), 1: (9, 12)}),
        (
            {"every_n_train_batches": 3},
            {"max_epochs": 2, "check_val_every_n_epoch": 2},
            True,
            {1: (9, 12)},
        ),
    ],
)
def test_model_checkpoint_sees_the_window_that_has_just_ended(tmp_path, arguments, options, validates, saved):
    recorder = Recorder()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="bn/eval_error_max", save_top_k=-1, filename="{epoch}")
    trainer = trainer_for(tmp_path, recorder, checkpoint, BatchNormMonitor(**arguments), **options)
    trainer.fit(Net(), train_data(), val_data() if validates else None)
    seen = {Path(path).stem: float(value) for path, value in checkpoint.best_k_models.items()}
    assert seen == {
        f"epoch={epoch}": close(recorder.expected(window)["bn/eval_error_max"]) for epoch, window in saved.items()
    }


@pytest.mark.parametrize("tag", sorted(SUMMARY_TAGS - {JUDGED}))
def test_every_summary_tag_can_be_monitored_by_model_checkpoint_with_its_defaults(tmp_path, tag):
    recorder, checkpoint = Recorder(), ModelCheckpoint(dirpath=tmp_path, monitor=tag)
    trainer_for(tmp_path, recorder, BatchNormMonitor(), checkpoint, max_epochs=3).fit(Net(), train_data(), val_data())
    windows = [recorder.expected(window)[tag] for window in windows_of(6, 18)]
    assert float(checkpoint.best_model_score) == close(min(windows))


class Settling(Net):
    """Learns nothing, so that its running statistics come closer to the exact ones with every epoch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = body()
        del network.dropout
        network.wide.momentum = network.narrow.momentum = 0.05
        super().__init__(network)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("options", "validates"),
    [
        ({}, True),
        ({}, False),
        ({"check_val_every_n_epoch": 2}, True),
        ({"val_check_interval": 1.0, "limit_val_batches": 1}, True),
    ],
)
def test_early_stopping_stops_in_the_epoch_whose_own_window_crosses_its_threshold(tmp_path, options, validates):
    recorder = Recorder()
    trainer_for(tmp_path, recorder, max_epochs=6).fit(Settling(), train_data())
    errors = [recorder.expected(window)["bn/eval_error_max"] for window in windows_of(6, 36)]
    assert all(later < 0.95 * earlier for earlier, later in pairwise(errors))
    crossing = 3  # an epoch that is validated also where every other one is
    threshold = (errors[crossing - 1] + errors[crossing]) / 2

    stopping = EarlyStopping(monitor="bn/eval_error_max", stopping_threshold=threshold)
    trainer = trainer_for(tmp_path, stopping, BatchNormMonitor(), max_epochs=6, **options)
    trainer.fit(Settling(), train_data(), val_data() if validates else None)
    assert stopping.stopped_epoch == crossing
    assert trainer.current_epoch == crossing + 1


@pytest.mark.parametrize(
    ("model", "options", "windows"),
    [
        (Net, {"max_epochs": 2}, [(0, 6), (6, 12)]),
        (StopsInMidEpoch, {"max_epochs": 4}, [(0, 6), (6, 9)]),
        (Net, {"max_epochs": 4, "max_steps": 9, "val_check_interval": 3}, [None, (0, 6), (6, 9)]),
    ],
    ids=["at the end of an epoch", "after should_stop", "after max_steps"],
)
def test_a_window_is_closed_before_the_validation_that_follows_its_last_batch(tmp_path, model, options, windows):
    class Looks(Callback):
        seen = ()

        def on_validation_start(self, trainer, pl_module):
            value = trainer.callback_metrics.get("bn/eval_error_max")
            self.seen += (None if value is None else float(value),)

    recorder, looks = Recorder(), Looks()
    trainer_for(tmp_path, recorder, BatchNormMonitor(), looks, **options).fit(model(), train_data(), val_data())
    expected = [window and recorder.expected(window)["bn/eval_error_max"] for window in windows]
    assert looks.seen == tuple(value if value is None else close(value) for value in expected)


def test_callback_metrics_have_none_of_our_keys_before_the_first_window_has_ended(tmp_path):
    keys = []
    look = OnTrainBatchEnd(lambda _: keys.append({key for key in ours(trainer.callback_metrics) if "bn" in key}))
    trainer = trainer_for(tmp_path, BatchNormMonitor(every_n_epochs=2), look, max_epochs=3)
    trainer.fit(Net(), train_data(), val_data())
    assert keys == [set()] * 11 + [SUMMARY_TAGS] * 7


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_before_fit_is_empty():
    report = BatchNormMonitor().report()
    assert isinstance(report, Report)
    assert len(report) == 0


def test_the_report_tells_of_the_window_so_far_until_the_first_has_ended_and_then_of_the_last_finished(tmp_path):
    recorder, monitor, reports = Recorder(), BatchNormMonitor(), []
    look = OnTrainBatchEnd(lambda _: reports.append(monitor.report()))
    trainer_for(tmp_path, recorder, monitor, look, max_epochs=3).fit(Net(), train_data(), val_data())

    told_of = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), *[(0, 6)] * 6, *[(6, 12)] * 6, (12, 18)]
    assert len(reports) == len(told_of)
    for report, window in zip([*reports, monitor.report()], [*told_of, (12, 18)], strict=True):
        assert num_batches(report) == dict.fromkeys(LAYERS, window[1] - window[0])
        for name in LAYERS:
            expected = recorder.layer_values(window, name)
            assert report[name].summary() == {metric: close(value) for metric, value in expected.items()}


def test_asking_for_reports_in_mid_window_changes_nothing_that_is_logged(tmp_path):
    def logged(name, *callbacks):
        monitor = BatchNormMonitor()
        look = [OnTrainBatchEnd(lambda _: monitor.report())] if callbacks else []
        trainer_for(tmp_path / name, monitor, *look, max_epochs=2, logger=True).fit(Net(), train_data())
        scalars = events(tmp_path / name)
        return {tag: scalars[tag] for tag in ours(scalars)}

    asked, unasked = logged("asked", True), logged("unasked")
    assert asked == {tag: [(step, close(value)) for step, value in points] for tag, points in unasked.items()}


def test_the_report_is_printed_once_at_the_end_of_fit_with_the_name_of_each_layer(tmp_path, capsys):
    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(Net(), train_data(), val_data())
    printed = capsys.readouterr().out
    assert str(monitor.report()) in printed
    assert all(printed.count(name) == 1 for name in LAYERS)


def test_a_second_fit_starts_with_fresh_statistics_and_single_hooks(tmp_path):
    model, monitor, during = Net(), BatchNormMonitor(), []
    before = hooks_of(model), optimizer_hooks()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(model, train_data(), val_data())
    assert (hooks_of(model), optimizer_hooks()) == before

    recorder = Recorder()
    look = OnTrainBatchEnd(lambda _: during.append(num_batches(monitor.report())))
    trainer_for(tmp_path, recorder, monitor, look, max_epochs=2).fit(model, train_data(4), val_data())
    assert during == [dict.fromkeys(LAYERS, count) for count in (1, 2, 3, 4, 4, 4, 4, 4)]
    for name in LAYERS:
        expected = recorder.layer_values((4, 8), name)
        assert monitor.report()[name].summary() == {metric: close(value) for metric, value in expected.items()}
    assert (hooks_of(model), optimizer_hooks()) == before


def test_the_same_trainer_can_fit_on_and_counts_each_batch_once(tmp_path):
    model, recorder, monitor = Net(), Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(model, train_data(), val_data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, train_data(), val_data())
    assert len(recorder.batches) == 18
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 6)
    assert float(trainer.callback_metrics["bn/eval_error_max"]) == close(
        recorder.expected((12, 18))["bn/eval_error_max"]
    )


def test_a_second_fit_that_fails_to_start_does_not_report_the_model_of_the_first(tmp_path):
    monitor = BatchNormMonitor(include="body.*")
    trainer_for(tmp_path, monitor).fit(Net(), train_data())
    other = Net()
    other.tail, other.body = other.body, nn.Identity()  # BatchNorm layers, but of other names
    with pytest.raises(ValueError, match="matches no BatchNorm layer"):
        trainer_for(tmp_path, monitor).fit(other, train_data())
    assert len(monitor.report()) == 0


# -------------------------------------------------------------------------------------------------- what must not count


def test_the_sanity_check_counts_nothing(tmp_path):
    counts = []

    class Looks(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            counts.append(num_batches(monitor.report()))

        def on_train_start(self, trainer, pl_module):
            counts.append(num_batches(monitor.report()))

    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, Looks(), num_sanity_val_steps=2).fit(Net(), train_data(), val_data())
    assert counts == [dict.fromkeys(LAYERS, 0)] * 2


def test_validation_counts_nothing(tmp_path):
    counts = []

    class Looks(Callback):
        def on_validation_start(self, trainer, pl_module):
            counts.append((num_batches(monitor.report()), {n: r.num_samples for n, r in monitor.report().items()}))

        on_validation_end = on_validation_start

    monitor = BatchNormMonitor(every_n_epochs=2)
    trainer = trainer_for(tmp_path, monitor, Looks(), val_check_interval=2)
    trainer.fit(Net(), train_data(), val_data())
    per_batch = {"body.wide": BATCH_SIZE * 4, "body.narrow": BATCH_SIZE}
    expected = [
        (dict.fromkeys(LAYERS, count), {name: count * n for name, n in per_batch.items()}) for count in (2, 4, 6)
    ]
    assert counts[::2] == expected  # before each validation
    assert counts[1::2] == expected  # and after it


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_outside_of_fit_counts_nothing_and_puts_no_hook_on_the_model(tmp_path, method):
    model, monitor, hooks = Net(), BatchNormMonitor(), []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            hooks.append(hooks_of(pl_module))

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    trainer = trainer_for(tmp_path, monitor, Looks())
    evaluate = getattr(trainer, method)
    evaluate(model, val_data())
    assert len(monitor.report()) == 0
    trainer.fit(model, train_data())
    before = monitor.report().to_dict()
    evaluate(model, val_data())
    assert monitor.report().to_dict() == before
    assert hooks == [0] * 6


def test_a_frozen_layer_inside_a_training_model_is_counted_and_its_inputs_are_the_population(tmp_path):
    class Frozen(Net):
        def on_train_start(self):
            self.body.wide.running_mean.fill_(0.5)
            self.body.wide.eval()

    model, recorder, monitor = Frozen(), Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(model, train_data(), val_data())
    assert not model.body.wide.training
    assert torch.equal(model.body.wide.running_mean, torch.full((4,), 0.5))
    report = monitor.report()
    assert num_batches(report) == dict.fromkeys(LAYERS, BATCHES)
    values = recorder.population((6, 12), "body.wide")
    np.testing.assert_allclose(report["body.wide"].population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(report["body.wide"].population_var, values.var(axis=1, ddof=1), rtol=1e-5)
    scalars = events(tmp_path)
    for tag, value in recorder.expected((6, 12)).items():
        assert scalars[tag][-1] == (11, close(value)), tag


# ------------------------------------------------------------------------------------------------------ nothing is left


class Fails(Net):
    """Raises at the start of a training or validation step."""

    def __init__(self, exception: BaseException, epoch: int, batch: int, step: str = "training_step") -> None:
        super().__init__()
        self.when = epoch, batch, step
        self.exception = exception

    def raise_if(self, *now):
        if now == self.when:
            raise self.exception

    def training_step(self, batch, batch_idx):
        self.raise_if(self.current_epoch, batch_idx, "training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.raise_if(self.current_epoch, batch_idx, "validation_step")
        super().validation_step(batch, batch_idx)


@pytest.fixture
def sigint_restored():
    """Lightning ignores SIGINT once it has handled a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def hooks_in_training(seen: list[tuple[int, int]], model: nn.Module) -> OnTrainBatchEnd:
    return OnTrainBatchEnd(lambda _: seen.append((hooks_of(model), optimizer_hooks())))


def test_every_hook_is_gone_after_fit(tmp_path):
    model, during = Net(), []
    before = hooks_of(model), optimizer_hooks()
    trainer_for(tmp_path, BatchNormMonitor(), hooks_in_training(during, model)).fit(model, train_data(), val_data())
    assert min(during) > before
    assert all(not module._forward_hooks for module in model.modules())
    assert (hooks_of(model), optimizer_hooks()) == before


@pytest.mark.usefixtures("sigint_restored")
@pytest.mark.parametrize(
    ("exception", "arrives_as"), [(RuntimeError("broken"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
@pytest.mark.parametrize(
    ("step", "epoch", "batch", "window"),
    [
        ("training_step", 0, 0, (0, 0)),
        ("training_step", 0, 4, (0, 4)),  # in the first window: of the window so far
        ("training_step", 1, 2, (0, 6)),  # later: of the last one finished
        ("validation_step", 0, 1, (0, 6)),
    ],
)
def test_every_hook_is_gone_after_an_interruption_and_the_report_tells_of_the_batches_before(
    tmp_path, exception, arrives_as, step, epoch, batch, window
):
    model, recorder, monitor = Fails(exception, epoch, batch, step), Recorder(), BatchNormMonitor()
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(arrives_as):
        trainer_for(tmp_path, recorder, monitor, max_epochs=2).fit(model, train_data(), val_data())
    recorder.teardown(None, None, "fit")
    assert (hooks_of(model), optimizer_hooks()) == before
    report = monitor.report()
    assert set(report) == set(LAYERS)
    assert num_batches(report) == dict.fromkeys(LAYERS, window[1] - window[0])
    for name in LAYERS if window[1] else ():
        expected = recorder.layer_values(window, name)
        assert report[name].summary() == {metric: close(value) for metric, value in expected.items()}


def test_a_fit_after_an_interrupted_one_counts_each_batch_once(tmp_path):
    model, monitor = Fails(RuntimeError("broken"), 0, 3), BatchNormMonitor()
    with pytest.raises(RuntimeError, match="broken"):
        trainer_for(tmp_path, monitor).fit(model, train_data())
    model.when = None
    trainer_for(tmp_path, monitor).fit(model, train_data())
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, BATCHES)
    assert hooks_of(model) == 0


# --------------------------------------------------------------------------------------------------- nothing is changed


class Augmented(Dataset):
    """Draws from all three random number generators."""

    def __init__(self) -> None:
        self.samples = samples()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        x, y = self.samples[index]
        return x + 0.1 * torch.randn(()) + 0.1 * np.random.randn() + 0.1 * random.random(), y.float()


class CastToFloat(Net):
    def forward(self, x):
        return super().forward(x.float())


def trajectory(folder: Path, *callbacks: Callback, **options) -> dict:
    """Everything that training leaves behind."""
    lightning.pytorch.seed_everything(7, verbose=False)
    model = CastToFloat()
    data = DataLoader(Augmented(), batch_size=BATCH_SIZE, shuffle=True)
    trainer = trainer_for(folder, *callbacks, max_epochs=3, logger=CSVLogger(folder), log_every_n_steps=1, **options)
    trainer.fit(model, data, val_data())
    (optimizer,) = trainer.optimizers
    losses = ("train_loss", "val_loss")
    return {
        "weights and buffers": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "losses": [[row[name] for row in read_csv(folder) if row[name]] for name in losses],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "grads": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def identical(one, other) -> bool:
    """Equal to the last bit, type and place."""
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


@pytest.mark.parametrize("arguments", [{}, {"capture": "pass"}, {"every_n_train_batches": 4}])
def test_training_with_the_monitor_is_bit_identical_to_training_without_it(tmp_path, arguments):
    options = {"num_sanity_val_steps": 1, "accumulate_grad_batches": 2}
    without = trajectory(tmp_path / "without", **options)
    monitor = BatchNormMonitor(**arguments)
    monitored = trajectory(tmp_path / "monitored", monitor, **options)
    assert len(monitor.report()) == 2
    assert sum("num_batches_tracked" in name for name in without["weights and buffers"]) == 2
    assert [len(losses) for losses in without["losses"]] == [3, 3]
    assert without.keys() == monitored.keys()
    for what in without:
        assert identical(monitored[what], without[what]), what


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
@pytest.mark.parametrize("argument", ["every_n_epochs", "every_n_train_batches"])
def test_a_period_that_is_no_positive_integer_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be a positive integer.*got {value}"):
        BatchNormMonitor(**{argument: value})


def test_two_periods_at_once_are_refused():
    with pytest.raises(ValueError, match=r"`every_n_epochs` and `every_n_train_batches` exclude.* 2 and 3.*None"):
        BatchNormMonitor(every_n_epochs=2, every_n_train_batches=3)


def test_an_unknown_capture_is_refused():
    with pytest.raises(ValueError, match=r"`capture` must be .*'auto', 'pass'.* got 'fast'"):
        BatchNormMonitor(capture="fast")


@pytest.mark.parametrize("value", ["yes", None, 0, 1, 2])
def test_a_per_layer_that_is_neither_a_bool_nor_auto_is_refused(value):
    with pytest.raises(ValueError, match=f'`per_layer` must be True, False or "auto", got {value!r}'):
        BatchNormMonitor(per_layer=value)


@pytest.mark.parametrize("value", [3, [3], ["body.*", None], b"body"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_that_are_no_strings_are_refused(argument, value):
    with pytest.raises(TypeError) as refusal:
        BatchNormMonitor(**{argument: value})
    message = str(refusal.value)
    assert f"`{argument}`" in message
    assert repr(value) in message
    assert "None" in message


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_no_layer_is_refused_when_fit_starts_and_leaves_no_hook(tmp_path, argument):
    model = Net()
    before = hooks_of(model), optimizer_hooks()
    monitor = BatchNormMonitor(**{argument: ["body.*", "encoder.*"]})
    with pytest.raises(ValueError, match=rf"`{argument}` pattern 'encoder\.\*' .*body\.wide, body\.narrow"):
        trainer_for(tmp_path, monitor).fit(model, train_data())
    assert (hooks_of(model), optimizer_hooks()) == before


def test_a_model_without_batch_norm_trains_on_with_one_warning_that_names_its_norm_layers(tmp_path, capsys):
    network = nn.Sequential(nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    monitor = BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, max_epochs=2, logger=True)
    with pytest.warns(UserWarning, match="No BatchNorm layer") as caught:
        trainer.fit(Net(network), train_data(), val_data())
    (warning,) = [str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)]
    assert "2 LayerNorm" in warning
    assert trainer.global_step == 12
    assert ours(events(tmp_path)) == set()
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss"}
    assert len(monitor.report()) == 0
    assert "No BatchNorm layer" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- short runs


def test_fast_dev_run_reports_its_one_batch(tmp_path):
    model, monitor = Net(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, logger=True, fast_dev_run=True)
    trainer.fit(model, train_data(), val_data())
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 1)
    assert SUMMARY_TAGS.issubset(trainer.callback_metrics)
    assert not list(tmp_path.rglob("events*"))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}])
def test_a_fit_without_a_training_batch_logs_nothing(tmp_path, options):
    model, monitor = Net(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, logger=True, **options)
    trainer.fit(model, train_data(), val_data())
    assert SUMMARY_TAGS.isdisjoint(trainer.callback_metrics)
    for file in tmp_path.rglob("events*"):
        assert ours(events(file.parent)) == set()
    assert all(layer.num_batches == 0 and layer.population_mean.isnan().all() for layer in monitor.report().values())
    assert hooks_of(model) == 0


# ---------------------------------------------------------------------------------------------- layers that are special


class WithSpecialLayers(Net):
    """Beside the usual two: a layer without running statistics and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stateless = nn.BatchNorm1d(1, track_running_stats=False)
        self.spare = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.body(self.stateless(x))


def test_a_layer_without_running_statistics_and_an_unused_one_are_reported_as_nan_and_enter_no_metric(tmp_path):
    recorder, monitor = Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(WithSpecialLayers(), train_data(), val_data())
    report = monitor.report()
    assert list(report) == ["stateless", "body.wide", "body.narrow", "spare"]
    for name in ("stateless", "spare"):
        assert all(math.isnan(value) for value in report[name].summary().values()), name
    stateless, spare = report["stateless"], report["spare"]
    assert (stateless.num_batches, spare.num_batches, spare.num_samples) == (6, 0, 0)
    values = recorder.population((6, 12), "stateless")
    np.testing.assert_allclose(stateless.population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert stateless.running_mean.isnan().all()
    assert spare.population_mean.isnan().all()
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    for tag, value in recorder.expected((6, 12)).items():
        assert scalars[tag][-1] == (11, close(value)), tag


def test_a_model_whose_only_layer_has_no_running_statistics_logs_that_none_is_unhealthy_and_nothing_else(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 1))
    monitor, loggers = BatchNormMonitor(), [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = trainer_for(tmp_path, monitor, logger=loggers)
    trainer.fit(Net(network), train_data())
    assert num_batches(monitor.report()) == {"body.1": BATCHES}
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars)} == {JUDGED: [(5, 0.0)]}
    rows = read_csv(tmp_path)
    assert {key for row in rows for key, value in row.items() if value} == {"epoch", "step", "train_loss", JUDGED}
    assert set(trainer.callback_metrics) == {"train_loss", JUDGED}
    assert trainer.callback_metrics[JUDGED] == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_a_running_statistic_that_is_not_finite_makes_the_largest_eval_error_infinite(tmp_path, buffer, poison):
    class Poisoned(Net):
        def on_train_start(self):
            getattr(self.body.wide, buffer)[0] = poison

    recorder = Recorder()
    trainer = trainer_for(tmp_path, recorder, BatchNormMonitor(), logger=True)
    trainer.fit(Poisoned(), train_data())
    scalars = events(tmp_path)
    assert scalars["bn/eval_error_max"] == [(5, math.inf)]
    assert scalars["bn.eval_error/body.wide"] == [(5, math.inf)]
    assert math.isinf(trainer.callback_metrics["bn/eval_error_max"])
    assert trainer.callback_metrics[JUDGED] == 1
    untouched = recorder.layer_values((0, BATCHES), "body.narrow")
    assert scalars["bn.eval_error/body.narrow"] == [(5, close(untouched["eval_error"]))]
    assert all(math.isfinite(scalars[f"bn.{name}/body.wide"][0][1]) for name in ("act_rmse", "mean_shift"))


# ----------------------------------------------------------------------------------------- when layers need attention


class AtRest(Net):
    """Learns nothing. One layer is healthy from the first epoch of 20 batches on, the other noisy."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = body()
        del network.dropout
        network.wide.momentum, network.narrow.momentum = 0.2, 0.9
        super().__init__(network)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OnTrainEpochStart(Callback):
    """Does something at the beginning of some epochs."""

    def __init__(self, actions) -> None:
        self.actions = actions

    def on_train_epoch_start(self, trainer, pl_module):
        self.actions.get(trainer.current_epoch, lambda _: None)(pl_module.body)


def poison(layer):
    return lambda network: network.get_submodule(layer).running_mean.fill_(math.nan)


def warned(run) -> list[str]:
    """The warnings about layers that something gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)]


class SideBySide(nn.Module):
    """A noisy layer, or several of them."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(6, momentum=0.9) for _ in range(num_layers))
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        return self.out(sum(layer(x.flatten(1)) for layer in self.layers))


def fit(tmp_path, monitor, *callbacks, model=None, num_batches=20, **options):
    trainer = trainer_for(tmp_path, *callbacks, monitor, **options)
    trainer.fit(AtRest() if model is None else model, train_data(num_batches), val_data())
    return trainer


def test_the_number_of_layers_that_need_attention_is_logged_for_each_window(tmp_path):
    spoil = OnTrainEpochStart({1: poison("narrow"), 2: poison("wide")})
    trainer = fit(tmp_path, BatchNormMonitor(), spoil, max_epochs=4, logger=True)
    assert events(tmp_path)[JUDGED] == [(19, 1.0), (39, 1.0), (59, 2.0), (79, 2.0)]
    assert trainer.callback_metrics[JUDGED] == 2


@pytest.mark.parametrize("arguments", [{}, {"on_unhealthy": "warn"}])
def test_each_layer_and_verdict_is_warned_of_once_in_a_fit(tmp_path, arguments):
    spoil = OnTrainEpochStart({2: poison("narrow"), 4: poison("wide")})
    monitor, by_epoch = BatchNormMonitor(**arguments), []

    class Count(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            by_epoch.append(monitor.report().summary().get("unhealthy_layers"))

    messages = warned(lambda: fit(tmp_path, monitor, spoil, Count(), max_epochs=6))
    assert by_epoch == [0, 1, 1, 1, 1, 2]  # at the end of the epochs before
    assert [
        [f" {layer} ({verdict}, eval_error " in message for layer in LAYERS for verdict in ("noisy", "non-finite")]
        for message in messages
    ] == [[False, False, True, False], [False, False, False, True], [False, True, False, False]]

    again = warned(lambda: fit(tmp_path, monitor, max_epochs=2))
    assert again == messages[:1]


def test_a_warning_comes_at_the_end_of_the_window(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        trainer = trainer_for(tmp_path, BatchNormMonitor(every_n_train_batches=10), Look())
        trainer.fit(AtRest(), train_data(20))
    assert seen == [seen[0]] * 9 + [seen[0] + 1] * 11


def test_many_layers_are_warned_of_in_one_line_the_first_five_by_name(tmp_path):
    monitor = BatchNormMonitor()
    (message,) = warned(lambda: fit(tmp_path, monitor, model=Net(SideBySide(12)), num_batches=12))
    unhealthy = monitor.report().unhealthy
    assert len(unhealthy) == 12
    told = [f" {layer.name} ({layer.verdict}, eval_error " in message for layer in unhealthy]
    assert told == [True] * 5 + [False] * 7
    assert " and 7 more. " in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("on_unhealthy", ["warn", "raise"])
@pytest.mark.parametrize("window", ["healthy", "too short to tell"])
def test_where_no_layer_needs_attention_there_is_no_warning_and_nothing_is_raised(tmp_path, window, on_unhealthy):
    model, monitor = AtRest(), BatchNormMonitor(on_unhealthy=on_unhealthy)
    if window == "healthy":
        model.body.narrow.momentum = 0.05
        torch.optim.swa_utils.update_bn(train_data(20), model)
    num_batches = 20 if window == "healthy" else 6
    assert warned(lambda: fit(tmp_path, monitor, model=model, num_batches=num_batches, max_epochs=2)) == []
    verdict = "healthy" if window == "healthy" else "insufficient-data"
    assert [layer.verdict for layer in monitor.report().values()] == [verdict] * 2


def test_to_ignore_is_silent_and_still_counts(tmp_path):
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    assert warned(lambda: fit(tmp_path, monitor, max_epochs=2, logger=True)) == []
    assert events(tmp_path)[JUDGED] == [(19, 1.0), (39, 1.0)]
    assert [layer.name for layer in monitor.report().unhealthy] == ["body.narrow"]


@pytest.mark.parametrize(
    ("arguments", "epoch", "num_batches", "steps"),
    [
        ({}, 0, 20, [19]),
        ({}, 2, 60, [19, 39, 59]),
        ({"every_n_epochs": 2}, 0, 40, [39]),
        ({"every_n_train_batches": 9}, 0, 9, [8]),
        ({"every_n_train_batches": 30}, 2, 60, [29, 59]),
    ],
)
def test_to_raise_ends_the_fit_after_the_window_is_logged_and_leaves_nothing_on_the_model(
    tmp_path, arguments, epoch, num_batches, steps
):
    model, recorder, monitor = AtRest(), Recorder(), BatchNormMonitor(on_unhealthy="raise", **arguments)
    model.body.narrow.momentum, model.body.narrow.eps = 0.05, 1.0  # so that its sampling noise is small
    validations = []

    class Look(Callback):
        def on_validation_start(self, trainer, pl_module):
            validations.append(trainer.current_epoch)

    before = hooks_of(model), optimizer_hooks()
    spoil = OnTrainEpochStart({epoch: poison("wide")})
    trainer = trainer_for(tmp_path, recorder, spoil, Look(), monitor, max_epochs=4, logger=True)
    with pytest.raises(UnhealthyBatchNormError) as raised:
        trainer.fit(model, train_data(20), val_data())
    recorder.teardown(None, None, "fit")
    assert (hooks_of(model), optimizer_hooks()) == before
    assert len(recorder.batches) == num_batches
    assert validations == list(range((num_batches - 1) // 20))  # it was not validated after

    report = raised.value.report
    assert report is monitor.report()
    assert report["body.wide"].verdict == "non-finite"
    assert report["body.wide"].num_batches == num_batches - (steps[-2] + 1 if len(steps) > 1 else 0)
    assert str(raised.value) == report.brief()
    assert "body.wide: non-finite" in str(raised.value)

    scalars = events(tmp_path)
    assert {tag: steps_of(scalars[tag]) for tag in SUMMARY_TAGS} == dict.fromkeys(SUMMARY_TAGS, steps)
    assert [value > 0 for _, value in scalars[JUDGED]] == [False] * (len(steps) - 1) + [True]
    assert trainer.callback_metrics[JUDGED] == len(report.unhealthy)
    assert math.isinf(trainer.callback_metrics["bn/eval_error_max"])


def test_the_monitor_that_raised_can_be_used_for_another_fit(tmp_path):
    monitor = BatchNormMonitor(on_unhealthy="raise")
    with pytest.raises(UnhealthyBatchNormError):
        fit(tmp_path, monitor)
    model = AtRest()
    fit(tmp_path, monitor, model=model, num_batches=6)
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 6)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)  # fmt: skip
def test_what_is_raised_can_be_sent_between_processes(tmp_path, duplicate):
    with pytest.raises(UnhealthyBatchNormError) as raised:
        fit(tmp_path, BatchNormMonitor(on_unhealthy="raise"), OnTrainEpochStart({0: poison("wide")}))
    same = duplicate(raised.value)
    assert type(same) is UnhealthyBatchNormError
    assert isinstance(same, RuntimeError)
    assert str(same) == str(raised.value)
    assert same.report.to_dict() == raised.value.report.to_dict()


@pytest.mark.parametrize("value", ["error", "", None, True, 3])
def test_a_reaction_that_is_unknown_is_refused(value):
    with pytest.raises(ValueError, match=rf"`on_unhealthy` must be .*'warn', 'ignore', 'raise'.* got {value!r}"):
        BatchNormMonitor(on_unhealthy=value)


def test_the_summary_at_the_end_of_fit_is_short_for_a_deep_network(tmp_path, capsys):
    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(Net(SideBySide(150)), train_data(10))
    printed = capsys.readouterr().out
    report = monitor.report()
    assert report.brief() in printed
    assert printed.count("running statistics in the last window") == 1
    assert "150 of 150 BatchNorm layers need attention: 150 noisy." in printed
    rows = [line for line in printed.splitlines() if line.startswith("body.layers.") and "noisy  " in line]
    assert [row.split()[0] for row in rows] == [layer.name for layer in report.worst(10)]
    assert len(printed.strip().splitlines()) <= 35
    assert len(str(report).splitlines()) > 150


# ---------------------------------------------------------------------------------------------------- the other package


def test_it_works_in_a_trainer_of_pytorch_lightning(tmp_path):
    class OtherNet(Steps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = body()

    class OtherRecorder(Recorder, pytorch_lightning.Callback):
        pass

    model, recorder, monitor = OtherNet(), OtherRecorder(), BatchNormMonitor()
    before = hooks_of(model), optimizer_hooks()
    trainer = trainer_for(
        tmp_path, recorder, monitor, trainer_class=pytorch_lightning.Trainer, max_epochs=2, logger=True
    )
    trainer.fit(model, train_data(), val_data())
    scalars = events(tmp_path)
    windows = [recorder.expected(window) for window in windows_of(6, 12)]
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(5, close(windows[0][tag])), (11, close(windows[1][tag]))] for tag in windows[0]
    }
    assert steps_of(scalars[JUDGED]) == [5, 11]
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, BATCHES)
    assert float(trainer.callback_metrics["bn/eval_error_max"]) == close(windows[1]["bn/eval_error_max"])
    assert (hooks_of(model), optimizer_hooks()) == before


# ----------------------------------------------------------------------------------------------- beside other callbacks


@pytest.mark.parametrize("monitor_first", [True, False])
def test_stochastic_weight_averaging_may_reset_the_count_of_batches_before_or_after_the_monitor(
    tmp_path, monitor_first
):
    monitor, averaging = BatchNormMonitor(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    seen = []

    class Look(Callback):
        def on_validation_start(self, trainer, pl_module):
            layer = monitor.report()["body.wide"]
            seen.append((layer.momentum, layer.flags, layer.evidence["initial_weight"]))
            assert layer.evidence["updates_per_call"] == 1

    callbacks = [monitor, averaging] if monitor_first else [averaging, monitor]
    trainer_for(tmp_path, *callbacks, Look(), max_epochs=4).fit(Net(), train_data(), val_data())
    assert seen[:4] == [(0.1, (), pytest.approx(0.9 ** (BATCHES * epoch))) for epoch in range(1, 5)]
    assert seen[4:] == [(None, ("written-outside",), 0.0)]  # the averaged weights' statistics are computed afresh
    assert monitor.report()["body.wide"].momentum is None


@pytest.mark.parametrize("kwargs", [{}, {"every_n_train_batches": 4}])
def test_calls_before_the_first_batch_do_not_count(tmp_path, kwargs):
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            assert pl_module.training
            for _ in range(3):
                pl_module(torch.randn(8, 1, 6))

    counts = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(monitor.report()["body.wide"].num_batches)

    monitor = BatchNormMonitor(**kwargs)
    trainer_for(tmp_path, Early(), monitor, Look()).fit(Net(), train_data())
    assert counts == ([1, 2, 3, 4, 4, 4] if kwargs else [1, 2, 3, 4, 5, 6])


def test_a_copy_of_the_monitor_made_while_it_runs_can_be_used_for_another_fit(tmp_path):
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                copies.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    monitor = BatchNormMonitor(every_n_train_batches=2)
    trainer_for(tmp_path, monitor, Copy()).fit(Net(), train_data())
    assert monitor.report()["body.wide"].num_batches == 2
    for copied in copies:
        assert copied.report()["body.wide"].num_batches == 2
        trainer_for(tmp_path, copied).fit(Net(), train_data(5))
        assert copied.report()["body.wide"].num_batches == 1


def test_the_monitor_can_be_pickled_after_a_fit_and_after_an_interrupted_one(tmp_path):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("on purpose")

    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor).fit(Net(), train_data())
    assert pickle.loads(pickle.dumps(monitor)).report()["body.wide"].num_batches == 6
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_for(tmp_path, monitor, Failing()).fit(Net(), train_data())
    assert len(pickle.loads(pickle.dumps(monitor)).report()) == 0


def test_half_epoch_windows_are_fresh_in_each_validation_of_half_an_epoch(tmp_path):
    monitor = BatchNormMonitor(every_n_train_batches=3)
    checkpoint = ModelCheckpoint(monitor="bn/eval_error_max", save_top_k=-1, dirpath=tmp_path)
    trainer_for(tmp_path, monitor, checkpoint, max_epochs=2, val_check_interval=0.5).fit(
        Net(), train_data(), val_data()
    )
    assert len(set(map(float, checkpoint.best_k_models.values()))) == 4


def test_a_strategy_that_nobody_has_shown_to_work_is_refused(tmp_path):
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    trainer = trainer_for(tmp_path, BatchNormMonitor(), strategy=DeepSpeedStrategy(torch.device("cpu")))
    with pytest.raises(ValueError, match="BatchNormMonitor does not support DeepSpeed"):
        trainer.fit(Net(), train_data())


@pytest.mark.parametrize("prefix", ["", 3])
def test_a_prefix_that_is_no_name_is_refused(prefix):
    with pytest.raises(ValueError, match=f"`log_key_prefix` must be a string that is not empty, got {prefix!r}"):
        BatchNormMonitor(log_key_prefix=prefix)
