"""Attached, detached, copied: what a tracker leaves behind, and what it survives."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker
from tests.tracking.small_models import C, assert_population, assert_same, hooks_on, network


def test_as_a_context_manager_it_is_attached_within_and_detached_after() -> None:
    model, batches = network(), [torch.randn(8, 4) for _ in range(5)]
    tracker = BatchNormTracker(model)
    assert not tracker.is_attached
    with tracker as entered:
        assert entered is tracker
        assert tracker.is_attached
        received = [model[0](x) for x in batches]
        for x in batches:
            model(x)
    assert not tracker.is_attached
    assert_population(tracker.report()["1"], received)


def test_attaching_twice_counts_once() -> None:
    model = network()
    tracker = BatchNormTracker(model).attach()
    assert tracker.attach() is tracker
    with tracker:
        model(torch.randn(8, 4))
    assert tracker.report()["1"].num_batches == 1
    assert not hooks_on(model)


def test_detaching_twice_or_unattached_is_harmless() -> None:
    model = network()
    tracker = BatchNormTracker(model)
    tracker.detach()
    with tracker:
        model(torch.randn(8, 4))
    tracker.detach()
    tracker.detach()
    assert tracker.report()["1"].num_batches == 1


def test_after_detaching_only_the_hooks_of_others_are_left() -> None:
    model = network()
    for module in model:
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    before, settings_before = hooks_on(model), torch._dynamo.config.get_config_copy()
    tracker = BatchNormTracker(model).attach()
    assert len(hooks_on(model)) > len(before)
    model(torch.randn(8, 4))
    tracker.detach()
    assert hooks_on(model) == before
    assert torch._dynamo.config.get_config_copy() == settings_before


def test_an_exception_within_passes_through_and_leaves_no_hook() -> None:
    model = network()
    tracker = BatchNormTracker(model)
    before = hooks_on(model)

    def interrupted() -> None:
        with tracker:
            model(torch.randn(8, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks_on(model) == before
    assert tracker.report()["1"].num_batches == 1


def test_an_exception_in_a_forward_loses_only_that_call() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.linear = nn.BatchNorm1d(C), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.bn(x))

    model, batches = Breaking(), [torch.randn(8, C) for _ in range(4)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
            with pytest.raises(RuntimeError):
                model(torch.randn(8, C + 1))
    assert_population(tracker.report()["bn"], batches)


def test_statistics_are_kept_after_detaching_and_calls_no_longer_count() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 4))
    before = tracker.report()
    model.eval()
    model(torch.randn(8, 4))
    model.train()
    frozen = copy.deepcopy(model)
    frozen(torch.randn(8, 4))
    assert_same(tracker.report(), before)


def test_attached_again_it_goes_on_with_the_window() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(6)]
    tracker = BatchNormTracker(model)
    for i, x in enumerate(batches):
        if i % 2:
            model(x)
        else:
            with tracker:
                model(x)
    assert_population(tracker.report()["0"], batches[::2])


def test_layers_that_come_and_go_between_two_attachments() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C))
    tracker = BatchNormTracker(model)
    first, second = torch.randn(8, C), torch.randn(8, C)
    with tracker:
        model(first)
    model.add_module("2", nn.BatchNorm1d(C))
    del model[1]
    with tracker:
        model(second)
    report = tracker.report()
    assert len(report) == 2
    assert_population(report["0"], [first, second])
    assert [layer.num_batches for layer in report.values()] == [2, 1]


def test_several_trackers_on_one_model_do_not_disturb_each_other() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(6)]
    with BatchNormTracker(model) as outer:
        model(batches[0])
        with BatchNormTracker(model) as inner:
            for x in batches[1:4]:
                model(x)
        for x in batches[4:]:
            model(x)
    assert_population(outer.report()["0"], batches)
    assert_population(inner.report()["0"], batches[1:4])


def test_once_detached_it_does_not_keep_the_model_alive_but_reports() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 4))
    running_mean, died = model[1].running_mean.double(), weakref.ref(model)
    del model
    gc.collect()
    assert died() is None
    assert tracker.report()["1"].num_batches == 1
    assert torch.equal(tracker.report()["1"].running_mean, running_mean)
    with pytest.raises(RuntimeError, match="model of this BatchNormTracker no longer exists"):
        tracker.attach()


# --- copies of the model ----------------------------------------------------------------------------------------------


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_of_a_monitored_model_is_not_monitored_and_trains_alike(duplicate: Any) -> None:
    model = network()
    batches = [torch.randn(8, 4) for _ in range(40)]

    def train(net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    with BatchNormTracker(model) as tracker:
        model(batches[0])
        twin = duplicate(model)
        train(twin)
        assert tracker.report()["1"].num_batches == 1
        train(model)
    assert tracker.report()["1"].num_batches == 41
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    with BatchNormTracker(twin) as of_twin:
        twin(batches[0])
    assert of_twin.report()["1"].num_batches == 1
    assert tracker.report()["1"].num_batches == 41
