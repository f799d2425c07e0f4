"""What an examination may be given: data of any kind, models that do more than compute, and all left as it was."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_bnmonitor import Report, examine, recalibrate
from tests.repair.exact_population import C
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Unchanged

VALUES = torch.randn(512, C, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(512) % 2


def labelled(batch_size: int = 32, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(VALUES, LABELS), batch_size, **kwargs)


class Augmented(Dataset[dict[str, Tensor]]):
    """Draws random numbers of each kind for a sample."""

    def __len__(self) -> int:
        return len(VALUES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": VALUES[index] + 0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random()}


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(C)


def examined(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """The report, of an examination that has changed nothing."""
    with Unchanged(model, entirely=True):
        return examine(model, *args, **kwargs)


def samples_of(report: Report) -> set[int]:
    return {layer.num_samples for layer in report.values()}


def test_batches_that_are_mappings_of_samples_with_random_augmentation() -> None:
    loader = DataLoader(Augmented(), 32, shuffle=True)
    assert samples_of(examined(trained(Net()), loader, loader, num_batches=None)) == {512}


@pytest.mark.slow
def test_loaders_with_workers_that_stay() -> None:
    generator = torch.Generator().manual_seed(4)
    state = generator.get_state()
    loader = DataLoader(Augmented(), 32, shuffle=True, num_workers=2, persistent_workers=True, generator=generator)
    assert samples_of(examined(trained(Net()), loader, DataLoader(Augmented(), 64, num_workers=1))) == {512}
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("endless", [lambda: DataLoader(Endless(), 256), lambda: itertools.repeat(VALUES)])
def test_data_without_end_are_looked_at_until_it_does(endless: Any) -> None:
    report = examined(trained(Net()), endless())
    assert max(layer.evidence["now_error"] for layer in report.values()) <= 0.01
    assert "not below" not in report.remarks[0]


def test_data_without_end_that_never_do_end_at_100_000_samples() -> None:
    scales = (10.0**power for power in itertools.cycle((0, 3)))
    report = examined(single(), (scale * torch.randn(512, C) for scale in scales))
    assert 100_000 <= report["0"].num_samples < 300_000
    assert "so many are the most" in report.remarks[0]


def test_several_loaders_one_after_another_or_together() -> None:
    model, one, two = trained(Net()), labelled(), labelled(64)
    assert samples_of(examined(model, itertools.chain(one, two), num_batches=None)) == {1024}
    in_turn = CombinedLoader([one, two], "sequential")
    assert samples_of(examined(model, in_turn, forward=lambda model, b: model(b[0][0]), num_batches=None)) == {1024}
    assert samples_of(examined(model, one, itertools.chain(one, two), num_batches=None)) == {512}
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError, match=r"batch 0 of `evaluation`, a DataLoader"):
        examine(model, one, [one, two])


class Module(pl.LightningModule):
    """Logs in its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"again": loss}, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_module_of_lightning_by_its_forward_and_by_a_step_that_logs() -> None:
    module = Module()
    for x, _ in labelled():
        module(x)
    by_forward = examined(module, labelled())
    by_step = examined(module, labelled(), forward=lambda module, batch: module.training_step(batch, 0))
    assert by_forward.to_dict() == by_step.to_dict()


def test_within_a_training_of_lightning() -> None:
    seen: list[Report] = []

    class Examining(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(examined(pl_module, trainer.train_dataloader, labelled()))

    module = Module()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, callbacks=[Examining()], accelerator="cpu", **options)
    trainer.fit(module, labelled(shuffle=True))
    assert [samples_of(report) for report in seen] == [{512}, {512}]


@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval])
def test_a_forward_that_sets_modes_itself(mode: Any) -> None:
    def forward(model: nn.Module, batch: Any) -> None:
        mode(model)(batch[0])

    assert samples_of(examined(trained(Net()), labelled(), forward=forward)) == {512}


def test_a_model_under_autocast_and_one_in_half_precision_with_data_that_are_not() -> None:
    def under_autocast(model: nn.Module, batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch[0])

    exact = examined(trained(Net()), labelled())
    cast = examined(trained(Net()), labelled(), forward=under_autocast)
    for name, layer in cast.items():
        torch.testing.assert_close(layer.population_var, exact[name].population_var, rtol=0.5, atol=0.5)
    half = single().bfloat16()
    with Unchanged(half, entirely=True), pytest.raises(RuntimeError, match="cannot take batch 0 of `batches`, a list"):
        examine(half, labelled())
    converting = lambda model, batch: model(batch[0].bfloat16())  # noqa: E731
    assert samples_of(examined(half, labelled(), forward=converting)) == {512}


def test_an_averaged_model_and_its_repair() -> None:
    model = trained(Net(), steps=100)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.module.b.reset_running_stats()
    report = examined(averaged, labelled())
    assert report["module.b"].flags == ("never-updated",)
    recalibrate(averaged, labelled())
    assert examined(averaged, labelled())["module.b"].verdict == "healthy"


def test_no_layer_that_data_reach_is_said_to_be_right() -> None:
    report = examined(trained(Net()), labelled(), forward=lambda model, batch: None)
    assert {layer.verdict for layer in report.values()} == {"unused"}
    assert "could not be judged" in str(report)
    assert "No BatchNorm layer was reached by these batches" in str(report)
    for value in (1.0, torch.nan):  # from one batch nothing is known of chance
        assert "No BatchNorm layer was reached" not in str(examined(trained(Net()), [value * VALUES]))


def test_a_last_batch_of_one_sample_is_an_error_as_in_training() -> None:
    model = trained(Net())
    batches = [VALUES[:16], VALUES[:1]]
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError, match="Expected more than 1 value per channel"):
        examine(model, batches)
    assert samples_of(examined(model, batches[:1], batches)) == {16}  # in evaluation it is none
