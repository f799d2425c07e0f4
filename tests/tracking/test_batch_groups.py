"""Batches that are of groups (sources, domains): what each layer received of each, and how far that is from all."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report
from tests.compiling import by_wrapping, in_place, its_parts
from tests.promises.test_cost import Operations, bytes_held
from tests.tracking.grouped_batches import (
    C,
    Grouped,
    assert_groups,
    batches_of,
    drawn,
    grouped,
    noise_of,
    shift_of,
)
from tests.tracking.small_models import assert_same, moments, saved_and_loaded
from tests.tracking.test_interrupts import Interrupt


def layer(**options: bool) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(C, **options))


def feed(tracker: BatchNormTracker, model: nn.Module, batches: Grouped, flush: int = 0) -> LayerReport:
    """Call the model for each batch, and tell of its group; merge after every so many calls."""
    for call, (name, x) in enumerate(batches, start=1):
        tracker.see_inputs(x, group=name)
        model(x)
        tracker.step()
        if flush and call % flush == 0:
            tracker.flush()
    return next(iter(tracker.report().values()))


def tracked(batches: Grouped, flush: int = 0) -> LayerReport:
    model = layer()
    with BatchNormTracker(model) as tracker:
        return feed(tracker, model, batches, flush)


@pytest.mark.parametrize("flush", [0, 1, 7])
@pytest.mark.parametrize("num", [5, 16, 100])
def test_each_group_has_the_exact_moments_of_its_batches(num: int, flush: int) -> None:
    batches = grouped(drawn(num), {"b": 0.5})
    report = tracked(batches, flush)
    assert_groups(report, batches)
    for name, group in report.groups.items():
        assert group.shift == pytest.approx(shift_of(batches, name), rel=1e-4)


def test_their_noise_is_that_of_batches_within_groups() -> None:
    batches = grouped(drawn(100), {"b": 0.5})
    for name, group in tracked(batches).groups.items():
        assert group.noise == pytest.approx(noise_of(batches, name), rel=1e-4)


def test_the_group_that_differs_is_named_with_its_number() -> None:
    batches = grouped(drawn(90), {"b": 1.0})
    report = tracked(batches)
    assert report.verdict == "grouped-batches"
    assert report.evidence["groups"] == 3
    assert report.evidence["group_shift"] == report.groups["b"].shift == pytest.approx(shift_of(batches, "b"), rel=1e-4)
    assert report.evidence["group_noise"] == report.groups["b"].noise
    assert f"By group: 'b' is {report.groups['b'].shift:.3g} off all batches (chance explains" in report.explanation
    assert "ConcatDataset" in report.remedy
    assert report.needs_attention


def test_groups_that_can_be_exchanged_are_nothing_to_speak_of() -> None:
    report = tracked(grouped(drawn(90)))
    assert report.verdict == "healthy"
    assert report.evidence["group_shift"] < 3 * report.evidence["group_noise"]
    assert "By group" not in report.explanation


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_groups_that_come_one_after_another_are_not_told_from_weights_that_move(apart: float) -> None:
    names = ["a"] * 40 + ["b"] * 40
    report = tracked(grouped(names, {"b": apart}))
    assert "group_noise" not in report.evidence
    assert all(math.isnan(group.noise) for group in report.groups.values())
    if apart:  # that they differ is told by what the model was given
        assert report.verdict == "ordered-batches"
        assert "weights that have moved meanwhile may be a part of that" in report.explanation
    else:
        assert report.verdict == "healthy"


def test_batches_without_a_group_count_in_all_and_in_no_group() -> None:
    batches = grouped(drawn(60, "ab"), {"b": 1.0})
    model = layer()
    with BatchNormTracker(model) as tracker:
        for name, x in batches:
            tracker.see_inputs(x, group=None if name == "a" else name)
            model(x)
        report = tracker.report()["0"]
    assert list(report.groups) == ["b"]
    assert report.groups["b"].shift == pytest.approx(shift_of(batches, "b"), rel=1e-4)
    assert report.num_batches == 60


def test_one_group_alone_differs_from_nothing() -> None:
    report = tracked(grouped(["a"] * 30))
    assert math.isnan(report.groups["a"].shift)
    assert not report.evidence.keys() & {"groups", "group_shift", "group_noise"}


def test_without_groups_there_are_none() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        for _, x in grouped(drawn(30)):
            tracker.see_inputs(x)
            model(x)
        report = tracker.report()["0"]
    assert report.groups == {}
    assert "group_shift" not in report.evidence


def test_a_group_holds_until_its_step_ends() -> None:
    model, (one, two, three) = layer(), (x for _, x in grouped("abc"))
    with BatchNormTracker(model) as tracker:
        tracker.see_inputs(one, group="a")
        model(one)
        model(two)
        tracker.step()
        model(three)
        report = tracker.report()["0"]
    assert {name: group.num_batches for name, group in report.groups.items()} == {"a": 2}
    assert report.num_batches == 3


@pytest.mark.parametrize("by", ["nothing", "step", "optimizer"])
def test_several_batches_of_a_step_go_to_their_own_groups(by: str) -> None:
    """Source and target in a step, gradients accumulated over batches: whatever tells where a step ends."""
    model, batches = layer(), grouped("ab" * 30, {"b": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with BatchNormTracker(model) as tracker:
        for index, (name, x) in enumerate(batches):
            tracker.see_inputs(x, group=name)
            model(x).square().mean().backward()
            if by != "nothing" and index % 2:
                optimizer.step() if by == "optimizer" else tracker.step()
        report = tracker.report()["0"]
    assert_groups(report, batches)


def test_groups_do_not_hide_that_the_calls_of_a_step_differ() -> None:
    def run(*, with_groups: bool) -> LayerReport:
        model, batches = layer(), grouped("ab" * 30, {"b": 0.5})
        with BatchNormTracker(model) as tracker:
            for index, (name, x) in enumerate(batches):
                tracker.see_inputs(x, group=name if with_groups else None)
                model(x)
                if index % 2:
                    tracker.step()
            return tracker.report()["0"]

    alone, of_groups = run(with_groups=False), run(with_groups=True)
    assert "calls-differ" in alone.flags
    assert of_groups.flags == alone.flags
    assert of_groups.evidence["call_shift"] == alone.evidence["call_shift"]


def test_a_shared_layer_and_one_that_is_called_rarely_have_their_own_counts() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.rarely, self.never = nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.BatchNorm1d(C)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.twice(x) + self.twice(2 * x)
            return self.rarely(x) if self.calls % 3 == 0 else x

    model, batches = Shared(), grouped(drawn(60), {"b": 0.5})
    with BatchNormTracker(model) as tracker:
        feed(tracker, model, batches, flush=11)
        report = tracker.report()
    both = [(name, x) for name, batch in batches for x in (batch, 2 * batch)]
    assert_groups(report["twice"], both)
    calls = {name: sum(group == name for group, _ in batches[2::3]) for name in "abc"}
    assert {name: group.num_batches for name, group in report["rarely"].groups.items()} == calls
    assert report["never"].groups == {}


@pytest.mark.parametrize("kind", ["frozen", "channels-last", "half", "uneven", "far from zero", "checkpointed"])
def test_groups_are_exact_for_all_kinds_of_calls(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    model = nn.Sequential(nn.BatchNorm2d(C)).to(dtype)
    if kind == "frozen":
        model[0].eval()
    names, generator = drawn(50), torch.Generator().manual_seed(1)
    mean = 1000.0 if kind == "far from zero" else 0.0
    batches = []
    for index, name in enumerate(names):
        x = torch.randn(2 + index % 5 if kind == "uneven" else 4, C, 3, 3, generator=generator) + (name == "b") + mean
        x = x.to(dtype)
        batches.append((name, x.contiguous(memory_format=torch.channels_last) if kind == "channels-last" else x))
    with BatchNormTracker(model, capture="pass" if mean else "auto") as tracker:
        for name, x in batches:
            tracker.see_inputs(x, group=name)
            x = x.clone().requires_grad_()
            output = checkpoint(model, x, use_reentrant=False) if kind == "checkpointed" else model(x)
            output.float().square().mean().backward()
        report = tracker.report()["0"]
    assert_groups(report, batches)


def test_a_value_that_is_not_finite_spoils_one_channel() -> None:
    batches = grouped(drawn(40), {"b": 0.5})
    batches[7][1][3, 2] = math.nan
    report = tracked(batches)
    assert report.verdict == "non-finite"
    finite = [channel for channel in range(C) if channel != 2]
    for name, group in report.groups.items():
        mean, var = moments([x[:, finite] for x in batches_of(batches, name)])
        np.testing.assert_allclose(group.mean[finite].numpy(), mean, atol=1e-5)
        np.testing.assert_allclose(group.var[finite].numpy(), var, rtol=1e-5)
        assert group.mean[2].isnan()
        assert math.isfinite(group.shift)


def test_a_guarded_call_is_in_no_group() -> None:
    batches, model = grouped(drawn(40), {"b": 0.5}), layer()
    batches[7][1][3, 2] = math.nan
    with BatchNormTracker(model, guard=True) as tracker:
        report = feed(tracker, model, batches)
    assert_groups(report, [*batches[:7], *batches[8:]])


def test_from_the_ninth_on_groups_are_counted_together_and_that_is_said_once() -> None:
    names = [f"group {index}" for index in range(12)] * 4
    batches, model = grouped(names), layer()
    with BatchNormTracker(model) as tracker:
        with pytest.warns(UserWarning, match="more than 8 groups of batches: 'group 8' and all that follow") as caught:
            report = feed(tracker, model, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.reset()
            feed(tracker, model, batches)
    assert len(caught) == 1
    assert_groups(report, [(name if int(name[6:]) < 8 else "other", x) for name, x in batches])


def test_a_group_may_be_called_other() -> None:
    names = ["other", *(f"group {index}" for index in range(8))] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tracked(grouped(names))
    assert_groups(report, grouped(names))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (3, "3"),
        (0, "0"),
        (True, "True"),
        (2.5, "2.5"),
        (torch.tensor(7), "7"),
        (np.int64(4), "4"),
        (np.array("x"), "x"),
        ("", ""),
        ("Ünï/<b>&{x}", "Ünï/<b>&{x}"),
        ("a" * 100, "a" * 14 + "…" + "a" * 15),
        ("caf\udce9", "caf?"),  # as `os.fsdecode` reads a folder in another encoding: no file takes it
    ],
    ids=str,
)
def test_what_names_a_group(group: object, name: str) -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        tracker.see_inputs(torch.zeros(4, C), group=group)
        model(torch.randn(4, C))
        assert list(tracker.report()["0"].groups) == [name]


@pytest.mark.parametrize(
    ("group", "told"),
    [
        (["a", "b"], r"got a list.*return that of the first: `names\[0\]`"),
        (("a", "a"), "a tuple"),
        ({"a": 1}, "a dict"),
        (torch.zeros(4), r"Tensor of shape \(4,\)"),
        (np.zeros((2, 3)), r"ndarray of shape \(2, 3\)"),
        (torch.zeros((), device="meta"), "tensor on meta"),
    ],
    ids=str,
)
def test_what_names_none(group: object, told: str) -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        with pytest.raises(TypeError, match=told):
            tracker.see_inputs(torch.zeros(4, C), group=group)
        model(torch.randn(4, C))
        assert tracker.report()["0"].groups == {}


def test_names_are_text() -> None:
    names = ["<script>{x}</script>" if name == "b" else name for name in drawn(90)]
    model = layer()
    with BatchNormTracker(model) as tracker:
        feed(tracker, model, grouped(names, {"<script>{x}</script>": 1.0}))
        report = tracker.report()
    assert "'<script>{x}</script>' is" in report.brief().replace("\n  ", " ")
    assert "<script>" not in report._repr_html_()
    assert "<script>" not in report.to_markdown()


def test_each_window_has_groups_of_its_own() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        feed(tracker, model, grouped(drawn(30), {"b": 1.0}))
        tracker.reset()
        later = grouped(drawn(30, "xy"), seed=1)
        assert_groups(feed(tracker, model, later), later)
        tracker.reset()
        assert tracker.report()["0"].groups == {}


@pytest.mark.parametrize("flush", [0, 5])
def test_a_window_that_is_saved_and_resumed_is_one_that_was_not(flush: int) -> None:
    batches = grouped(drawn(80), {"b": 0.5})

    def run(*, interrupted: bool) -> Report:
        model = layer()
        tracker = BatchNormTracker(model).attach()
        feed(tracker, model, batches[:33], flush)
        if interrupted:
            state = saved_and_loaded(tracker.state_dict())
            tracker.detach()
            tracker = BatchNormTracker(model)
            tracker.load_state_dict(state)
            tracker.attach()
        feed(tracker, model, batches[33:], flush)
        return tracker.report()

    whole, resumed = run(interrupted=False), run(interrupted=True)
    assert whole["0"].groups.keys() == {"a", "b", "c"}
    assert_same(resumed, whole, 1e-9)


def test_what_is_saved_of_layers_that_have_changed_is_left_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C))
    batches = grouped(drawn(30), {"b": 0.5})
    with BatchNormTracker(model) as tracker:
        feed(tracker, model, batches)
        state = tracker.state_dict()
    other = nn.Sequential(nn.BatchNorm1d(C + 1), nn.BatchNorm1d(C))
    with BatchNormTracker(other) as tracker:
        with pytest.warns(UserWarning, match="left out"):
            tracker.load_state_dict(state)
        report = tracker.report()
    assert report["0"].groups == {}
    assert report["1"].groups.keys() == {"a", "b", "c"}


def test_what_counts_for_nothing_counts_for_no_group() -> None:
    model, batches = layer(), grouped(drawn(20))
    with BatchNormTracker(model) as tracker:
        with tracker.paused():
            feed(tracker, model, batches)
        model.eval()
        for name, x in batches:
            tracker.see_inputs(x, group=name)
            model(x)
        model.train()
        model(batches[0][1])  # was told of while nothing counted
        assert tracker.report()["0"].groups == {}
        assert tracker.report()["0"].num_batches == 1
        tracker.close()
        feed(tracker, model, batches)
        assert tracker.report()["0"].groups == {}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [by_wrapping, in_place, its_parts])
def test_compiled_layers_are_counted_by_group_in_no_more_graphs(compiled: Callable[..., nn.Module]) -> None:
    batches = grouped(drawn(40), {"b": 0.5})

    def run(*, with_groups: bool) -> tuple[LayerReport, int]:
        torch._dynamo.reset()
        counters.clear()
        model = compiled(layer(), backend="eager", fullgraph=True)
        with BatchNormTracker(model) as tracker:
            for name, x in batches:
                tracker.see_inputs(x, group=name if with_groups else None)
                model(x)
            (report,) = tracker.report().values()
        assert not counters["graph_break"]
        return report, counters["stats"]["unique_graphs"]

    (report, num_graphs), (_, expected) = run(with_groups=True), run(with_groups=False)
    assert report.evidence["calls_traced"] == 40
    assert_groups(report, batches)
    assert num_graphs == expected


def test_groups_cost_no_operation_but_in_merges_and_no_value_of_the_device() -> None:
    def operations(*, with_groups: bool) -> list[str]:
        model, batches = layer(), grouped(drawn(40))
        with BatchNormTracker(model) as tracker:
            tracker.see_inputs(())
            with Operations() as counted:
                for name, x in batches:
                    tracker.see_inputs((), group=name if with_groups else None)
                    model(x)
        return counted.names

    assert operations(with_groups=True) == operations(with_groups=False)


def test_a_few_operations_are_added_to_a_merge_however_many_layers() -> None:
    def operations(depth: int, *, with_groups: bool) -> list[str]:
        model, batches = nn.Sequential(*(nn.BatchNorm1d(C) for _ in range(depth))), grouped(drawn(40))
        with BatchNormTracker(model) as tracker:
            for name, x in batches:
                tracker.see_inputs((), group=name if with_groups else None)
                model(x)
            with Operations() as counted:
                tracker.flush()
        return counted.names

    added = [len(operations(depth, with_groups=True)) - len(operations(depth, with_groups=False)) for depth in (2, 12)]
    assert 0 < added[0] <= 80  # in a merge of 40 calls of each layer
    assert added[1] == added[0]
    forbidden = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
    names = operations(2, with_groups=True)
    assert not [name for name in names if any(name.split(".")[1].startswith(word) for word in forbidden)]


def test_training_steps_do_without_the_values_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bnmonitor.capture.layer_hook.is_abstract", lambda x: False)  # that would skip them
    model = layer()
    with BatchNormTracker(model) as tracker:
        model.to("meta")  # a device that raises if a value is copied from it
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for name in drawn(200):
            tracker.see_inputs((), group=name)
            model(torch.randn(4, C, device="meta")).square().mean().backward()
            optimizer.step()
        (rows,) = tracker._recorder.windows.groups._rows.values()
    assert rows.is_meta
    assert rows.shape == (2, 3, 2, C)


def test_thirty_two_bytes_a_channel_and_group_are_kept() -> None:
    def bytes_of(names: list[str]) -> int:
        model = layer()
        with BatchNormTracker(model) as tracker:
            for name, x in grouped(names or ["a"] * 60):
                tracker.see_inputs((), group=name if names else None)
                model(x)
            tracker.flush()
            return bytes_held(tracker)

    assert bytes_of(drawn(60, "abcde")) - bytes_of([]) == 32 * 5 * C + 2 * 5 * 8  # and two counts of each


@pytest.mark.slow
def test_an_interrupt_within_a_merge_loses_and_doubles_nothing() -> None:
    batches, num_interrupts = grouped(drawn(12), {"b": 0.5}), 0
    expected = tracked(batches).groups
    for first in itertools.count(1, 5):
        model = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C).eval())
        with BatchNormTracker(model) as tracker:
            for name, x in batches:
                tracker.see_inputs((), group=name)
                model(x)
            interrupted = False
            try:
                with Interrupt(first):
                    tracker.flush()
            except KeyboardInterrupt:
                interrupted = True
            num_interrupts += interrupted
            found = tracker.report()["0"].groups
        assert found.keys() == expected.keys()
        for name, group in found.items():
            assert group.num_batches == expected[name].num_batches
            torch.testing.assert_close(group.mean, expected[name].mean)
        if not interrupted:
            break
    assert num_interrupts > 20


def test_training_is_the_same_to_the_bit() -> None:
    def trained(*, is_monitored: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = BatchNormTracker(model)
        for name, x in grouped(drawn(40)):
            if is_monitored:
                tracker.attach()
                tracker.see_inputs(x, group=name)
            optimizer.zero_grad()
            model(x + 0.1 * torch.randn(C)).square().mean().backward()
            optimizer.step()
        assert not is_monitored or len(tracker.report()["1"].groups) == 3
        return [*model.state_dict().values(), torch.rand(3)]

    for one, other in zip(trained(is_monitored=False), trained(is_monitored=True), strict=True):
        assert torch.equal(one, other)
