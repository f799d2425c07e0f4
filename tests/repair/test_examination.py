"""Examination: what one pass says of a model that is there."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bnmonitor import Report, examine, recalibrate
from tests.repair.exact_population import C, Recorder, error_in_eval, layers_of, moments
from tests.repair.small_models import Net, trained
from tests.repair.unchanged import Unchanged


def batches(num: int, size: int = 64, shift: float = 1.0, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, C, generator=generator) + shift for _ in range(num)]


def fed(model: nn.Module, data: list[Tensor]) -> nn.Module:
    for x in data:
        model(x)
    return model


def norm(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(C, momentum=momentum), nn.Linear(C, 2))


@pytest.mark.parametrize("is_training", [True, False])
def test_every_layer_is_compared_with_what_it_receives_in_the_pass(is_training: bool) -> None:
    model, data = trained(Net()).train(is_training), batches(12)
    recorder = Recorder(model)
    with Unchanged(model, entirely=True):
        report = examine(model, data, num_batches=None)
    assert list(report) == ["a", "b", "c"]
    for name, layer in report.items():
        assert recorder.training[name] == [True] * len(data)
        mean, var = moments(recorder[name])
        np.testing.assert_allclose(layer.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer.population_var.numpy(), var, rtol=1e-6)
        assert layer.num_samples == 12 * 64
        assert layer.summary()["eval_error"] == pytest.approx(
            error_in_eval(layers_of(model)[name], recorder[name]), rel=1e-3
        )
    assert ("frozen layers are not told" in report.remarks[-1]) == (not is_training)


def test_what_recalibrate_says_of_before_is_that_report() -> None:
    model, data = trained(Net()), batches(12)
    examined = examine(model, data, num_batches=None)
    assert recalibrate(model, data).before.to_dict() == examined.to_dict()


@pytest.mark.parametrize("momentum", [0.1, 0.02, None])
def test_a_layer_that_was_trained_on_these_data_is_healthy(momentum: float | None) -> None:
    layer = examine(fed(norm(momentum), batches(400)), batches(40, seed=6))["0"]
    assert (layer.verdict, layer.flags, layer.needs_attention) == ("healthy", (), False)


@pytest.mark.parametrize("updates", [30, 200])
def test_the_weight_of_the_initial_values_is_told_from_momentum_and_counter(updates: int) -> None:
    model, data = fed(norm(momentum=0.003), batches(updates)), batches(40, seed=6)
    layer = examine(model, data, num_batches=None)["0"]
    assert layer.verdict == "warming-up"
    assert layer.needs_attention
    assert layer.evidence["initial_weight"] == pytest.approx(0.997**updates)
    assert f"After {updates} updates with `momentum=0.003`" in layer.explanation
    # Trained for as long with what is recommended, the initial values are gone.
    momentum = float(re.search(r"momentum=([\d.]+)`", layer.remedy)[1])
    again = examine(fed(norm(momentum), batches(updates)), data, num_batches=None)["0"]
    assert again.evidence["warmup_error"] < 0.1
    assert not again.needs_attention


def test_what_was_recalibrated_is_not_told_of_initial_values_that_are_gone() -> None:
    model, data = fed(norm(momentum=0.003), batches(30)), batches(40, seed=6)
    recalibrate(model, data)
    fits = examine(model, data)["0"]
    assert (fits.verdict, fits.evidence["initial_weight"]) == ("healthy", 0)
    other = examine(model, batches(40, shift=2.0))["0"]
    assert (other.verdict, other.needs_attention) == ("misfit", True)


@pytest.mark.parametrize("num", [3, 40])
def test_zeros_and_ones_that_no_batch_has_updated_are_named(num: int) -> None:
    layer = examine(norm(), batches(num, shift=3.0), num_batches=None)["0"]
    assert layer.flags == ("never-updated",)
    assert layer.needs_attention
    assert "`num_batches_tracked` is zero" in layer.explanation
    fits = examine(norm(), batches(40, size=500, shift=0.0), num_batches=None)["0"]
    assert (fits.flags, fits.needs_attention) == ((), False)


def test_running_statistics_that_are_off_for_a_reason_that_is_not_known_are_a_misfit_until_recalibrated() -> None:
    model, data = fed(norm(), batches(200)), batches(40, shift=1.5)
    layer = examine(model, data)["0"]
    assert (layer.verdict, layer.needs_attention) == ("misfit", True)
    assert layer.evidence["eval_error"] == pytest.approx(0.5, abs=0.1)
    namespace = {"lightning_bnmonitor": __import__("lightning_bnmonitor"), "model": model, "loader": data}
    eval(re.search(r"`(lightning_bnmonitor\.recalibrate\([^`]*\))`", layer.remedy)[1], namespace)
    assert examine(model, data)["0"].verdict == "healthy"


@pytest.mark.slow
def test_noise_of_the_last_batches_is_told_and_only_where_it_happens() -> None:
    seen = batches(200, size=32, seed=99)
    off = [examine(fed(norm(0.9), batches(50, size=32, seed=s)), seen)["0"] for s in range(12)]
    assert {layer.verdict for layer in off} <= {"noisy", "healthy"}
    for layer in off:
        assert layer.evidence["noise_error"] == pytest.approx(0.19, abs=0.02)  # sqrt(1.5 / 32 * 0.9 / 1.1)
        assert layer.needs_attention == (layer.verdict == "noisy")
        assert layer.needs_attention == (layer.evidence["eval_error"] ** 2 - layer.evidence["now_error"] ** 2 > 0.1**2)
    model = fed(norm(0.9), batches(50, size=32))
    recalibrate(model, seen)
    assert examine(model, seen)["0"].verdict == "healthy"


def test_a_model_in_training_mode_has_its_frozen_and_stale_layers_named_and_measured_as_in_training() -> None:
    model, data = trained(Net(), steps=300), batches(40, shift=3.0)
    model.a.eval()
    model.b.track_running_stats = False
    model.c.momentum = 0.0
    recorder = Recorder(model)
    with Unchanged(model, entirely=True):
        report = examine(model, data, num_batches=None)
    assert {name: set(modes) for name, modes in recorder.training.items()} == {"a": {False}, "b": {True}, "c": {True}}
    assert [report[name].verdict for name in "abc"] == ["frozen", "stale", "stale"]
    assert report["a"].needs_attention
    assert "frozen=True" in report["a"].remedy
    assert not {flag for layer in report.values() for flag in layer.flags}
    for name, layer in report.items():
        assert layer.summary()["eval_error"] == pytest.approx(
            error_in_eval(layers_of(model)[name], recorder[name]), rel=2e-2
        )


def test_layers_without_running_statistics_and_layers_that_are_not_reached() -> None:
    class Partly(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.one(self.a(x)))

    model = trained(Partly())
    model.a = nn.BatchNorm1d(C, track_running_stats=False)
    report = examine(model, batches(20))
    assert [report[name].verdict for name in "abc"] == ["no-running-stats", report["b"].verdict, "unused"]
    assert "It is not reached by any of these batches." in report["c"].explanation


def in_order(data: list[Tensor]) -> list[Tensor]:
    values = torch.cat(data)
    return list(values[values[:, 0].argsort()].split(len(data[0])))


def shuffled(data: list[Tensor]) -> list[Tensor]:
    return [data[index] for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("arranged", "verdict", "words"),
    [
        (in_order, "ordered-batches", "come in an order"),
        (lambda data: shuffled(in_order(data)), "grouped-batches", "resemble each other"),
        (list, "healthy", "fit what it receives"),
    ],
)
def test_the_order_and_the_making_of_batches_is_told(
    arranged: Callable[[list[Tensor]], list[Tensor]], verdict: str, words: str
) -> None:
    model, data = fed(norm(), batches(300)), batches(40, seed=6)
    report = examine(model, arranged(data), num_batches=None)
    assert report["0"].verdict == verdict
    assert words in report["0"].explanation
    assert any("what such batches have normalised" in remark for remark in report.remarks) == (verdict != "healthy")


@pytest.mark.parametrize("size", [2, 3])
def test_tiny_batches_are_told(size: int) -> None:
    layer = examine(fed(norm(), batches(300, size)), batches(60, size, seed=6))["0"]
    assert layer.verdict == "tiny-batch"
    assert layer.evidence["samples_per_batch"] == size


def test_a_small_last_batch_is_told_if_the_pass_came_to_it() -> None:
    epoch = [*batches(20), *batches(1, size=2)]
    model = fed(norm(0.4), 5 * epoch)
    layer = examine(model, epoch, num_batches=None)["0"]
    assert (layer.verdict, layer.flags, layer.needs_attention) == ("noisy", ("small-last-batch",), True)
    assert "drop_last=True" in layer.remedy
    # By hand: the last batch weighs 0.4, those before add up to 0.36 * 0.4 / 1.6 over 64 values.
    of_last, of_others = 0.4**2 * 1 / 2 + 0.6**2 * 0.25 / 64, 0.4**2 / 1 + 0.6**2 * 0.25 / 63
    assert layer.evidence["noise_error"] == pytest.approx((of_last + of_others / 2) ** 0.5, rel=0.2)
    stopped = examine(model, epoch, num_batches=20)["0"]
    assert stopped.flags == ()
    recalibrate(model, batches(100))
    fits = examine(model, epoch, num_batches=None)["0"]
    assert (fits.verdict, fits.flags, fits.needs_attention) == ("healthy", ("small-last-batch",), False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told_with_batch_and_channel(value: float) -> None:
    model, data = fed(norm(), batches(50)), batches(20)
    data[6][3, 1] = value
    with Unchanged(model, entirely=True):
        layer = examine(model, data, num_batches=None)["0"]
    assert layer.verdict == "non-finite"
    assert "first in batch 7 (counted from 1), channel 1" in layer.explanation
    mean, _ = moments(data)
    assert np.isnan(layer.population_mean.numpy()).tolist() == [False, True, False]
    np.testing.assert_allclose(layer.population_mean.numpy()[[0, 2]], mean[[0, 2]], rtol=1e-6)


def test_running_statistics_that_are_not_finite_are_told_and_repaired_by_what_is_printed() -> None:
    model, data = fed(norm(), batches(50)), batches(20)
    model[0].running_var[2] = torch.nan
    with Unchanged(model, entirely=True):
        layer = examine(model, data)["0"]
    assert (layer.verdict, layer.evidence["eval_error"]) == ("non-finite", float("inf"))
    assert "reset_running_stats" not in layer.remedy
    recalibrate(model, data)
    assert examine(model, data)["0"].verdict == "healthy"


class WithoutKernel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


class AroundKernel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_layer_whose_forward_runs_no_kernel_is_not_judged_and_one_that_does_is() -> None:
    model = nn.Sequential(AroundKernel(C), WithoutKernel(C), nn.Linear(C, 2))
    report = examine(model, batches(20, shift=4.0))
    assert report["0"].flags == ("never-updated",)
    assert report["1"].verdict == "own-forward"
    assert not report["1"].needs_attention


def test_calls_for_one_batch_that_differ_are_told() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2))
    pairs = [torch.stack([a, 3 * b]) for a, b in zip(batches(60), batches(60, seed=8), strict=True)]
    fed(model, [side for pair in pairs for side in pair])
    both = examine(model, pairs, forward=lambda model, pair: [model(side) for side in pair])["0"]
    assert "calls-differ" in both.flags
    assert both.needs_attention
    one = examine(model, [pair.flatten(0, 1) for pair in pairs])["0"]
    assert "calls-differ" not in one.flags


def test_one_layer_at_several_places_of_the_model_is_told_to_be_that() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) + 0.3)

    layer = examine(fed(Shared(), batches(300, shift=0.0)), batches(40, shift=0.0))["norm"]
    assert layer.evidence["calls_per_model_call"] == 2
    assert layer.flags == ("calls-differ",)
    assert "at several places" in layer.explanation


def test_weights_that_do_not_train_are_told_where_the_statistics_would_go_on() -> None:
    model = fed(norm(), batches(200))
    model[0].requires_grad_(False)
    assert examine(model, batches(40))["0"].flags == ("half-frozen",)
    assert examine(model.eval(), batches(40))["0"].flags == ()
    model.train().requires_grad_(False)
    assert examine(model, batches(40))["0"].flags == ()


class TestEvaluation:
    def test_data_that_differ_are_told(self) -> None:
        model, data = fed(Net(), batches(300)), batches(40, seed=6)
        recorder = Recorder(model)
        with Unchanged(model, entirely=True):
            report = examine(model, data, [x + 2 for x in data], num_batches=None)
        assert "domain-shift" in report["a"].flags
        assert report["a"].needs_attention
        assert "first BatchNorm layer" in report["a"].explanation
        assert recorder.training["a"] == [True] * 40 + [False] * 40
        for name, layer in report.items():
            received = recorder[name][40:]
            mean, _ = moments(received)
            np.testing.assert_allclose(layer.validation[0].numpy(), mean, rtol=1e-6, atol=1e-6)
            error = error_in_eval(layers_of(model)[name], received)
            assert layer.evidence["val_error"] == pytest.approx(error, rel=1e-2)

    def test_data_like_those_of_training_are_not(self) -> None:
        model = Net()
        model.drop = nn.Identity()
        report = examine(fed(model, batches(300)), batches(60, seed=6), batches(20, seed=7))
        assert not {flag for layer in report.values() for flag in layer.flags}
        assert all(layer.evidence["val_error"] < 0.2 for layer in report.values())
        assert not report.unhealthy

    def test_a_layer_that_only_they_reach(self) -> None:
        class Head(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.head = nn.BatchNorm1d(C), nn.BatchNorm1d(C)

            def forward(self, x: Tensor) -> Tensor:
                return self.first(x) if self.first.training else self.head(self.first(x) + 2)

        model = fed(Head(), batches(300))
        model.head.num_batches_tracked += 5
        layer = examine(model, batches(60), batches(20))["head"]
        assert (layer.verdict, layer.flags, layer.needs_attention) == ("unused", ("other-weights",), True)
        assert "The training data do not reach it" in layer.explanation

    def test_none_at_all_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="`evaluation` gave no batch"):
            examine(norm(), batches(9), [])

    def test_what_the_model_cannot_take_is_named(self) -> None:
        model = fed(norm(), batches(9))
        with (
            Unchanged(model, entirely=True),
            pytest.raises(RuntimeError, match=r"cannot take batch 1 of `evaluation`"),
        ):
            examine(model, batches(9), [*batches(1), torch.ones(4, C + 1)])


@pytest.mark.parametrize("num_batches", [0, -3, 2.0, "all", True])
def test_an_unknown_number_of_batches_is_an_error(num_batches: object) -> None:
    with pytest.raises(ValueError, match=r'`num_batches` must be a positive integer, "auto" or None, got'):
        examine(norm(), batches(3), num_batches=num_batches)


def test_too_few_batches_are_said_to_be_with_what_to_give() -> None:
    text = " ".join(str(examine(fed(norm(), batches(50)), batches(3))).split())
    assert "0: insufficient-data. From 3 batches chance and trouble cannot be told apart." in text
    assert "Give eight batches or more." in text
    assert "Give eight" not in str(examine(fed(norm(), batches(50)), batches(9)))


def test_no_batch_and_layers_that_are_not_there_are_errors() -> None:
    with pytest.raises(ValueError, match="`batches` gave no batch"):
        examine(norm(), [])
    with pytest.raises(ValueError, match="has not been initialised"):
        examine(nn.Sequential(nn.LazyBatchNorm1d()), batches(3))
    with pytest.raises(ValueError, match="matches no BatchNorm layer"):
        examine(norm(), batches(3), include="nothing")


def test_a_model_without_batchnorm_has_an_empty_report_and_the_data_are_left_alone() -> None:
    data = iter(batches(2))
    with pytest.warns(UserWarning, match="No BatchNorm layer to monitor in Linear"):
        report = examine(nn.Linear(C, 2), data)
    assert len(report) == 0
    assert len(list(data)) == 2


def test_include_and_exclude_choose_the_layers() -> None:
    model = trained(Net())
    assert list(examine(model, batches(9), include="[ab]", exclude="b")) == ["a"]


def test_calls_that_cannot_be_looked_at_are_told() -> None:
    class Flat(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    model = nn.Sequential(nn.BatchNorm1d(C), nn.Flatten(0), Flat(C))
    layer = examine(model, batches(9))["2"]
    assert layer.verdict == "unused"
    assert "9 calls could not be looked at" in layer.explanation


def test_the_report_says_at_its_end_what_one_pass_does_not_tell() -> None:
    report = examine(fed(norm(), batches(50)), batches(9))
    assert isinstance(report, Report)
    text = str(report)
    assert "9 batches with 576 samples were looked at" in text
    assert " ".join(text.split()).endswith("`BatchNormMonitor` in training tells.")
    assert all(remark in report.to_markdown() for remark in report.remarks)
    assert report._repr_html_().count("<p>") == 1 + len(report.remarks)
    assert report.to_dict()["remarks"] == list(report.remarks)
    assert report.brief(0).count("\n") == 0
    twin = copy.deepcopy(report)
    assert str(twin) == text


def test_a_loaders_own_generator_is_as_before() -> None:
    generator = torch.Generator().manual_seed(3)
    data = torch.cat(batches(9))
    loader = DataLoader(data, 64, shuffle=True, generator=generator)
    state = generator.get_state()
    examine(fed(norm(), batches(20)), loader, loader)
    assert torch.equal(generator.get_state(), state)
