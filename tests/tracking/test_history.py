"""What running statistics are made of, across windows."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report
from tests.tracking.small_models import C, Several, assert_population, feed, rms, saved_and_loaded

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


@pytest.mark.parametrize(
    ("momentum", "sizes"),
    [(0.01, "unequal batches"), (0.5, "unequal batches"), *itertools.product((0.1, None), SIZES)],
)
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
            assert layer.flags == (("small-last-batch",) if (momentum, sizes) == (0.5, "unequal batches") else ())
            tracker.reset()


@pytest.mark.slow
@pytest.mark.parametrize(  # with the number of batches, or without it, as converted weights are
    ("momentum", "counted"), [(0.01, True), (0.1, False), (0.5, True), (None, True), (None, False)]
)
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
            assert layer.flags == (("small-last-batch",) if momentum == 0.5 else ())
            tracker.reset()


@pytest.mark.parametrize("closed", [False, True], ids=["in mid-window", "between two windows"])
@pytest.mark.parametrize("momentum", [0.01, None])
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


class OfManyWidths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(width, momentum=None) for width in [1, 2, 3, 5, 8, 16, 64])

    def forward(self, size: int) -> None:
        for layer in self.layers:
            layer(torch.randn(size, layer.num_features) * 2 + 3)


@pytest.fixture(scope="module")
def trained() -> OfManyWidths:
    torch.manual_seed(0)
    model = OfManyWidths()
    for _ in range(400):
        model(64)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("num_batches", [8, 40])
@pytest.mark.parametrize("counted", [True, False], ids=["num_batches_tracked", "converted weights"])
@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1, None])
def test_short_windows_on_a_trained_model_give_no_false_alarm(
    trained: OfManyWidths, momentum: float | None, counted: bool, num_batches: int
) -> None:
    model = copy.deepcopy(trained)
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


@pytest.mark.slow
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
