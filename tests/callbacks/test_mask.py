"""``BatchNormMonitor(mask=)``: the batches of a fit tell what counts."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import trainer_for
from tests.tracking.padded_models import Records, assert_unpadded, batches, lengths_to_mask, network

pytestmark = EXPECTED_WARNINGS
NAMES = ("body.1", "body.4", "body.7")


class Padded(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = network()
        self.out = nn.Linear(3, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        records.mask = lengths_to_mask(batch)
        loss = self.out(self.body(batch[0])).square().mean()
        records.mask = None
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.body(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Nothing:
    mask = None


records = Nothing()


def loader(num=12, seed=0, offset=3.0):
    return DataLoader(batches(num, seed=seed, offset=offset), batch_size=None)


def fit(tmp_path, monitor, model=None, **options):
    model = model or Padded()
    trainer = trainer_for(tmp_path, *([] if monitor is None else [monitor]), **options)
    trainer.fit(model, loader(), loader(3, seed=1))
    return model


def test_each_window_has_the_statistics_without_padding_of_its_batches(tmp_path, monkeypatch):
    model = Padded()
    own = Records(model)
    monkeypatch.setitem(globals(), "records", own)
    monitor = BatchNormMonitor(mask=lengths_to_mask, on_unhealthy="ignore")
    fit(tmp_path, monitor, model, max_epochs=2)
    for name in NAMES:
        last = Records(nn.Sequential())
        last.values, last.kept = {name: own.values[name][12:]}, {name: own.kept[name][12:]}
        assert_unpadded(monitor.report()[name], last, name)
    assert "padded" in monitor.report()["body.1"].flags
    assert "padded" in str(monitor.report())
    layer = monitor.report()["body.1"]
    assert [layer.to_dict()[f"unpadded_{of}"] for of in ("mean", "var")] == layer.unpadded.tolist()


def test_training_is_bit_identical(tmp_path):
    monitored = fit(tmp_path, BatchNormMonitor(mask=lengths_to_mask, on_unhealthy="ignore"))
    plain = fit(tmp_path, None)
    assert torch.equal(torch.stack(monitored.losses), torch.stack(plain.losses))
    assert all(map(torch.equal, monitored.state_dict().values(), plain.state_dict().values()))


def test_a_warning_names_padding_with_its_number_and_a_remedy(tmp_path):
    with pytest.warns(UserWarning, match=r"body\.1.*padded"):
        fit(tmp_path, BatchNormMonitor(mask=lengths_to_mask), max_epochs=4)


def test_a_function_that_fails_stops_no_training(tmp_path):
    monitor = BatchNormMonitor(mask=lambda batch: batch["lengths"], on_unhealthy="ignore")
    with pytest.warns(UserWarning, match=r"`mask` failed"):
        model = fit(tmp_path, monitor)
    assert len(model.losses) == 12
    assert all(math.isfinite(loss) for loss in model.losses)
    assert monitor.report()["body.1"].num_batches == 12
    assert monitor.report()["body.1"].unpadded is None


def test_evaluation_alone_asks_for_no_mask(tmp_path):
    asked = []
    monitor = BatchNormMonitor(mask=lambda batch: asked.append(batch), on_unhealthy="ignore")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`mask`")
        trainer_for(tmp_path, monitor).validate(Padded(), loader(3))
    assert asked == []


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="`mask` must be a function or None, got 3"):
        BatchNormMonitor(mask=3)
