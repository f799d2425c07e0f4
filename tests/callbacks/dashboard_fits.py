"""Fits of a layer that recovers beside one that does not, with loggers that keep what they get."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.event_files import Events

C = 3
BATCHES, BATCH_SIZE = 16, 32  # in an epoch
LAYERS = ("quick", "slow")
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
SUMMARY = ("eval_error_max", "eval_error_p90", "eval_error_median", "act_rmse_max", "mean_shift_max")


# -------------------------------------------------------------------------------------------------------------- running


class Net(LightningModule):
    """A layer that is healthy in the third epoch, and one that never is."""

    def __init__(self, momenta=None):
        super().__init__()
        torch.manual_seed(0)
        for name, momentum in (momenta or dict(zip(LAYERS, (0.1, 0.02), strict=True))).items():
            self.add_module(name, nn.BatchNorm1d(C, momentum=momentum))
        self.out = nn.Linear(C, 1)

    def training_step(self, batch, batch_idx):
        # By the step, so that a run that is resumed in mid-epoch has the same data.
        generator = torch.Generator().manual_seed(2 * self.trainer.global_step + self.global_rank)
        x = torch.randn(batch[0].shape, generator=generator) + 4
        layers = [module for module in self.children() if isinstance(module, nn.BatchNorm1d)]
        return self.out(sum(layer(x) for layer in layers)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(num_batches=BATCHES):
    return DataLoader(TensorDataset(torch.zeros(num_batches * BATCH_SIZE, C)), batch_size=BATCH_SIZE)


def fit(logger, *callbacks, model=None, loader=None, ckpt_path=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, "num_sanity_val_steps": 0, **quiet, **options}
    model = model or Net()
    trainer = Trainer(logger=logger, callbacks=list(callbacks), **options)
    trainer.fit(model, loader or data(), ckpt_path=ckpt_path)
    return model, trainer


def board(tmp_path, **options):
    return TensorBoardLogger(tmp_path, name="run", **options)


class Look(Callback):
    """Keeps the report of every window. Comes after the monitor."""

    def __init__(self, monitor):
        self.monitor, self.reports = monitor, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        report = self.monitor.report()
        if report is not self.monitor.report():
            return  # of a window that has not ended: a new one each time
        if not self.reports or report is not self.reports[-1]:
            self.reports.append(report)


class At(Callback):
    """Calls a function with the trainer at the end of a training batch, counted from 1."""

    def __init__(self, batch, function):
        self.batch, self.function, self.count = batch, function, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            self.function(trainer)


class Save:
    def __init__(self, path):
        self.path = path

    def __call__(self, trainer):
        trainer.save_checkpoint(self.path)


class StoppedError(Exception):
    pass


def stop(_):
    raise StoppedError


# ------------------------------------------------------------------------------------------------------ the default run


class Run(NamedTuple):
    folder: Path
    events: Events
    reports: list
    tags: set


STEPS = [BATCHES * epoch - 1 for epoch in (1, 2, 3, 4)]


def verdicts(report):
    return {name: layer.verdict for name, layer in report.items()}


# --------------------------------------------------------------------------------------------------------------- charts


def scalar_tags(prefix, layers=LAYERS):
    summary = {f"{prefix}/{name}" for name in (*SUMMARY, "unhealthy_layers")}
    return summary | {f"{prefix}.{metric}/{layer}" for metric in METRICS for layer in layers}


OURS = ["BatchNorm health", "BatchNorm layers"]
THEIRS = {
    "mine": {"both": ["Multiline", ["loss/.*", "val_loss"]], "band": ["Margin", ["mid", "low", "high"]]},
    "second": {"one": ["Multiline", ["x"]]},
}


# -------------------------------------------------------------------------------------------------------- other loggers


class Plain(Logger):
    """Keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.metrics, self.images, self.texts = [], [], []

    name, version = "memory", 0

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def of_ours(self):
        return [(step, metrics) for step, metrics in self.metrics if "bn/unhealthy_layers" in metrics]


class OnlyText(Plain):
    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.texts.append((key, columns, data, dataframe, step))


class OnlyImages(Plain):
    def log_image(self, key, images, step=None, **kwargs):
        if not isinstance(images, list):
            raise TypeError("a list is expected, as WandbLogger does")
        self.images.append((key, images, step, kwargs))


class Files:
    """What keeps the files that it is given."""

    def __init__(self):
        self.files = []

    def keep(self, path, *more):
        self.files.append((Path(path).name, Path(path).read_text(encoding="utf-8"), *more))


class MlflowClient(Files):
    def log_artifact(self, run_id, local_path, artifact_path=None):
        self.keep(local_path, run_id, artifact_path)


class LikeMlflow(Plain):
    run_id = "the run"

    def __init__(self):
        super().__init__()
        self.experiment = MlflowClient()


class WandbRun(Files):
    def log_artifact(self, artifact_or_path, name=None, type=None, aliases=None, tags=None):
        self.keep(artifact_or_path, name, type)


class CometExperiment(Files):
    def log_artifact(self, artifact):
        raise AssertionError("an artifact of Comet's is no file")

    def log_asset(self, file_data, file_name=None, overwrite=False, copy_to_tmp=True):
        self.files.append((file_name, file_data.read()))


class TakesFiles(Plain):
    """As WandbLogger and CometLogger have an experiment."""

    def __init__(self, experiment):
        super().__init__()
        self.experiment = experiment


class LikeWandb(OnlyText, OnlyImages):
    pass


def weights(model, trainer):
    (optimizer,) = trainer.optimizers
    state = [value for of in optimizer.state.values() for value in of.values()]
    return [*model.state_dict().values(), *state]


def assert_same(tensors, others):
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def interrupt(_):
    raise KeyboardInterrupt
