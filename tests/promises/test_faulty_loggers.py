"""Loggers that fail, disks that are full, warnings that are errors: the monitor loses no report."""

from __future__ import annotations

import errno
import os
import sys
import textwrap
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_bnmonitor import BatchNormMonitor
from tests.processes import run_script
from tests.promises.faulty_runs import (
    BATCHES,
    MARKS,
    BoomError,
    Memory,
    Net,
    assert_usable,
    data,
    hooks_of,
    optimizer_hooks,
    trainer_for,
)

pytestmark = MARKS


@pytest.mark.filterwarnings("ignore:Memory did not log")
@pytest.mark.parametrize("options", [{}, {"on_unhealthy": "ignore"}, {"every_n_train_batches": BATCHES}])
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


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_file_that_can_grow_no_further_loses_no_report(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISK_FULL))
    done = run_script(script, tmp_path)
    assert f"FAILED OSError {errno.EFBIG}" in done.output, done.errors  # when the logger closes its file, after all
    assert "REPORT 48 True 600 0" in done.output


def test_where_warnings_are_errors_the_run_ends_by_its_warning_and_the_report_is_there(tmp_path):
    class Strict(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.a.running_mean[1] = torch.nan
            warnings.simplefilter("error")

    monitor, model, logger = BatchNormMonitor(), Net(), Memory()
    model.b.momentum = None  # of few batches the average is right
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
