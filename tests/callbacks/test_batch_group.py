"""``BatchNormMonitor(group=...)``: a function that names the group of each training batch."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.page.document import cells
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import events, trainer_for

pytestmark = EXPECTED_WARNINGS
BATCHES, C = 24, 6


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C), nn.BatchNorm1d(C))

    def training_step(self, batch, batch_idx):
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def domains(num_batches=BATCHES, seed=0):
    """Batches of one of three domains each; the second lies apart."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.randint(3, (num_batches,), generator=generator)
    x = torch.randn(num_batches, 16, C, generator=generator) + 2.0 * (domain == 1)[:, None, None]
    return DataLoader(TensorDataset(x, domain), batch_size=None)


def name(batch, batch_idx):
    return "abc"[batch[1]]


def fitted(tmp_path, group, logger=False, **options):
    torch.manual_seed(0)
    monitor, model = BatchNormMonitor(group=group), Net()
    trainer = trainer_for(tmp_path, monitor, logger=logger, **options)
    trainer.fit(model, domains())
    return monitor, trainer, model


def test_the_group_that_differs_is_named_in_the_report_and_in_the_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"body\.1 \(grouped-batches, group_shift [0-9.]+\)"):
        monitor, *_ = fitted(tmp_path, name)
    layer = monitor.report()["body.1"]
    assert layer.verdict == "grouped-batches"
    assert "By group: 'b' is" in layer.explanation
    loader = domains().dataset
    for index, group in enumerate("abc"):
        assert layer.groups[group].num_batches == int((loader.tensors[1] == index).sum())
        assert layer.groups[group].num_samples == 16 * layer.groups[group].num_batches


def test_it_is_logged_and_in_the_history(tmp_path):
    monitor, trainer, _ = fitted(tmp_path, name, logger=True, max_epochs=2)
    scalars = events(tmp_path)
    for layer in monitor.report().values():
        points = scalars[f"bn.group_shift/{layer.name}"]
        assert [step for step, _ in points] == [BATCHES - 1, 2 * BATCHES - 1]
        assert points[-1][1] == pytest.approx(layer.evidence["group_shift"], rel=1e-5)
    largest = max(layer.evidence["group_shift"] for layer in monitor.report().values())
    assert float(trainer.callback_metrics["bn/group_shift_max"]) == pytest.approx(largest, rel=1e-5)
    assert scalars["bn/group_shift_max"][-1][1] == pytest.approx(largest, rel=1e-5)
    kept = cells(monitor.history.document()).metrics["group_shift"]
    assert kept.shape == (2, 2)
    assert kept.max() == pytest.approx(largest, rel=0.01)
    assert "group_shift" in monitor.history.to_csv().splitlines()[0]


def test_without_it_nothing_is_said_of_groups(tmp_path):
    monitor, _, _ = fitted(tmp_path, None, logger=True)
    assert not [tag for tag in events(tmp_path) if "group" in tag]
    assert "group_shift" not in cells(monitor.history.document()).metrics
    assert all(layer.groups == {} for layer in monitor.report().values())


@pytest.mark.parametrize("group", ["a", 3, [name]])
def test_what_is_no_function_is_refused(group):
    with pytest.raises(TypeError, match="`group` must be a function of a training batch and its index"):
        BatchNormMonitor(group=group)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda batch, batch_idx: batch["domain"], "new|indices|tuple"),
        (lambda batch: "a", "positional argument"),
        (lambda batch, batch_idx: ["a"] * 16, "A batch is of one group"),
        (lambda batch, batch_idx: 1 / (batch_idx - 5) and "a", "division by zero"),
    ],
    ids=["no such key", "other arguments", "a list", "later"],
)
def test_a_function_that_fails_is_warned_of_once_and_training_goes_on(tmp_path, function, told):
    with pytest.warns(UserWarning, match=f"`group` of BatchNormMonitor has failed with batch .*({told})") as caught:
        monitor, trainer, _ = fitted(tmp_path, function, max_epochs=2)
    assert len([each for each in caught if "`group`" in str(each.message)]) == 1
    assert trainer.global_step == 2 * BATCHES
    assert monitor.report()["body.1"].num_batches == BATCHES
    assert monitor.report()["body.1"].groups == {}


def test_what_it_does_not_name_is_of_no_group(tmp_path):
    monitor, *_ = fitted(tmp_path, lambda batch, batch_idx: "b" if batch[1] == 1 else None)
    layer = monitor.report()["body.1"]
    assert list(layer.groups) == ["b"]
    assert layer.verdict == "grouped-batches"
    assert "Batches of a group differ from the others" in layer.explanation


def test_it_may_be_of_the_index_of_the_batch(tmp_path):
    monitor, *_ = fitted(tmp_path, lambda batch, batch_idx: batch_idx % 2)
    assert {group: its.num_batches for group, its in monitor.report()["body.1"].groups.items()} == {"0": 12, "1": 12}


def test_training_is_the_same_to_the_bit(tmp_path):
    *_, with_groups = fitted(tmp_path, name, max_epochs=2)
    *_, without = fitted(tmp_path, None, max_epochs=2)
    for one, other in zip(with_groups.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_batches_whose_gradients_are_accumulated_go_to_their_own_groups(tmp_path):
    monitor, *_ = fitted(tmp_path, name, accumulate_grad_batches=4)
    expected, *_ = fitted(tmp_path, name)
    for group, its in monitor.report()["body.1"].groups.items():
        same = expected.report()["body.1"].groups[group]
        assert its.num_batches == same.num_batches


@pytest.mark.slow
def test_a_run_that_is_resumed_in_mid_window_has_the_groups_of_one_that_was_not(tmp_path):
    x, domain = domains().dataset.tensors

    class ByIndex(Net):  # as Lightning gives the first batches once more
        def training_step(self, batch, batch_idx):
            return super().training_step((x[batch_idx],), batch_idx)

    def group(_, batch_idx):
        return "abc"[domain[batch_idx]]

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    whole, resumed = BatchNormMonitor(group=group), BatchNormMonitor(group=group)
    trainer_for(tmp_path, whole, saved, max_epochs=1).fit(ByIndex(), domains())
    path = next(path for path in tmp_path.glob("*.ckpt") if "step=10" in path.name)
    trainer_for(tmp_path, resumed, max_epochs=1).fit(ByIndex(), domains(), ckpt_path=path)
    one, other = (monitor.report()["body.1"] for monitor in (whole, resumed))
    assert one.explanation == other.explanation
    for group, its in one.groups.items():
        same = other.groups[group]
        assert its.num_batches == same.num_batches
        np.testing.assert_allclose(its.mean, same.mean, rtol=1e-9)
        np.testing.assert_allclose(its.var, same.var, rtol=1e-9)
        assert math.isclose(its.noise, same.noise, rel_tol=1e-6)


def test_an_older_history_without_groups_is_gone_on_from(tmp_path):
    monitor, *_ = fitted(tmp_path, name)
    state = monitor.history.state_dict()
    del state["windows"]["metrics"]["group_shift"]
    history = type(monitor.history)()
    history.load_state_dict(state)
    assert "group_shift" not in cells(history.document()).metrics
    assert "'b' is" in history.document()["texts"][0]  # and names outlive a checkpoint


@pytest.mark.slow
def test_a_monitor_with_a_function_may_be_configured_by_its_path(tmp_path):
    arguments = {
        "model": {"class_path": f"{__name__}.Net"},
        "trainer": {
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "lightning_bnmonitor.BatchNormMonitor",
                    "init_args": {"group": f"{__name__}.name"},
                }
            ],
        },
    }
    cli = LightningCLI(run=False, args=arguments, save_config_callback=None)
    (monitor,) = (each for each in cli.trainer.callbacks if isinstance(each, BatchNormMonitor))
    assert monitor._group.name_of((None, 1), 0) == "b"
