"""`trainer.validate` and `trainer.test` without a fit: what they print, and that they leave everything as it was."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor, UnhealthyBatchNormError
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    BATCH_SIZE,
    LAYERS,
    Net,
    hooks_of,
    num_batches,
    optimizer_hooks,
    samples,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


class TwoLoaders(Net):
    """Is evaluated with several loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class Failing(Callback):
    """Fails in the second batch of an evaluation."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise RuntimeError("on purpose")

    on_test_batch_end = on_validation_batch_end


def loaders():
    return [DataLoader(samples(12, seed=seed), batch_size=BATCH_SIZE) for seed in (5, 6)]


@pytest.mark.parametrize("function", ["validate", "test"])
def test_running_statistics_that_were_never_updated_are_named(tmp_path, capsys, function):
    model, monitor = TwoLoaders(), BatchNormMonitor(on_unhealthy="ignore")
    trainer = trainer_for(tmp_path, monitor)
    state = copy.deepcopy(model.state_dict())
    getattr(trainer, function)(model, loaders(), verbose=False)
    printed = capsys.readouterr().out
    assert "BatchNorm: what was evaluated" in printed
    assert "2 of 2 BatchNorm layers need attention: 2 never-updated." in printed
    assert "Its running statistics were never updated" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith(LAYERS) and "  " in line}
    assert set(rows) == set(LAYERS)
    assert all("never-updated" in row for row in rows.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == 0
    assert len(monitor.report()) == 0


@pytest.mark.parametrize("function", ["validate", "test"])
def test_layers_that_need_attention_are_warned_of_or_raised(tmp_path, capsys, function):
    model = Net()
    with pytest.warns(UserWarning, match=r"BatchNorm layers need attention: .* \(never-updated, val_error"):
        getattr(trainer_for(tmp_path, BatchNormMonitor()), function)(model, val_data(), verbose=False)
    monitor = BatchNormMonitor(on_unhealthy="raise")
    with pytest.raises(UnhealthyBatchNormError, match="2 never-updated") as raised:
        getattr(trainer_for(tmp_path, monitor), function)(model, val_data(), verbose=False)
    assert all(layer.needs_attention for layer in raised.value.report.values())
    assert hooks_of(model) == 0


def test_running_statistics_that_are_right_are_not(tmp_path, capsys):
    model = Net()
    torch.optim.swa_utils.update_bn(DataLoader(samples(12, seed=5), batch_size=BATCH_SIZE), model.train())
    trainer_for(tmp_path, BatchNormMonitor()).validate(model, loaders()[0], verbose=False)
    printed = capsys.readouterr().out
    assert "None of 2 BatchNorm layers needs attention." in printed
    assert "never-updated" not in printed


def test_what_is_evaluated_is_the_same_with_the_monitor(tmp_path):
    def evaluated(*callbacks):
        model, trainer = Net(), trainer_for(tmp_path, *callbacks)
        metrics = [run(model, val_data(), verbose=False) for run in (trainer.validate, trainer.test)]
        return metrics, torch.rand(3).tolist()

    assert evaluated(BatchNormMonitor()) == evaluated()


@pytest.mark.parametrize("function", ["validate", "test"])
def test_the_report_of_a_fit_stays_and_so_does_its_state(tmp_path, capsys, function):
    model, monitor = Net(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor)
    trainer.fit(model, train_data(12))
    report, state = monitor.report(), monitor.state_dict()
    capsys.readouterr()
    getattr(trainer, function)(model, train_data(12), verbose=False)
    assert "BatchNorm: what was evaluated" in capsys.readouterr().out
    assert monitor.report() is report
    assert monitor.state_dict() is state
    assert num_batches(report) == dict.fromkeys(LAYERS, 12)


@pytest.mark.parametrize("function", ["validate", "test"])
def test_an_evaluation_that_fails_leaves_no_hook_and_the_report_of_the_fit(tmp_path, function):
    model, monitor = Net(), BatchNormMonitor()
    hooks = optimizer_hooks()
    with pytest.raises(RuntimeError, match="on purpose"):
        getattr(trainer_for(tmp_path, monitor, Failing()), function)(model, train_data(), verbose=False)
    assert (hooks_of(model), optimizer_hooks()) == (0, hooks)
    assert len(monitor.report()) == 0

    trainer_for(tmp_path, monitor).fit(model, train_data(12))
    report, state = monitor.report(), monitor.state_dict()
    with pytest.raises(RuntimeError, match="on purpose"):
        getattr(trainer_for(tmp_path, monitor, Failing()), function)(model, train_data(), verbose=False)
    assert (hooks_of(model), optimizer_hooks()) == (0, hooks)
    assert monitor.report() is report
    assert monitor.state_dict() is state


def test_without_batches_to_look_at_nothing_is_printed(tmp_path, capsys):
    model = Net()
    trainer_for(tmp_path, BatchNormMonitor(validation_batches=0)).validate(model, val_data(), verbose=False)
    assert "BatchNorm" not in capsys.readouterr().out
    assert hooks_of(model) == 0


def test_of_a_model_without_batch_norm_nothing_is_printed_and_a_warning_says_so(tmp_path, capsys):
    trainer, model = trainer_for(tmp_path, BatchNormMonitor()), Net(nn.Sequential(nn.Flatten(), nn.Linear(6, 1)))
    with pytest.warns(UserWarning, match="No BatchNorm layer to monitor"):
        trainer.validate(model, val_data(), verbose=False)
    assert "BatchNorm" not in capsys.readouterr().out
