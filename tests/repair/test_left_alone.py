"""Layers that a recalibration leaves alone: why, how far off they are, and the warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker, recalibrate
from tests.repair.exact_population import C, Recorder, assert_written, data, error_in_eval, layers_of, moments
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Unchanged, buffers_of

INCLUDED = "`recalibrate(model, loader, frozen=True)` includes"


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def off_by(distance: float, batches: list[Tensor], how: str) -> nn.Sequential:
    """A frozen or stale layer whose running mean is so many standard deviations off, and one that trains."""
    model = nn.Sequential(nn.BatchNorm1d(C, eps=1e-12), nn.BatchNorm1d(C))
    mean, var = (torch.from_numpy(value) for value in moments(batches))
    model[0].running_mean.copy_(mean + distance * var.sqrt())
    model[0].running_var.copy_(var)
    if how == "frozen":
        model[0].eval()
    elif how == "momentum":
        model[0].momentum = 0.0
    else:
        model[0].track_running_stats = False
    return model


def test_frozen_and_stale_layers_are_measured_in_eval_mode_in_the_pass_that_is_made_anyway() -> None:
    model, batches = trained(Net()), data()
    model.b.eval()
    model.c.track_running_stats = False
    recorder, before = Recorder(model), buffers_of(model)
    with Unchanged(model), pytest.warns(UserWarning, match="has left layers alone") as warned:
        result = recalibrate(model, batches)
    assert recorder.training == {"a": [True] * 10, "b": [False] * 10, "c": [False] * 10}
    assert result.left_alone == {"b": "frozen", "c": "stale"}
    expected = {name: error_in_eval(layers_of(model)[name], recorder[name]) for name in "bc"}
    assert result.misfits == pytest.approx(expected, rel=1e-2)  # the variance is the unbiased one
    assert list(result.misfits) == sorted(expected, key=expected.__getitem__, reverse=True)
    assert (list(result.before), list(result.after)) == (["a", "b", "c"], ["a"])
    changed = [name for name, value in buffers_of(model).items() if value != before[name]]
    assert changed == ["a.running_mean", "a.running_var"]
    assert len(warned) == 1
    said = str(warned[0].message)
    for name, why in result.left_alone.items():
        assert f"{name} ({why}, eval_error {result.misfits[name]:.2g})" in said
        assert f"{name} ({why}, eval_error {result.misfits[name]:.4f})" in str(result)
    assert INCLUDED in said
    assert warned[0].filename == __file__


@pytest.mark.parametrize("how", ["frozen", "momentum", "track_running_stats"])
@pytest.mark.parametrize(("distance", "is_said"), [(0.0, False), (0.097, False), (0.103, True), (2.0, True)])
def test_a_warning_comes_from_an_error_of_a_tenth_on(distance: float, is_said: bool, how: str) -> None:
    batches = [torch.randn(5000, C) for _ in range(4)]
    model = off_by(distance, batches, how)
    if not is_said:
        with silent():
            assert recalibrate(model, batches).misfits == {}
        return
    with pytest.warns(UserWarning, match="has left layers alone") as warned:
        assert recalibrate(model, batches).misfits == pytest.approx({"0": distance}, rel=1e-3)
    assert ("train on afterwards" in str(warned[0].message)) == (how == "frozen")


def test_chance_is_not_warned_of() -> None:
    """The running statistics are those of the distribution, and the data are few."""
    told = 0
    for _ in range(150):
        model = nn.Sequential(nn.BatchNorm1d(8))
        model[0].momentum = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told += bool(recalibrate(model, [torch.randn(6, 8) for _ in range(3)]).misfits)
    assert told <= 2


def test_running_statistics_that_are_not_finite_are_warned_of() -> None:
    model = off_by(0.0, data(), "frozen")
    model[0].running_var[1] = torch.nan
    with pytest.warns(UserWarning, match=r"0 \(frozen, eval_error inf\)"):
        recalibrate(nn.Sequential(model[0]), data())


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_where_nothing_is_recalibrated_it_is_one_pass_that_says_so(distance: float) -> None:
    batches, calls = data(), []
    model = nn.Sequential(off_by(distance, batches, "track_running_stats")[0])
    model.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings(record=True) as warned, Unchanged(model, entirely=True):
        warnings.simplefilter("always")
        result = recalibrate(model, batches)
    assert len(calls) == len(batches)
    assert [INCLUDED in str(warning.message) for warning in warned] == [True] * bool(distance)
    assert str(result).startswith("0 BatchNorm layers recalibrated on 10 batches.")


def test_what_is_asked_for_or_excluded_is_not_warned_of() -> None:
    batches = data()
    for choice in ({"frozen": True}, {"exclude": "0"}, {"include": "1"}):
        with silent():
            assert recalibrate(off_by(1.0, batches, "frozen"), batches, **choice).misfits == {}


def test_a_model_in_eval_mode_as_a_whole_has_no_frozen_layers() -> None:
    model = trained(Net()).eval()
    with silent():
        assert (recalibrate(model, data()).left_alone, model.training) == ({}, False)


def test_a_layer_that_the_pass_does_not_use_is_not_warned_of() -> None:
    model = trained(Net())
    model.c.eval()
    with silent():
        result = recalibrate(model, data(), forward=lambda model, batch: model.a(batch))
    assert (result.left_alone, result.misfits) == ({"c": "frozen", "b": "unused"}, {})


def test_at_most_five_layers_are_listed_the_worst_first() -> None:
    batches = data()
    model = nn.Sequential(*(off_by(1.0 + index, batches, "track_running_stats")[0] for index in range(7)))
    with pytest.warns(UserWarning, match="has left layers alone") as warned:
        result = recalibrate(model, batches)
    said = str(warned[0].message)
    assert said.count("eval_error") == 5
    assert " and 2 more." in said
    assert said.index(next(iter(result.misfits))) < said.index(list(result.misfits)[4])


def test_an_averaged_model_that_was_set_up_for_a_tracker_is_not_left_alone_in_silence() -> None:
    """Layers in eval mode within a model in training mode, as it takes to measure a model that is not trained."""
    averaged = trained(Net()).train()
    for layer in layers_of(averaged).values():
        layer.eval()
    with BatchNormTracker(averaged) as tracker, torch.no_grad():
        for batch in data():
            averaged(batch)
    assert {layer.verdict for layer in tracker.report().values()} == {"frozen"}
    with pytest.warns(UserWarning, match="has left layers alone"):
        recalibrate(averaged, data())
    with silent():
        assert list(recalibrate(averaged, data(), frozen=True).after) == ["a", "b", "c"]
    assert_written(averaged.a, data())


def remedy_of(layer: nn.Module, batches: list[Tensor]) -> str:
    model = nn.Sequential(layer)
    with BatchNormTracker(model) as tracker:
        for batch in batches:
            model(batch)
    return tracker.report()["0"].remedy


@pytest.mark.parametrize("how", ["frozen", "momentum", "track_running_stats"])
@pytest.mark.parametrize("is_finite", [True, False])
def test_the_call_that_a_report_prints_for_such_a_layer_repairs_it(how: str, is_finite: bool) -> None:
    batches = data()
    layer = off_by(1.0, batches, how)[0]
    if not is_finite:
        layer.running_mean[0] = torch.nan
    remedy = remedy_of(layer, batches)
    assert "`lightning_bnmonitor.recalibrate(model, loader, frozen=True)`" in remedy
    assert "reset_running_stats" not in remedy  # which does nothing where they are not tracked
    recalibrate(nn.Sequential(layer), batches, frozen=True)
    assert_written(layer, batches)


def test_a_layer_that_trains_is_repaired_without_frozen() -> None:
    model, batches = single(), data()
    model[0].running_mean[0] = torch.nan
    remedy = remedy_of(model[0], batches)
    assert "`lightning_bnmonitor.recalibrate(model, loader)`" in remedy
    recalibrate(model, batches)
    assert_written(model[0], batches)
