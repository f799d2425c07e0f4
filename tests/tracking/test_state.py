"""What a tracker saves, and how it goes on from there."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, Report
from tests.tracking.small_models import (
    C,
    Nested,
    Several,
    assert_alike,
    assert_population,
    assert_same,
    feed,
    network,
    rms,
    saved_and_loaded,
)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "restarted", "dtype"),
    [(0, True, torch.float32), (1, True, torch.float32), (1, False, torch.float64)],
    ids=["first window, in another process", "second, in another process", "second, loaded into itself"],
)
@pytest.mark.parametrize("moment", ["in mid-window", "at its end", "when closed", "after validation", "when begun"])
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


def test_a_state_of_version_0_5_is_gone_on_from() -> None:
    its, model = torch.randn(20, 8, 4), network()
    with BatchNormTracker(model) as tracker:
        for x in its[:11]:
            model(x)
        state = tracker.state_dict()
    del state["groups"], state["paddings"]
    for layer in (*state["layers"], *state["not_called"]):
        del layer["left_out"]
    resumed = BatchNormTracker(model, mask=lambda batch: torch.ones(8, dtype=torch.bool), guard=True)
    resumed.load_state_dict(state)
    with resumed:
        for x in its[11:]:
            resumed.see_inputs(x, group="a")
            model(x)
            resumed.step()
        layer = resumed.close()["1"]
    assert layer.num_batches == 20
    assert layer.flags == ()
    assert layer.groups["a"].num_batches == layer.evidence["padding_batches"] == 9


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": "2", "channels": None, "layers": []}], ids=str)
def test_a_state_of_another_version_is_an_error_that_says_which(state: dict[str, Any]) -> None:
    model = network()
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 4))
        with pytest.raises(ValueError, match=f"version 8; got version {state.get('version')!r}"):
            tracker.load_state_dict(state)
    assert tracker.report()["1"].num_batches == 1


@pytest.mark.slow
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


def test_the_state_of_another_rank_is_history_alone():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    with BatchNormTracker(layer) as tracker:
        for _ in range(10):
            layer(torch.randn(8, 3))
        state = tracker.state_dict()
        assert state["rank"] == 0
        tracker.load_state_dict(state | {"rank": 1})
        assert tracker.report()["(root)"].verdict == "unused"
        for _ in range(30):
            layer(torch.randn(8, 3))
        report = tracker.report()["(root)"]
        assert (report.num_batches, report.num_samples, report.verdict, report.flags) == (30, 240, "healthy", ())
        assert report.evidence["updates_per_call"] == 1
        tracker.reset()
        layer(torch.randn(8, 3))
        assert tracker.report()["(root)"].flags == ()


def test_of_the_window_that_had_ended_on_another_rank_nothing_counts():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    with BatchNormTracker(layer) as tracker:
        for _ in range(30):
            layer(torch.randn(8, 3))
        tracker.close()
        tracker.load_state_dict(tracker.state_dict() | {"rank": 1})
        closed = tracker.report()["(root)"]
        assert (closed.num_batches, closed.num_samples, closed.verdict, closed.flags) == (0, 0, "unused", ())
        torch.testing.assert_close(closed.running_mean, layer.running_mean.double(), rtol=0, atol=0)
        tracker.reset()
        for _ in range(30):
            layer(torch.randn(8, 3))
        report = tracker.report()["(root)"]
        assert (report.num_batches, report.verdict, report.flags) == (30, "healthy", ())


def test_that_a_layer_not_called_yet_was_written_from_outside_survives_a_restart():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        tracker.close()
        model[0].running_mean += 1
        tracker.reset()
        assert tracker.report()["0"].flags == ("written-outside",)
    other = BatchNormTracker(model)
    other.load_state_dict(tracker.state_dict())
    with other:
        assert other.report()["0"].flags == ("written-outside",)


def test_a_write_after_a_window_without_calls_is_noticed_in_spite_of_a_restart():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        tracker.close()
    other = BatchNormTracker(model)
    other.load_state_dict(tracker.state_dict())
    with other:
        model[0].running_mean += 1
        other.reset()
        assert other.report()["0"].flags == ("written-outside",)


def test_a_closed_report_of_a_layer_not_called_survives_a_restart():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        report = tracker.close()
        model[0].running_mean += 1
    other = BatchNormTracker(model)
    other.load_state_dict(tracker.state_dict())
    with other:
        assert other.report().to_dict() == report.to_dict()
