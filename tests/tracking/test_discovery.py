"""Which layers are found, and their names."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_bnmonitor import BatchNormTracker
from tests.tracking.small_models import C, Nested, Several, assert_population, hooks_on, network


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
