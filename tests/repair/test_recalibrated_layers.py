"""Which layers are recalibrated, and that modes are as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bnmonitor import recalibrate
from tests.repair.exact_population import C, Recorder, assert_written, data, layers_of
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Unchanged, buffers_of


def test_whatever_the_modes_were_they_are_exactly_that_afterwards() -> None:
    model = trained(Net())
    for eval_modules in ([], ["drop"], ["a", "one"], ["a", "b", "c"], [""], ["", "drop", "a", "b", "c"]):
        for name, module in model.named_modules():
            module.training = name not in eval_modules
        with Unchanged(model):
            recalibrate(model, data())


def test_a_module_whose_train_method_does_something_else_is_not_asked() -> None:
    class Stays(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("nobody should call this")

    model, batches = Stays(nn.BatchNorm1d(C), nn.Dropout(0.5), nn.BatchNorm1d(C)), data()
    recorder = Recorder(model)
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)
    assert_written(model[2], recorder["2"])


@pytest.mark.filterwarnings("ignore:recalibrate has left layers alone")
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_layers_are_left_alone_and_in_eval_unless_asked(frozen: bool) -> None:
    model, batches = trained(Net()), data()
    model.b.eval()
    model.c.momentum = 0.0
    recorder, before = Recorder(model), buffers_of(model)
    with Unchanged(model):
        result = recalibrate(model, batches, frozen=frozen)
    assert recorder.training == {"a": [True] * 10, "b": [frozen] * 10, "c": [frozen] * 10}
    assert result.left_alone == ({} if frozen else {"b": "frozen", "c": "stale"})
    assert_written(model.a, recorder["a"])
    for name in ("b", "c"):
        if frozen:
            assert_written(layers_of(model)[name], recorder[name])
        else:
            assert {k: v for k, v in buffers_of(model).items() if k[0] == name} == {
                k: v for k, v in before.items() if k[0] == name
            }
    assert ("Left alone: b (frozen, eval_error " in str(result)) != frozen


def test_in_a_model_in_eval_mode_all_layers_are_recalibrated() -> None:
    model = trained(Net()).eval()
    recorder = Recorder(model)
    with Unchanged(model):
        assert recalibrate(model, data()).left_alone == {}
    for name, layer in layers_of(model).items():
        assert_written(layer, recorder[name])


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_momentum_plays_no_part(momentum: float | None) -> None:
    model, batches = single(momentum=momentum), data()
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)
    assert model[0].num_batches_tracked == 5


def test_a_layer_without_running_statistics_is_left_alone_and_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C))
    recorder = Recorder(model)
    result = recalibrate(model, data())
    assert result.left_alone == {"0": "no running statistics"}
    assert_written(model[1], recorder["1"])
    result = recalibrate(model, data(), frozen=True)
    assert result.left_alone == {"0": "no running statistics"}


@pytest.mark.filterwarnings("ignore:recalibrate has left layers alone")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_with_buffers_that_it_does_not_track_is_stale(frozen: bool) -> None:
    model, batches = single(), data()
    model[0].track_running_stats = False
    with Unchanged(model, entirely=not frozen):
        result = recalibrate(model, batches, frozen=frozen)
    assert result.left_alone == ({} if frozen else {"0": "stale"})
    if frozen:
        assert_written(model[0], batches)


def test_a_layer_that_the_pass_does_not_use_is_left_alone_and_named() -> None:
    model, batches = trained(Net()), data()
    before = buffers_of(model)
    result = recalibrate(model, batches, forward=lambda model, batch: model.a(batch))
    assert result.left_alone == {"b": "unused", "c": "unused"}
    assert "Left alone: b (unused), c (unused)." in str(result)
    assert_written(model.a, batches)
    for name, value in buffers_of(model).items():
        assert (value == before[name]) == (name not in ("a.running_mean", "a.running_var"))
    after = buffers_of(model)
    with torch.no_grad():
        model.b.running_mean.fill_(5)
    result.restore()
    assert model.b.running_mean.tolist() == [5] * 4  # what was not written is not put back
    assert {k: v for k, v in buffers_of(model).items() if k != "b.running_mean"} == {
        k: v for k, v in before.items() if k != "b.running_mean"
    }
    assert after != before


def test_include_and_exclude_choose_layers_and_the_others_stay_in_eval() -> None:
    for choice in ({"include": ["a"]}, {"exclude": ("b", "c")}, {"include": "[a-b]", "exclude": "b"}):
        model = trained(Net())
        recorder, before = Recorder(model), buffers_of(model)
        with Unchanged(model):
            result = recalibrate(model, data(), **choice)
        assert list(result.after) == ["a"]
        assert recorder.training == {"a": [True] * 10, "b": [False] * 10, "c": [False] * 10}
        changed = [name for name, value in buffers_of(model).items() if value != before[name]]
        assert changed == ["a.running_mean", "a.running_var"]
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="matches no BatchNorm layer"):
        recalibrate(model, data(), include="nothing")
    with Unchanged(model, entirely=True), pytest.raises(TypeError, match="`exclude`"):
        recalibrate(model, data(), exclude=3)


def test_parameters_that_need_no_gradient_and_gradients_that_are_there_stay() -> None:
    model, batches = trained(Net()), data()
    model.a.weight.requires_grad_(False)
    model(batches[0]).sum().backward()
    with Unchanged(model):
        recalibrate(model, batches)
