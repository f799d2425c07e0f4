"""Faults: the monitor is never the reason a run fails, never changes training, and loses nothing that was seen."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_bnmonitor
from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT, _CompilerSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
]
C = 3
BATCHES = 6  # in an epoch


@pytest.fixture(autouse=True)
def everything_restored():
    torch.manual_seed(0)
    handler, interval, users = signal.getsignal(signal.SIGINT), sys.getswitchinterval(), _CompilerSettings.users
    threads, hooks = set(threading.enumerate()), optimizer_hooks()
    yield
    signal.signal(signal.SIGINT, handler)
    sys.setswitchinterval(interval)
    for late in set(threading.enumerate()) - threads:
        late.join(60)  # a loader does not wait for the threads that feed its workers
    assert set(threading.enumerate()) <= threads
    assert (_CompilerSettings.users, optimizer_hooks()) == (users, hooks)


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


# ----------------------------------------------------------------------------------------------------- runs that break


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


PLACES = ["before the first layer", "between two layers", "after the last layer", "backward", "optimizer step"]


@pytest.mark.parametrize(("batch", "window"), [(4, (0, 5)), (BATCHES + 3, (0, BATCHES))])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_comes_out_unchanged_and_the_report_tells_of_what_was_seen(tmp_path, place, batch, window):
    error, monitor = BoomError("broken"), BatchNormMonitor()
    model = Net(place, batch, error)
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, monitor).fit(model, data(), data(1))
    assert raised.value is error
    assert raised.value.__context__ is None
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), *window)
    assert_usable(tmp_path, model, monitor)


def test_what_was_seen_of_a_later_window_is_in_the_state_of_a_run_that_broke(tmp_path):
    monitor, model = BatchNormMonitor(), Net("between two layers", BATCHES + 3, BoomError())
    with pytest.raises(BoomError):
        trainer_for(tmp_path, monitor).fit(model, data())
    restored = BatchNormTracker(model)
    restored.load_state_dict(monitor.state_dict()["tracker"])
    with restored:
        model.assert_reported(restored.report(), BATCHES, len(model.seen))


def test_the_error_of_batch_norm_at_one_value_per_channel_comes_through_unchanged(tmp_path):
    def error_of(*callbacks):
        model = Net("one value per channel", 4)
        with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
            trainer_for(tmp_path, *callbacks).fit(model, data())
        return str(raised.value), type(raised.value), model

    monitor = BatchNormMonitor()
    *without, _ = error_of()
    *monitored, model = error_of(monitor)
    assert monitored == without
    model.assert_reported(monitor.report(), 0, 5)  # "a" has seen the fifth, "b" has not
    assert monitor.report()["a"].num_batches == monitor.report()["b"].num_batches + 1
    assert_usable(tmp_path, model, monitor)


def failing_callback(hook, error, epoch):
    class Fails(Callback):
        pass

    def fail(self, trainer, *args, **kwargs):
        if trainer.current_epoch == epoch:
            raise error

    setattr(Fails, hook, fail)
    return Fails()


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize(
    ("hook", "window"),
    [
        ("on_train_epoch_start", (0, 6)),
        ("on_train_batch_start", (0, 6)),
        ("on_before_zero_grad", (0, 6)),
        ("on_before_backward", (0, 6)),
        ("on_after_backward", (0, 6)),
        ("on_before_optimizer_step", (0, 6)),
        ("on_train_batch_end", (0, 6)),
        ("on_validation_start", (6, 12)),
        ("on_validation_batch_end", (6, 12)),
        ("on_validation_end", (6, 12)),
        ("on_train_epoch_end", (6, 12)),
    ],
)
def test_an_exception_in_another_callback_loses_nothing(tmp_path, hook, window, order):
    error, monitor, model = BoomError("broken"), BatchNormMonitor(), Net()
    before = hooks_of(model), optimizer_hooks()
    callbacks = [failing_callback(hook, error, epoch=1), monitor]
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, *callbacks[:: 1 if order == "first" else -1]).fit(model, data(), data(1))
    assert raised.value is error
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), *window)
    assert_usable(tmp_path, model, monitor)


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown"])
def test_an_exception_in_another_callback_when_a_fit_begins_or_ends_leaves_no_hook(tmp_path, hook, order):
    def fail(self, *args, **kwargs):
        raise error

    error, monitor, model = BoomError("broken"), BatchNormMonitor(), Net()
    before = hooks_of(model), optimizer_hooks()
    callbacks = [type("Fails", (Callback,), {hook: fail})(), monitor]
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, *callbacks[:: 1 if order == "first" else -1]).fit(model, data())
    assert raised.value is error
    assert (hooks_of(model), optimizer_hooks()) == before
    if model.seen:
        model.assert_reported(monitor.report(), BATCHES, 2 * BATCHES)
    assert_usable(tmp_path, model, monitor)


@pytest.mark.filterwarnings("ignore:Found .* module")
def test_a_fit_of_a_model_that_an_exception_in_validation_left_in_eval_mode_says_so(tmp_path):
    model, monitor = Net(), BatchNormMonitor()
    with pytest.raises(BoomError):
        trainer_for(tmp_path, failing_callback("on_validation_start", BoomError(), 1)).fit(model, data(), data(1))
    assert not model.training
    trainer_for(tmp_path, monitor, max_epochs=1).fit(model, data(), data(1))
    assert not model.training  # as it was found: Lightning trains in that mode, where nothing counts
    for layer in monitor.report().values():
        assert layer.verdict == "unused"
        assert "not called in this window while the model was in training mode" in layer.explanation


def test_where_lightning_does_not_tell_of_an_exception_the_next_fit_still_counts_once(tmp_path):
    """A callback that raises in ``on_exception`` keeps those after it from hearing of anything."""

    class Fails(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise BoomError

    monitor, model = BatchNormMonitor(), Net("backward", 4, ZeroDivisionError())
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(BoomError):
        trainer_for(tmp_path, Fails(), monitor).fit(model, data())
    model.assert_reported(monitor.report(), 0, 5)
    model.place, first = None, len(model.seen)
    trainer_for(tmp_path, monitor, max_epochs=1).fit(model, data())
    model.assert_reported(monitor.report(), first, first + BATCHES)
    assert (hooks_of(model), optimizer_hooks()) == before


def test_after_a_keyboard_interrupt_the_state_has_all_that_was_seen(tmp_path):
    monitor, model = BatchNormMonitor(), Net("between two layers", 4, KeyboardInterrupt())
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(SystemExit):
        trainer_for(tmp_path, monitor).fit(model, data())
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), 0, 5)
    resumed = BatchNormTracker(model)
    resumed.load_state_dict(monitor.state_dict()["tracker"])
    with resumed:
        model.assert_reported(resumed.report(), 0, 5)
    assert_usable(tmp_path, model, monitor)


def raising_once(function, error, monkeypatch, module):
    """Replace a function of the package by one that raises when it is called for the first time."""
    errors = [error]

    def broken(*args, **kwargs):
        if errors:
            raise errors.pop()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, function.__name__, broken)


def test_a_keyboard_interrupt_while_calls_are_merged_loses_and_doubles_nothing(monkeypatch):
    window = lightning_bnmonitor.statistics.window
    raising_once(window.merge_moments, KeyboardInterrupt(), monkeypatch, window)
    model, batches = single(), []
    with contextlib.suppress(KeyboardInterrupt), BatchNormTracker(model) as tracker:
        while True:
            batches += feed(model, 1)
            assert len(batches) < 3 * STASH_LIMIT
    layer = layer_of(tracker)
    calls = layer.num_samples // 8  # with or without the call that was interrupted
    assert len(batches) <= calls <= len(batches) + 1
    if calls == len(batches):
        assert_population(layer, batches)


def test_a_pass_that_runs_out_of_memory_does_not_end_the_run(monkeypatch):
    hooks = lightning_bnmonitor.capture.layer_hook
    raising_once(hooks.pass_moments, torch.OutOfMemoryError("out of memory"), monkeypatch, hooks)
    model = single()
    with warnings.catch_warnings(), BatchNormTracker(model, capture="pass") as tracker:
        warnings.simplefilter("ignore")
        _, *batches = feed(model, 6)
        layer = layer_of(tracker)
    assert_population(layer, batches)
    assert layer.evidence["calls_skipped"] == 1


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


@pytest.mark.filterwarnings("ignore:Memory did not log")
@pytest.mark.parametrize("options", [{}, {"on_unhealthy": "raise"}, {"every_n_train_batches": BATCHES}])
def test_a_logger_that_fails_costs_its_own_metrics_alone(tmp_path, options):
    monitor, model, reports = BatchNormMonitor(**options), Net(), []

    class Look(Callback):
        def on_validation_start(self, trainer, pl_module):
            reports.append(monitor.report())
            summary = {f"bn/{name}": value for name, value in monitor.report().summary().items()}
            assert {name: trainer.callback_metrics[name].item() for name in summary} == pytest.approx(summary)

    before, loggers = (hooks_of(model), optimizer_hooks()), [Memory(), Memory(BoomError("no connection")), Memory()]
    trainer_for(tmp_path, monitor, Look(), logger=loggers).fit(model, data(), data(1))
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(reports[0], 0, BATCHES)
    model.assert_reported(reports[1], BATCHES, 2 * BATCHES)
    for logger in (loggers[0], loggers[2]):
        ours = [(step, metrics) for step, metrics in logger.logged if "bn/eval_error_max" in metrics]
        assert [step for step, _ in ours] == [BATCHES - 1, 2 * BATCHES - 1]
        for (_, metrics), report in zip(ours, reports, strict=True):
            for name, value in report.summary().items():
                assert metrics[f"bn/{name}"] == value
    assert any("train_loss" in metrics for _, metrics in loggers[1].logged)
    assert_usable(tmp_path, model, monitor)


def test_a_keyboard_interrupt_in_a_logger_comes_through(tmp_path):
    monitor, model = BatchNormMonitor(), Net()
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(SystemExit):
        trainer_for(tmp_path, monitor, logger=[Memory(KeyboardInterrupt())]).fit(model, data())
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), 0, BATCHES)


@pytest.mark.parametrize("monitored", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore:TensorBoardLogger did not log")
def test_a_full_disk_ends_the_run_as_it_does_without_the_monitor_and_loses_no_report(tmp_path, monkeypatch, monitored):
    write, full = RecordWriter.write, []

    def write_or_fail(self, record):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    class Fill(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            full.extend([True] * (trainer.current_epoch == 1))

    monkeypatch.setattr(RecordWriter, "write", write_or_fail)
    monitor, model, logger = BatchNormMonitor(), Net(), TensorBoardLogger(tmp_path)
    before = hooks_of(model), optimizer_hooks()
    callbacks = [Fill(), monitor] if monitored else [Fill()]
    with pytest.raises(OSError, match="No space left"):
        trainer_for(tmp_path, *callbacks, max_epochs=8, logger=logger, log_every_n_steps=1).fit(model, data())
    full.clear()
    for writer in logger.experiment.all_writers.values():  # its thread, which is not ours
        writer.event_writer._async_writer._worker.stop()
    assert (hooks_of(model), optimizer_hooks()) == before
    if monitored:
        epochs = len(model.seen) // BATCHES
        assert epochs >= 2
        model.assert_reported(monitor.report(), (epochs - 1) * BATCHES, epochs * BATCHES)


DISK_FULL = """
import resource, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_bnmonitor import BatchNormMonitor

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.bn, self.batches = nn.BatchNorm1d(3), 0
    def training_step(self, batch, batch_idx):
        self.batches += 1
        return self.bn(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

monitor, model = BatchNormMonitor(), Net()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
torch.manual_seed(0)
x = torch.randn(48, 3)
trainer = Trainer(logger=TensorBoardLogger(sys.argv[1]), enable_checkpointing=False, max_epochs=100, accelerator="cpu",
                  callbacks=[monitor], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=100)
try:
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=8))
except OSError as error:
    print("FAILED", type(error).__name__, error.errno)
layer = monitor.report()["bn"]
exact = torch.allclose(layer.population_mean, x.double().mean(0), atol=1e-6)
print("REPORT", layer.num_samples, exact, model.batches, len(model.bn._forward_hooks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_file_that_can_grow_no_further_loses_no_report(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISK_FULL))
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False
    )
    assert f"FAILED OSError {errno.EFBIG}" in done.stdout, done.stderr  # when the logger closes its file, after all
    assert "REPORT 48 True 600 0" in done.stdout


def test_where_warnings_are_errors_the_run_ends_by_its_warning_and_the_report_is_there(tmp_path):
    class Strict(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.a.running_mean[1] = torch.nan
            warnings.simplefilter("error")

    monitor, model, logger = BatchNormMonitor(), Net(), Memory()
    before = hooks_of(model), optimizer_hooks()
    trainer = trainer_for(tmp_path, Strict(), monitor, logger=logger)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="BatchNorm layers need attention"):
        trainer.fit(model, data())
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), 0, BATCHES)
    assert monitor.report()["a"].verdict == "non-finite"
    assert trainer.callback_metrics["bn/unhealthy_layers"] == 1
    assert any("bn/unhealthy_layers" in metrics for _, metrics in logger.logged)
    model.a.reset_running_stats()
    assert_usable(tmp_path, model, monitor)


def spoilt(value):
    def make(index):
        x = torch.randn(8, C)
        if index == 1:
            x[2, 1] = value
        return x

    return make


def scaled(factor, dtype=torch.float32):
    return lambda index: (torch.randn(8, C, dtype=dtype) * factor).to(dtype)


ODD = {
    "plain": ({}, scaled(1)),
    "NaN": ({}, spoilt(torch.nan)),
    "Inf": ({}, spoilt(torch.inf)),
    "overflow in float32": ({}, scaled(1e30)),
    "overflow in float64": ({"dtype": torch.float64}, scaled(1e160, torch.float64)),
    "underflow in float32": ({}, scaled(1e-30)),
    "underflow in float64": ({"dtype": torch.float64}, scaled(1e-200, torch.float64)),
    "constant": ({}, lambda index: torch.ones(8, C)),
    "two values": ({}, lambda index: torch.randn(2, C)),
    "momentum 0": ({"momentum": 0.0}, scaled(1)),
    "momentum 1": ({"momentum": 1.0}, scaled(1)),
    "momentum None": ({"momentum": None}, scaled(1)),
    "momentum 1.5": ({"momentum": 1.5}, scaled(1)),
    "momentum 3": ({"momentum": 3.0}, scaled(1)),
    "momentum 100": ({"momentum": 100.0}, scaled(1)),
    "momentum below 0": ({"momentum": -0.1}, scaled(1)),
    "momentum NaN": ({"momentum": float("nan")}, scaled(1)),
    "no affine": ({"affine": False}, scaled(1)),
    "no statistics": ({"track_running_stats": False}, scaled(1)),
    "half": ({"dtype": torch.float16}, scaled(1, torch.float16)),
    "half, overflow": ({"dtype": torch.float16}, lambda index: (torch.randn(8, C) * 6e4).half()),
    "bfloat16": ({"dtype": torch.bfloat16}, scaled(1, torch.bfloat16)),
}


@pytest.mark.parametrize("case", list(ODD))
def test_where_every_warning_and_every_numpy_flag_is_an_error_odd_layers_are_reported(case):
    kwargs, make = ODD[case]
    model = single(**kwargs)
    with warnings.catch_warnings(), np.errstate(all="raise"), BatchNormTracker(model) as tracker:
        warnings.simplefilter("error")
        for num_batches in (1, 2, 40):
            batches = [make(index) for index in range(num_batches)]
            for x in batches:
                model(x)
            report = tracker.close()
            assert str(report)
            assert report.brief()
            report.to_dict()
            report.summary()
            tracker.state_dict()
            tracker.reset()
    layer = report["0"]
    if case in ("plain", "two values", "no affine", "no statistics", "half", "bfloat16") or "momentum" in case:
        assert_population(layer, batches, 2e-5)
        if layer.has_running_stats:
            assert torch.equal(layer.running_mean.nan_to_num(), model[0].running_mean.double().nan_to_num())


def test_a_layer_without_eps_that_is_frozen_is_counted():
    model = single(eps=0.0)
    model[0].eval()  # in training mode BatchNorm refuses it
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        assert_population(layer_of(tracker), batches)
        model[0].train()
        with pytest.raises(ValueError, match="eps must be positive"):
            feed(model)
        assert_population(layer_of(tracker), batches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_default_dtype_while_reporting_disturbs_nothing(dtype):
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model, 40)
        expected = tracker.report()
        torch.set_default_dtype(dtype)
        try:
            report = tracker.close()
            assert report.to_dict() == expected.to_dict()
            assert str(report) == str(expected)
            tracker.reset()
            batches = feed(model, 40)
            report = tracker.report()
        finally:
            torch.set_default_dtype(torch.float32)
    assert_population(report["0"], batches)


# -------------------------------------------------------------------------------------- what becomes of layers mid-run


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(C)

    def forward(self, x):
        return self.bn(x)


def test_a_layer_that_is_replaced_while_attached_keeps_what_it_saw_and_its_successor_counts_when_attached_again():
    model = Named()
    with BatchNormTracker(model) as tracker:
        old, first = model.bn, feed(model)
        model.bn = nn.BatchNorm1d(C)
        feed(model)
        layer = tracker.report()["bn"]
        assert_population(layer, first)
        assert torch.equal(layer.running_mean, old.running_mean.double())
        tracker.reset()
        feed(model)
        assert tracker.close()["bn"].verdict == "unused"
    assert not old._forward_hooks
    with tracker:
        tracker.reset()
        batches = feed(model)
        layer = tracker.report()["bn"]
        assert_population(layer, batches)
        assert torch.equal(layer.running_mean, model.bn.running_mean.double())


def test_a_layer_that_is_replaced_during_fit_breaks_nothing_and_counts_in_the_next_fit(tmp_path):
    class Replace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 2:
                pl_module.a = copy.deepcopy(pl_module.a)

    monitor, model = BatchNormMonitor(), Net()
    trainer_for(tmp_path, Replace(), monitor, max_epochs=1).fit(model, data())
    assert_population(monitor.report()["a"], model.received("a", 0, 3))
    assert_population(monitor.report()["b"], model.received("b", 0, BATCHES))
    assert_usable(tmp_path, model, monitor)


def reassign(layer):
    layer.running_mean, layer.running_var = torch.full((C,), 7.0), torch.full((C,), 2.0)


def register(layer):
    layer.register_buffer("running_mean", torch.full((C,), -7.0))


def assign_state(layer):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["running_mean"] += 5
    layer.load_state_dict(state, assign=True)


def assign_counted(layer):
    assign_state(layer)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(10_000)}, assign=True)


@pytest.mark.parametrize("when", ["in mid-window", "between windows"])
@pytest.mark.parametrize("write", [reassign, register, assign_state, assign_counted], ids=lambda write: write.__name__)
def test_buffers_that_are_replaced_are_those_that_are_reported(write, when):
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model, 20)
        if when == "between windows":
            tracker.close()
            write(model[0])
            tracker.reset()
            batches = feed(model, 20)
        else:
            write(model[0])
            batches += feed(model, 2)
        layer = tracker.close()["0"]
        assert_population(layer, batches)
        mean, var = model[0].running_mean, model[0].running_var
        assert torch.equal(layer.running_mean, mean.double())
        assert torch.equal(layer.running_var, var.double())
        assert layer.summary()["act_rmse"] == pytest.approx(act_rmse(batches, mean, var, layer.eps), rel=1e-5)
        if when == "between windows":
            assert "written-outside" in layer.flags
        tracker.reset()
        assert_population(layer_of(tracker), [])
        batches = feed(model, 20)
        layer = tracker.close()["0"]
        assert_population(layer, batches)
        assert layer.flags == ()


def test_running_statistics_that_go_and_come_back_break_nothing():
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        model[0].running_mean = model[0].running_var = None
        batches += feed(model)
        layer = tracker.close()["0"]
        assert_population(layer, batches)
        assert not layer.has_running_stats
        tracker.reset()
        feed(model)
        model[0].num_batches_tracked = None
        tracker.reset()
        model[0].running_mean, model[0].running_var = torch.zeros(C), torch.ones(C)
        batches = feed(model)
        layer = tracker.close()["0"]
        assert_population(layer, batches)
        assert torch.equal(layer.running_mean, model[0].running_mean.double())


def test_a_count_of_batches_of_another_shape_disturbs_nothing():
    model = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        model[0].num_batches_tracked = model[0].num_batches_tracked.reshape(1)
        batches += feed(model)
        assert_population(tracker.report()["0"], batches)
        assert tracker.report()["0"].flags == ()


def test_running_statistics_that_are_learnt_disturb_nothing():
    model = single()
    del model[0].running_mean
    model[0].running_mean = nn.Parameter(torch.zeros(C))
    model[0].eval()
    with torch.no_grad(), BatchNormTracker(model) as tracker:  # PyTorch refuses it with gradients
        batches = feed(model)
        tracker.reset()
        batches = feed(model)
        assert_population(layer_of(tracker), batches)


def test_frozen_parameters_disturb_nothing():
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).requires_grad_(False)
    with BatchNormTracker(model) as tracker:
        feed(model)
        model[0].requires_grad_(True)
        tracker.reset()
        batches = feed(model)
        received = [model[0](x) for x in batches]
        assert_population(tracker.report()["1"], received)


def test_every_dtype_that_a_model_goes_through_counts():
    model, batches = nn.Sequential(nn.BatchNorm1d(C), nn.Identity(), nn.BatchNorm1d(C, affine=False)), []
    with BatchNormTracker(model) as tracker:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32):
            model.to(dtype)
            batches += feed(model, 4, dtype=dtype)
            assert_population(tracker.report()["0"], batches)
        model[0].double()  # one of two
        assert_population(tracker.report()["0"], batches)
        tracker.reset()
        model.double()
        batches = feed(model, 4, dtype=torch.float64)
        report = tracker.close()
        assert_population(report["0"], batches, 1e-9)
        assert torch.equal(report["0"].running_mean, model[0].running_mean)
        tracker.state_dict()


def test_a_model_that_is_moved_to_meta_is_still_reported():
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        model.to("meta")
        layer = layer_of(tracker)
        assert_population(layer, batches)
        assert layer.running_mean.isnan().all()
        tracker.state_dict()
        tracker.close()
        tracker.reset()
        model.to_empty(device="cpu")
        model[0].reset_parameters()
        batches = feed(model, 20)
        layer = tracker.close()["0"]
        assert_population(layer, batches)
        assert torch.equal(layer.running_mean, model[0].running_mean.double())
    model.to("meta")
    assert_population(layer_of(tracker), batches)


@pytest.mark.parametrize("before", [0, 5])
def test_calls_without_values_are_skipped(before):
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model, before)
        model.to("meta")
        model(torch.randn(8, C, device="meta"))
        layer = layer_of(tracker)
    assert_population(layer, batches)
    assert layer.evidence["calls_skipped"] == 1


def test_a_state_that_is_loaded_for_a_model_on_meta_is_kept():
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        state = tracker.state_dict()
    with torch.device("meta"):
        empty = single()
    with BatchNormTracker(empty) as tracker:
        tracker.load_state_dict(state)
        assert_population(layer_of(tracker), batches)


def widen(layer, width):
    layer.num_features = width
    layer.running_mean, layer.running_var = torch.zeros(width), torch.ones(width)
    layer.weight, layer.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize("reported", [False, True])
def test_a_layer_whose_number_of_channels_changes_does_not_end_the_run_and_keeps_what_it_saw(reported):
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        if reported:
            tracker.flush()
        widen(model[0], C + 2)
        for _ in range(2 * STASH_LIMIT):
            model(torch.randn(8, C + 2))
            tracker.step()
        layer = tracker.close()["0"]
        if layer.num_features == C:
            assert_population(layer, batches)
        tracker.reset()
        for _ in range(2 * STASH_LIMIT):
            model(torch.randn(8, C + 2))
        tracker.close()
        tracker.state_dict()


# ------------------------------------------------------------------------------- attaching, detaching, and who is alive


def test_two_trackers_attached_twice_and_detached_in_any_order_each_count_once():
    model = single()
    before = hooks_of(model), optimizer_hooks()
    one, other = BatchNormTracker(model).attach().attach(), BatchNormTracker(model).attach()
    first = feed(model)
    one.detach()
    one.detach()
    second = feed(model)
    other.attach()
    third = feed(model)
    other.detach()
    feed(model)
    assert (hooks_of(model), optimizer_hooks()) == before
    assert_population(layer_of(one), first)
    assert_population(layer_of(other), first + second + third)


def test_whatever_is_asked_after_detaching_and_after_the_model_died_works():
    model = single()
    tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    tracker.detach()

    def ask():
        tracker.flush()
        tracker.step()
        tracker.detach()
        with tracker.paused():
            pass
        assert_population(layer_of(tracker), batches)
        tracker.state_dict()

    ask()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    ask()
    report = tracker.close()
    assert tracker.close() is report
    ask()
    tracker.reset()
    assert_population(layer_of(tracker), [])


def test_a_model_that_dies_while_attached_is_not_kept_and_its_layers_go_on_counting():
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1))
    tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    layer, reference, linear = model[0], weakref.ref(model), weakref.ref(model[1])
    del model
    gc.collect()
    assert reference() is None
    assert linear() is None
    batches += feed(layer)
    tracker.step()
    assert_population(layer_of(tracker), batches)
    tracker.reset()
    tracker.close()
    tracker.detach()
    assert not layer._forward_hooks


def test_attached_and_detached_many_times_leaves_nothing():
    model = single()
    before = hooks_of(model), optimizer_hooks(), _CompilerSettings.users
    tracker, batches = BatchNormTracker(model), []
    for _ in range(50):
        with tracker:
            batches += feed(model, 1)
        with BatchNormTracker(model) as other:
            feed(model, 1)
    assert_population(layer_of(tracker), batches)
    assert layer_of(other).num_batches == 1
    assert (hooks_of(model), optimizer_hooks(), _CompilerSettings.users) == before
    references = []
    for _ in range(50):
        dropped = single()
        with BatchNormTracker(dropped) as other:
            feed(dropped, 1)
        references += [weakref.ref(dropped), weakref.ref(dropped[0]), weakref.ref(other)]
    del dropped, other
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_trackers_that_are_dropped_with_their_models_while_attached_leave_nothing():
    before, users, keys = optimizer_hooks(), _CompilerSettings.users, set(_global_optimizer_post_hooks)
    references = []
    for _ in range(50):
        model = single()
        tracker = BatchNormTracker(model).attach()
        feed(model, 1)
        references += [weakref.ref(model), weakref.ref(model[0]), weakref.ref(tracker)]
    del model, tracker
    gc.collect()
    try:
        assert [reference() for reference in references] == [None] * len(references)
        assert (optimizer_hooks(), _CompilerSettings.users) == (before, users)
    finally:
        for key in set(_global_optimizer_post_hooks) - keys:
            del _global_optimizer_post_hooks[key]
        while _CompilerSettings.users > users:
            _CompilerSettings.release()


def test_a_thousand_windows_take_no_more_memory_than_a_hundred():
    model, x = single(), torch.randn(8, C)

    def objects():
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(thing), torch.Tensor) for thing in alive)

    with BatchNormTracker(model) as tracker:
        for _ in range(100):
            model(x)
            tracker.reset()
        num_objects, num_tensors = objects()
        num_blocks = sys.getallocatedblocks()
        for _ in range(900):
            model(x)
            tracker.reset()
        after_objects, after_tensors = objects()
        assert after_tensors <= num_tensors
        assert after_objects - num_objects < 100  # of which there would be 900 for each that a window leaves behind
        assert sys.getallocatedblocks() - num_blocks < 900  # nor are there any that are not counted above
        assert_population(layer_of(tracker), [])
        batches = feed(model)
        assert_population(layer_of(tracker), batches)


# ---------------------------------------------------------------------------------------------- copies of what is alive


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_copies_made_and_trained_during_fit_count_nothing_and_the_original_counts_on(tmp_path, duplicate):
    class Wrapped(Net):
        """Records without hooks, which could not be pickled."""

        def __init__(self):
            LightningModule.__init__(self)
            self.net = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append({"net.0": [batch[0].clone()]})
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Copies(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.train(duplicate(pl_module.net))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.train(duplicate(pl_module.net))

        def train(self, twin):
            assert twin.training
            twin(torch.randn(8, C) + 100).sum().backward()

    monitor, model = BatchNormMonitor(), Wrapped()
    trainer_for(tmp_path, Copies(), monitor).fit(model, data())
    assert_population(monitor.report()["net.0"], model.received("net.0", BATCHES, 2 * BATCHES))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("attached", [True, False])
def test_a_deep_copy_of_a_tracker_is_detached_and_goes_on_with_what_the_original_has(attached):
    model, users = single(), _CompilerSettings.users
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        if attached:
            twin = copy.deepcopy(tracker)
    if not attached:
        twin = copy.deepcopy(tracker)
    assert not twin.is_attached
    assert _CompilerSettings.users == users
    with twin:
        assert_population(layer_of(twin), batches)
        more = feed(model)
        assert_population(layer_of(twin), batches + more)
    assert_population(layer_of(tracker), batches)


def test_a_copy_of_a_model_that_holds_its_tracker_has_one_of_its_own():
    model = single()
    model.tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    other = copy.deepcopy(model)
    model.tracker.detach()
    with other.tracker as tracker:
        more = feed(other)
        assert_population(layer_of(tracker), batches + more)
    assert_population(layer_of(model.tracker), batches)


def test_a_tracker_refuses_to_be_pickled_and_counts_on():
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(tracker)
        batches += feed(model)
        assert_population(layer_of(tracker), batches)


def test_a_copy_of_a_model_that_holds_its_tracker_leaves_the_original_counting():
    model = single()
    model.tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    with contextlib.suppress(TypeError):
        feed(copy.deepcopy(model))
    batches += feed(model)
    model.tracker.detach()
    assert_population(layer_of(model.tracker), batches)


# ------------------------------------------------------------------------------------------------ threads and processes


def itself(model):
    return model


def replica(model):
    """As ``torch.nn.parallel.replicate`` makes them: shallow, with shared hooks and, on the first device, buffers."""
    twin = model.__new__(type(model))
    twin.__dict__ = model.__dict__.copy()
    twin._parameters, twin._buffers = model._parameters.copy(), model._buffers.copy()
    twin._modules = {name: replica(module) for name, module in model._modules.items()}
    return twin


def call_in_threads(models, batches):
    errors = []

    def run(model, batches):
        try:
            for x in batches:
                model(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=arguments) for arguments in zip(models, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


@pytest.mark.parametrize("copied", [itself, replica])
def test_calls_from_four_threads_at_once_all_count(copied):
    sys.setswitchinterval(1e-6)
    for _ in range(10):
        model = single()
        batches = [[torch.randn(8 + index, C) + thread for index in range(50)] for thread in range(4)]
        with BatchNormTracker(model) as tracker:
            call_in_threads([copied(model) for _ in batches], batches)
            layer = layer_of(tracker)
        assert_population(layer, list(itertools.chain(*batches)))
        assert layer.evidence["calls_skipped"] == 0


@pytest.mark.parametrize("copied", [itself, replica])
def test_calls_from_threads_in_turn_all_count(copied):
    model = single()
    batches = [[torch.randn(8, C) + thread for _ in range(50)] for thread in range(4)]
    with BatchNormTracker(model) as tracker:
        for of_thread in batches:
            call_in_threads([copied(model)], [of_thread])
        assert_population(layer_of(tracker), list(itertools.chain(*batches)))


@pytest.mark.parametrize("waiting", [5, STASH_LIMIT])
def test_a_call_from_another_thread_while_calls_are_merged_counts(monkeypatch, waiting):
    window = lightning_bnmonitor.statistics.window
    merge, model, late, threads = window.merge_moments, single(), torch.randn(8, C), []

    def merge_meanwhile(*args):
        if not threads:
            threads.append(threading.Thread(target=model, args=(late,)))
            threads[0].start()
            threads[0].join(0.5)  # it may have to wait for us
        return merge(*args)

    monkeypatch.setattr(window, "merge_moments", merge_meanwhile)
    with BatchNormTracker(model) as tracker:
        batches = feed(model, waiting)
        tracker.flush()
        for thread in threads:
            thread.join(60)
        layer = layer_of(tracker)
    assert_population(layer, [*batches, late])


class Features(Dataset):
    """Runs the model that is trained, in the worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 60

    def __getitem__(self, index):
        assert self.model.training
        self.model(torch.randn(8, C) + 100)
        return torch.randn(C)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_what_forked_workers_do_with_the_model_counts_nothing():
    model, batches = single(), []
    loader = DataLoader(Features(model), batch_size=6, num_workers=2, multiprocessing_context="fork")
    with BatchNormTracker(model) as tracker:
        for x in loader:
            model(x)
            batches.append(x)
        layer = layer_of(tracker)
    assert len(batches) == 10
    assert_population(layer, batches)
    assert torch.equal(layer.running_mean, model[0].running_mean.double())


# ------------------------------------------------------------------------------------------------------- spoilt batches


def test_empty_batches_count_nothing_and_what_batch_norm_says_of_them_is_the_same(tmp_path):
    def outcome(model, x):
        try:
            return tuple(model(x).shape)
        except Exception as error:
            return type(error), str(error)

    model, batches = single(), []
    shapes = [(0, C), (0, C, 4), (8, C, 0)]
    without = [outcome(single(), torch.randn(shape)) for shape in shapes]
    with BatchNormTracker(model) as tracker:
        for shape, expected in zip(shapes, without, strict=True):
            batches += feed(model)
            assert outcome(model, torch.randn(shape)) == expected
        assert_population(layer_of(tracker), batches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_in_a_run_is_named_and_spoils_no_later_window(tmp_path, value):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                batch[0][2, 1] = value

    class OfInput(Net):
        """Its loss does not depend on what is spoilt, so that only the input is."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return self.linear(torch.ones(4, C)).square().mean()

    reports = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            reports.append(monitor.report())
            for layer in (pl_module.a, pl_module.b):
                layer.reset_running_stats()

    monitor, model = BatchNormMonitor(), OfInput()
    loader = data()
    loader = DataLoader([x.clone() for (x,) in loader.dataset], batch_size=8, collate_fn=lambda x: [torch.stack(x)])
    trainer_for(tmp_path, Spoil(), monitor, Look(), max_epochs=3).fit(model, loader)
    assert [report["a"].verdict == "non-finite" for report in reports] == [False, True, False]
    mean, _ = moments(model.received("a", BATCHES, 2 * BATCHES))
    assert reports[1]["a"].population_mean.isnan().tolist() == [False, True, False]
    np.testing.assert_allclose(reports[1]["a"].population_mean[[0, 2]], mean[[0, 2]], atol=1e-6)
    model.assert_reported(reports[0], 0, BATCHES)
    model.assert_reported(reports[2], 2 * BATCHES, 3 * BATCHES)
