"""Running statistics as they are in an evaluation, against what is evaluated: whatever they come from."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lightning_bnmonitor import BatchNormTracker, recalibrate
from tests.tracking.test_validation import data, moments

C = 4


def network(momentum=0.1):
    return nn.Sequential(nn.BatchNorm1d(C, momentum=momentum), nn.Linear(C, 8), nn.BatchNorm1d(8, momentum=momentum))


def train(net, batches, lr=0.0):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for x in batches:
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


def validate(tracker, net, batches, loader=0):
    was_training = net.training
    net.eval()
    tracker.start_validation(loader)
    with torch.no_grad():
        for x in batches:
            net(x)
    net.train(was_training)
    return tracker.validation_report()


def flags_of(report):
    names = ("never-updated", "other-weights", "domain-shift", "unexplained-error")
    return {name: set(layer.flags) & set(names) for name, layer in report.items()}


def error_by_hand(layer, running_mean, running_var, batches, eps=1e-5):
    """RMS error of the normalised activations: both of every value, in float64."""
    values = torch.cat(list(batches)).double().numpy()
    mean, var = moments(batches)
    wrong = (values - running_mean) / np.sqrt(running_var + eps)
    right = (values - mean) / np.sqrt(var + eps)
    return np.sqrt(((wrong - right) ** 2).mean(axis=0))


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_is_that_of_the_activations_that_the_running_statistics_made(close, shift):
    net, validation = network(), data(10, 2, shift)
    with BatchNormTracker(net) as tracker:
        train(net, data(40, 1))
        if close:
            tracker.close()
        mean, var = (getattr(net[0], name).double().numpy().copy() for name in ("running_mean", "running_var"))
        net.eval()
        tracker.start_validation()
        net(validation[0])
        net[0].running_mean.add_(torch.inf)  # what they become later has no part in it
        for x in validation[1:]:
            net(x)
        report = tracker.validation_report()
    layer = report["0"]
    by_hand = error_by_hand(layer, mean, var, validation)
    np.testing.assert_allclose(layer.val_error, by_hand, rtol=1e-2, atol=1e-3)  # which counts variance by N
    np.testing.assert_allclose(layer.val_running, [mean, var], rtol=0)
    assert layer.evidence["val_error"] == pytest.approx(math.sqrt((by_hand**2).mean()), rel=1e-2, abs=1e-3)
    assert json.loads(json.dumps(layer.to_dict()))["val_error"] == pytest.approx(layer.val_error.tolist())
    assert copy.deepcopy(report)["0"].val_error.equal(layer.val_error)
    known = [its.evidence["val_error"] for its in report.values() if "val_error" in its.evidence]
    assert report.summary()["val_error_max"] == max(known)


def test_with_the_running_statistics_of_training_no_layer_is_flagged_of_a_hundred():
    flagged = []
    for seed in range(34):
        torch.manual_seed(seed)
        net = nn.Sequential(network(momentum=(0.05, 0.1, 0.2)[seed % 3]), nn.ReLU(), nn.BatchNorm1d(8, momentum=0.1))
        with BatchNormTracker(net) as tracker:
            train(net, data(64, 2 * seed), lr=0.01)
            tracker.close()
            report = validate(tracker, net, data((1, 2, 4, 16)[seed % 4], 2 * seed + 1))
        flagged += [flag for flags in flags_of(report).values() for flag in flags]
        assert sum("val_error" in layer.evidence for layer in report.values()) == 3
    assert flagged == []


class WithCopy(nn.Module):
    """Validates a copy of what it trains."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.averaged = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x) if self.training else self.averaged(x)


def test_a_copy_whose_buffers_nobody_updates_is_named_and_the_remedy_works():
    model, batches, validation = WithCopy(), data(40, 1), data(8, 2)
    with BatchNormTracker(model) as tracker:
        train(model, batches)
        tracker.close()
        report = validate(tracker, model, validation)
        assert flags_of(report) == {
            **{"net.0": set(), "net.2": set()},
            **{"averaged.0": {"never-updated"}, "averaged.2": {"never-updated"}},
        }
        assert all(report[name].needs_attention is name.startswith("averaged") for name in report)
        assert "recalibrate(averaged, loader)" in report["averaged.0"].remedy
        recalibrate(model.averaged, batches)
        assert flags_of(validate(tracker, model, validation))["averaged.0"] == set()
        model.averaged.load_state_dict(model.net.state_dict())
        assert not any(flags_of(validate(tracker, model, validation)).values())


def test_a_copy_with_statistics_of_other_data_is_named():
    model = WithCopy()
    model.averaged.train()
    for x in data(40, 3, shift=3.0):
        model.averaged(x)
    with BatchNormTracker(model) as tracker:
        train(model, data(40, 1))
        tracker.close()
        report = validate(tracker, model, data(8, 2))
    assert flags_of(report)["averaged.0"] == {"other-weights"}
    assert "was not called in training" in report["averaged.0"].explanation
    assert report["averaged.0"].needs_attention


def test_without_any_training_what_is_evaluated_is_judged_alone():
    with BatchNormTracker(net := network()) as tracker:
        before = copy.deepcopy(net.state_dict())
        report = validate(tracker, net, data(6, 2))
        assert flags_of(report) == {"0": {"never-updated"}, "2": {"never-updated"}}
        assert "load its running statistics" in report["0"].remedy
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    train(net, data(60, 1))
    with BatchNormTracker(net) as tracker:
        assert not any(flags_of(validate(tracker, net, data(6, 2))).values())


def averaged(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@pytest.mark.parametrize("what", ["weights", "buffers", "other layers"])
def test_validated_with_others_than_trained_is_noticed(what):
    torch.manual_seed(0)
    net = network()
    with BatchNormTracker(net) as tracker:
        train(net, data(40, 1))
        tracker.close()
        with torch.no_grad():
            if what == "weights":
                net[0].weight.mul_(4)
                net[2].bias.add_(1e-6)
            elif what == "buffers":
                net[2].running_mean.add_(0.5)
            else:
                net[1].weight.mul_(4)
        report = validate(tracker, net, data(8, 2))
    # Of layers without BatchNorm nothing is known: something before it differs.
    expected = {"weights": "other-weights", "buffers": "other-weights", "other layers": "domain-shift"}[what]
    assert flags_of(report) == {"0": set(), "2": {expected}}
    assert report["2"].needs_attention
    if what != "other layers":
        assert "PreciseBatchNorm(restore=True)" in report["2"].remedy


def test_statistics_of_other_data_are_named_and_not_those_that_validation_has():
    net, batches = network(), data(60, 1)
    with BatchNormTracker(net) as tracker:
        train(net, batches)
        tracker.close()
        recalibrate(net, [x + 3 for x in batches])
        report = validate(tracker, net, batches)
        assert flags_of(report) == {"0": {"other-weights"}, "2": set()}
        assert report["0"].evidence["val_shift"] < 3 * report["0"].evidence["val_noise"]
        recalibrate(net, batches)  # as the remedy says
        assert flags_of(validate(tracker, net, batches)) == {"0": set(), "2": set()}


@pytest.mark.parametrize("how", ["recalibrate", "update_bn"])
def test_repaired_statistics_are_not_others_and_data_that_differ_still_are(how):
    batches = data(40, 1)
    net = network(momentum=0.001)
    with BatchNormTracker(net) as tracker:
        train(net, batches)
        assert tracker.close()["0"].verdict == "warming-up"
        if how == "recalibrate":
            recalibrate(net, batches)
        else:
            with tracker.paused():
                update_bn(batches, net)
        assert not any(flags_of(validate(tracker, net, data(8, 2))).values())
        report = validate(tracker, net, data(8, 2, shift=2.0))
    assert flags_of(report)["0"] == {"domain-shift"}


def test_a_second_validation_of_the_same_window_begins_from_what_training_has_shown():
    net = network()
    with BatchNormTracker(net) as tracker:
        train(net, data(40, 1))
        ended = tracker.close()
        assert flags_of(validate(tracker, net, data(8, 2, shift=3.0)))["0"] == {"domain-shift"}
        again = validate(tracker, net, data(8, 2))
        assert tracker.report() is again
        assert {name: (layer.flags, layer.needs_attention) for name, layer in again.items()} == {
            name: (layer.flags, layer.needs_attention) for name, layer in ended.items()
        }


def test_of_several_loaders_each_is_against_what_the_first_began_with():
    net = network()
    with BatchNormTracker(net) as tracker:
        train(net, data(40, 1))
        tracker.close()
        before = net[0].running_mean.double().clone()
        net.eval()
        for loader, shift in enumerate((0.0, 2.0)):
            tracker.start_validation(loader)
            for x in data(6, 5, shift):
                net(x)
            net[0].running_mean.add_(1.0)
        report = tracker.validation_report()
    torch.testing.assert_close(report["0"].val_running[0], before)
    assert report["0"].evidence["val_loader"] == 1


def test_a_layer_that_normalises_by_the_batch_in_validation_has_no_error_there():
    net = network()
    with BatchNormTracker(net) as tracker:
        train(net, data(40, 1))
        tracker.close()
        net.eval()
        net[0].train()
        tracker.start_validation()
        for x in data(6, 2, shift=5.0):
            net(x)
        report = tracker.validation_report()
    assert "val_error" not in report["0"].evidence
    assert report["0"].val_error.isnan().all()
    assert report["0"].evidence["val_shift"] > 1
    assert "val_error" in report["2"].evidence


def test_running_statistics_that_are_not_finite_are_infinitely_wrong():
    model = WithCopy()
    model.averaged[0].running_var[1] = torch.nan
    with BatchNormTracker(model) as tracker:
        train(model, data(40, 1))
        tracker.close()
        layer = validate(tracker, model, data(8, 2))["averaged.0"]
    assert layer.val_error.isinf().tolist() == [False, True, False, False]
    assert layer.needs_attention


# ----------------------------------------------------------------------------------------------- training in eval mode


def train_in_eval(net, batches, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.01)
    net.eval()
    for x in batches:
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_not_finite_in_validation_is_told_of_the_layer_where_it_begins(value, trained):
    net, batches = network(), data(60, seed=1)
    with BatchNormTracker(net) as tracker:
        if trained:
            train(net, batches)
            tracker.close()
        evaluated = data(3, seed=2)
        evaluated[1][3, 1] = value
        report = validate(tracker, net, evaluated)
    first, second = report.values()
    assert "non-finite-validation" in first.flags
    assert first.evidence["val_non_finite"] == 1
    assert "1 of 4 channels" in first.explanation
    assert "isfinite" in first.remedy
    assert report.unhealthy == [first] if trained else first in report.unhealthy
    assert "non-finite-validation" not in second.flags
    assert second.evidence["val_non_finite"] == 8


def test_of_several_loaders_the_one_with_what_is_not_finite_is_told_of():
    net, (shifted, good) = network(), data(2, seed=2)
    with BatchNormTracker(net) as tracker:
        train(net, data(60, seed=1))
        tracker.close()
        net.eval()
        with torch.no_grad():
            for loader, x in enumerate((shifted + 3, good * math.nan, good)):
                tracker.start_validation(loader)
                net(x)
        report = tracker.validation_report(num_loaders=3)
    assert report["0"].evidence["val_loader"] == 1
    assert report["0"].evidence["val_non_finite"] == C


def test_nothing_is_blamed_on_validation_behind_a_layer_that_gives_nan_by_its_own_statistics():
    net = network()
    with BatchNormTracker(net) as tracker:
        batches = data(60, seed=1)
        batches[30][0, 0] = math.nan
        train(net, batches)
        tracker.close()
        report = validate(tracker, net, data(1, seed=2))
    assert report["2"].evidence["val_non_finite"] == 8
    assert not any("non-finite-validation" in layer.flags for layer in report.values())


def test_a_model_that_is_trained_in_eval_mode_is_told_so_with_counts():
    net = network()
    with BatchNormTracker(net) as tracker:
        train_in_eval(net, data(12, 1))
        with torch.no_grad():
            net(data(1, 2)[0])
        report = tracker.close()
    for layer in report.values():
        assert (layer.verdict, layer.needs_attention, layer.num_batches) == ("trained-in-eval", True, 0)
        assert (layer.evidence["calls_in_eval_mode"], layer.evidence["steps_in_eval_mode"]) == (12, 12)
        assert "still the initial zeros and ones" in layer.explanation


@pytest.mark.parametrize("compiled", ["eager", "aot_eager"])
def test_also_of_compiled_models(compiled):
    torch._dynamo.reset()
    net = network()
    net.compile(backend=compiled)
    with BatchNormTracker(net) as tracker:
        train_in_eval(net, data(5, 1))
        layer = tracker.close()["0"]
    torch._dynamo.reset()
    assert (layer.verdict, layer.evidence["calls_in_eval_mode"]) == ("trained-in-eval", 5)


def test_it_is_harmless_where_learnt_statistics_are_right_in_validation_and_not_otherwise():
    net = network()
    train(net, data(60, 1))
    for shift, needs_attention in ((0.0, False), (2.0, True)):
        with BatchNormTracker(net) as tracker:
            train_in_eval(net, data(12, 1))
            assert all(layer.needs_attention for layer in tracker.close().values())
            layer = validate(tracker, net, data(8, 2, shift))["0"]
        assert (layer.verdict, layer.needs_attention) == ("trained-in-eval", needs_attention)
        assert "initial" not in layer.explanation


@pytest.mark.parametrize("what", ["another model's optimizer", "no gradients", "paused", "closed"])
def test_what_trains_nothing_of_it_is_no_training_in_eval_mode(what):
    net, other = network(), nn.Linear(C, C)
    with BatchNormTracker(net) as tracker:
        if what == "another model's optimizer":
            train_in_eval(nn.Sequential(other, net), data(5, 1), torch.optim.SGD(other.parameters(), 0.01))
        elif what == "no gradients":
            net.eval()
            with torch.no_grad():
                net(data(1, 1)[0])
        elif what == "paused":
            with tracker.paused():
                train_in_eval(net, data(5, 1))
        else:
            tracker.close()
            train_in_eval(net, data(5, 1))
            tracker.reset()
        assert {layer.verdict for layer in tracker.report().values()} == {"unused"}


def test_the_counts_begin_anew_with_each_window_and_go_through_a_state():
    net = network()
    with BatchNormTracker(net) as tracker:
        train_in_eval(net, data(3, 1))
        twin = BatchNormTracker(net)
        twin.load_state_dict(tracker.state_dict())
        with twin:
            train_in_eval(net, data(2, 1))
            assert twin.report()["0"].evidence["calls_in_eval_mode"] == 5
            assert twin.report()["0"].evidence["steps_in_eval_mode"] == 5
        tracker.reset()
        train(net, data(10, 1))
        assert tracker.report()["0"].verdict != "trained-in-eval"
        assert "calls_in_eval_mode" not in tracker.report()["0"].evidence


def test_a_part_in_eval_mode_whose_statistics_are_still_initial_is_told_so():
    net = network()
    with BatchNormTracker(net) as tracker:
        net[0].eval()
        for x in data(20, 1):
            net(x)
        layer = tracker.close()["0"]
    assert (layer.verdict, layer.needs_attention) == ("frozen", True)
    assert "still the initial zeros and ones" in layer.explanation


@pytest.mark.parametrize("is_repaired", [False, True])
def test_weights_that_are_swapped_as_late_as_within_a_validation_step_are_others(is_repaired):
    torch.manual_seed(0)
    net, batches = network(), data(40, 1)
    with BatchNormTracker(net) as tracker:
        train(net, batches, lr=0.05)
        tracker.close()
        if is_repaired:
            recalibrate(net, batches)
        net.eval()
        tracker.start_validation()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.5)
            for x in data(10, 2):
                net(x)
        report = tracker.validation_report()
    assert "other-weights" in report["2"].flags
    assert "domain-shift" not in report["2"].flags


def test_a_variance_below_zero_is_told_of_as_what_is_not_finite():
    net = network()
    with BatchNormTracker(net) as tracker:
        net[2].running_var[3] = -1.0
        validate(tracker, net, data(4, 32))
    report = tracker.report()
    assert (report["2"].verdict, report["2"].evidence["non_finite_running_stats"]) == ("non-finite", 1)
    assert report["0"].verdict != "non-finite"


@pytest.mark.parametrize(("size", "is_sorted", "is_told"), [(64, False, False), (4, False, True), (64, True, True)])
def test_without_running_statistics_batches_of_validation_are_compared_with_those_of_training(size, is_sorted, is_told):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False), nn.Linear(C, C))
    x = torch.randn(512, C, generator=generator)
    x = x.sort(dim=0)[0] if is_sorted else x
    with BatchNormTracker(net) as tracker:
        tracker.reset()
        train(net, torch.randn(20, 64, C, generator=generator))
        tracker.close()
        report = validate(tracker, net, x.split(size))
    assert (report["0"].flags == ("evaluated-by-batch",)) is is_told
    assert report["0"].needs_attention is is_told
    means = torch.stack([part.mean(dim=0) for part in x.split(size)]).double()
    scatter = (means.var(dim=0, correction=0) / x.double().var(dim=0)).mean().sqrt().item()
    assert report["0"].evidence["val_scatter"] == pytest.approx(scatter, rel=1e-4)
    assert report["0"].evidence["train_scatter"] == pytest.approx(1 / 8)
