"""Layers, buffers and devices that change while a tracker is attached."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.promises.faulty_runs import (
    BATCHES,
    MARKS,
    C,
    Net,
    act_rmse,
    assert_population,
    assert_usable,
    data,
    feed,
    layer_of,
    single,
    trainer_for,
)

pytestmark = MARKS


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
