"""Windows begin and end: what is called in between belongs to neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker, Report
from tests.tracking.small_models import C, assert_population, feed, network


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
