"""Windows of few batches: their metrics are their own, and they are judged together with those before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker, LayerReport, recalibrate

C = 6


def batches(num: int, seed: int = 0, offset: float = 2.0, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [offset + torch.randn(size, C, generator=generator) for _ in range(num)]


class Monitored:
    def __init__(self, momentum: float | None = 0.05) -> None:
        self.model = nn.Sequential(nn.BatchNorm1d(C, momentum=momentum))
        self.tracker = BatchNormTracker(self.model).attach()

    def window(self, data: list[Tensor]) -> LayerReport:
        self.tracker.reset()
        for x in data:
            self.model(x)
        return self.tracker.close()["0"]


JUDGEMENT = (
    *("batches", "degrees_of_freedom", "noise_error", "warmup_error", "lag_error", "initial_weight", "z_mean", "z_var"),
    *(
        "reference_error",
        "initial_distance",
        "least_error",
        "now_error",
        "drift_per_batch",
        "jitter",
        "samples_per_batch",
    ),
)


@pytest.mark.parametrize("lengths", [[5, 5], [3, 2, 4], [1] * 8, [20, 2, 7]])
def test_the_judgement_is_that_of_one_window_and_the_metrics_are_those_of_the_last(lengths: list[int]) -> None:
    parts, one, several = [batches(num, seed) for seed, num in enumerate(lengths)], Monitored(), Monitored()
    *_, apart = [several.window(part) for part in parts]
    num_windows = int(apart.evidence["windows"])
    for part in parts[:-num_windows]:
        one.window(part)
    together = one.window([x for part in parts[-num_windows:] for x in part])
    for name in JUDGEMENT:
        assert apart.evidence[name] == pytest.approx(together.evidence[name], rel=1e-6, abs=1e-9), name
    assert apart.evidence["batches_before"] == sum(lengths[-num_windows:-1])
    assert (apart.verdict, apart.flags) == (together.verdict, together.flags)
    last = torch.cat(parts[-1]).double()
    assert (apart.num_batches, apart.num_samples) == (len(parts[-1]), len(last))
    np.testing.assert_allclose(apart.population_mean, last.mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(apart.population_var, last.var(dim=0), rtol=1e-6)


def test_no_more_windows_are_taken_together_than_it_takes() -> None:
    one = Monitored()
    windows = [
        one.window(batches(num, seed)).evidence.get("windows", 1) for seed, num in enumerate([5, 5, 5, 2, 9, 2, 3])
    ]
    assert windows == [1, 2, 2, 3, 1, 1, 2]


def test_a_long_window_is_judged_alone() -> None:
    alone, after = Monitored(), Monitored()
    for one in (alone, after):
        one.window(batches(5))
    after.tracker._recorder.layers[0].earlier = ()
    left, right = (one.window(batches(8, 1)) for one in (alone, after))
    assert left.evidence == right.evidence
    assert "windows" not in left.evidence


def test_a_window_without_a_batch_is_left_out() -> None:
    one = Monitored()
    one.window(batches(5))
    assert one.window([]).verdict == "unused"
    assert one.window(batches(5, 1)).evidence["windows"] == 2


def test_nothing_goes_on_from_statistics_that_something_else_has_written() -> None:
    one = Monitored()
    one.window(batches(5))
    one.model[0].running_mean.add_(1)
    report = one.window(batches(5, 1))
    assert "written-outside" in report.flags
    assert "windows" not in report.evidence
    assert one.window(batches(5, 2)).evidence["windows"] == 2


@pytest.mark.parametrize("in_mid_window", [True, False])
def test_nothing_goes_on_from_statistics_that_were_recalibrated(in_mid_window: bool) -> None:
    one = Monitored()
    one.window(batches(5))
    if in_mid_window:
        one.tracker.reset()
        recalibrate(one.model, batches(20, 3))
        for x in batches(3, 1):
            one.model(x)
        report = one.tracker.close()["0"]
    else:
        recalibrate(one.model, batches(20, 3))
        report = one.window(batches(3, 1))
    assert "windows" not in report.evidence
    assert report.verdict == "insufficient-data"


def test_a_window_with_a_value_that_is_not_finite_ends_the_row() -> None:
    one = Monitored()
    one.window(batches(3))
    one.window([torch.full((4, C), torch.nan)])
    one.tracker.reset()
    assert one.tracker._recorder.layers[0].earlier == ()
    one.model[0].reset_running_stats()
    assert "windows" not in one.window(batches(3, 2)).evidence


@pytest.mark.parametrize("seen", [0, 2])
def test_a_resumed_run_judges_as_one_that_was_not_interrupted(seen: int, tmp_path) -> None:
    def finish(one: Monitored) -> LayerReport:
        for x in batches(4, 2)[seen:]:
            one.model(x)
        return one.tracker.close()["0"]

    one = Monitored()
    one.window(batches(3))
    one.window(batches(2, 1))
    one.tracker.reset()
    for x in batches(4, 2)[:seen]:
        one.model(x)
    torch.save({"model": one.model.state_dict(), "tracker": one.tracker.state_dict()}, tmp_path / "state.pt")
    other = Monitored()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.model.load_state_dict(saved["model"])
    other.tracker.load_state_dict(saved["tracker"])
    expected, resumed = finish(one), finish(other)
    assert expected.evidence["windows"] == 3
    assert resumed.evidence == expected.evidence


def test_a_copy_of_a_tracker_goes_on_by_itself() -> None:
    one = Monitored()
    one.window(batches(5))
    one.tracker.reset()
    model, tracker = copy.deepcopy((one.model, one.tracker))
    tracker.attach()
    for x in batches(5, 1):
        model(x)
    assert tracker.close()["0"].evidence["windows"] == 2


def test_calls_that_update_nothing_are_counted_in_the_last_window_alone() -> None:
    one = Monitored()
    one.window(batches(5))
    assert "calls_not_updating" not in one.window(batches(5, 1)).evidence


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_what_is_certain_is_said_at_the_first_batch(momentum: float) -> None:
    report = Monitored(momentum).window(batches(1))
    assert report.verdict == "warming-up"
    assert report.needs_attention
    assert Monitored(momentum).window(batches(1, offset=0.0)).verdict == "insufficient-data"


def test_the_explanation_begins_with_how_many_windows_it_rests_on() -> None:
    one = Monitored(0.01)
    first, second = one.window(batches(5)), one.window(batches(5, 1))
    assert "windows:" not in first.explanation
    assert second.explanation.startswith("0: warming-up. Over the last 2 windows: the initial zeros and ones")
