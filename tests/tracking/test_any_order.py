"""Laws that hold for any sequence of what may happen, against a reference that keeps every value it was given."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn

from lightning_bnmonitor import BatchNormTracker, ChannelMoments
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from lightning_bnmonitor.statistics.moments import _merge_states
from lightning_bnmonitor.statistics.segments import Segments
from lightning_bnmonitor.tracking.collectives import Share, together

LAW = settings(max_examples=200, deadline=None)
SHAPES = {"a": (3,), "b": (2, 3), "c": (2, 2, 2)}  # of a sample
MOMENTA = [0.1, 0.5, 0.0, None]
SEEDS = st.integers(0, 2**32 - 1)


class Network(nn.Module):
    """Three layers, each of which is given its own input."""

    def __init__(self, dtype: torch.dtype, options: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        kinds = {"a": nn.BatchNorm1d, "b": nn.BatchNorm1d, "c": nn.BatchNorm2d}
        self.layers = nn.ModuleDict(
            {name: kind(SHAPES[name][0], dtype=dtype, **options.get(name, {})) for name, kind in kinds.items()}
        )

    def forward(self, inputs: list[tuple[str, torch.Tensor]], fails: bool = False) -> list[torch.Tensor]:
        outputs = [self.layers[name](x) for name, x in inputs]
        if fails:
            raise ZeroDivisionError
        return outputs


def rows(x):
    array = x.detach().double().numpy()
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def two_pass(values):
    """Mean and unbiased variance of ``(n, C)``, NaN where there are not enough values."""
    missing = np.full(values.shape[1], np.nan)
    mean = values.sum(axis=0) / len(values) if len(values) else missing
    return mean, np.square(values - mean).sum(axis=0) / (len(values) - 1) if len(values) > 1 else missing


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_alike(one, other, bound=1e-12, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], bound, f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, bound, f"{where}[{i}]")
    elif isinstance(one, float):
        assert (
            one == other or math.isclose(one, other, rel_tol=bound, abs_tol=bound) or (one != one and other != other)
        ), (
            where,
            one,
            other,
        )
    else:
        assert one == other, where


# --- merges -----------------------------------------------------------------------------------------------------------


@st.composite
def ragged_metrics(draw):
    """Metrics, some of them empty, each with the values of its channels, of which there may be unequal numbers."""
    loc, rng = draw(st.sampled_from([0.0, -100.0, 1e4])), np.random.default_rng(draw(SEEDS))
    metrics = []
    for kinds in draw(st.lists(st.lists(st.sampled_from(["values", "moments"]), max_size=3), min_size=1, max_size=7)):
        metric, values = ChannelMoments(2), [np.empty(0), np.empty(0)]
        for kind in kinds:
            counts = [draw(st.integers(0, 5)) for _ in range(2)] if kind == "moments" else [draw(st.integers(0, 5))] * 2
            added = [rng.normal(loc, 1.0, count) for count in counts]
            if kind == "values":
                metric.update(torch.from_numpy(np.stack(added, axis=1)))
            else:
                mean = [x.mean() if len(x) else math.nan for x in added]
                m2 = [np.square(x - m).sum() for x, m in zip(added, mean, strict=True)]
                metric.update_moments(torch.tensor(counts), *map(torch.tensor, (mean, m2)))
            values = [np.concatenate(pair) for pair in zip(values, added, strict=True)]
        metrics.append((metric, values))
    return metrics


def assert_metric(metric, values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics: nothing was updated, but only merged
        count, mean, var = (field.numpy() for field in metric.compute())
    for channel, x in enumerate(values):
        exact_mean, exact_var = two_pass(x[:, None])
        assert count[channel] == len(x)
        np.testing.assert_allclose(mean[channel : channel + 1], exact_mean, rtol=1e-14, atol=1e-13)
        np.testing.assert_allclose(var[channel : channel + 1], exact_var, rtol=1e-9, atol=1e-16)


@LAW
@given(data=st.data(), metrics=ragged_metrics())
def test_metrics_whose_channels_have_unequal_counts_are_merged_in_any_tree_or_at_once(data, metrics):
    states = torch.stack([metric.state for metric, _ in metrics])
    at_once = ChannelMoments(2)
    at_once.state = _merge_states(states)  # what torchmetrics does with those of several ranks
    everything = [np.concatenate(channel) for channel in zip(*(values for _, values in metrics), strict=True)]
    assert_metric(at_once, everything)
    while len(metrics) > 1:
        i, j = data.draw(st.permutations(range(len(metrics))))[:2]
        metrics[i][0].merge_state(metrics[j][0])
        union = metrics[i][0], [np.concatenate(pair) for pair in zip(metrics[i][1], metrics[j][1], strict=True)]
        assert_metric(*union)
        assert_metric(*metrics[j])
        metrics = [metric for k, metric in enumerate(metrics) if k not in (i, j)] + [union]
    assert_metric(metrics[0][0], everything)


WIDTHS = (2, 1, 3)
LAYERS = Segments(np.array(WIDTHS))
NO_CALLS: list[list[Any]] = [[] for _ in WIDTHS]


@st.composite
def ranks_calls(draw):
    """For each rank and layer its calls: values, whether they updated buffers, degrees of freedom, sums of squares."""
    loc, rng = draw(st.sampled_from([0.0, 3.0, -1e3])), np.random.default_rng(draw(SEEDS))
    ranks = []
    for _ in range(draw(st.integers(1, 6))):
        calls = []
        for width in WIDTHS:
            sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4))
            calls.append([])
            for size, updating in sizes:
                values = rng.normal(loc, 1.0, (size, width))
                if draw(st.integers(0, 30)) == 0:
                    values[-1, 0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
                call = values, updating, float(updating) * rng.integers(1, 4), rng.uniform(1, 2, (2, width))
                calls[-1].append(call)
        ranks.append(calls)
    return ranks


def share_of(calls):
    """By the definitions, in two passes over all calls."""
    share = Share.empty(LAYERS)
    for index, (own, width) in enumerate(zip(LAYERS.slices, WIDTHS, strict=True)):
        received, updating = calls[index], [call for call in calls[index] if call[1]]
        values = np.concatenate([np.empty((0, width)), *(call[0] for call in received)])
        if len(values):
            with np.errstate(invalid="ignore"):
                share.mean[own] = values.mean(axis=0)
                share.squares[own] = np.square(values - values.mean(axis=0)).sum(axis=0)
        share.num_samples[index] = len(values)
        for row, (weigh, moment) in enumerate(((len, np.mean), (lambda x: len(x) - 1, np.std))):
            weighing = [call for call in updating if weigh(call[0])]
            weights = np.array([float(weigh(call[0])) for call in weighing])
            share.weight[row, index] = weights.sum()
            if weighing:
                with np.errstate(invalid="ignore"):
                    share.value[row, own] = np.average(
                        [moment(call[0], axis=0) for call in weighing], axis=0, weights=weights
                    )
        share.dof[index] = sum(call[2] for call in updating)
        share.within[:, own] = sum((call[3] for call in updating), np.zeros((2, width)))
        for number, call in enumerate(received, start=1):
            bad = ~np.isfinite(call[0]).all(axis=0)
            share.first_bad[own] = np.fmin(share.first_bad[own], np.where(bad, number, np.inf))
    return share


def assert_share(share, expected):
    for name, one, other in zip(Share._fields, share, expected, strict=True):
        assert one.shape == other.shape, name
        finite = np.isfinite(other)  # what is not is NaN in the population, whatever is said of it here
        if name == "first_bad":
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one[finite], other[finite], rtol=1e-9, atol=1e-9, err_msg=name)
            assert not np.isfinite(one[~finite]).any(), name
    np.testing.assert_allclose(
        share.population(LAYERS), expected.population(LAYERS), rtol=1e-9, atol=1e-9, equal_nan=True
    )


def first_bad_of(ranks):
    return functools.reduce(np.fmin, (share_of(calls).first_bad for calls in ranks))


def union_of(ranks):
    calls = [[call for of_rank in ranks for call in of_rank[index]] for index in range(len(WIDTHS))]
    return share_of(calls)._replace(first_bad=first_bad_of(ranks))


@LAW
@given(data=st.data(), ranks=ranks_calls())
def test_any_tree_of_ranks_in_any_order_is_one_rank_with_all_calls(data, ranks):
    assert_share(together([share_of(calls) for calls in ranks], LAYERS), union_of(ranks))
    forest = [(share_of(calls), [calls]) for calls in ranks]
    while len(forest) > 1:
        order = data.draw(st.permutations(range(len(forest))))
        chosen = order[: data.draw(st.integers(2, len(forest)))]
        members = [calls for i in chosen for calls in forest[i][1]]
        union = together([forest[i][0] for i in chosen], LAYERS), members
        assert_share(union[0], union_of(members))
        forest = [tree for i, tree in enumerate(forest) if i not in chosen] + [union]


@LAW
@given(data=st.data(), ranks=ranks_calls())
def test_ranks_that_saw_nothing_add_nothing_wherever_they_stand(data, ranks):
    shares = [share_of(calls) for calls in ranks]
    for _ in range(data.draw(st.integers(1, 3))):
        shares.insert(data.draw(st.integers(0, len(shares))), Share.empty(LAYERS))
    assert_share(Share.empty(LAYERS), share_of(NO_CALLS))
    assert_share(together(shares, LAYERS), union_of(ranks))
    for share in shares:
        assert_share(together([share], LAYERS), share)


@LAW
@given(ranks=ranks_calls())
def test_what_a_rank_sends_is_what_is_received(ranks):
    for calls in ranks:
        sent = share_of(calls)
        for one, other in zip(Share.unpacked(sent.packed(), LAYERS), sent, strict=True):
            np.testing.assert_array_equal(one, other)


# --- batches ----------------------------------------------------------------------------------------------------------


def windows_population(batches, momenta, capture="pass", flushes=()):
    model = nn.Sequential(nn.BatchNorm1d(2, dtype=batches[0].dtype))
    with BatchNormTracker(model, capture=capture) as tracker:
        for i, (x, momentum) in enumerate(zip(batches, momenta, strict=True)):
            model[0].train(momentum != "frozen")
            model[0].momentum = 0.1 if momentum == "frozen" else momentum
            model(x)
            if i in flushes:
                tracker.flush()
    layer = tracker.close()["0"]
    return layer.num_samples, layer.population_mean.numpy(), layer.population_var.numpy()


def assert_populations(population, values, bound):
    mean, var = two_pass(values)
    assert population[0] == len(values)
    assert (np.abs(population[1] - mean) <= bound * np.sqrt(var)).all()
    assert (np.abs(population[2] - var) <= bound * var).all()


def draw_momenta(data, number):
    kinds = st.sampled_from([*MOMENTA, "frozen"])
    return data.draw(st.lists(kinds, min_size=number, max_size=number))


@LAW
@given(
    data=st.data(),
    loc=st.sampled_from([0.0, 3.0, -20.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_the_population_is_the_same_however_values_are_split_into_batches_of_any_shape(data, loc, dtype, seed):
    values = torch.from_numpy(np.random.default_rng(seed).normal(loc, 1.0, (120, 2))).to(dtype)
    capture, bound = ("pass", 1e-9) if dtype == torch.float64 else ("auto", 1e-5)
    for _ in range(2):
        batches = []
        for part in torch.tensor_split(values, sorted(data.draw(st.sets(st.integers(1, 59), max_size=40)))):
            positions = data.draw(st.sampled_from([length for length in (1, 2, 3, 5, 10) if len(part) % length == 0]))
            if len(part) == 1:
                batches.append(part)
            elif positions > 1 or data.draw(st.booleans()):
                batches.append(part.reshape(-1, positions, 2).transpose(1, 2))
            else:
                batches.append(part)
        momenta = draw_momenta(data, len(batches))
        # A batch of a single value cannot be trained on.
        momenta = ["frozen" if len(rows(x)) == 1 else m for x, m in zip(batches, momenta, strict=True)]
        assert_populations(windows_population(batches, momenta, capture), rows(values), bound)


@LAW
@given(
    data=st.data(),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=60),
    loc=st.sampled_from([0.0, -1e3]),
    seed=SEEDS,
)
def test_the_order_of_batches_leaves_the_population_as_it_is(data, sizes, loc, seed):
    rng = np.random.default_rng(seed)
    batches = [torch.from_numpy(rng.normal(loc + t / 10, 1.0, (n, 2))) for t, n in enumerate(sizes)]
    calls = list(zip(batches, draw_momenta(data, len(batches)), strict=True))
    shuffled = data.draw(st.permutations(calls))
    flushes = data.draw(st.sets(st.integers(0, 59), max_size=20))
    first, second = (windows_population(*zip(*order, strict=True), flushes=flushes) for order in (calls, shuffled))
    np.testing.assert_allclose(second[1], first[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(second[2], first[2], rtol=1e-12 * max(1, abs(loc)))
    assert_populations(second, np.concatenate([rows(x) for x in batches]), 1e-9)


# --- what is asked in between, and what is saved ----------------------------------------------------------------------

FLOW = st.lists(
    st.one_of(
        st.tuples(
            st.just("train"),
            st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 6)), min_size=1, max_size=4),
            st.sampled_from([1, 2, 5, 17, STASH_LIMIT + 2]),
        ),
        st.tuples(st.sampled_from(["reset", "close", "eval", "write", "copy", "missed", "step"])),
    ),
    min_size=1,
    max_size=5,
)
OPTIONS = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries(
            {
                "momentum": st.sampled_from([0.1, *MOMENTA]),
                "affine": st.booleans(),
                "track_running_stats": st.sampled_from([True, True, True, False]),
            }
        )
        for name in SHAPES
    }
)


def draw_input(rng, name, size, loc, dtype):
    return torch.from_numpy(rng.normal(loc, 1.0, (size, *SHAPES[name]))).to(dtype)


def follow(model, tracker, action, seed):
    """Do what is said to a model and its tracker. Returns the report of a window that ends."""
    rng = np.random.default_rng(seed)
    dtype = torch.float64
    report = None
    if action[0] == "train":
        for _ in range(action[2]):
            model([(name, draw_input(rng, name, size, 3.0, dtype)) for name, size in action[1]])
    elif action[0] in ("eval", "missed"):
        with tracker.paused() if action[0] == "missed" else nullcontext():
            model.train(action[0] == "missed")
            model([(name, draw_input(rng, name, 4, 100.0, dtype)) for name in SHAPES])
            model.train()
    elif action[0] == "close":
        report = tracker.close()
    elif action[0] == "reset":
        tracker.reset()
    elif action[0] == "step":
        tracker.step()
    elif action[0] == "copy":
        report = tracker.report()
    elif model.layers["a"].running_mean is not None:
        model.layers["a"].running_mean += 0.5
    return report


def said(report):
    return None if report is None else report.to_dict()


@LAW
@given(
    data=st.data(),
    options=OPTIONS,
    flow=FLOW,
    capture=st.sampled_from(["auto", "pass"]),
    seed=SEEDS,
)
def test_asking_changes_nothing_of_what_is_reported(data, options, flow, capture, seed):
    flow = [one for action in flow for one in ([(*action[:2], 1)] * action[2] if action[0] == "train" else [action])]
    questions = data.draw(
        st.dictionaries(
            st.integers(0, len(flow) - 1),
            st.lists(st.sampled_from(["flush", "report", "state_dict", "attach", "detach"]), min_size=1, max_size=3),
            max_size=12,
        )
    )

    def run(asked):
        model, reports = Network(torch.float64, options), []
        tracker = BatchNormTracker(model, capture=capture).attach()
        for i, action in enumerate(flow):
            reports.append(follow(model, tracker, action, [seed, i]))
            for question in questions.get(i, ()) if asked else ():
                getattr(tracker, question)()
                tracker.attach()
        tracker.detach()
        return [said(report) for report in (*reports, tracker.report())]

    assert_alike(run(asked=True), run(asked=False), 1e-9)


@LAW
@given(data=st.data(), options=OPTIONS, flow=FLOW, capture=st.sampled_from(["auto", "pass"]), seed=SEEDS)
def test_a_fresh_tracker_on_a_copy_of_the_model_goes_on_with_what_was_saved(data, options, flow, capture, seed):
    if data.draw(st.booleans()):  # else nobody tells of steps
        flow = [one for action in flow for one in (action, ("step",))]
    else:
        flow = [action for action in flow if action[0] != "step"]
    flow = [("train", [(name, 4) for name in SHAPES], 1), ("step",), *flow]
    cut = data.draw(st.integers(0, len(flow)))
    before_attach = data.draw(st.booleans())
    model = Network(torch.float64, options)
    tracker = BatchNormTracker(model, capture=capture).attach()
    for i, action in enumerate(flow[:cut]):
        follow(model, tracker, action, [seed, i])
    tracker.step()
    saved = through_a_file(tracker.state_dict())
    other_model = copy.deepcopy(model)
    other = BatchNormTracker(other_model, capture=capture)
    if before_attach:
        other.load_state_dict(saved)
        other.attach()
    else:
        other.attach()
        other.load_state_dict(saved)
    assert_alike(said(other.report()), said(tracker.report()))
    for i, action in enumerate(flow[cut:], start=cut):
        one, two = (follow(m, t, action, [seed, i]) for m, t in ((model, tracker), (other_model, other)))
        assert_alike(said(two), said(one))
        if action[0] == "train":
            assert_alike(said(other.report()), said(tracker.report()))
    tracker.detach()
    other.detach()
    assert_alike(said(other.close()), said(tracker.close()))


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


# --- anything, in any order -------------------------------------------------------------------------------------------


@dataclass
class Received:
    """All that one layer received in a window, and what is known of its buffers."""

    values: list[Any] = field(default_factory=list)
    counted_updates: int = 0
    tracked_before: int = 0
    end: Any = None
    written: bool = False
    was_called: bool = False  # in any window


@dataclass
class Expected:
    """What a report must say of a layer."""

    num_batches: int
    num_samples: int
    mean: Any
    var: Any
    running: Any
    written: bool


@dataclass
class Reference:
    """Every value since the window began, and the few rules about what counts."""

    layers: dict[str, Received]
    closed: dict[str, Expected] | None = None


def buffers_of(layer):
    if layer.running_mean is None:
        return None
    return torch.stack([layer.running_mean, layer.running_var]).double().numpy().copy()


def tracked_of(layer):
    return 0 if layer.num_batches_tracked is None else layer.num_batches_tracked.item()


def is_same(one, other):
    return one is None or np.array_equal(one, other, equal_nan=True)


CALLS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.sampled_from([0.0, 3.0, -20.0])), min_size=1, max_size=4
)
WRITES = ["reset", "copy", "nan", "add", "same", "count"]


class Anything(RuleBasedStateMachine):
    dtype: torch.dtype
    capture: str
    bound: float

    def __init__(self) -> None:
        super().__init__()
        self.tracker = None
        self.saved = []
        self.is_paused = False
        self.frozen = set()

    @initialize(options=OPTIONS)
    def begin(self, options):
        self.model = Network(self.dtype, options)
        self.twin = copy.deepcopy(self.model)
        self.reference = Reference({name: Received() for name in SHAPES})
        self.tracker = BatchNormTracker(self.model, capture=self.capture).attach()

    # The reference

    def expected(self):
        if self.reference.closed is not None:
            return self.reference.closed
        result = {}
        for name, seen in self.reference.layers.items():
            layer = self.twin.layers[name]
            values = np.concatenate([np.empty((0, SHAPES[name][0])), *seen.values])
            set_back = seen.counted_updates and tracked_of(layer) < seen.tracked_before
            written = bool(seen.written or set_back)
            result[name] = Expected(len(seen.values), len(values), *two_pass(values), buffers_of(layer), written)
        return result

    def close_reference(self):
        if self.reference.closed is None:
            self.reference.closed = self.expected()
            for name, seen in self.reference.layers.items():
                seen.end = buffers_of(self.twin.layers[name])

    def begin_reference(self):
        self.reference.closed = None
        for name, seen in self.reference.layers.items():
            layer = self.twin.layers[name]
            seen.values, seen.counted_updates, seen.tracked_before = [], 0, tracked_of(layer)
            seen.written = not is_same(seen.end, buffers_of(layer))

    def check(self, report):
        expected = self.expected()
        assert sorted(report) == [f"layers.{name}" for name in SHAPES]
        for name in SHAPES:
            layer = report[f"layers.{name}"]
            reference = expected[name]
            assert (layer.num_batches, layer.num_samples) == (reference.num_batches, reference.num_samples), name
            mean, var = layer.population_mean.numpy(), layer.population_var.numpy()
            std = np.sqrt(np.fmax(reference.var, 1))  # that of what is drawn, if there are too few values to tell
            np.testing.assert_array_equal(np.isnan(mean), np.isnan(reference.mean))
            np.testing.assert_array_equal(np.isnan(var), np.isnan(reference.var))
            assert not (np.abs(mean - reference.mean) > self.bound * std).any(), (name, mean, reference.mean)
            assert not (np.abs(var - reference.var) > self.bound * std**2).any(), (name, var, reference.var)
            assert layer.has_running_stats == (reference.running is not None)
            running = np.full((2, len(mean)), np.nan) if reference.running is None else reference.running
            np.testing.assert_array_equal(torch.stack([layer.running_mean, layer.running_var]).numpy(), running)
            assert ("written-outside" in layer.flags) == reference.written, (name, layer.flags)
            self.check_metrics(layer, mean, var, *running)

    def check_metrics(self, layer, mean, var, running_mean, running_var):
        s, q = var + layer.eps, running_var + layer.eps
        shift = (running_mean - mean) / np.sqrt(s)
        # E[((x - running_mean) / sqrt(q) - (x - mean) / sqrt(s))^2]
        rmse = np.sqrt((1 / np.sqrt(q) - 1 / np.sqrt(s)) ** 2 * var + (running_mean - mean) ** 2 / q)
        ratio = np.log(q) - np.log(s)
        rmse, shift = rmse + 0 * running_mean, shift + 0 * s
        ratio = np.where(var <= 1e-3 * layer.eps, np.nan, ratio)
        for name, value in {"act_rmse": rmse, "mean_shift": shift, "log_var_ratio": ratio}.items():
            reported = getattr(layer, name).numpy()
            np.testing.assert_allclose(reported, value, rtol=1e-9, atol=1e-9, equal_nan=True, err_msg=name)
            finite = value[np.isfinite(value)]
            if len(finite):
                size = np.abs(finite).mean() if name == "log_var_ratio" else np.sqrt(np.square(finite).mean())
                assert layer.evidence[name] == pytest.approx(size, rel=1e-9, abs=1e-9)
            else:
                assert name not in layer.evidence

    # What may happen

    def inputs(self, calls, rng):
        made = []
        for name, size, loc in calls:
            layer = self.twin.layers[name]
            can_be_single = name in self.frozen and layer.running_mean is not None
            size = 2 if name == "a" and size == 1 and not can_be_single else size
            made.append((name, draw_input(rng, name, size, loc, self.dtype)))
        return made

    def receive(self, inputs):
        if self.reference.closed is not None or self.is_paused or not self.tracker.is_attached:
            return
        for name, x in inputs:
            seen, layer = self.reference.layers[name], self.twin.layers[name]
            seen.counted_updates += layer.training and layer.running_mean is not None
            if x.numel():
                seen.values.append(rows(x))
                seen.was_called = True

    def freeze(self):
        for model in (self.model, self.twin):
            model.train()
            for name in self.frozen:
                model.layers[name].eval()

    def call(self, inputs, mode="grad", **options):
        context = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        with context():
            one, two = self.model(inputs, **options), self.twin(inputs, **options)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return one, two

    def train_on(self, calls, seed, repeats=1, mode="grad", step=False):
        rng = np.random.default_rng(seed)
        for _ in range(repeats):
            inputs = self.inputs(calls, rng)
            self.receive(inputs)
            outputs = self.call(inputs, mode)
            if step and mode == "grad":
                for model, out in zip((self.model, self.twin), outputs, strict=True):
                    loss = sum(y.square().sum() for y in out)
                    if loss.requires_grad:
                        loss.backward()
                        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
                        optimizer.step()
                        optimizer.zero_grad()

    def simple(self, action, seed=0):
        if action == "train":
            self.train_on([("a", 4, 3.0), ("b", 3, 0.0), ("c", 2, -20.0)], seed)
        elif action == "reset":
            self.tracker.reset()
            self.close_reference()
            self.begin_reference()
        elif action == "close":
            self.close_reference()
            report = self.tracker.close()
            self.check(report)
            assert self.tracker.report() is report
        elif action == "report":
            self.check(self.tracker.report())
        elif action == "eval":
            self.eval_pass(set(), seed, "grad")
        else:
            getattr(self.tracker, action)()

    @rule(
        calls=CALLS,
        seed=SEEDS,
        repeats=st.sampled_from([1, 1, 2, 7, STASH_LIMIT + 2]),
        mode=st.sampled_from(["grad", "grad", "no_grad", "inference"]),
        step=st.booleans(),
    )
    def train(self, calls, seed, repeats, mode, step):
        self.train_on(calls, seed, repeats, mode, step)

    @rule(
        calls=CALLS,
        repeats=st.sampled_from([0, 1, 5, STASH_LIMIT + 2]),
        action=st.sampled_from(["reset", "reset", "close", "report", "flush", "step", "state_dict"]),
        looks=st.booleans(),
        seed=SEEDS,
    )
    def train_and_act(self, calls, repeats, action, looks, seed):
        self.train_on(calls, seed, repeats)
        self.simple(action, seed)
        if looks:
            self.simple("report")

    @rule(
        actions=st.lists(
            st.sampled_from(["train", "train", "reset", "close", "report", "flush", "step", "state_dict", "eval"]),
            min_size=1,
            max_size=5,
        ),
        seed=SEEDS,
        fails=st.booleans(),
    )
    def paused(self, actions, seed, fails):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), self.tracker.paused():
            self.is_paused = True
            for i, action in enumerate(actions):
                self.simple(action, [seed, i])
            self.is_paused = False
            if fails:
                raise ZeroDivisionError

    @rule(training=st.sets(st.sampled_from("abc")), seed=SEEDS, mode=st.sampled_from(["grad", "no_grad"]))
    def eval_pass(self, training, seed, mode):
        for model in (self.model, self.twin):
            model.eval()
            for name in training:  # in training mode themselves, in a model that is not
                model.layers[name].train()
        rng = np.random.default_rng(seed)
        self.call([(name, draw_input(rng, name, 4, 50.0, self.dtype)) for name in SHAPES], mode)
        self.freeze()

    @rule(calls=CALLS, seed=SEEDS, how=st.sampled_from(["after", "shape", "single"]), mode=st.sampled_from(["grad"]))
    def fail(self, calls, seed, how, mode):
        rng = np.random.default_rng(seed)
        inputs = self.inputs(calls, rng)
        self.receive(inputs)
        error: Any = ZeroDivisionError
        if how == "shape":
            inputs, error = [*inputs, ("b", torch.zeros(3, 2, 3, 1, dtype=self.dtype))], ValueError
        elif how == "single" and "a" not in self.frozen:
            inputs, error = [*inputs, ("a", torch.zeros(1, 3, dtype=self.dtype))], ValueError
        for model in (self.model, self.twin):
            with pytest.raises(error):
                model(inputs, fails=True)

    @rule(name=st.sampled_from("abc"))
    def freeze_or_thaw(self, name):
        self.frozen ^= {name}
        self.freeze()

    @rule(name=st.sampled_from("abc"), momentum=st.sampled_from(MOMENTA))
    def change_momentum(self, name, momentum):
        for model in (self.model, self.twin):
            model.layers[name].momentum = momentum

    @rule(name=st.sampled_from("abc"), how=st.sampled_from(WRITES), seed=SEEDS)
    def write(self, name, how, seed):
        values = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 2, (2, SHAPES[name][0])))
        for model in (self.model, self.twin):
            layer = model.layers[name]
            if layer.running_mean is None:
                continue
            if how == "reset":
                layer.reset_running_stats()
            elif how == "copy":
                layer.running_mean.copy_(values[0])
                layer.running_var.copy_(values[1])
            elif how == "add":
                layer.running_var[-1] += 1e-3
            elif how == "nan":
                layer.running_mean[0] = math.nan
            elif how == "same":
                layer.running_mean = layer.running_mean.clone()
            else:
                layer.num_batches_tracked += 100

    @rule(seed=SEEDS)
    def call_a_copy(self, seed):
        rng = np.random.default_rng(seed)
        copied = copy.deepcopy(self.model)
        copied([(name, draw_input(rng, name, 4, 50.0, self.dtype)) for name in SHAPES])

    @rule()
    def detach(self):
        self.tracker.detach()

    @rule()
    def attach(self):
        self.tracker.attach()

    @rule()
    def save(self):
        states = [through_a_file(x.state_dict()) for x in (self.tracker, self.model, self.twin)]
        self.saved.append((states, copy.deepcopy(self.reference)))

    @precondition(lambda self: self.saved)
    @rule(
        number=st.integers(0, 100),
        into=st.sampled_from(["itself", "another", "a copy"]),
        restore=st.booleans(),
        attach_first=st.booleans(),
    )
    def load(self, number, into, restore, attach_first):
        (state, of_model, of_twin), reference = self.saved[number % len(self.saved)]
        if into != "itself":
            self.tracker.detach()
            self.model = copy.deepcopy(self.model) if into == "a copy" else self.model
            self.tracker = BatchNormTracker(self.model, capture=self.capture)
        if restore:
            self.model.load_state_dict(of_model)
            self.twin.load_state_dict(of_twin)
        if attach_first or into == "itself":
            self.tracker.attach()
        self.tracker.load_state_dict(state)
        self.tracker.attach()
        self.reference = copy.deepcopy(reference)

    def teardown(self):
        if self.tracker is None:
            return
        self.tracker.detach()
        self.check(self.tracker.report())
        self.close_reference()
        self.check(self.tracker.close())
        for one, two in zip(self.model.state_dict().values(), self.twin.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


class AnythingInFloat32(Anything):
    dtype, capture, bound = torch.float32, "auto", 1e-5


class AnythingInFloat64(Anything):
    dtype, capture, bound = torch.float64, "pass", 1e-9


MACHINE = settings(LAW, stateful_step_count=12, suppress_health_check=[HealthCheck.too_slow])
TestAnythingInFloat32 = AnythingInFloat32.TestCase
TestAnythingInFloat32.settings = MACHINE
TestAnythingInFloat64 = AnythingInFloat64.TestCase
TestAnythingInFloat64.settings = MACHINE
