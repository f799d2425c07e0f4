"""Runs that are interrupted and resumed from Lightning's checkpoints, against the same runs left alone."""

import signal
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.diagnosis.flags import FLAGS
from tests.processes import run_script
from tests.tracking.small_models import assert_alike

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
]
BATCHES = 24  # in an epoch
EPOCHS = 3


class Net(LightningModule):
    """Trains on the batch that belongs to the step, as Lightning does not bring a loader back to where it was."""

    def __init__(self, widths=(6, 3), frozen=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = widths
        self.conv, self.a = nn.Conv1d(1, first, 3), nn.BatchNorm1d(first)
        self.linear, self.b = nn.Linear(first * 4, second), nn.BatchNorm1d(second, momentum=0.3)
        self.out, self.never = nn.Linear(second, 1), nn.BatchNorm1d(2)
        generator = torch.Generator().manual_seed(1)
        self.data = [torch.randn(10 + t % 5, 1, 6, generator=generator) + 1 for t in range(BATCHES * EPOCHS)]

    def forward(self, x):
        return self.out(self.b(self.linear(torch.relu(self.a(self.conv(x))).flatten(1))))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [self.data[self.trainer.global_step]] if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return nn.functional.mse_loss(self(x), x.mean(dim=2))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0] + 50).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Windows(Callback):
    """Every report, by the number of training batches before its window's end."""

    def __init__(self, monitor):
        self.monitor, self.reports, self.last = monitor, {}, None

    def look(self, trainer):
        report = self.monitor._report
        if report is None or report is self.last:
            return
        is_new = self.last is None or any(
            report[name].numbers is not layer.numbers for name, layer in self.last.items()
        )
        if is_new:  # and not that of the same window after validation
            self.reports[trainer.global_step] = before_validation(report)
        self.last = report

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(trainer)

    def on_train_end(self, trainer, pl_module):
        self.look(trainer)


def before_validation(report):
    """A report without what validation adds, which is not repeated by a run that is resumed after it."""
    values = report.to_dict()
    for name in ("val_error_max", "val_shift_max", "unhealthy_layers"):
        values["summary"].pop(name, None)
    for layer in values["layers"].values():
        for name in ("val_error", "val_shift", "explanation", "remedy", "needs_attention"):
            del layer[name]
        layer["flags"] = [flag for flag in layer["flags"] if FLAGS[flag].rule is not None]
        layer["evidence"] = {name: value for name, value in layer["evidence"].items() if not name.startswith("val_")}
    return values


def loader(num=BATCHES):
    return DataLoader(TensorDataset(torch.randn(num, 1, 6)), batch_size=1)


def run(folder, *callbacks, ckpt_path=None, model=None, monitor_options=None, **options):
    monitor = BatchNormMonitor(**(monitor_options or {}))
    windows = Windows(monitor)
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": EPOCHS, "limit_val_batches": 2}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, callbacks=[monitor, windows, *callbacks], **(defaults | quiet | options))
    model = model or Net()
    try:
        trainer.fit(model, loader(), loader(2), ckpt_path=ckpt_path)
    except StopError:
        pass
    except SystemExit:  # what Lightning makes of a KeyboardInterrupt
        pass
    return windows.reports, monitor, trainer


class StopError(Exception):
    pass


class Save(Callback):
    """Saves checkpoints at given moments, each a kind and a step."""

    def __init__(self, folder, *moments):
        self.folder, self.moments = folder, moments

    def act(self, kind, trainer):
        moment = kind, trainer.global_step
        if moment in self.moments and not path_of(self.folder, *moment).exists():
            trainer.save_checkpoint(path_of(self.folder, *moment))

    def on_train_batch_end(self, trainer, *_):
        self.act("batch end", trainer)

    def on_validation_batch_end(self, trainer, *_):
        self.act("validation", trainer)

    def on_validation_end(self, trainer, *_):
        self.act("validation end", trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.act("epoch end", trainer)


def path_of(folder, kind, step):
    return folder / f"{kind} {step}.ckpt"


class SaveAndStop(Callback):
    """Saves a checkpoint at the end of a batch, and ends the run there as a crash does."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise StopError


OPTIONS = {
    "epochs": {},
    "two epochs": {"monitor_options": {"every_n_epochs": 2}},
    "batches": {"monitor_options": {"every_n_train_batches": 10}},
    "half epochs": {"monitor_options": {"every_n_train_batches": 12}, "val_check_interval": 0.5},
    "validation in mid-epoch": {"val_check_interval": 0.25},
}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {name: run(folder, **options)[0] for name, options in OPTIONS.items()}


# Before, at and after a window's end, within a validation, after it, and at an epoch's end.
MOMENTS = {
    "epochs": [
        *(("batch end", step) for step in (1, 12, 23, 24, 25, 71)),
        *(("validation", 24), ("validation end", 48), ("epoch end", 24)),
    ],
    "two epochs": [("batch end", 24), ("batch end", 40), ("validation", 24), ("validation end", 48), ("epoch end", 48)],
    "batches": [
        *(("batch end", step) for step in (10, 23, 24, 71)),
        *(("validation", 48), ("validation end", 24), ("epoch end", 24)),
    ],
    "half epochs": [
        ("batch end", 12),
        ("batch end", 23),
        ("validation", 24),
        ("validation end", 48),
        ("epoch end", 24),
    ],
    "validation in mid-epoch": [("batch end", 12), ("batch end", 25), ("validation", 48), ("epoch end", 24)],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, left_alone):
    """Folders with the checkpoints of runs that were saved at all moments, and not disturbed by that."""
    folders = {}
    for windows, moments in MOMENTS.items():
        folders[windows] = folder = tmp_path_factory.mktemp("saved")
        reports, _, _ = run(folder, Save(folder, *moments), **OPTIONS[windows])
        assert_alike(reports, left_alone[windows], rounding(windows))
        assert all(path_of(folder, *moment).exists() for moment in moments)
    return folders


def rounding(windows):
    """In a window of two batches the noise is the difference of two numbers: its z has lost a digit."""
    return 1e-11 if windows == "batches" else 1e-12


@pytest.mark.parametrize(
    ("windows", "kind", "step"), [(windows, *moment) for windows, moments in MOMENTS.items() for moment in moments]
)
def test_a_run_resumed_at_the_end_of_a_batch_has_the_reports_of_one_left_alone(
    tmp_path, left_alone, saved, windows, kind, step
):
    after, monitor, _ = run(tmp_path, ckpt_path=path_of(saved[windows], kind, step), **OPTIONS[windows])
    expected = left_alone[windows]
    assert {end for end in expected if end > step} <= after.keys() <= expected.keys()
    for end, report in after.items():
        assert_alike(report, expected[end], rounding(windows))
    assert_alike(before_validation(monitor.report()), expected[max(expected)], rounding(windows))


def test_a_run_that_goes_on_after_its_end_knows_its_history(tmp_path, left_alone):
    _, _, trainer = run(tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    after, _, _ = run(tmp_path, ckpt_path=tmp_path / "end.ckpt")
    assert after.keys() == {72}
    assert_alike(after[72], left_alone["epochs"][72])


KILLED = """
import os, signal, sys
from tests.tracking import test_resume
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

class Kill(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 33:
            os.kill(os.getpid(), signal.SIGKILL)

checkpoints = ModelCheckpoint(sys.argv[1], every_n_train_steps=10, save_top_k=-1, filename="{step}")
test_resume.run(sys.argv[1], Kill(), checkpoints, enable_checkpointing=True)
"""


def test_a_killed_run_resumes_as_of_its_last_checkpoint(tmp_path, left_alone):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = run_script(script, tmp_path)
    assert killed.code == -signal.SIGKILL, killed.errors
    after, _, _ = run(tmp_path, ckpt_path=tmp_path / "step=30.ckpt")
    assert after.keys() == {48, 72}
    for end, report in after.items():
        # The weights themselves come from another process, where float32 sums may be rounded in another way.
        assert_alike(report, left_alone["epochs"][end], bound=1e-4)


class Interrupted(Net):
    """Stops in the middle of a step, after its forward."""

    def __init__(self, error, at):
        super().__init__()
        self.error, self.at = error, at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.at:
            raise self.error
        return loss


@pytest.mark.parametrize(("error", "at"), [(StopError, 24), (KeyboardInterrupt, 30), (StopError, 47)])
def test_a_run_interrupted_within_a_batch_counts_what_was_run_and_says_so(tmp_path, left_alone, error, at):
    save = OnExceptionCheckpoint(tmp_path, "broken")
    run(tmp_path, save, model=Interrupted(error, at), enable_checkpointing=True)
    after, _, _ = run(tmp_path, ckpt_path=tmp_path / "broken.ckpt")
    assert after.keys() == {48, 72}
    for name in ("a", "b"):
        layer = after[48]["layers"][name]
        alone = left_alone["epochs"][48]["layers"][name]
        assert layer["flags"] == ["interrupted-batch"]
        # The batch that was interrupted has gone through the layer twice, and into its running statistics twice.
        assert layer["num_batches"] == alone["num_batches"] + 1
        assert layer["evidence"]["updates_per_call"] == 1
        assert layer["evidence"]["initial_weight"] == pytest.approx(
            alone["evidence"]["initial_weight"] * (1 - layer["momentum"])
        )
        assert layer["verdict"] == alone["verdict"]
        later = after[72]["layers"][name]
        assert later["flags"] == []
        assert later["num_batches"] == BATCHES


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a run that crashed six batches into its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, SaveAndStop(30, folder / "saved.ckpt"))
    return folder / "saved.ckpt"


def state_of(checkpoint):
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("BatchNormMonitor"))
    return checkpoint["callbacks"][key]


def test_a_checkpoint_is_small_and_loads_with_weights_only(tmp_path, stopped):
    state = state_of(torch.load(stopped, weights_only=True))
    torch.save(state, tmp_path / "state")
    assert (tmp_path / "state").stat().st_size <= 1024 * (6 + 3 + 2) + 64 * 1024
    wide = tmp_path / "wide.ckpt"
    run(tmp_path, SaveAndStop(30, wide), model=Net((100, 200)))
    torch.save(state_of(torch.load(wide, weights_only=True)), tmp_path / "state")
    assert (tmp_path / "state").stat().st_size <= 1024 * 302 + 64 * 1024


class Changed(Net):
    """Loads what it has of a checkpoint."""

    def on_load_checkpoint(self, checkpoint):
        own = self.state_dict()
        fits = {k: v for k, v in checkpoint["state_dict"].items() if k in own and own[k].shape == v.shape}
        checkpoint["state_dict"] = own | fits
        checkpoint["optimizer_states"] = [torch.optim.SGD(self.parameters(), lr=0.05).state_dict()]


def test_a_model_whose_layers_have_changed_goes_on_and_is_told_which(tmp_path, stopped):
    model = Changed((6, 5))
    model.extra = nn.BatchNorm1d(4)
    del model.never
    message = (
        r"BatchNorm layers have changed since the state was saved; left out, as the model has none of that name and "
        r"width: b, never; new: b, extra\."
    )
    with pytest.warns(UserWarning, match=message):
        after, _, _ = run(tmp_path, ckpt_path=stopped, model=model)
    assert after[48]["layers"]["a"]["num_batches"] == BATCHES
    assert after[48]["layers"]["b"]["num_batches"] == BATCHES - 6
    assert after[72]["layers"]["b"]["num_batches"] == BATCHES


def test_nothing_is_said_if_no_layer_has_changed(tmp_path, stopped):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BatchNorm layers have changed")
        run(tmp_path, ckpt_path=stopped)


def test_a_checkpoint_without_the_monitor_is_no_trouble(tmp_path, stopped):
    path = tmp_path / "changed.ckpt"
    checkpoint = torch.load(stopped, weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, path)
    after, _, _ = run(tmp_path, ckpt_path=path)
    assert after[48]["layers"]["a"]["num_batches"] == BATCHES - 6


def test_a_state_of_another_version_is_left_out_with_a_warning(tmp_path, stopped):
    path = tmp_path / "changed.ckpt"
    checkpoint = torch.load(stopped, weights_only=True)
    state_of(checkpoint)["tracker"]["version"] = 1
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=r"statistics in the checkpoint are left out: .* got version 1"):
        after, _, _ = run(tmp_path, ckpt_path=path)
    assert after[48]["layers"]["a"]["num_batches"] == BATCHES - 6


def test_early_stopping_finds_its_metric_in_the_first_validation_after_a_resume(tmp_path):
    options = {"val_check_interval": 0.25}
    path = tmp_path / "saved.ckpt"
    run(tmp_path, SaveAndStop(25, path), **options)
    strict = EarlyStopping("bn/eval_error_max", patience=100)
    _, _, trainer = run(tmp_path, strict, ckpt_path=path, **options)
    assert trainer.global_step == 72


def test_two_monitors_keep_states_of_their_own(tmp_path, left_alone):
    path = tmp_path / "saved.ckpt"
    other = BatchNormMonitor(every_n_train_batches=10, include="a", log_key_prefix="other")
    run(tmp_path, other, SaveAndStop(25, path))
    other = BatchNormMonitor(every_n_train_batches=10, include="a", log_key_prefix="other")
    after, _, _ = run(tmp_path, other, ckpt_path=path)
    assert_alike(after[72], left_alone["epochs"][72])
    assert other.report()["a"].num_batches == 2  # 72 = 7 * 10 + 2
    assert list(other.report()) == ["a"]


def test_a_checkpoint_that_was_tested_is_not_what_the_next_fit_goes_on_from(tmp_path, stopped):
    class Tested(Net):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    monitor = BatchNormMonitor()
    trainer = Trainer(
        default_root_dir=tmp_path, callbacks=[monitor], logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.test(Tested(), loader(2), ckpt_path=stopped)
    trainer.fit(Net(), loader())
    assert monitor.report()["a"].num_batches == BATCHES


def test_a_checkpoint_saved_by_model_checkpoint_while_validating_has_the_window_that_was_validated(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="bn/eval_error_max", save_top_k=-1, filename="{step}")
    reports, _, _ = run(tmp_path, best, enable_checkpointing=True)
    for step, report in reports.items():
        state = state_of(torch.load(tmp_path / f"step={step}.ckpt", weights_only=True))
        assert state["summary"]["bn/eval_error_max"] == report["summary"]["eval_error_max"]
