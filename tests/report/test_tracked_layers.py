"""Reports of layers that were really tracked, against all the values that they received."""

import json
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from tests.report.made_reports import INF, NAN, Branches, branches_report, decoded, tracked
from tests.report.read_tables import FORMS, text_rows


def test_to_dict_of_tracked_layers_is_strict_json():
    read = json.loads(json.dumps(branches_report().to_dict(), allow_nan=False))
    assert list(read["layers"]) == ["early", "late", "nothing_kept", "never"]
    assert read["layers"]["early"]["evidence"]["calls_saved"] == 8


def test_a_cumulative_average_is_reported_as_momentum_none():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None))
    report = tracked(model, torch.randn(4, 8, 3))
    assert report["0"].momentum is None
    assert report.to_dict()["layers"]["0"]["momentum"] is None
    assert report["0"].num_batches == 4
    # A cumulative average of equal batches is the exact mean: nothing is wrong but the buffers' own rounding.
    assert report["0"].summary()["mean_shift"] < 1e-6


# ----------------------------------------------------------------------------------------------------- from real layers


@pytest.mark.parametrize(
    ("shape", "verdict"),
    [
        # The initial values have a third of the weight in the buffers. That is known exactly, however few the batches,
        ((16, 3), "warming-up"),
        ((8, 3, 5), "warming-up"),
        # but not how far off that makes them, from so few samples.
        ((4, 3, 5, 2), "insufficient-data"),
        ((2, 3, 4, 2, 2), "insufficient-data"),
    ],
)
def test_a_tracked_layers_report_is_that_of_all_its_values(shape, verdict):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, eps=1e-3, momentum=0.2))
    batches = [torch.randn(shape) * 3 + 1 + 0.1 * step for step in range(5)]
    report = tracked(model, batches)["0"]

    x = np.concatenate([np.moveaxis(batch.double().numpy(), 1, 0).reshape(3, -1) for batch in batches], axis=1)
    running_mean, running_var = (b.double().numpy() for b in (model[0].running_mean, model[0].running_var))
    assert (report.name, report.type, report.num_features) == ("0", kind.__name__, 3)
    assert (report.eps, report.momentum, report.num_batches, report.num_samples) == (1e-3, 0.2, 5, x.shape[1])
    np.testing.assert_allclose(report.population_mean, x.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(report.population_var, x.var(axis=1, ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(report.running_mean, running_mean)
    np.testing.assert_array_equal(report.running_var, running_var)
    std = np.sqrt(x.var(axis=1, ddof=1) + 1e-3)
    error = (x.T - running_mean) / np.sqrt(running_var + 1e-3) - (x.T - x.mean(axis=1)) / std
    rmse = np.sqrt(error.var(axis=0, ddof=1) + error.mean(axis=0) ** 2)
    np.testing.assert_allclose(report.act_rmse, rmse, rtol=1e-5)
    now_mean, now_var = report.now_mean.numpy(), report.now_var.numpy()
    gain_error = np.sqrt(now_var) * (1 / np.sqrt(running_var + 1e-3) - 1 / np.sqrt(now_var + 1e-3))
    offset = (now_mean - running_mean) / np.sqrt(running_var + 1e-3)
    np.testing.assert_allclose(report.eval_error, np.hypot(gain_error, offset), rtol=1e-5)
    np.testing.assert_allclose(report.mean_shift, (running_mean - x.mean(axis=1)) / std, rtol=1e-5, atol=1e-6)
    expected = {
        "calls_saved": 5.0,
        "calls_traced": 0.0,
        "calls_pass": 0.0,
        "calls_skipped": 0.0,
        "updates_per_call": 1.0,
        "dead_channels": 0.0,
        "non_finite_channels": 0.0,
        "non_finite_running_stats": 0.0,
        "num_features": 3.0,
        "momentum": 0.2,
        "effective_momentum": 0.2,
        "batches": 5.0,
        "batch_size": shape[0],
        "samples_per_batch": x.shape[1] / 5,
    }
    assert {key: report.evidence[key] for key in expected} == expected
    assert report.evidence["initial_weight"] == pytest.approx(0.8**5)
    assert report.verdict == verdict


def test_the_present_statistics_of_a_single_batch_are_the_populations():
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(64, 3)])["0"]
    np.testing.assert_array_equal(report.now_mean, report.population_mean)
    np.testing.assert_array_equal(report.now_var, report.population_var)


def test_the_present_statistics_are_those_at_the_end_of_the_window_and_not_of_all_of_it():
    torch.manual_seed(0)
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(256, 3) + 0.1 * step for step in range(40)])["0"]
    np.testing.assert_allclose(report.now_mean, 3.95, atol=0.2)  # half a batch after the last one
    np.testing.assert_allclose(report.now_var, 1, atol=0.2)
    np.testing.assert_allclose(report.population_mean, 1.95, atol=0.1)
    np.testing.assert_allclose(report.population_var, 1 + 0.1**2 * 1600 / 12, atol=0.1)


def test_z_says_how_far_running_statistics_are_off_by_more_than_chance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(200))
    report = tracked(model, torch.randn(64, 16, 200))["0"]
    for z in (report.z_mean, report.z_var):
        assert z.square().mean().sqrt() == pytest.approx(1, abs=0.15)
    assert report.evidence["z_mean"] == pytest.approx(report.z_mean.square().mean().sqrt().item(), rel=1e-9)
    assert report.evidence["z_var"] == pytest.approx(report.z_var.square().mean().sqrt().item(), rel=1e-9)


def test_a_report_before_any_batch_is_one_of_an_empty_window():
    model = Branches()
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert list(report) == ["never", "late", "early", "nothing_kept"]
    assert report.summary() == {"unhealthy_layers": 0.0}
    for name, one in report.items():
        assert one.verdict == "unused"
        assert (one.num_batches, one.num_samples) == (0, 0)
        assert one.population_mean.isnan().all()
        assert one.population_mean.shape == (getattr(model, name).num_features,)
        assert "updates_per_call" not in one.evidence
    assert all(name in form(report) for name in report for form in FORMS.values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_report_of_a_tracker_that_was_never_attached_is_empty():
    assert len(BatchNormTracker(Branches()).report()) == 0


def test_a_lazy_layer_that_was_not_called_is_reported_without_channels():
    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm1d()})
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert report["lazy"].num_features == 0
    assert all(math.isnan(value) for value in report["lazy"].summary().values())
    assert report.summary() == {"unhealthy_layers": 0.0}
    assert all("lazy" in form(report) for form in FORMS.values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_that_is_itself_a_layer_is_named_root():
    assert list(tracked(nn.BatchNorm1d(3), [torch.randn(8, 3)])) == ["(root)"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_report_does_not_change_when_training_goes_on(dtype):
    model = nn.Sequential(nn.BatchNorm1d(3, dtype=dtype))
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 3, dtype=dtype))
        report = tracker.report()
        before = report.to_dict()
        model(torch.randn(8, 3, dtype=dtype) + 5)
        tracker.reset()
        model[0].reset_running_stats()
        assert report.to_dict() == before
        assert tracker.report().to_dict() != before


def test_a_value_that_is_not_finite_costs_only_its_own_channel():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3) for _ in range(4)]
    batches[2][5, 1] = NAN
    model = nn.Sequential(nn.BatchNorm1d(3))
    report = tracked(model, batches)["0"]
    assert report.population_mean.isnan().tolist() == [False, True, False]
    x = torch.cat(batches).double()[:, [0, 2]]
    np.testing.assert_allclose(report.population_mean[[0, 2]], x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(report.population_var[[0, 2]], x.var(0), rtol=1e-5)
    assert report.eval_error[1] == INF  # the value is in the running statistics, too
    assert report.evidence["non_finite_channels"] == 1


def test_a_constant_channel_is_counted_as_dead():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3) * torch.tensor([1.0, 0.0, 1.0]) + 2 for _ in range(4)]
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), batches)["0"]
    assert report.evidence["dead_channels"] == 1
    assert report.log_var_ratio.isnan().tolist() == [False, True, False]
    assert report.eval_error.isfinite().all()


class Zoo(nn.Module):
    """Layers of unequal widths in every condition, each fed its own values."""

    WIDTHS: ClassVar[dict[str, int]] = {
        **{"plain": 7, "single": 1, "wide": 33, "frozen": 5, "no_stats": 4, "never": 6, "never_broken": 3},
        **{"broken": 9, "bad_input": 8, "both": 5, "dead": 12, "cumulative": 2, "still": 3, "trained": 11},
    }

    def __init__(self) -> None:
        super().__init__()
        for name, width in self.WIDTHS.items():
            self.add_module(name, nn.BatchNorm1d(width, track_running_stats=name != "no_stats", eps=1e-3))
        self.wide.momentum, self.cumulative.momentum, self.still.momentum = 0.5, None, 0.0
        for frozen in (self.frozen, self.trained):
            frozen.running_mean += 0.3
        self.frozen.eval()
        self.trained.num_batches_tracked += 1000
        self.broken.running_mean[[2, 7]] = NAN
        self.broken.running_var[[2, 5]] = torch.tensor([INF, NAN])
        self.never_broken.running_var[1] = INF
        self.both.running_mean[1] = -INF

    def forward(self, batches: Mapping[str, torch.Tensor]) -> None:
        for name, x in batches.items():
            getattr(self, name)(x)


def zoo_data(num_batches: int) -> dict[str, np.ndarray]:
    """What each layer of the zoo receives, ``(batches, 16, C)``, with values that are not finite and dead channels."""
    rng = np.random.default_rng(0)
    data = {}
    for name, width in Zoo.WIDTHS.items():
        if not name.startswith("never"):
            scale = np.array([2e-3, 5e-4, 0, 1])[:width] if name == "dead" else rng.uniform(0.5, 2, width)
            scale = np.resize(scale, width)
            shift = rng.normal(size=width) + 0.01 * np.arange(num_batches)[:, None, None] * (name == "plain")
            data[name] = (rng.normal(size=(num_batches, 16, width)) * scale + shift).astype(np.float32)
    data["bad_input"][3, 2, 6], data["bad_input"][1, 5, [0, 6]] = NAN, INF
    data["both"][num_batches - 1, 0, [1, 3]] = [1, -INF]
    return data


@pytest.mark.parametrize("num_batches", [4, 40])
def test_what_the_tracker_computes_for_all_layers_at_once_is_what_each_layers_tensors_say(num_batches):
    model, data = Zoo(), zoo_data(num_batches)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(num_batches)])
    assert set(report) == set(Zoo.WIDTHS)
    for name, summary in report.layer_summaries().items():
        one, evidence = report[name], report[name].evidence
        for metric, value in one.summary().items():
            assert summary[metric] == pytest.approx(value, rel=1e-9, abs=1e-15, nan_ok=True), (name, metric)
            assert evidence.get(metric, NAN) == pytest.approx(value, rel=1e-9, abs=1e-15, nan_ok=True), (name, metric)
            assert (metric in evidence) == (not math.isnan(value)), (name, metric)
    infinite = {name for name, summary in report.layer_summaries().items() if summary["eval_error"] == INF}
    assert infinite == {"broken", "bad_input", "both"}
    without = {name for name, summary in report.layer_summaries().items() if math.isnan(summary["eval_error"])}
    assert without == {"no_stats", "never", "never_broken"}


def test_layers_that_are_not_called_in_a_later_window_are_summarised_as_their_tensors_say():
    model, data = Zoo(), zoo_data(20)
    with BatchNormTracker(model) as tracker:
        for name, x in data.items():
            model({name: torch.from_numpy(x[0])})
        tracker.reset()
        for t in range(20):
            model({"plain": torch.from_numpy(data["plain"][t])})
        report = tracker.report()
    assert {name for name, one in report.items() if one.num_batches} == {"plain"}
    for name, summary in report.layer_summaries().items():
        assert summary == pytest.approx(report[name].summary(), rel=1e-9, abs=1e-15, nan_ok=True), name
        assert math.isnan(summary["eval_error"]) == (name != "plain")
    broken = {"broken", "both", "never_broken"}
    assert {name for name, one in report.items() if one.verdict == "non-finite"} == broken


@pytest.mark.parametrize("num_batches", [4, 40])
def test_dead_and_non_finite_channels_are_counted_as_a_look_at_all_values_counts_them(num_batches):
    model, data = Zoo(), zoo_data(num_batches)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(num_batches)])
    for name, width in Zoo.WIDTHS.items():
        x = data[name].reshape(-1, width).astype(float) if name in data else None
        bad_input = np.zeros(width, bool) if x is None else ~np.isfinite(x).all(axis=0)
        bad_stats = np.zeros(width, bool)
        if name != "no_stats":
            module = getattr(model, name)
            bad_stats = ~(np.isfinite(module.running_mean.numpy()) & np.isfinite(module.running_var.numpy()))
        dead = 0
        if x is not None:
            with np.errstate(invalid="ignore"):
                dead = int((x.var(axis=0, ddof=1) <= 1e-6).sum())
        evidence = report[name].evidence
        found = [evidence[key] for key in ("dead_channels", "non_finite_channels", "non_finite_running_stats")]
        assert found == [dead, (bad_input | bad_stats).sum(), bad_stats.sum()], name
        assert (report[name].verdict == "non-finite") == (bad_input | bad_stats).any(), name
        assert ("dead-channels" in report[name].flags) == bool(dead), name
        assert evidence["num_features"] == report[name].num_features == width
    assert report["dead"].evidence["dead_channels"] == 6
    assert report["bad_input"].evidence["non_finite_channels"] == 2
    assert report["bad_input"].evidence["first_bad_batch"] == 2
    assert report["bad_input"].evidence["first_bad_channel"] == 0
    assert report["both"].evidence["first_bad_batch"] == num_batches
    assert report["both"].evidence["first_bad_channel"] == 3
    assert "first_bad_batch" not in report["broken"].evidence


def test_the_variance_of_a_single_value_is_not_counted_as_non_finite():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].eval()
    report = tracked(model, [torch.randn(1, 3)])["0"]
    assert report.population_var.isnan().all()
    assert report.evidence["non_finite_channels"] == 0
    assert report.verdict == "frozen"


def test_every_form_of_a_zoo_is_strict_json_or_text():
    model, data = Zoo(), zoo_data(20)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(20)])
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(read["layers"]) == list(report)
    for name, values in read["layers"].items():
        np.testing.assert_array_equal(decoded(values["now_var"]), report[name].now_var, err_msg=name)
        assert {key: decoded(value) for key, value in values["evidence"].items()} == report[name].evidence
    assert len(text_rows(str(report))) == len(Zoo.WIDTHS)
    assert all(name in form(report) for name in report for form in FORMS.values())
