"""The tracker in plain PyTorch loops: what counts, what it survives, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import itertools
import math
import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT

LAW = settings(max_examples=200, deadline=None)
C = 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def moments(batches: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values of ``(N, C, *)`` batches, in two float64 passes."""
    arrays = [batch.detach().double().numpy() for batch in batches]
    values = np.concatenate([np.moveaxis(array, 1, 0).reshape(array.shape[1], -1) for array in arrays], axis=1)
    mean = values.mean(axis=1)
    return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def assert_population(layer: LayerReport, batches: list[Tensor], bound: float = 1e-5) -> None:
    assert layer.num_batches == len(batches)
    assert layer.num_samples == sum(batch.numel() // batch.shape[1] for batch in batches)
    mean, var = moments(batches)
    assert np.all(np.abs(layer.population_mean.numpy() - mean) <= bound * np.sqrt(var))
    assert np.all(np.abs(layer.population_var.numpy() - var) <= bound * (var + layer.eps))


def assert_same(one: Report, other: Report, bound: float = 1e-12) -> None:
    """All that reports say is the same, numbers up to rounding."""
    assert list(one) == list(other)
    assert_alike(one.to_dict(), other.to_dict(), bound)


def assert_alike(one: Any, other: Any, bound: float = 1e-12, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], bound, f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, bound, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True, msg=lambda text: where + text)
    elif isinstance(one, float) and not math.isnan(one):
        assert math.isclose(one, other, rel_tol=bound, abs_tol=bound), (where, one, other)
    elif isinstance(one, float):
        assert math.isnan(other), where
    else:
        assert one == other, where


def hooks_on(model: nn.Module) -> list[Any]:
    """Every hook of every module of a model, and those of all optimizers."""
    hooks: list[Any] = list(torch_optimizer._global_optimizer_post_hooks.values())
    for module in model.modules():
        for name, registered in vars(module).items():
            if "hooks" in name and registered:
                hooks += [(name, hook) for hook in registered.values()]
    return hooks


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 2), nn.BatchNorm1d(2))


class Several(nn.Module):
    """Calls the BatchNorm layers that it is told to."""

    def __init__(self, num: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(C, dtype=dtype) for _ in range(num))

    def forward(self, x: Tensor, which: list[int]) -> None:
        for index in which:
            self.layers[index](x)


# --- attaching and detaching ------------------------------------------------------------------------------------------


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
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None
    assert tracker.report()["1"].num_batches == 1
    with pytest.raises(RuntimeError, match="no longer exists"):
        tracker.attach()


# --- what counts ------------------------------------------------------------------------------------------------------


def test_a_model_in_eval_counts_nothing_though_its_layer_be_in_train() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model.eval()
        model[1].train()
        model(torch.randn(8, 4))
    assert tracker.report()["1"].num_batches == 0
    assert tracker.report()["4"].num_batches == 0


def test_validation_between_training_steps_counts_nothing() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(6)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model.train()
            model(x)
            model.eval()
            with torch.no_grad():
                model(torch.full((8, C), 1e6))
    assert_population(tracker.report()["0"], batches)


def test_nothing_counts_while_paused_even_if_paused_twice() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    with BatchNormTracker(model) as tracker:
        with tracker.paused():
            with tracker.paused():
                model(x + 100)
            model(x + 100)
        model(x)
        with pytest.raises(ZeroDivisionError), tracker.paused():
            raise ZeroDivisionError
        model(x + 1)
    assert_population(tracker.report()["0"], [x, x + 1])


def test_reset_begins_another_window() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(50)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
        tracker.reset()
        assert tracker.report()["0"].num_batches == 0
        assert tracker.report()["0"].population_mean.isnan().all()
        for x in batches[:7]:
            model(x)
        assert_population(tracker.report()["0"], batches[:7])
        assert tracker.report()["0"].evidence["updates_per_call"] == 1


def test_before_it_is_attached_reset_flush_step_and_pause_are_harmless() -> None:
    tracker = BatchNormTracker(network())
    tracker.reset()
    tracker.flush()
    tracker.step()
    with tracker.paused():
        pass
    assert not tracker.is_attached


def test_before_it_is_attached_the_report_is_empty() -> None:
    report = BatchNormTracker(network()).report()
    assert len(report) == 0
    assert report.summary() == {}
    assert "No BatchNorm" in str(report)


def test_before_any_batch_the_report_lists_layers_that_saw_nothing() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert list(report) == ["1", "4"]
    assert report.summary() == {"unhealthy_layers": 0.0}
    assert report["1"].num_batches == report["1"].num_samples == 0
    assert report["1"].population_mean.isnan().all()
    assert torch.equal(report["1"].running_var, torch.ones(C, dtype=torch.float64))
    assert "1" in str(report)


def test_an_empty_batch_in_a_frozen_layer_counts_nothing() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(C)), torch.randn(4, C, 2, 2)
    model[0].eval()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(0, C, 2, 2))
        model(x)
        model(torch.randn(0, C, 2, 2))
    assert_population(tracker.report()["0"], [x])


def test_an_empty_batch_in_training_counts_nothing() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(C)), torch.randn(4, C, 2, 2)
    with BatchNormTracker(model) as tracker:
        model(torch.randn(0, C, 2, 2))
        model(x)
    assert_population(tracker.report()["0"], [x])


def test_frozen_layers_count_in_the_population() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(40)]
    model[0].eval()
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    layer = tracker.report()["0"]
    assert_population(layer, batches)
    assert torch.equal(layer.running_mean, torch.zeros(C, dtype=torch.float64))
    assert "updates_per_call" not in layer.evidence


def test_calls_with_momentum_0_count_in_the_population() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(40)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            model[0].momentum = 0.1 if i % 3 else 0.0
            model(x)
    assert_population(tracker.report()["0"], batches)


def test_a_layer_frozen_halfway_counts_throughout() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) * (1 + i) for i in range(40)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            model[0].train(i < 20)
            model(x)
    assert_population(tracker.report()["0"], batches)
    assert tracker.report()["0"].evidence["updates_per_call"] == 1


def test_a_layer_without_running_stats_has_a_population_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C))
    batches = [torch.randn(8, C) for _ in range(5)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    report = tracker.report()
    assert_population(report["0"], batches)
    assert not report["0"].has_running_stats
    assert report["0"].running_mean.isnan().all()
    assert report["0"].evidence["non_finite_channels"] == 0
    assert report.summary()["eval_error_max"] == pytest.approx(report["1"].summary()["eval_error"])


def test_a_layer_whose_buffers_are_no_longer_updated_is_reported_with_them() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    model[0].track_running_stats = False
    with BatchNormTracker(model) as tracker:
        model(x)
    layer = tracker.report()["0"]
    assert_population(layer, [x])
    assert layer.has_running_stats
    assert torch.equal(layer.running_var, torch.ones(C, dtype=torch.float64))


def test_a_cumulative_average_over_equal_batches_is_the_population_mean() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=None))
    with BatchNormTracker(model) as tracker:
        for _ in range(50):
            model(torch.randn(8, C) + 5)
    layer = tracker.report()["0"]
    assert layer.momentum is None
    torch.testing.assert_close(layer.running_mean, layer.population_mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_counts_data_once_and_updates_twice(use_reentrant: bool) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2)), [torch.randn(8, C) for _ in range(40)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    layer = tracker.report()["0"]
    assert_population(layer, batches)
    assert layer.evidence["updates_per_call"] == 2


def test_calls_in_inference_mode_count_as_long_as_the_model_trains() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(10)]
    with BatchNormTracker(model) as tracker:
        for i, x in enumerate(batches):
            with torch.inference_mode(i % 2 == 0):
                model(x)
    assert_population(tracker.report()["0"], batches)


def test_so_many_calls_in_inference_mode_that_they_are_merged_there() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) + i for i in range(80)]
    with BatchNormTracker(model) as tracker:
        with torch.inference_mode():
            for x in batches[:40]:
                model(x)
        for x in batches[40:]:
            model(x)
    assert_population(tracker.report()["0"], batches)


@pytest.mark.parametrize("action", ["flush", "report", "state_dict", "reset"])
def test_whatever_is_asked_in_inference_mode_training_goes_on(action: str) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(6)]
    with BatchNormTracker(model) as tracker:
        for x in batches[:3]:
            model(x)
        with torch.inference_mode():
            getattr(tracker, action)()
        for x in batches[3:]:
            model(x)
    assert_population(tracker.report()["0"], batches[3:] if action == "reset" else batches)


@pytest.mark.parametrize("capture", ["auto", "pass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_one_channel_until_the_next_window(value: float, capture: str) -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(50)]
    spoilt = torch.randn(8, C)
    spoilt[2, 1] = value
    with BatchNormTracker(model, capture=capture) as tracker:
        for x in [*batches[:20], spoilt, *batches[20:]]:
            model(x)
        layer = tracker.report()["0"]
        assert layer.population_mean.isnan().tolist() == [False, True, False]
        assert layer.population_var.isnan().tolist() == [False, True, False]
        assert layer.evidence["non_finite_channels"] == 1
        mean, _ = moments([*batches, spoilt.nan_to_num(0, 0, 0)])
        np.testing.assert_allclose(layer.population_mean[[0, 2]], mean[[0, 2]], rtol=0, atol=1e-6)

        tracker.reset()
        for x in batches:
            model(x)
        assert_population(tracker.report()["0"], batches)


# --- windows that end -------------------------------------------------------------------------------------------------


def feed(model: nn.Module, num_batches: int, size: int = 8) -> list[Tensor]:
    """Train on batches from one distribution, in every channel; return them."""
    batches = [torch.randn(size, C) * 2 + 3 for _ in range(num_batches)]
    for x in batches:
        model(x)
    return batches


def test_a_closed_window_is_what_is_reported_until_the_next_one_begins() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        batches = feed(model, 20)
        report = tracker.close()
        assert_population(report["0"], batches)
        before = report.to_dict()
        assert tracker.report() is report
        feed(model, 30)
        tracker.step()
        tracker.flush()
        assert tracker.report() is report
        assert tracker.close() is report
        assert report.to_dict() == before
        tracker.reset()
        assert tracker.report()["0"].num_batches == 0
        batches = feed(model, 7)
        assert_population(tracker.report()["0"], batches)
        assert tracker.report()["0"].evidence["updates_per_call"] == 1
        assert_population(tracker.close()["0"], batches)


@pytest.mark.parametrize("num_calls", [0, 1, 30, 100])
def test_what_is_called_between_two_windows_belongs_to_neither(num_calls: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for num_batches in (40, 25, 3):
            batches = feed(model, num_batches)
            assert_population(tracker.close()["0"], batches)
            for _ in range(num_calls):
                model(torch.randn(8, C) + 1000)
            tracker.reset()
    assert tracker.report()["0"].num_batches == 0


def test_a_window_without_a_call_ends_as_any_other() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        for _ in range(2):
            assert tracker.close().summary() == {"unhealthy_layers": 0.0}
            assert [layer.verdict for layer in tracker.close().values()] == ["unused", "unused"]
            assert tracker.report() is tracker.close()
            tracker.reset()
        received = [model[0](x) for x in (torch.randn(8, 4), torch.randn(8, 4))]
        for x in received:
            model[1](x)
        assert_population(tracker.close()["1"], received)
        tracker.reset()
        assert [layer.num_batches for layer in tracker.close().values()] == [0, 0]


def test_to_begin_a_window_ends_the_one_before() -> None:
    def last_of_three(close: bool) -> Report:
        torch.manual_seed(5)
        model = nn.Sequential(nn.BatchNorm1d(C, momentum=0.02))
        with BatchNormTracker(model) as tracker:
            for _ in range(2):
                feed(model, 20)
                if close:
                    tracker.close()
                    tracker.close()
                tracker.reset()
            feed(model, 20)
        return tracker.close()

    explicit, implied = last_of_three(close=True), last_of_three(close=False)
    assert implied.to_dict() == explicit.to_dict()
    assert implied["0"].evidence["initial_weight"] == pytest.approx(0.98**60)


def test_to_begin_a_window_twice_changes_nothing() -> None:
    def second(resets: int) -> Report:
        torch.manual_seed(6)
        model = nn.Sequential(nn.BatchNorm1d(C))
        with BatchNormTracker(model) as tracker:
            feed(model, 20)
            for _ in range(resets):
                tracker.reset()
            feed(model, 20)
        return tracker.report()

    assert second(3).to_dict() == second(1).to_dict()


def test_pauses_and_the_time_between_windows_may_overlap() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        expected = feed(model, 3)
        with tracker.paused():
            feed(model, 3)
            assert_population(tracker.close()["0"], expected)
            feed(model, 3)
        feed(model, 3)  # closed
        with tracker.paused():
            tracker.reset()
            feed(model, 3)
        expected = feed(model, 4)
        assert_population(tracker.report()["0"], expected)
        with tracker.paused():
            assert_population(tracker.close()["0"], expected)
            tracker.reset()
            assert tracker.report()["0"].num_batches == 0
            feed(model, 3)
        tracker.close()
        with tracker.paused():
            pass
        feed(model, 3)  # closed
        tracker.reset()
        expected = feed(model, 5)
        assert_population(tracker.report()["0"], expected)


def test_a_window_that_was_closed_stays_so_while_detached_and_attached_again() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        feed(model, 10)
        report = tracker.close()
    assert tracker.report() is report
    with tracker:
        feed(model, 10)
        assert tracker.report() is report
        tracker.reset()
        batches = feed(model, 4)
    assert_population(tracker.report()["0"], batches)


def test_an_interrupted_window_can_be_closed_when_detached() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        batches = feed(model, 10)
    assert_population(tracker.close()["0"], batches)
    tracker.reset()
    with tracker:
        batches = feed(model, 4)
    assert_population(tracker.report()["0"], batches)


def test_reports_in_mid_window_agree_and_change_nothing_of_the_last() -> None:
    def trained(asked: bool) -> tuple[Report, Report]:
        torch.manual_seed(7)
        model = nn.Sequential(nn.BatchNorm1d(C, momentum=0.3), nn.BatchNorm1d(C, momentum=None))
        with BatchNormTracker(model) as tracker:
            for window in range(2):
                for step in range(50):
                    feed(model, 1, 8 + step % 3)
                    if step % 7 == 0:
                        tracker.flush()
                        if asked:
                            assert tracker.report().to_dict() == tracker.report().to_dict()
                if window == 0:
                    first = tracker.close()
                    tracker.reset()
        return first, tracker.close()

    for asked, unasked in zip(trained(asked=True), trained(asked=False), strict=True):
        assert asked.to_dict() == unasked.to_dict()


@pytest.mark.parametrize("between", ["within a window", "between two windows"])
def test_layers_that_are_added_removed_or_replaced_while_detached_break_nothing(between: str) -> None:
    model = nn.ModuleDict({name: nn.BatchNorm1d(C) for name in ("kept", "removed", "replaced", "idle")})

    def train(num_batches: int) -> list[Tensor]:
        batches = [torch.randn(8, C) for _ in range(num_batches)]
        for x in batches:
            for name, layer in model.items():
                if name != "idle":
                    layer(x)
        return batches

    tracker = BatchNormTracker(model)
    with tracker:
        first = train(20)
        if between == "between two windows":
            tracker.close()
    del model["removed"]
    model["replaced"] = nn.BatchNorm1d(C)
    model["added"] = nn.BatchNorm1d(C)
    names = ["kept", "replaced", "idle", "added"]
    with tracker:
        if between == "between two windows":
            assert [layer.num_batches for layer in tracker.report().values()] == [20, 20, 20, 0]  # of that window
            tracker.reset()
            first = []
        assert sorted(tracker.report()) == sorted(names)
        second = train(15)
        report = tracker.report()
        assert sorted(report) == sorted(names)
        assert_population(report["kept"], first + second)
        for name in ("replaced", "added"):
            assert_population(report[name], second)
            assert report[name].flags == ()
            assert report[name].evidence["initial_weight"] == pytest.approx(0.9**15)
        assert report["kept"].evidence["initial_weight"] == pytest.approx(0.9**35)
        assert report["idle"].verdict == "unused"
        assert sorted(saved["name"] for saved in tracker.state_dict()["layers"]) == ["added", "kept", "replaced"]
        assert tracker.close().to_dict() == report.to_dict()
        tracker.reset()
        third = train(10)
    assert_population(tracker.close()["kept"], third)
    assert_population(tracker.report()["added"], third)


# --- what running statistics are made of, across windows --------------------------------------------------------------


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


SIZES = {
    "equal batches": [16] * 100,
    "unequal batches": [4 + 7 * t % 23 for t in range(100)],
    "a short last batch": [16] * 99 + [5],
}
WIDE = 1000


def wide_layer(momentum: float | None, trained_on: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(WIDE, momentum=momentum))
    feed_wide(model, [16] * trained_on)
    return model


def feed_wide(model: nn.Module, sizes: list[int]) -> None:
    for size in sizes:
        model(torch.randn(size, WIDE) * 2 + 3)


def assert_calibrated(layer: LayerReport) -> None:
    """Of a thousand channels, the RMS of z differs from 1 by 0.03 or so."""
    assert rms(layer.z_mean) == pytest.approx(1, abs=0.1)
    assert rms(layer.z_var) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, None])
def test_z_is_calibrated_in_three_consecutive_windows(momentum: float | None, sizes: str) -> None:
    model = wide_layer(momentum)
    with BatchNormTracker(model) as tracker:
        for window in range(1, 4):
            feed_wide(model, SIZES[sizes])
            layer = tracker.close()["0"]
            if momentum is None and sizes == "equal batches":  # then it is the population's, what came before apart
                assert torch.equal(layer.z_mean, torch.zeros(WIDE, dtype=torch.float64))
                assert torch.equal(layer.z_var, torch.zeros(WIDE, dtype=torch.float64))
            else:
                assert_calibrated(layer)
            remains = 0 if momentum is None else (1 - momentum) ** (100 * window)
            assert layer.evidence["initial_weight"] == pytest.approx(remains)
            assert layer.evidence["lag_error"] == layer.evidence["drift_error"] == 0
            assert layer.flags == ()
            tracker.reset()


@pytest.mark.parametrize("counted", [True, False], ids=["num_batches_tracked", "converted weights"])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, None])
def test_z_is_calibrated_when_monitoring_starts_on_a_trained_model(momentum: float | None, counted: bool) -> None:
    model = wide_layer(momentum, trained_on=500)
    if not counted:
        model[0].num_batches_tracked.zero_()
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            feed_wide(model, SIZES["unequal batches"])
            layer = tracker.close()["0"]
            assert_calibrated(layer)
            assert layer.verdict == ("noisy" if momentum == 0.5 else "healthy")
            for error in ("initial_weight", "warmup_error", "lag_error"):
                assert layer.evidence[error] == 0
            assert layer.flags == ()
            tracker.reset()


@pytest.mark.parametrize("closed", [False, True], ids=["in mid-window", "between two windows"])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, None])
def test_z_is_calibrated_after_a_resume(momentum: float | None, closed: bool) -> None:
    sizes = SIZES["unequal batches"]
    model = wide_layer(momentum)
    with BatchNormTracker(model) as tracker:
        feed_wide(model, sizes)
        tracker.reset()
        feed_wide(model, sizes[:37])
        if closed:
            tracker.close()
        state, weights = saved_and_loaded({"tracker": tracker.state_dict(), "model": model.state_dict()}).values()
    model = wide_layer(momentum)
    model.load_state_dict(weights)
    tracker = BatchNormTracker(model)
    tracker.load_state_dict(state)
    with tracker:
        if closed:
            tracker.reset()
            feed_wide(model, sizes)
        else:
            feed_wide(model, sizes[37:])
        total = 237 if closed else 200
        for seen in (total, total + 100):
            layer = tracker.close()["0"]
            assert_calibrated(layer)
            assert layer.flags == ()
            remains = 0 if momentum is None else (1 - momentum) ** seen
            assert layer.evidence["initial_weight"] == pytest.approx(remains)
            assert layer.evidence["lag_error"] == 0
            tracker.reset()
            feed_wide(model, sizes)


def test_the_published_experiment_is_noise() -> None:
    path = Path(__file__).parents[2] / "examples" / "ema_vs_exact.py"
    spec = importlib.util.spec_from_file_location("ema_vs_exact", path)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    layer = experiment.run()
    assert (round(rms(layer.z_mean), 2), round(rms(layer.z_var), 2)) == (1.17, 0.92)
    assert not layer.needs_attention
    assert layer.remedy == ""
    assert layer.flags == ()


@pytest.mark.parametrize("trained_on", [1, 100])
def test_what_a_trained_model_really_lags_behind_is_found(trained_on: int) -> None:
    """So that the absence of alarms elsewhere says something."""
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=0.01))
    for _ in range(trained_on):
        model(torch.randn(64, C))
    with BatchNormTracker(model) as tracker:
        feed(model, 50, 64)
    layer = tracker.report()["0"]
    assert (layer.verdict, layer.needs_attention) == ("lagging", True)


@pytest.mark.parametrize("num_batches", [8, 12, 40])
@pytest.mark.parametrize("counted", [True, False], ids=["num_batches_tracked", "converted weights"])
@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1, None])
def test_short_windows_on_a_trained_model_give_no_false_alarm(
    momentum: float | None, counted: bool, num_batches: int
) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [1, 2, 3, 5, 8, 16, 64]
            self.layers = nn.ModuleList(nn.BatchNorm1d(width, momentum=momentum) for width in widths)

        def forward(self, size: int) -> None:
            for layer in self.layers:
                layer(torch.randn(size, layer.num_features) * 2 + 3)

    model = Layers()
    for layer in model.layers:
        layer.momentum = None
    for _ in range(400):
        model(64)
    for layer in model.layers:
        layer.momentum = momentum
        if not counted:
            layer.num_batches_tracked.zero_()
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            for _ in range(num_batches):
                model(64)
            report = tracker.close()
            assert {layer.verdict for layer in report.values()} == {"healthy"}
            assert all(layer.flags == () for layer in report.values())
            tracker.reset()


def test_the_initial_values_weigh_what_all_batches_so_far_have_left_of_them() -> None:
    model = Several(3)
    steady, changing, idle = model.layers
    steady.momentum, changing.momentum, idle.momentum = 0.03, 0.2, 0.1
    batches = [torch.randn(8, C) for _ in range(90)]
    with BatchNormTracker(model) as tracker:
        for x in batches[:30]:
            model(x, [0, 1, 2])
        report = tracker.close()
        for name, weight in zip(report, (0.97**30, 0.8**30, 0.9**30), strict=True):
            assert report[name].evidence["initial_weight"] == pytest.approx(weight, rel=1e-12)

        tracker.reset()
        changing.momentum = 0.05
        for x in batches[30:40]:
            model(x, [0, 1])
        changing.momentum = 0.01
        for x in batches[40:50]:
            model(x, [0, 1])
        report = tracker.report()
        assert report["layers.0"].evidence["initial_weight"] == pytest.approx(0.97**50, rel=1e-12)
        expected = 0.8**30 * 0.95**10 * 0.99**10
        assert report["layers.1"].evidence["initial_weight"] == pytest.approx(expected, rel=1e-12)
        assert report["layers.2"].verdict == "unused"

        tracker.reset()
        steady.eval()
        for x in batches[50:]:
            model(x, [0, 2])
        report = tracker.close()
        assert report["layers.0"].verdict == "frozen"
        assert report["layers.2"].evidence["initial_weight"] == pytest.approx(0.9**70, rel=1e-12)

        tracker.reset()
        steady.train()
        for x in batches[:10]:
            model(x, [0])
        report = tracker.close()
        assert report["layers.0"].evidence["initial_weight"] == pytest.approx(0.97**60, rel=1e-12)
        assert all(layer.flags == () for layer in report.values())


def test_a_layer_that_is_first_called_in_a_later_window_is_fresh_there() -> None:
    model = Several(2)
    with BatchNormTracker(model) as tracker:
        for which in ([0], [0], [0, 1]):
            for _ in range(10):
                model(torch.randn(8, C), which)
            report = tracker.close()
            tracker.reset()
    assert report["layers.0"].evidence["initial_weight"] == pytest.approx(0.9**30)
    assert report["layers.1"].evidence["initial_weight"] == pytest.approx(0.9**10)
    assert report["layers.0"].flags == report["layers.1"].flags == ()


@pytest.mark.parametrize("before", ["monitored", "unknown", "unknown, then frozen"])
def test_noise_that_is_left_from_earlier_windows_is_known(before: str) -> None:
    """In short windows most of the buffers' noise is older than the window."""
    model = wide_layer(0.02, trained_on=0 if before == "monitored" else 300)
    with BatchNormTracker(model) as tracker:
        if before == "monitored":
            feed_wide(model, [16] * 300)
        elif before == "unknown, then frozen":
            model[0].eval()
            feed_wide(model, [16] * 20)
            model[0].train()
        for _ in range(1 if "unknown" in before else 4):
            tracker.reset()
            feed_wide(model, [16] * 12)
        layer = tracker.report()["0"]
    expected = math.sqrt(
        0.02 / 1.98 * (1 / 16 + 1 / (2 * 15))
    )  # of normal values: their variance's variance is 2/(n-1)
    assert layer.evidence["noise_error"] == pytest.approx(expected, rel=0.05)
    exact = math.sqrt(
        ((layer.running_mean - 3) / 2).square().mean() + ((layer.running_var / 4 - 1) / 2).square().mean()
    )
    assert exact == pytest.approx(expected, rel=0.05)


def test_after_a_window_in_which_not_all_updates_were_seen_nothing_is_known_of_what_was_before() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=0.01))
    with BatchNormTracker(model) as tracker:
        feed(model, 20)
        with tracker.paused():
            feed(model, 20)
        layer = tracker.close()["0"]
        assert layer.flags == ("missed-calls",)
        assert torch.equal(layer.z_mean, torch.zeros(C, dtype=torch.float64))
        for _ in range(2):
            tracker.reset()
            feed(model, 20)
            layer = tracker.close()["0"]
            assert layer.flags == ()
            assert layer.evidence["initial_weight"] == 0
            assert (layer.z_mean != 0).all()


# What may happen to the running statistics of a layer between two windows, without and with another outcome.


def nothing(model: nn.Module) -> None:
    pass


def validation(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, C) + 100, [0, 1])
    model.train()


def load_the_same(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def reassign_the_same(model: nn.Module) -> None:
    model.layers[0].running_mean = model.layers[0].running_mean.clone()


def write_and_restore(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    model.layers[0].reset_running_stats()
    model.load_state_dict(state)


def recount(model: nn.Module) -> None:
    model.layers[0].num_batches_tracked += 1000


def move_the_mean(model: nn.Module) -> None:
    model.layers[0].running_mean[1] += 1e-3


def move_the_variance(model: nn.Module) -> None:
    model.layers[0].running_var[2] *= 1.001


def reassign_another(model: nn.Module) -> None:
    model.layers[0].running_mean = torch.ones(C)


def spoil(model: nn.Module) -> None:
    model.layers[0].running_mean[0] = math.nan


def train_on(model: nn.Module) -> None:
    model(torch.randn(8, C) + 1, [0])


def load_another(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    state["layers.0.running_mean"] += 1
    model.load_state_dict(state)


def recalibrate(model: nn.Module) -> None:
    torch.optim.swa_utils.update_bn([torch.randn(8, C) for _ in range(4)], model.layers[0])


def start_again(model: nn.Module) -> None:
    model.layers[0].reset_running_stats()


HARMLESS = [nothing, validation, load_the_same, reassign_the_same, write_and_restore, recount]
WRITING = [
    *(move_the_mean, move_the_variance, reassign_another, spoil, train_on, load_another, recalibrate, start_again),
]


@pytest.mark.parametrize("closed", ["closed", "detached"])
@pytest.mark.parametrize("happens", HARMLESS + WRITING, ids=lambda function: function.__name__)
def test_what_writes_running_statistics_between_windows_is_flagged_where_and_when_it_did(
    happens: Callable[[nn.Module], None], closed: str
) -> None:
    model, batches = Several(2), [torch.randn(8, C) for _ in range(20)]
    flags: list[list[tuple[str, ...]]] = []
    tracker = BatchNormTracker(model).attach()
    for window in range(4):
        for x in batches:
            model(x, [0, 1])
        report = tracker.close()
        flags.append([layer.flags for layer in report.values()])
        if window == 1:
            if closed == "detached":
                tracker.detach()
            happens(model)
            tracker.attach()
        tracker.reset()
    tracker.detach()
    flagged = ("written-outside",) if happens in WRITING else ()
    assert flags == [[(), ()], [(), ()], [flagged, ()], [(), ()]]


@pytest.mark.parametrize(
    ("happens", "weight"),
    [(nothing, 0.9**40), (move_the_mean, 0.0), (train_on, 0.0), (recalibrate, 0.0), (start_again, 0.9**20)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_history_starts_again_from_what_was_written(happens: Callable[[nn.Module], None], weight: float) -> None:
    model = Several(2)

    def window() -> Report:
        for _ in range(20):
            model(torch.randn(8, C), [0, 1])
        return tracker.close()

    with BatchNormTracker(model) as tracker:
        window()
        happens(model)
        tracker.reset()
        report = window()
        assert report["layers.0"].evidence["initial_weight"] == pytest.approx(weight)
        assert report["layers.1"].evidence["initial_weight"] == pytest.approx(0.9**40)
        tracker.reset()
        report = window()
        assert report["layers.0"].evidence["initial_weight"] == pytest.approx(weight * 0.9**20)


@pytest.mark.parametrize("momentum", [0.02, 0.1])
def test_weights_that_are_loaded_while_no_batch_is_trained_on_have_no_initial_values_left(momentum: float) -> None:
    """A monitor attaches when a fit starts, and some load weights only then."""
    trained = nn.Sequential(nn.BatchNorm1d(C, momentum=momentum))
    feed(trained, 400, 32)
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=momentum))
    with BatchNormTracker(model) as tracker:
        model.load_state_dict(trained.state_dict())
        tracker.reset()
        for _ in range(2):
            feed(model, 40, 32)
            layer = tracker.close()["0"]
            assert (layer.verdict, layer.evidence["initial_weight"]) == ("healthy", 0)
            tracker.reset()
        model[0].reset_running_stats()
        tracker.reset()
        feed(model, 40, 32)
        assert tracker.close()["0"].evidence["initial_weight"] == pytest.approx((1 - momentum) ** 40)


def test_z_is_calibrated_in_the_window_after_running_statistics_were_written() -> None:
    model = wide_layer(0.1)
    with BatchNormTracker(model) as tracker:
        for write in (None, 5.0, None):
            if write is not None:
                tracker.close()
                model[0].running_mean.fill_(write)
            tracker.reset()
            feed_wide(model, [16] * 100)
            assert_calibrated(tracker.report()["0"])
        assert tracker.report()["0"].flags == ()


def test_a_reset_of_running_statistics_in_mid_window_is_noticed_by_their_count() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        feed(model, 40, 32)
        tracker.reset()
        feed(model, 10, 32)
        model[0].reset_running_stats()
        feed(model, 20, 32)
        layer = tracker.close()["0"]
        assert "written-outside" in layer.flags
        assert layer.verdict == "insufficient-data"  # as what each batch weighs is not known
        assert torch.equal(layer.z_mean, torch.zeros(C, dtype=torch.float64))
        assert "updates_per_call" not in layer.evidence
        assert "reset within this window" in layer.explanation
        tracker.reset()
        batches = feed(model, 30, 32)
        layer = tracker.close()["0"]
    assert_population(layer, batches)
    assert (layer.verdict, layer.flags) == ("healthy", ())


# --- any loop ---------------------------------------------------------------------------------------------------------


def test_without_an_optimizer_what_waits_stays_bounded() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(100)]
    most = 0
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
            most = max(most, *(len(layer.stash) for layer in tracker._layers))
    assert 1 < most <= STASH_LIMIT
    assert_population(tracker.report()["0"], batches)


def test_the_step_of_any_optimizer_merges_what_waits() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BatchNormTracker(model) as tracker:
        for _ in range(STASH_LIMIT):
            model(torch.randn(8, C))
        assert [len(layer.stash) for layer in tracker._layers] == [STASH_LIMIT]
        optimizer.step()
        assert [len(layer.stash) for layer in tracker._layers] == [0]
    assert tracker.report()["0"].num_batches == STASH_LIMIT


def test_a_step_told_merges_what_waits() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for _ in range(STASH_LIMIT):
            model(torch.randn(8, C))
        tracker.step()
        assert [len(layer.stash) for layer in tracker._layers] == [0]
    assert tracker.report()["0"].num_batches == STASH_LIMIT


ACTIONS = ("flush", "step", "report", "state_dict", "attach", "detach and attach")


@LAW
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=70),
    actions=st.dictionaries(st.integers(0, 69), st.sampled_from(ACTIONS), max_size=25),
    seed=st.integers(0, 2**31),
)
def test_what_is_asked_in_between_changes_nothing(sizes: list[int], actions: dict[int, str], seed: int) -> None:
    torch.manual_seed(seed)
    model = Several(2, torch.float64)
    batches = [torch.randn(n, C, dtype=torch.float64) * 2 + 7 for n in sizes]
    tracker = BatchNormTracker(model, capture="pass")
    with tracker:
        for i, x in enumerate(batches):
            model(x, [0, 1] if i % 2 == 0 else [0])
            for name in actions.get(i, "").split(" and "):
                if name:
                    getattr(tracker, name)()
    report = tracker.report()
    assert_population(report["layers.0"], batches, 1e-12)
    assert_population(report["layers.1"], batches[::2], 1e-12)


@LAW
@given(
    skipped=st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=50),
    seed=st.integers(0, 2**31),
)
def test_layers_skipped_at_random_are_each_exact(skipped: list[set[int]], seed: int) -> None:
    torch.manual_seed(seed)
    model, received = Several(5, torch.float64), [[] for _ in range(5)]
    with BatchNormTracker(model, capture="pass") as tracker:
        for skip in skipped:
            x = torch.randn(4, C, dtype=torch.float64)
            called = [index for index in range(5) if index not in skip]
            model(x, called)
            for index in called:
                received[index].append(x)
    report = tracker.report()
    for index in range(5):
        layer = report[f"layers.{index}"]
        assert layer.num_batches == len(received[index])
        if received[index]:
            assert_population(layer, received[index], 1e-12)


def test_two_networks_that_play_against_each_other_are_each_exact() -> None:
    class Game(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(2, C), nn.BatchNorm1d(C), nn.Linear(C, C))
            self.critic = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 1))

    game = Game()
    received: dict[str, list[Tensor]] = {"generator.1": [], "critic.1": []}
    for name, batches in received.items():
        game.get_submodule(name).register_forward_pre_hook(lambda _, args, to=batches: to.append(args[0].detach()))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (game.generator, game.critic)]
    with BatchNormTracker(game) as tracker:
        for step in range(60):
            real, noise = torch.randn(8, C) + 2, torch.randn(8, 2)
            if step % 3 == 0:
                game.critic(game.generator(noise)).mean().neg().backward()
                optimizers[0].step()
            loss = game.critic(game.generator(noise).detach()).mean() - game.critic(real).mean()
            loss.backward()
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    report = tracker.report()
    assert [layer.num_batches for layer in report.values()] == [80, 140]
    for name, batches in received.items():
        assert_population(report[name], batches)


def test_a_layer_called_by_keyword_counts() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)

    model, batches = Keyword(), [torch.randn(8, C) for _ in range(5)]
    for capture in ("auto", "pass"):
        with BatchNormTracker(model, capture=capture) as tracker:
            for x in batches:
                model(x)
        assert_population(tracker.report()["bn"], batches)


@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_another_default_device_disturbs_nothing(capture: str) -> None:
    model, batches = Several(3), [torch.randn(8, C) for _ in range(40)]
    with BatchNormTracker(model, capture=capture) as tracker:
        torch.set_default_device("meta")
        try:
            for x in batches:
                model(x, [1, 0])
            report = tracker.report()
            summary, evidence = report.summary(), [layer.evidence for layer in report.values()]
            state = tracker.state_dict()
            tracker.load_state_dict(state)
            tracker.reset()
        finally:
            torch.set_default_device(None)
    assert_population(report["layers.0"], batches)
    for layer in report.values():
        assert layer.population_mean.device == layer.running_mean.device == torch.device("cpu")
    assert summary["eval_error_max"] > 0
    assert all(counts["non_finite_channels"] == 0 for counts in evidence)
    assert state["channels"].device == torch.device("cpu")


def test_another_default_dtype_disturbs_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, batches = nn.Sequential(nn.BatchNorm1d(C)), [torch.randn(8, C) for _ in range(40)]
        single = nn.Sequential(nn.BatchNorm1d(C)).float()
        with BatchNormTracker(model) as tracker, BatchNormTracker(single) as of_single:
            for x in batches:
                model(x)
                single(x.float())
        assert_population(tracker.report()["0"], batches, 1e-12)
        assert_population(of_single.report()["0"], [x.float() for x in batches])
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_algorithms_disturb_nothing() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model, batches = Several(3), [torch.randn(8, C) for _ in range(40)]
        with BatchNormTracker(model) as tracker:
            for i, x in enumerate(batches):
                model(x, [0, 1, 2] if i % 2 == 0 else [2])
            report = tracker.report()
            tracker.reset()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_population(report["layers.0"], batches[::2])
    assert_population(report["layers.2"], batches)


# --- which layers, and their names ------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(C)
        self.block = nn.ModuleDict({"bn1": nn.BatchNorm1d(C), "bn2": nn.BatchNorm1d(C)})
        self.head = nn.Sequential(nn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block["bn2"](self.block["bn1"](self.stem(x))))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["stem", "block.bn1", "block.bn2", "head.0"]),
        ("block.*", None, ["block.bn1", "block.bn2"]),
        (["stem", "head.*"], None, ["stem", "head.0"]),
        (None, "*.bn?", ["stem", "head.0"]),
        (None, ("stem", "head.0"), ["block.bn1", "block.bn2"]),
        ("block.*", ["*2"], ["block.bn1"]),
    ],
)
def test_patterns_say_which_layers_are_monitored(include: Any, exclude: Any, expected: list[str]) -> None:
    model = Nested()
    with BatchNormTracker(model, include, exclude) as tracker:
        model(torch.randn(8, C))
    report = tracker.report()
    assert list(report) == expected
    assert all(layer.num_batches == 1 for layer in report.values())


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_layers(argument: str) -> None:
    model = Nested()
    tracker = BatchNormTracker(model, **{argument: ["stem", "blok.*"]})
    with pytest.raises(ValueError, match=rf"`{argument}` pattern 'blok.*' .*stem, block.bn1, block.bn2, head.0"):
        tracker.attach()
    assert not tracker.is_attached
    assert not hooks_on(model)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [[1], [None], ["stem", 3]])
def test_a_pattern_that_is_no_string_is_an_error(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{argument}`"):
        BatchNormTracker(Nested(), **{argument: value})


def test_an_unknown_capture_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"`capture` must be one of \['auto', 'pass'\], got 'fast'"):
        BatchNormTracker(Nested(), capture="fast")


def test_a_model_without_batch_norm_warns_once_and_names_what_it_has_instead() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.LayerNorm(6))
    tracker = BatchNormTracker(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tracker:
            tracker.attach()
            for _ in range(3):
                model(torch.randn(8, 4))
            tracker.report()
            tracker.reset()
            tracker.state_dict()
    (warning,) = caught
    assert "2 LayerNorm" in str(warning.message)
    assert "1 GroupNorm" in str(warning.message)
    assert len(tracker.report()) == 0


def test_the_layers_are_listed_in_the_order_of_their_first_call() -> None:
    model = Several(5)
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, C), [3, 1, 3])
        assert list(tracker.report()) == [f"layers.{i}" for i in (3, 1, 0, 2, 4)]
        model(torch.randn(8, C), [4, 0, 1])
        assert list(tracker.report()) == [f"layers.{i}" for i in (3, 1, 4, 0, 2)]
        tracker.reset()
        model(torch.randn(8, C), [2, 1])
    assert list(tracker.report()) == [f"layers.{i}" for i in (3, 1, 4, 0, 2)]


def test_a_lazy_layer_is_monitored_from_its_first_call_on() -> None:
    model, batches = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d()), [torch.randn(8, C) for _ in range(5)]
    with BatchNormTracker(model) as tracker:
        assert [layer.num_batches for layer in tracker.report().values()] == [0, 0]
        for x in batches:
            model[0](x)
        tracker.state_dict()
        report = tracker.report()
        assert_population(report["0"], batches)
        assert report["0"].type == "BatchNorm1d"
        assert report["1"].num_features == 0
        tracker.reset()
        model[0](batches[0])
    assert_population(tracker.report()["0"], batches[:1])


def test_layers_converted_to_synchronized_ones_are_found() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert [layer.type for layer in report.values()] == ["SyncBatchNorm", "SyncBatchNorm"]


def test_a_shared_layer_is_one_layer_under_its_first_name() -> None:
    shared = nn.BatchNorm1d(C)
    model, x = nn.Sequential(shared, nn.Identity(), shared), torch.randn(8, C)
    received: list[Tensor] = []
    shared.register_forward_pre_hook(lambda _, args: received.append(args[0].detach()))
    with BatchNormTracker(model) as tracker:
        model(x)
    assert list(tracker.report()) == ["0"]
    assert len(received) == 2
    assert_population(tracker.report()["0"], received)


def test_the_names_of_wrappers_are_left_out() -> None:
    class Wrapper(nn.Module):
        def __init__(self, name: str, module: nn.Module) -> None:
            super().__init__()
            self.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            return next(self.children())(x)

    model = nn.Sequential()
    model.add_module("block", Wrapper("_orig_mod", Nested()))
    model.add_module("shard", Wrapper("_fsdp_wrapped_module", nn.Sequential(nn.BatchNorm1d(C))))
    model.add_module("last", checkpoint_wrapper(nn.BatchNorm1d(C)))
    root = Wrapper("_orig_mod", model)
    with BatchNormTracker(root, include=["block.stem", "shard.0", "last"]) as tracker:
        root(torch.randn(8, C))
    assert list(tracker.report()) == ["block.stem", "shard.0", "last"]
    assert all(layer.num_batches == 1 for layer in tracker.report().values())


def test_the_model_may_itself_be_the_layer() -> None:
    model, batches = nn.BatchNorm1d(C), [torch.randn(8, C) for _ in range(5)]
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
        model.eval()
        model(batches[0] + 100)
    assert list(tracker.report()) == ["(root)"]
    assert_population(tracker.report()["(root)"], batches)


def test_it_keeps_the_layers_for_the_report_when_the_model_is_gone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, C))
    running_mean = model[0].running_mean.clone()
    del model
    gc.collect()
    assert torch.equal(tracker.report()["0"].running_mean, running_mean.double())
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


# --- saved and restored -----------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(leaves, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(leaves, value))
    else:
        yield value


def test_a_saved_state_holds_tensors_and_primitives_only() -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        for _ in range(40):
            model(torch.randn(8, 4))
        tracker.reset()
        for _ in range(40):
            model(torch.randn(8, 4))
    kinds = {type(value) for value in leaves(tracker.state_dict())}
    assert Tensor in kinds
    assert kinds <= {Tensor, int, float, bool, str, type(None)}


@LAW
@given(
    num_steps=st.integers(1, 50),
    cut=st.integers(0, 49),
    resets=st.sets(st.integers(0, 49), max_size=2),
    before_attach=st.booleans(),
    capture=st.sampled_from(["auto", "pass"]),
    seed=st.integers(0, 2**31),
)
def test_an_interrupted_run_reports_what_an_uninterrupted_one_does(
    num_steps: int, cut: int, resets: set[int], before_attach: bool, capture: str, seed: int
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.far, self.near, self.frozen = nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.BatchNorm1d(C, momentum=None)
            self.never = nn.BatchNorm1d(2)
            self.frozen.eval()

        def forward(self, x: Tensor, step: int) -> None:
            self.near(x)
            if step % 3:
                self.far(x + 500)
            self.frozen(x)

    torch.manual_seed(seed)
    batches = [torch.randn(4, C) for _ in range(num_steps)]

    def run(interrupted: bool) -> BatchNormTracker:
        model = Model()
        tracker = BatchNormTracker(model, capture=capture).attach()
        for step, x in enumerate(batches):
            if step == min(cut, num_steps - 1):
                tracker.flush()  # as saving does: what is merged in another order is rounded otherwise
            if interrupted and step == min(cut, num_steps - 1):
                state, weights = saved_and_loaded(tracker.state_dict()), model.state_dict()
                tracker.detach()
                model = Model()
                model.load_state_dict(weights)
                tracker = BatchNormTracker(model, capture=capture)
                if not before_attach:
                    tracker.attach()
                tracker.load_state_dict(state)
                tracker.attach()
            if step in resets:
                tracker.reset()
            model(x, step)
        tracker.detach()
        return tracker

    whole, interrupted = run(interrupted=False), run(interrupted=True)
    assert_same(interrupted.report(), whole.report())
    assert_alike(whole.state_dict(), interrupted.state_dict())


class Varied(nn.Module):
    """Layers of every kind of history."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        options = {
            "slow": {"momentum": 0.02},
            "fast": {"momentum": 0.5},
            "average": {"momentum": None},
            "far": {},
            "near": {},
            "recomputed": {},
            "frozen": {},
            "stateless": {"track_running_stats": False},
            "seldom": {},
            "never": {},
        }
        self.layers = nn.ModuleDict({name: nn.BatchNorm1d(C, dtype=dtype, **given) for name, given in options.items()})
        self.layers["frozen"].eval()

    def forward(self, x: Tensor, step: int) -> None:
        for name in ("slow", "fast", "average", "frozen", "stateless"):
            self.layers[name](x)
        self.layers["far"](x + 500)
        self.layers["near"](x + 40)  # far for a kernel that sums value by value
        if step == 3:
            torch.func.vmap(self.layers["stateless"])(torch.stack([x, x]))  # cannot be looked at
        checkpoint(self.layers["recomputed"], x.clone().requires_grad_(), use_reentrant=False).sum().backward()
        if step > 20:
            self.layers["seldom"](x)


@pytest.mark.parametrize(
    ("restarted", "dtype"),
    [(False, torch.float64), (True, torch.float32)],
    ids=["loaded into itself", "in another process"],
)
@pytest.mark.parametrize("moment", ["in mid-window", "at its end", "when closed", "after validation", "when begun"])
@pytest.mark.parametrize("window", [0, 1])
def test_a_resumed_run_reports_all_that_an_uninterrupted_one_does(
    window: int, moment: str, restarted: bool, dtype: torch.dtype
) -> None:
    def run(interrupted: bool) -> list[dict[str, Any]]:
        torch.manual_seed(8)
        model, said = Varied(dtype), []
        tracker = BatchNormTracker(model).attach()

        def interrupt() -> None:
            nonlocal model, tracker
            tracker.flush()
            if interrupted:
                saved = saved_and_loaded({"model": model.state_dict(), "tracker": tracker.state_dict()})
                if restarted:
                    tracker.detach()
                    model = Varied(dtype)
                    tracker = BatchNormTracker(model)
                model.load_state_dict(saved["model"])
                tracker.load_state_dict(saved["tracker"])
                tracker.attach()
            said.append(tracker.report().to_dict())
            said.append(tracker.state_dict())

        for number in range(3):
            for step in range(30):
                model(torch.randn(6 + step % 5, C, dtype=dtype) * 2, step)
                if (number, step, moment) in ((window, 24, "in mid-window"), (window, 29, "at its end")):
                    interrupt()
            said.append(tracker.close().to_dict())
            if number == window and moment == "after validation":
                model.eval()
                model.layers["slow"](torch.randn(8, C, dtype=dtype))
                model.train()
                model.layers["frozen"].eval()
            if number == window and moment in ("when closed", "after validation"):
                interrupt()
            if number == 0:
                model(torch.full((6, C), 7.0, dtype=dtype), 0)  # does not count, and is noticed
            tracker.reset()
            if (number, moment) == (window, "when begun"):
                interrupt()
        tracker.detach()
        return said

    for resumed, uninterrupted in zip(run(interrupted=True), run(interrupted=False), strict=True):
        assert_alike(resumed, uninterrupted)


@pytest.mark.parametrize("since", ["nothing", "written", "trained on", "the model is loaded later"])
def test_a_closed_window_is_reported_after_a_resume_as_it_was_when_it_ended(since: str) -> None:
    def trained() -> tuple[nn.Module, BatchNormTracker]:
        torch.manual_seed(9)
        model = Several(2)
        tracker = BatchNormTracker(model).attach()
        for _ in range(2):
            tracker.reset()
            for _ in range(30):
                model(torch.randn(32, C) * 2 + 3, [0, 1])
        tracker.close()
        if since == "written":
            model.layers[0].running_mean += 1
        elif since == "trained on":
            model(torch.randn(32, C), [0, 1])
        return model, tracker

    def next_window(model: nn.Module, tracker: BatchNormTracker) -> Report:
        torch.manual_seed(10)
        tracker.reset()
        for _ in range(30):
            model(torch.randn(32, C) * 2 + 3, [0, 1])
        tracker.detach()
        return tracker.close()

    model, tracker = trained()
    expected = tracker.report()
    saved = saved_and_loaded({"model": model.state_dict(), "tracker": tracker.state_dict()})
    resumed = Several(2)
    if since != "the model is loaded later":
        resumed.load_state_dict(saved["model"])
    other = BatchNormTracker(resumed)
    other.load_state_dict(saved["tracker"])
    other.attach()
    resumed.load_state_dict(saved["model"])
    assert_same(other.report(), expected)
    assert_same(next_window(resumed, other), next_window(model, tracker))


@pytest.mark.parametrize("closed", [False, True])
def test_a_tracker_that_was_closed_itself_goes_on_as_the_one_that_was_saved(closed: bool) -> None:
    def tracked(num_batches: int) -> tuple[nn.Module, BatchNormTracker]:
        model = nn.Sequential(nn.BatchNorm1d(C))
        tracker = BatchNormTracker(model).attach()
        feed(model, num_batches)
        return model, tracker

    (model, tracker), (_, other) = tracked(10), tracked(20)
    tracker.close()
    if closed:
        other.close()
    tracker.load_state_dict(other.state_dict())
    other.detach()
    assert tracker.report()["0"].num_batches == 20
    model(torch.randn(8, C))
    assert tracker.report()["0"].num_batches == (20 if closed else 21)
    tracker.reset()
    batches = feed(model, 5)
    tracker.detach()
    assert_population(tracker.report()["0"], batches)


def test_what_was_learnt_of_checkpointing_survives_a_restart() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))

    def train(num_batches: int) -> None:
        for _ in range(num_batches):
            checkpoint(model, torch.randn(8, C, requires_grad=True), use_reentrant=False).sum().backward()

    with BatchNormTracker(model) as tracker:
        train(30)
        layer = tracker.close()["0"]
        assert layer.flags == ("double-update",)
        assert layer.evidence["assumed_updates_per_call"] == 1
        assert rms(layer.z_mean) == 0  # it was not known before
        state, weights = saved_and_loaded(tracker.state_dict()), copy.deepcopy(model.state_dict())
    model = nn.Sequential(nn.BatchNorm1d(C))
    model.load_state_dict(weights)
    tracker = BatchNormTracker(model)
    tracker.load_state_dict(state)
    with tracker:
        assert tracker.report()["0"].flags == ("double-update",)
        tracker.reset()
        train(15)
        tracker.load_state_dict(saved_and_loaded(tracker.state_dict()))
        train(15)
    layer = tracker.close()["0"]
    assert layer.flags == ("double-update",)
    assert "assumed_updates_per_call" not in layer.evidence
    assert layer.evidence["effective_momentum"] == pytest.approx(1 - 0.9**2)
    assert rms(layer.z_mean) > 0


def test_checkpointing_in_an_earlier_window_explains_no_further_updates_in_a_later_one() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for _ in range(20):
            checkpoint(model, torch.randn(8, C, requires_grad=True), use_reentrant=False).sum().backward()
        tracker.reset()
        feed(model, 20)
        tracker.reset()
        for _ in range(20):
            feed(model, 1)
            with tracker.paused():
                feed(model, 1)
    layer = tracker.close()["0"]
    assert layer.flags == ("missed-calls",)
    assert layer.evidence["updates_per_call"] == 2


def test_a_window_that_is_resumed_in_the_middle_of_a_step_says_so() -> None:
    model, x = Several(2), torch.randn(8, C)

    def flags_after_a_resume() -> list[tuple[str, ...]]:
        resumed = BatchNormTracker(model)
        resumed.load_state_dict(saved_and_loaded(tracker.state_dict()))
        with resumed:
            again = BatchNormTracker(model)
            again.load_state_dict(saved_and_loaded(resumed.state_dict()))
        with again:
            flags = [layer.flags for layer in again.report().values()]
            again.reset()
            assert [layer.flags for layer in again.close().values()] == [(), ()]
        return flags

    with BatchNormTracker(model) as tracker:
        model(x, [0, 1])
        assert flags_after_a_resume() == [(), ()]  # it is not known yet whether anything tells of steps
        tracker.step()
        model(x, [0, 1])
        tracker.step()
        assert flags_after_a_resume() == [(), ()]
        model(x, [1])
        assert flags_after_a_resume() == [(), ("interrupted-batch",)]
        tracker.step()
        assert flags_after_a_resume() == [(), ()]
        with tracker.paused():
            model(x, [0, 1])
        assert flags_after_a_resume() == [("missed-calls",), ("missed-calls",)]
    assert [layer.flags for layer in tracker.report().values()] == [("missed-calls",), ("missed-calls",)]


def test_running_statistics_that_were_written_while_no_process_ran_are_flagged() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        feed(model, 20)
        tracker.close()
        state = saved_and_loaded(tracker.state_dict())
    for change, flags in ((0.0, ()), (0.5, ("written-outside",))):
        resumed = copy.deepcopy(model)
        resumed[0].running_mean += change
        tracker = BatchNormTracker(resumed)
        tracker.load_state_dict(state)
        with tracker:
            tracker.reset()
            feed(resumed, 20)
        assert tracker.report()["0"].flags == flags


def test_a_state_loaded_replaces_what_was_there() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    with BatchNormTracker(model) as tracker:
        model(x)
        state = tracker.state_dict()
        expected = tracker.report()["0"]
        for _ in range(40):
            model(x + 9)
        tracker.load_state_dict(state)
        assert torch.equal(tracker.report()["0"].population_mean, expected.population_mean)
        model(x + 1)
    assert_population(tracker.report()["0"], [x, x + 1])


def test_a_saved_state_does_not_change_as_training_goes_on() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(C)), torch.randn(8, C)
    with BatchNormTracker(model) as tracker:
        model(x)
        state = tracker.state_dict()
        before = copy.deepcopy(state)
        model(x + 9)
        tracker.flush()
        tracker.reset()
    assert_alike(state, before, 0)


def test_a_layer_that_a_loaded_state_does_not_know_begins_with_an_empty_window() -> None:
    model, x = Several(2), torch.randn(8, C)
    with BatchNormTracker(model, include="layers.0") as tracker:
        model(x, [0, 1])
        state = tracker.state_dict()
    with BatchNormTracker(model) as tracker:
        for _ in range(20):
            model(x + 1, [0, 1])
        with pytest.warns(UserWarning, match=r"have changed since the state was saved; new: layers\.1\."):
            tracker.load_state_dict(state)
        assert [layer.num_batches for layer in tracker.report().values()] == [1, 0]
        for _ in range(5):
            model(x, [0, 1])
    report = tracker.report()
    assert_population(report["layers.0"], [x] * 6)
    assert_population(report["layers.1"], [x] * 5)
    assert report["layers.1"].evidence["updates_per_call"] == 1
    assert (
        report["layers.1"].evidence["initial_weight"] == 0
    )  # of what the 21 batches before have made, nothing is known


def test_a_state_loaded_before_attaching_is_what_is_saved_until_then() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, C))
    state = tracker.state_dict()
    waiting = BatchNormTracker(model)
    waiting.load_state_dict(state)
    assert_alike(waiting.state_dict(), state, 0)


def test_a_state_for_a_changed_model_names_what_is_left_out_and_keeps_the_rest() -> None:
    model, x = Nested(), torch.randn(8, C)
    with BatchNormTracker(model) as tracker:
        model(x)
    state = tracker.state_dict()
    changed = Nested()
    changed.head = nn.Sequential(nn.BatchNorm1d(C + 2))
    del changed.block["bn1"]
    changed.extra = nn.BatchNorm1d(C)
    loaded = BatchNormTracker(changed)
    loaded.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"block\.bn1, head\.0"):
        loaded.attach()
    report = loaded.report()
    loaded.detach()
    assert_population(report["stem"], [x])
    assert {name: layer.num_batches for name, layer in report.items()} == {
        "stem": 1, "block.bn2": 1, "head.0": 0, "extra": 0,
    }  # fmt: skip


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": "2", "channels": None, "layers": []}], ids=str)
def test_a_state_of_another_version_is_an_error_that_says_which(state: dict[str, Any]) -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 4))
        with pytest.raises(ValueError, match=f"version 6; got version {state.get('version')!r}"):
            tracker.load_state_dict(state)
    assert tracker.report()["1"].num_batches == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [[16, 64, 256], [8] * 60, [2048], [1]], ids=str)
def test_a_saved_state_is_at_most_a_kibibyte_a_channel_and_64_more(widths: list[int], dtype: torch.dtype) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.BatchNorm1d(width, dtype=dtype) for width in widths)

        def forward(self) -> None:
            for layer in self.layers:
                layer(torch.randn(2, layer.num_features, dtype=dtype))

    def saved() -> int:
        file = io.BytesIO()
        torch.save(tracker.state_dict(), file)
        return file.tell()

    model, sizes = Wide(), []
    with BatchNormTracker(model) as tracker:
        for _ in range(2):
            for _ in range(43):
                model()
            sizes.append(saved())
            tracker.close()
            sizes.append(saved())
            tracker.reset()
    assert 500 * sum(widths) < min(sizes)
    assert max(sizes) <= 1024 * sum(widths) + 64 * 1024


# --- what a layer may be given ----------------------------------------------------------------------------------------


class ChannelsSecondToLast(nn.BatchNorm1d):
    """Takes ``(N, L, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TakesAList(nn.BatchNorm1d):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.relu(super().forward(torch.cat(parts)))


@pytest.mark.parametrize(
    ("layer", "given"),
    [(ChannelsSecondToLast(8), torch.randn(4, 5, 8)), (TakesAList(8), [torch.randn(4, 8), torch.randn(3, 8)])],
)
def test_a_subclass_that_takes_anything_else_is_skipped_and_disturbs_nothing(layer: nn.Module, given: object) -> None:
    model = nn.Sequential(layer)
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            model(given)
    report = tracker.report()["0"]
    assert (report.num_batches, report.evidence["calls_skipped"]) == (0, 3)
    assert torch.equal(report.running_mean, layer.running_mean.double())


def test_skipped_calls_are_counted_in_their_own_window() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False))
    with BatchNormTracker(model) as tracker:
        for _ in range(2):
            torch.func.vmap(model)(torch.randn(4, 8, C))
            assert tracker.close()["0"].evidence["calls_skipped"] == 1
            tracker.reset()
        model(torch.randn(8, C))
    assert tracker.report()["0"].evidence["calls_skipped"] == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_calls_under_a_transform_or_while_tracing_are_skipped() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False))
    with BatchNormTracker(model) as tracker:
        torch.func.vmap(model)(torch.randn(4, 8, C))
        torch.jit.trace(model, torch.randn(8, C), check_trace=False)
        model(torch.randn(8, C))
    layer = tracker.report()["0"]
    assert (layer.num_batches, layer.evidence["calls_skipped"]) == (1, 2)


def test_a_model_without_values_can_be_attached_and_reported() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        pass
    layer = tracker.report()["0"]
    assert layer.num_batches == 0
    assert torch.isnan(layer.running_mean).all()


def test_layers_whose_names_differ_by_a_wrapper_alone_are_both_monitored() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(C)
            self._orig_mod = nn.ModuleDict({"bn": nn.BatchNorm1d(C)})

    both = Both()
    with BatchNormTracker(both) as tracker:
        both.bn(torch.randn(8, C))
        both._orig_mod["bn"](torch.randn(9, C))
    assert {name: layer.num_samples for name, layer in tracker.report().items()} == {"bn": 8, "_orig_mod.bn": 9}


@pytest.mark.parametrize("patterns", [{"include": []}, {"exclude": "*"}])
def test_patterns_that_leave_no_layer_are_warned_of(patterns: dict[str, object]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    with (
        pytest.warns(UserWarning, match="`include` and `exclude` leave no BatchNorm layer to monitor of 0"),
        BatchNormTracker(model, **patterns) as tracker,
    ):
        model(torch.randn(8, C))
    assert len(tracker.report()) == 0
