"""Fits with the monitor against every value the layers received, and against the same fit without it."""

from collections import OrderedDict, defaultdict

import numpy as np
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor

BATCHES = 10  # in an epoch
BATCH_SIZE = 32
MOMENTUM = 0.2


# ------------------------------------------------------------------------------------------------------ models and data


def network(widths=(4, 3)):
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv1d(1, widths[0], 3),
            a=nn.BatchNorm1d(widths[0], momentum=MOMENTUM),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            linear=nn.Linear(4 * widths[0], widths[1]),
            b=nn.BatchNorm1d(widths[1], momentum=MOMENTUM),
            out=nn.Linear(widths[1], 1),
        )
    )


class Steps:
    lr = 0.002

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x).float(), y.float())

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self(batch[0]).float().square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Net(Steps, LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()


def samples(num=BATCHES * BATCH_SIZE, offset=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(num, 1, 6, generator=generator) + offset
    return TensorDataset(x, x.mean(dim=2) + torch.randn(num, 1, generator=generator))


def train_data(**kwargs):
    return DataLoader(samples(**kwargs), batch_size=BATCH_SIZE, shuffle=True)


def val_data(seed=2):
    """Inputs so far from those of training that counting any of them would show."""
    return DataLoader(samples(2 * BATCH_SIZE, offset=100.0, seed=seed), batch_size=BATCH_SIZE)


# -------------------------------------------------------------------------------------------- the independent reference


class Recorder(Callback):
    """Every value that training batches gave to every BatchNorm layer, and the buffers after each batch."""

    def __init__(self):
        self.batches, self.buffers, self.calls, self.handles = [], [], None, []

    def on_fit_start(self, trainer, pl_module):
        self.layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self.store(name, args[0])))

    def store(self, name, x):
        if self.calls is not None:
            self.calls[name].append(np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1).copy())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls = defaultdict(list)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(self.calls)
        self.calls = None
        self.buffers.append(
            {
                name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
                for name, layer in self.layers.items()
                if layer.running_mean is not None
            }
        )

    def teardown(self, trainer, pl_module, stage):
        for handle in self.handles:
            handle.remove()


class Windows(Callback):
    """Each report as it comes, and how many training batches there were before it."""

    def __init__(self, monitor):
        self.monitor, self.ends, self.reports, self.count = monitor, [], [], 0

    def look(self):
        report = self.monitor._report
        if report is None or any(report is other for other in self.reports):
            return
        if (
            self.reports
            and report
            and all(report[name].numbers is layer.numbers for name, layer in self.reports[-1].items())
        ):
            self.reports[-1] = report  # the same window, after validation
        else:
            self.ends.append(self.count)
            self.reports.append(report)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        self.look()

    def on_validation_start(self, trainer, pl_module):
        self.look()

    def on_train_epoch_end(self, trainer, pl_module):
        self.look()

    def on_train_end(self, trainer, pl_module):
        self.look()


class OtherRecorder(Recorder, pytorch_lightning.Callback):
    pass


class OtherWindows(Windows, pytorch_lightning.Callback):
    pass


def check_layer(layer, calls, buffers):
    assert layer.num_batches == len(calls), layer.name
    if calls:
        values = np.concatenate(calls, axis=1)
        assert layer.num_samples == values.shape[1], layer.name
        mean, var = values.mean(axis=1), values.var(axis=1, ddof=1)
        std = np.sqrt(var + layer.eps)
        assert (np.abs(layer.population_mean.numpy() - mean) <= 2e-6 * (std + np.abs(mean))).all(), layer.name
        assert (np.abs(layer.population_var.numpy() - var) <= 2e-5 * std**2).all(), layer.name
    if buffers is not None:
        assert (layer.running_mean == buffers[0]).all(), layer.name
        assert (layer.running_var == buffers[1]).all(), layer.name


class Ran:
    """A fit with the monitor: what it left, and what the recorder says of it."""

    def __init__(self, trainer, model, monitor, recorder, windows, twin=None):
        self.trainer, self.model, self.monitor, self.recorder, self.twin = trainer, model, monitor, recorder, twin
        self.ends, self.reports = windows.ends, windows.reports

    def check(self, *ends, without=()):
        """Windows end after so many batches, and their populations and running statistics are what was recorded."""
        assert self.ends == list(ends)
        assert len(self.recorder.batches) == ends[-1]
        for start, end, report in zip([0, *ends], ends, self.reports, strict=False):
            trained = {name: layer for name, layer in report.items() if layer.averaged_of is None}
            assert set(trained) == set(self.recorder.layers) - set(without)
            for name, layer in trained.items():
                calls = [call for batch in self.recorder.batches[start:end] for call in batch[name]]
                check_layer(layer, calls, self.recorder.buffers[end - 1].get(name))
        assert self.monitor.report() is self.reports[-1]
        return self

    def verdicts(self, window=-1):
        return {name: layer.verdict for name, layer in self.reports[window].items()}

    def flags(self, window=-1):
        return {name: layer.flags for name, layer in self.reports[window].items()}

    def flags_of_training(self, window=-1):
        """All but the one that validation adds, whose data are far off."""
        return {name: tuple(flag for flag in its if flag != "domain-shift") for name, its in self.flags(window).items()}

    def check_healthy(self, in_validation="domain-shift"):
        """All but the first window are healthy, with one flag where there was validation: its data are far off."""
        for report in self.reports[1:]:
            for layer in report.values():
                flags = (in_validation,) if "val_error" in layer.evidence else ()
                verdict = "healthy" if layer.averaged_of is None else "averaged"
                assert (layer.verdict, layer.flags) == (verdict, flags), report
        return self


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def trainer_for(tmp_path, callbacks, trainer_class=Trainer, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "logger": False,
        "default_root_dir": tmp_path,
    }
    return trainer_class(callbacks=list(callbacks), **(defaults | options))


def fit(
    tmp_path,
    make_model=Net,
    others=tuple,
    monitor=None,
    monitor_first=True,
    data=train_data,
    val=val_data,
    other_package=False,
    twin=True,
    **options,
):
    """Train with the monitor, and once more without it (``twin``), which must leave the same to the last bit.

    ``twin`` may be that of an earlier fit which differs in what concerns the monitor alone.
    """
    monitor = BatchNormMonitor() if monitor is None else monitor
    recorder = (OtherRecorder if other_package else Recorder)()
    windows = (OtherWindows if other_package else Windows)(monitor)
    optimizer_hooks = len(_global_optimizer_post_hooks), len(_global_optimizer_pre_hooks)

    def train(folder, *callbacks):
        seed_everything(3, verbose=False)
        model = make_model()
        trainer = trainer_for(folder, callbacks, **options)
        loaders = (data and data(), val and val()) if data else ()
        trainer.fit(model, *loaders)
        return trainer, model, torch.get_rng_state()

    beside = [monitor, *others()] if monitor_first else [*others(), monitor]
    trainer, model, state = train(tmp_path, recorder, *beside, windows)
    assert (len(_global_optimizer_post_hooks), len(_global_optimizer_pre_hooks)) == optimizer_hooks
    if twin is True:
        twin = train(tmp_path / "twin", *others())
    if twin:
        other_trainer, other, other_state = twin
        assert hooks_of(model) == hooks_of(other)
        assert trainer.global_step == other_trainer.global_step
        one, two = model.state_dict(), other.state_dict()
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key
        assert torch.equal(state, other_state)
    return Ran(trainer, model, monitor, recorder, windows, twin)


def fit_in_both_orders(tmp_path, *args, **options):
    """With the monitor before and after the other callbacks, and once without it."""
    first = fit(tmp_path / "first", *args, **options)
    return first, fit(tmp_path / "last", *args, monitor_first=False, twin=first.twin, **options)
