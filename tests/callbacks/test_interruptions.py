"""Nothing is left on the model after a fit or an interruption, and training is bit-identical with the monitor."""

import random
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    BATCH_SIZE,
    BATCHES,
    LAYERS,
    Net,
    OnTrainBatchEnd,
    Recorder,
    close,
    hooks_of,
    num_batches,
    optimizer_hooks,
    read_csv,
    samples,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


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


def hooks_in_training(seen: list[tuple[int, int]], model: nn.Module) -> OnTrainBatchEnd:
    return OnTrainBatchEnd(lambda _: seen.append((hooks_of(model), optimizer_hooks())))


def test_every_hook_is_gone_after_fit(tmp_path):
    model, during = Net(), []
    before = hooks_of(model), optimizer_hooks()
    trainer_for(tmp_path, BatchNormMonitor(), hooks_in_training(during, model)).fit(model, train_data(), val_data())
    assert min(during) > before
    assert all(not module._forward_hooks for module in model.modules())
    assert (hooks_of(model), optimizer_hooks()) == before


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize(
    ("step", "epoch", "batch", "window", "exception", "arrives_as"),
    [
        ("training_step", 0, 0, (0, 0), RuntimeError("broken"), RuntimeError),
        ("training_step", 0, 4, (0, 4), RuntimeError("broken"), RuntimeError),  # of the window so far
        ("training_step", 0, 4, (0, 4), KeyboardInterrupt(), SystemExit),
        ("training_step", 1, 2, (0, 6), RuntimeError("broken"), RuntimeError),  # later: of the last one finished
        ("validation_step", 0, 1, (0, 6), RuntimeError("broken"), RuntimeError),
        ("validation_step", 0, 1, (0, 6), KeyboardInterrupt(), SystemExit),
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


def test_training_with_the_monitor_is_bit_identical_to_training_without_it(tmp_path):
    options = {"num_sanity_val_steps": 1, "accumulate_grad_batches": 2}
    without = trajectory(tmp_path / "without", **options)
    assert sum("num_batches_tracked" in name for name in without["weights and buffers"]) == 2
    assert [len(losses) for losses in without["losses"]] == [3, 3]
    for arguments in ({}, {"capture": "pass", "every_n_train_batches": 4}):
        monitor = BatchNormMonitor(**arguments)
        monitored = trajectory(tmp_path / f"monitored {len(arguments)}", monitor, **options)
        assert len(monitor.report()) == 2
        assert without.keys() == monitored.keys()
        for what in without:
            assert identical(monitored[what], without[what]), (arguments, what)
