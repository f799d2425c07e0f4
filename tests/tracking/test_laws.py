"""Laws of the tracker: how values are split and ordered, what is asked in between, and a restart change nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.statistics.two_pass import rows, two_pass
from tests.tracking.drawn_networks import MOMENTA, OPTIONS, SEEDS, SHAPES, Network, draw_input
from tests.tracking.small_models import assert_alike, saved_and_loaded

pytestmark = pytest.mark.slow
LAW = settings(max_examples=50, deadline=None)


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
    # PyTorch's float32 kernel adds up values one by one, so that its error grows with them.
    capture, bound = ("pass", 1e-9) if dtype == torch.float64 else ("auto", 1e-6 * (1 + abs(loc)))
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
    saved = saved_and_loaded(tracker.state_dict())
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
