"""The monitor beside what else people put into a Trainer, against every value that the layers received."""

import copy
import importlib.util
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
]
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
        return nn.functional.mse_loss(self(x).float(), y)

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

    def __init__(self, trainer, model, monitor, recorder, windows):
        self.trainer, self.model, self.monitor, self.recorder = trainer, model, monitor, recorder
        self.ends, self.reports = windows.ends, windows.reports

    def check(self, *ends, without=()):
        """Windows end after so many batches, and their populations and running statistics are what was recorded."""
        assert self.ends == list(ends)
        assert len(self.recorder.batches) == ends[-1]
        for start, end, report in zip([0, *ends], ends, self.reports, strict=False):
            assert set(report) == set(self.recorder.layers) - set(without)
            for name, layer in report.items():
                calls = [call for batch in self.recorder.batches[start:end] for call in batch[name]]
                check_layer(layer, calls, self.recorder.buffers[end - 1].get(name))
        assert self.monitor.report() is self.reports[-1]
        return self

    def verdicts(self, window=-1):
        return {name: layer.verdict for name, layer in self.reports[window].items()}

    def flags(self, window=-1):
        return {name: layer.flags for name, layer in self.reports[window].items()}

    def check_healthy(self):
        for report in self.reports[1:]:
            assert {(layer.verdict, layer.flags) for layer in report.values()} == {("healthy", ())}, report
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
    """Train with the monitor, and once more without it (``twin``), which must leave the same to the last bit."""
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
    if twin:
        other_trainer, other, other_state = train(tmp_path / "twin", *others())
        assert hooks_of(model) == hooks_of(other)
        assert trainer.global_step == other_trainer.global_step
        one, two = model.state_dict(), other.state_dict()
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key
        assert torch.equal(state, other_state)
    return Ran(trainer, model, monitor, recorder, windows)


def test_the_reference_notices_a_batch_that_is_missing(tmp_path):
    ran = fit(tmp_path, twin=False).check(10, 20).check_healthy()
    del ran.recorder.batches[-1]["net.a"][0]
    with pytest.raises(AssertionError):
        ran.check(10, 20)


# ------------------------------------------------------------------------------------- callbacks that write the weights

both_orders = pytest.mark.parametrize("monitor_first", [True, False])


@both_orders
def test_stochastic_weight_averaging(tmp_path, monitor_first):
    def others():
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]

    ran = fit(tmp_path, others=others, monitor_first=monitor_first, max_epochs=4)
    ran.check(10, 20, 30, 40, 50)  # the last epoch computes the averaged weights' statistics afresh
    assert [ran.flags(i)["net.a"] for i in range(5)] == [(), (), (), (), ("written-outside",)]
    assert ran.verdicts() == dict.fromkeys(("net.a", "net.b"), "healthy")


@both_orders
@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_weight_averaging_swaps_weights_in_validation_and_the_report_is_of_those_that_train(
    tmp_path, averaging, use_buffers, monitor_first
):
    def others():
        return [averaging(use_buffers=use_buffers)]

    ran = fit(tmp_path, others=others, monitor_first=monitor_first, val_check_interval=0.5)
    ran.check(10, 20).check_healthy()


class Unfreezes(BaseFinetuning):
    def __init__(self, train_bn):
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.conv, pl_module.net.a], train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.net.conv, pl_module.net.a], optimizer, lr=0.002)


class FiltersParameters(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.002)


@both_orders
def test_finetuning_that_freezes_batch_norm_is_stale_until_it_is_unfrozen(tmp_path, monitor_first):
    ran = fit(tmp_path, FiltersParameters, lambda: [Unfreezes(False)], monitor_first=monitor_first, max_epochs=5)
    ran.check(10, 20, 30, 40, 50)
    assert [ran.verdicts(i)["net.a"] for i in (0, 1, 3, 4)] == ["stale", "stale", "healthy", "healthy"]
    assert ran.verdicts(2)["net.a"] in ("warming-up", "healthy")
    assert [ran.flags(i)["net.a"] for i in range(5)] == [("not-updating",), ("not-updating",), (), (), ()]
    assert ran.reports[0]["net.a"].needs_attention
    assert {ran.flags(i)["net.b"] for i in range(5)} == {()}
    assert ran.reports[2]["net.a"].evidence["initial_weight"] == pytest.approx((1 - MOMENTUM) ** 10)


def test_finetuning_that_trains_batch_norm_is_as_without_it(tmp_path):
    ran = fit(tmp_path, FiltersParameters, lambda: [Unfreezes(True)], max_epochs=4)
    ran.check(10, 20, 30, 40).check_healthy()


def test_pruning_leaves_the_layers_alone(tmp_path):
    def others():
        return [ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"], make_pruning_permanent=True)]

    ran = fit(tmp_path, others=others)
    ran.check(10, 20).check_healthy()


@both_orders
def test_callbacks_that_only_watch(tmp_path, monitor_first):
    def others():
        return [
            *(LearningRateMonitor(), Timer(), TQDMProgressBar(), ModelSummary(max_depth=-1)),
            *([DeviceStatsMonitor()] if importlib.util.find_spec("psutil") else []),
            *(ModelCheckpoint(save_last=True), EarlyStopping("val_loss", patience=9)),
            GradientAccumulationScheduler({0: 1, 1: 3}),
        ]

    kwargs = {"logger": [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]}
    ran = fit(
        tmp_path, others=others, monitor_first=monitor_first, num_sanity_val_steps=2, enable_progress_bar=True, **kwargs
    )
    ran.check(10, 20).check_healthy()
    assert "bn/eval_error_max" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


@both_orders
def test_rich_progress_bar_and_model_summary_with_an_example_input(tmp_path, monitor_first, capsys):
    pytest.importorskip("rich")

    class WithExample(Net):
        example_input_array = torch.full((5, 1, 6), 1e3)

    ran = fit(
        tmp_path,
        WithExample,
        lambda: [RichProgressBar(), RichModelSummary(max_depth=-1)],
        monitor_first=monitor_first,
        enable_progress_bar=True,
        enable_model_summary=True,
    )
    ran.check(10, 20).check_healthy()
    assert "BatchNorm: running statistics in the last window" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- trials before training


class OwnData(Net):
    """Has its batch size and learning rate where the finders look for them."""

    def __init__(self):
        super().__init__()
        self.batch_size, self.lr = 8, 0.002

    def train_dataloader(self):
        return DataLoader(samples(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return val_data()


class LearningRateFinderAt(LearningRateFinder):
    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def finds_learning_rate(at_start=True):
    finder = LearningRateFinder if at_start else LearningRateFinderAt
    return [finder(min_lr=1e-4, max_lr=0.1, num_training_steps=25)]


def finds_batch_size():
    return [BatchSizeFinder(init_val=16, max_trials=2, steps_per_trial=2)]


@pytest.mark.parametrize("finder", [finds_learning_rate, finds_batch_size])
@both_orders
def test_what_a_finder_tries_before_training_does_not_count(tmp_path, monitor_first, finder):
    ran = fit(tmp_path, OwnData, finder, monitor_first=monitor_first, data=None, max_epochs=2)
    batches = ran.trainer.num_training_batches
    assert batches == (40 if finder is finds_learning_rate else 10)
    ran.check(batches, 2 * batches)
    assert set(ran.flags(0).values()) == set(ran.flags(1).values()) == {()}
    for report in ran.reports:
        assert {layer.evidence["updates_per_call"] for layer in report.values()} == {1}
    weights = [layer.evidence["initial_weight"] for layer in ran.reports[0].values()]
    assert weights == pytest.approx([(1 - MOMENTUM) ** batches] * 2)


@both_orders
@pytest.mark.parametrize(
    ("window", "ends"),
    [
        ({}, [40, 80, 120]),
        ({"every_n_train_batches": 28}, [28, 56, 84, 112, 120]),
        ({"every_n_epochs": 2}, [80, 120]),
    ],
)
def test_what_a_finder_tries_between_epochs_does_not_count(tmp_path, monitor_first, window, ends):
    # (After a BatchSizeFinder there, Lightning 2.6 trains on nothing any more, with or without us.)
    def others():
        return finds_learning_rate(at_start=False)

    ran = fit(tmp_path, OwnData, others, BatchNormMonitor(**window), monitor_first, data=None, max_epochs=3)
    ran.check(*ends)
    for report in ran.reports:
        assert {layer.flags for layer in report.values()} == {()}
        assert {layer.evidence["updates_per_call"] for layer in report.values()} == {1}


# ---------------------------------------------------------------------------------------------------- options and loops

OPTIONS = {
    "limit_val_batches=0": ({"limit_val_batches": 0}, 10),
    "limit_val_batches=1": ({"limit_val_batches": 1, "num_sanity_val_steps": -1}, 10),
    "both limits by share": ({"limit_train_batches": 0.8, "limit_val_batches": 0.5}, 8),
    "overfit_batches by share": ({"overfit_batches": 0.9}, 9),
    "val_check_interval, accumulated": ({"val_check_interval": 0.3, "accumulate_grad_batches": 4}, 10),
    "clipped, anomalies detected": ({"gradient_clip_val": 0.1, "detect_anomaly": True}, 10),
    "grad mode in validation": ({"inference_mode": False}, 10),
    "loaders reloaded": ({"reload_dataloaders_every_n_epochs": 1}, 10),
    "profiled": ({"profiler": "simple"}, 10),
    "deterministic": ({"deterministic": True, "benchmark": False}, 10),
    "sync_batchnorm": ({"sync_batchnorm": True}, 10),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_trainer(tmp_path, option):
    options, batches = OPTIONS[option]
    fit(tmp_path, **options).check(batches, 2 * batches).check_healthy()


def test_a_barebones_trainer(tmp_path):
    options = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"))
    ran = fit(tmp_path, barebones=True, **options, num_sanity_val_steps=None, max_epochs=2)
    ran.check(10, 20).check_healthy()


class TwoInputs(Steps, LightningModule):
    """Each layer belongs to one of two loaders, either of which may have nothing in a batch."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: network() for name in ("one", "two")})

    def training_step(self, batch, batch_idx):
        losses = [
            nn.functional.mse_loss(self.heads[name](x_y[0]), x_y[1]) for name, x_y in batch.items() if x_y is not None
        ]
        return sum(losses)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.heads["one"](batch[0]).square().mean())


@pytest.mark.parametrize(("mode", "one", "two"), [("min_size", 4, 4), ("max_size_cycle", 10, 10), ("max_size", 10, 4)])
def test_several_loaders(tmp_path, mode, one, two):
    def data():
        return CombinedLoader({"one": train_data(), "two": train_data(num=4 * BATCH_SIZE, offset=-3.0, seed=4)}, mode)

    ran = fit(tmp_path, TwoInputs, data=data, val=lambda: [val_data(), val_data(7)], num_sanity_val_steps=1)
    ran.check(max(one, two), 2 * max(one, two))
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        **dict.fromkeys(("heads.one.a", "heads.one.b"), one),
        **dict.fromkeys(("heads.two.a", "heads.two.b"), two),
    }
    assert {flag for flags in ran.flags().values() for flag in flags} <= {"domain-shift"}  # as the data are different


@pytest.mark.parametrize("window", [{}, {"every_n_train_batches": 4}])
def test_two_fits_with_another_trainer_and_evaluation_in_between(tmp_path, window):
    monitor = BatchNormMonitor(**window)
    ran = fit(tmp_path, monitor=monitor, twin=False)
    report = monitor.report()
    told = report.to_dict()
    for evaluate in (ran.trainer.validate, ran.trainer.test, ran.trainer.predict):
        evaluate(ran.model, val_data())
    assert monitor.report() is report
    assert report.to_dict() == told
    again = fit(tmp_path, lambda: ran.model, monitor=monitor, twin=False)
    ends = (4, 8, 12, 16, 20) if window else (10, 20)
    again.check(*ends)
    assert hooks_of(ran.model) == 0


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
def test_two_monitors_in_one_trainer(tmp_path, namespace):
    class OtherNet(Steps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

    other_package = namespace == "pytorch_lightning"
    second = BatchNormMonitor(every_n_train_batches=5, include="net.b", log_key_prefix="norm", capture="pass")
    also = (OtherWindows if other_package else Windows)(second)
    options = {"trainer_class": pytorch_lightning.Trainer} if other_package else {}
    ran = fit(
        tmp_path,
        OtherNet if other_package else Net,
        lambda: [second, also],
        other_package=other_package,
        twin=False,
        **options,
    )
    ran.check(10, 20).check_healthy()
    Ran(ran.trainer, ran.model, second, ran.recorder, also).check(5, 10, 15, 20, without=["net.a"])
    for prefix, layers in (("bn", 2), ("norm", 1)):
        assert f"{prefix}/eval_error_max" in ran.trainer.callback_metrics
        assert float(ran.trainer.callback_metrics[f"{prefix}/unhealthy_layers"]) <= layers
    assert hooks_of(ran.model) == 0


class Data(LightningDataModule):
    def train_dataloader(self):
        return train_data()

    def val_dataloader(self):
        return val_data()


def test_lightning_cli_reads_the_monitor_from_a_file(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: 3
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_bnmonitor.BatchNormMonitor
      init_args:
        every_n_train_batches: 5
        exclude: [net.a]
        per_layer: true
        capture: pass
        on_unhealthy: ignore
    - class_path: lightning_bnmonitor.BatchNormMonitor
      init_args:
        include: net.a
        per_layer: auto
        log_key_prefix: other
"""
    )
    cli = LightningCLI(Net, Data, args=["fit", "--config", str(config)])
    first, second = (callback for callback in cli.trainer.callbacks if isinstance(callback, BatchNormMonitor))
    assert {name: layer.num_batches for name, layer in first.report().items()} == {"net.b": 5}
    assert {name: layer.num_batches for name, layer in second.report().items()} == {"net.a": 10}
    assert first.report()["net.b"].evidence["calls_pass"] == 5
    assert hooks_of(cli.model) == 0
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    assert "on_unhealthy: ignore" in saved.read_text()


# ------------------------------------------------------------------------------------------------------ kinds of models


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8, momentum=MOMENTUM), nn.ReLU(), nn.Linear(8, 6)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=MOMENTUM), nn.LeakyReLU(), nn.Linear(8, 1)
        )

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        first, second = self.optimizers()
        generated = self.generator(torch.randn(len(real), 2))
        self.toggle_optimizer(second)
        loss = nn.functional.softplus(-self.discriminator(real)).mean()
        loss = loss + nn.functional.softplus(self.discriminator(generated.detach())).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        if batch_idx % 2:
            self.toggle_optimizer(first)
            loss = nn.functional.softplus(-self.discriminator(generated)).mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            self.untoggle_optimizer(first)

    def validation_step(self, batch, batch_idx):
        self.discriminator(batch[0].flatten(1) + self.generator(torch.randn(len(batch[0]), 2)))

    def configure_optimizers(self):
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in networks]


def test_a_gan_with_two_optimizers_and_three_calls_of_the_discriminator(tmp_path):
    ran = fit(tmp_path, Gan, max_epochs=3).check(10, 20, 30)
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        "generator.1": 10,
        "discriminator.1": 25,
    }
    assert set(ran.flags().values()) == {()}


class Distilled(Net):
    """A student and its averaged teacher."""

    def __init__(self, teaches):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.teaches = teaches
        if teaches == "in eval mode":
            self.teacher.eval()
        else:
            self.teacher.a.momentum = self.teacher.b.momentum = 0.0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        answer = self(batch[0])
        return nn.functional.mse_loss(answer, batch[1]) + nn.functional.mse_loss(answer, target)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.002)


@pytest.mark.parametrize(
    ("teaches", "verdict", "flags"),
    [("in eval mode", "frozen", ()), ("in train mode with momentum 0", "stale", ("not-updating",))],
)
def test_a_teacher_and_its_student(tmp_path, teaches, verdict, flags):
    ran = fit(tmp_path, lambda: Distilled(teaches)).check(10, 20)
    for window in (0, 1):
        for name in ("teacher.a", "teacher.b"):
            layer = ran.reports[window][name]
            assert (layer.verdict, layer.flags) == (verdict, flags)
            assert layer.needs_attention  # the buffers are initial ones
            assert layer.num_batches == 10
        for name in ("net.a", "net.b"):
            assert ran.reports[window][name].num_batches == 10
            assert not window or ran.reports[window][name].verdict == "healthy"


def test_a_teacher_whose_running_statistics_follow_the_students(tmp_path):
    class Follows(Distilled):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.buffers(), self.net.buffers(), strict=True):
                    mine.copy_(torch.lerp(mine.float(), theirs.float(), 0.3))

    ran = fit(tmp_path, lambda: Follows("in eval mode"), max_epochs=4).check(10, 20, 30, 40)
    for name in ("teacher.a", "teacher.b"):
        layer = ran.reports[-1][name]
        assert layer.verdict == "frozen"
        assert layer.num_batches == 10
        assert not layer.needs_attention
        assert layer.summary()["eval_error"] < 0.1


def test_a_layer_under_two_names_called_three_times(tmp_path):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm1d(1, momentum=MOMENTUM)
            self.second = self.first

        def forward(self, x):
            return self.net(self.first(x)) + self.net(self.second(x * 2 + 1)) + self.net(self.second(x))

    ran = fit(tmp_path, Shared).check(10, 20)
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        "net.a": 30,
        "net.b": 30,
        "first": 30,
    }
    assert set(ran.flags().values()) == {()}


class Repeats(Net):
    """Weights at rest, and as many passes over each batch as are asked for."""

    lr = 0.0

    def __init__(self, times):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 32), nn.BatchNorm1d(32, momentum=MOMENTUM), nn.Linear(32, 1)
        )
        self.times = times

    def training_step(self, batch, batch_idx):
        return sum(super(Repeats, self).training_step(batch, batch_idx) for _ in range(self.times))


def noise(num, window):
    """Independent inputs, anew in each epoch."""
    generator = torch.Generator().manual_seed(window)
    return TensorDataset(torch.randn(num, 1, 6, generator=generator), torch.zeros(num, 1))


@pytest.mark.parametrize(
    "times",
    [
        1,
        pytest.param(
            4,
            marks=pytest.mark.xfail(
                strict=True, reason="calls with the same inputs in one step are taken for independent batches"
            ),
        ),
    ],
)
def test_passes_over_the_same_batch_are_one_draw_of_chance(tmp_path, times):
    class Independent(Repeats):
        def train_dataloader(self):
            return DataLoader(noise(40 * BATCH_SIZE, self.trainer.current_epoch), batch_size=BATCH_SIZE)

    options = {"data": None, "twin": False, "reload_dataloaders_every_n_epochs": 1, "max_epochs": 6}
    ran = fit(tmp_path, lambda: Independent(times), **options).check(40, 80, 120, 160, 200, 240)
    z = torch.stack([layer.z_mean for report in ran.reports[1:] for layer in report.values()])
    assert 0.7 < z.square().mean().sqrt() < 1.4
    assert {layer.verdict for report in ran.reports[1:] for layer in report.values()} == {"healthy"}


class Lazy(Net):
    def __init__(self, example=False):
        super().__init__()
        if example:
            self.example_input_array = torch.full((5, 1, 6), 1e3)
        self.net.a = nn.LazyBatchNorm1d(momentum=MOMENTUM)
        self.net.b = nn.LazyBatchNorm1d(momentum=MOMENTUM)


@both_orders
@pytest.mark.parametrize("materialised", ["in training", "in the sanity check", "by the model summary"])
def test_lazy_layers(tmp_path, materialised, monitor_first):
    if materialised == "by the model summary":
        ran = fit(tmp_path, lambda: Lazy(True), lambda: [ModelSummary()], monitor_first=monitor_first)
    else:
        steps = 1 if materialised == "in the sanity check" else 0
        ran = fit(tmp_path, Lazy, num_sanity_val_steps=steps, monitor_first=monitor_first)
    ran.check(10, 20).check_healthy()
    assert {layer.type for layer in ran.reports[-1].values()} == {"BatchNorm1d"}
    weights = [layer.evidence["initial_weight"] for layer in ran.reports[0].values()]
    assert weights == pytest.approx([(1 - MOMENTUM) ** 10] * 2)


@both_orders
def test_layers_made_by_configure_model(tmp_path, monitor_first):
    class Late(Steps, LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = network()

    fit(tmp_path, Late, lambda: [ModelSummary()], monitor_first=monitor_first).check(10, 20).check_healthy()


@pytest.mark.parametrize("buffers", ["its own", "copies"])
def test_functional_call_in_training_step(tmp_path, buffers):
    class Functional(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            state = {name: 1.0 * value for name, value in self.net.named_parameters()}
            if buffers == "copies":
                state |= {name: value.clone() for name, value in self.net.named_buffers()}
            return nn.functional.mse_loss(torch.func.functional_call(self.net, state, (x,)), y)

    ran = fit(tmp_path, Functional).check(10, 20)
    if buffers == "its own":
        ran.check_healthy()
    else:
        assert ran.verdicts() == dict.fromkeys(("net.a", "net.b"), "stale")
        assert ran.flags() == dict.fromkeys(("net.a", "net.b"), ("not-updating",))


# ------------------------------------------------------------------------------------------------------------ quantised


class Quantised(Net):
    """What ``prepare_qat`` makes of a convolution and its BatchNorm, which it fuses."""

    def __init__(self, slow=False, frozen=False):
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(1, 4, (1, 3)),
                a=nn.BatchNorm2d(4, momentum=MOMENTUM),
                relu=nn.ReLU(),
                flat=nn.Flatten(),
                linear=nn.Linear(16, 3),
                b=nn.BatchNorm1d(3, momentum=MOMENTUM),
                out=nn.Linear(3, 1),
            )
        )
        quantization = torch.ao.quantization
        fused = quantization.fuse_modules_qat(self.net, ["conv", "a", "relu"])
        fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        self.net = quantization.prepare_qat(fused)
        self.net.conv._enable_slow_path_for_better_numerical_stability = slow
        if frozen:
            self.net.conv.freeze_bn_stats()

    def forward(self, x):
        return self.net(x[:, :, None])


def test_a_convolution_fused_for_quantization_aware_training_is_monitored(tmp_path):
    ran = fit(tmp_path, Quantised).check(10, 20).check_healthy()
    assert set(ran.reports[-1]) == {"net.conv.bn", "net.b"}
    assert type(ran.model.net.conv).__name__ == "ConvBnReLU2d"
    assert ran.reports[-1]["net.conv.bn"].evidence["calls_saved"] == 10


def test_a_fused_convolution_that_takes_the_slow_path_is_monitored(tmp_path):
    ran = fit(tmp_path, lambda: Quantised(slow=True)).check(10, 20).check_healthy()
    assert ran.reports[-1]["net.conv.bn"].num_batches == 10


def test_a_fused_convolution_whose_statistics_are_frozen_is_monitored(tmp_path):
    ran = fit(tmp_path, lambda: Quantised(frozen=True)).check(10, 20)
    assert ran.verdicts() == {"net.conv.bn": "frozen", "net.b": "healthy"}


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true", "16-mixed"])
def test_precisions(tmp_path, precision):
    def data():
        x, y = samples().tensors
        return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True)

    ran = fit(tmp_path, data=data, precision=precision).check(10, 20)
    assert set(ran.flags().values()) == {()}
    assert set(ran.verdicts().values()) == {"healthy"}


# ------------------------------------------------------------------------------------------------------------- compiled


class Wrapped(nn.Module):  # Dynamo leaves a bare Sequential's `compile()` alone
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x)


class WrappedNet(Net):
    def __init__(self):
        super().__init__()
        self.net = Wrapped()


def compiled_by(how):
    model = WrappedNet()
    if how == "module.compile, dynamic":
        model.net.compile(backend="eager", dynamic=True)
    elif how == "the whole, by aot_eager":
        return torch.compile(model, backend="aot_eager")
    else:
        model.net = torch.compile(model.net)
    return model


@pytest.mark.parametrize("how", ["module.compile, dynamic", "the whole, by aot_eager", "inductor"])
def test_compiled_models_with_a_shorter_last_batch(tmp_path, how):
    if how == "inductor" and not (importlib.util.find_spec("torch._inductor") and _has_compiler()):
        pytest.skip("there is no C++ compiler")

    def data():
        return DataLoader(samples(BATCHES * BATCH_SIZE - 5), batch_size=BATCH_SIZE, shuffle=True)

    eager = fit(tmp_path, WrappedNet, data=data, twin=False).check(10, 20)
    torch._dynamo.reset()
    seed_everything(3, verbose=False)
    model, monitor = compiled_by(how), BatchNormMonitor()
    windows = Windows(monitor)
    trainer = trainer_for(tmp_path, [monitor, windows])
    trainer.fit(model, data(), val_data())
    assert windows.ends == [10, 20]
    for report, expected in zip(windows.reports, eager.reports, strict=True):
        for name, layer in report.items():
            other = expected[name]
            assert (layer.num_batches, layer.num_samples) == (other.num_batches, other.num_samples)
            assert layer.evidence["calls_traced"] == 10
            torch.testing.assert_close(layer.population_mean, other.population_mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.population_var, other.population_var, rtol=1e-4, atol=1e-4)
            assert (layer.verdict, layer.flags) == (other.verdict, other.flags)
    assert hooks_of(model) == 0
    torch._dynamo.reset()


def _has_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:
        return False


def test_averaged_weights_with_running_statistics_of_others_are_seen_in_a_pass_over_data():
    """The lines in the README."""
    torch.manual_seed(0)
    x = torch.randn(2048, 8) + 1
    y = (x.sum(dim=1) > 8).long()
    batches = x.split(64)
    layers = [nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(32, 2))
    averaged, optimizer = torch.optim.swa_utils.AveragedModel(net), torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    for _ in range(6):
        for indices in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[indices]), y[indices]).backward()
            optimizer.step()
        averaged.update_parameters(net)

    def look():
        averaged.train()
        for module in averaged.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        with BatchNormTracker(averaged) as tracker, torch.no_grad():
            for batch in batches:
                averaged(batch)
        averaged.eval()
        with torch.no_grad():
            return tracker.report(), float(nn.functional.cross_entropy(averaged(x), y))

    report, loss = look()
    assert [(layer.verdict, layer.needs_attention) for layer in report.values()] == [("frozen", True)] * 2
    torch.optim.swa_utils.update_bn(batches, averaged)
    repaired, loss_after = look()
    assert repaired.unhealthy == []
    assert loss_after < loss / 2
