"""The course of a window and the standard errors of the running statistics, against batches that are kept."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_bnmonitor import BatchNormTracker


def batches(seed, sizes, channels=3):
    """Batches of which each has a mean and a variance of its own."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(
            rng.normal(rng.normal(size=channels), rng.lognormal(size=channels), size=(n, channels))
        ).float()
        for n in sizes
    ]


def check_course(course, kept):
    """Runs of consecutive batches, each with the statistics of its own."""
    assert course.num_batches.sum() == len(kept)
    assert len(course.num_batches) <= 16
    assert (course.num_batches > 0).all()
    assert all(values.dtype == torch.float64 and values.device.type == "cpu" for values in course)
    ends = course.num_batches.cumsum(0).long().tolist()
    for run, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        its = [batch.double().numpy() for batch in kept[start:end]]
        dof = [len(batch) - 1 for batch in its]
        var = np.average([batch.var(axis=0, ddof=1) for batch in its], axis=0, weights=dof)
        np.testing.assert_allclose(course.mean[run], np.concatenate(its).mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(course.var[run], var, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(2, 20), min_size=1, max_size=70), seed=st.integers(0, 2**32 - 1))
def test_the_course_is_that_of_the_batches_in_at_most_16_runs_of_equal_length(sizes, seed):
    norm, kept = nn.BatchNorm1d(3), batches(seed, sizes)
    with BatchNormTracker(norm) as tracker:
        for x in kept:
            norm(x)
    course = tracker.report()["(root)"].course
    check_course(course, kept)
    *full, last = course.num_batches.tolist()
    assert len(set(full)) <= 1
    assert last <= (full or [last])[0]
    assert len(course.num_batches) > 8 or course.num_batches.tolist() == [1] * len(sizes)


def test_the_course_of_images_is_that_of_all_their_positions():
    norm, kept = nn.BatchNorm2d(3), [torch.randn(n, 3, 4, 5) * n for n in (2, 3, 4) * 7]
    with BatchNormTracker(norm) as tracker:
        for x in kept:
            norm(x)
    check_course(tracker.report()["(root)"].course, [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in kept])


def test_only_batches_that_updated_the_running_statistics_are_in_the_course():
    norm, kept = nn.BatchNorm1d(3), batches(0, [8] * 40)
    with BatchNormTracker(norm) as tracker:
        for index, x in enumerate(kept):
            norm.train(index % 4 > 0)
            norm(x)
        norm.train()
    report = tracker.report()["(root)"]
    check_course(report.course, [x for index, x in enumerate(kept) if index % 4])


def test_the_course_is_empty_where_no_call_updated_the_running_statistics():
    model = nn.ModuleDict(
        {
            "called": nn.BatchNorm1d(3),
            "never": nn.BatchNorm1d(4),
            "frozen": nn.BatchNorm1d(3).eval(),
            "stateless": nn.BatchNorm1d(3, track_running_stats=False),
        }
    )
    with BatchNormTracker(model) as tracker:
        before = tracker.report()
        for x in batches(0, [8] * 20):
            for name in ("called", "frozen", "stateless"):
                model[name](x)
    report = tracker.report()
    for layer in (*before.values(), report["never"], report["frozen"], report["stateless"]):
        course = layer.course
        assert [tuple(values.shape) for values in course] == [(0,), (0, layer.num_features), (0, layer.num_features)]
        assert all(values.dtype == torch.float64 for values in course)
    assert report["called"].course.num_batches.sum() == 20


@pytest.mark.parametrize("at", [1, 5, 16, 17, 40])
def test_a_report_taken_within_the_window_keeps_its_course_when_the_window_goes_on_and_when_it_is_reset(at):
    norm, kept = nn.BatchNorm1d(3), batches(0, [8] * 60)
    with BatchNormTracker(norm) as tracker:
        for x in kept[:at]:
            norm(x)
        early = tracker.report()["(root)"]
        for x in kept[at:]:
            norm(x)
        late = tracker.report()["(root)"]
        check_course(early.course, kept[:at])
        tracker.reset()
        norm(kept[0])
        check_course(tracker.report()["(root)"].course, kept[:1])
    check_course(early.course, kept[:at])
    check_course(late.course, kept)


def test_a_value_that_is_not_finite_is_in_the_course_of_its_channel_alone():
    norm, kept = nn.BatchNorm1d(3), batches(0, [8] * 10)
    kept[4][2, 1] = torch.nan
    with BatchNormTracker(norm) as tracker:
        for x in kept:
            norm(x)
    course = tracker.report()["(root)"].course
    others = [0, 2]
    check_course(course._replace(mean=course.mean[:, others], var=course.var[:, others]), [x[:, others] for x in kept])
    assert course.mean[4, 1].isnan()


def saved_bytes(what, through_torch):
    if not through_torch:
        return len(pickle.dumps(what))
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.tell()


@pytest.mark.parametrize("through_torch", [False, True])
def test_saving_a_layers_report_does_not_save_those_of_all_layers(through_torch):
    model = nn.Sequential(nn.BatchNorm1d(8), *(nn.BatchNorm1d(8) for _ in range(200)))
    with BatchNormTracker(model) as tracker:
        for x in batches(0, [4] * 20, channels=8):
            model(x)
    layer = tracker.report()["0"]
    one = nn.BatchNorm1d(8)
    with BatchNormTracker(one) as tracker:
        for x in batches(0, [4] * 20, channels=8):
            one(x)
    alone = tracker.report()["(root)"]
    assert saved_bytes(layer, through_torch) < 1.2 * saved_bytes(alone, through_torch)
    loaded = pickle.loads(pickle.dumps(layer))
    for field in ("num_batches", "mean", "var"):
        assert torch.equal(getattr(loaded.course, field), getattr(layer.course, field))
    assert torch.equal(loaded.numbers, layer.numbers)


def inputs(rng, distribution, shape):
    """Stationary, and with other means and variances than the initial ones."""
    if distribution == "normal":
        return 3 + 2 * rng.normal(size=shape)
    return rng.exponential(2, size=shape) if distribution == "exponential" else rng.uniform(-1, 4, size=shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "momentum", "sizes"),
    [
        ("normal", 0.1, [16]),
        ("exponential", 0.1, [16]),
        ("uniform", 0.02, [16]),
        ("normal", None, [16]),
        ("normal", 0.1, [4]),
        ("uniform", 0.1, [32, 32, 32, 8]),
    ],
)
def test_standard_errors_are_the_spread_of_the_running_statistics_over_repetitions(distribution, momentum, sizes):
    rng = np.random.default_rng(0)
    norm = nn.BatchNorm1d(2000, momentum=momentum)  # each channel is a repetition of the same experiment
    with BatchNormTracker(norm) as tracker, torch.no_grad():
        for index in range(200):
            norm(torch.from_numpy(inputs(rng, distribution, (sizes[index % len(sizes)], 2000))).float())
    report = tracker.report()["(root)"]
    for running, stderr in (
        (report.running_mean, report.running_mean_stderr),
        (report.running_var, report.running_var_stderr),
    ):
        assert (stderr > 0).all()
        assert float(stderr.square().mean().sqrt()) == pytest.approx(float(running.std()), rel=0.1)


def test_standard_errors_are_those_after_all_windows_since_the_buffers_began():
    """What earlier windows have left in the buffers is noise, too."""
    rng = np.random.default_rng(0)
    norm = nn.BatchNorm1d(2000, momentum=0.01)
    with BatchNormTracker(norm) as tracker, torch.no_grad():
        for window in range(4):
            if window:
                tracker.reset()
            for _ in range(100):
                norm(torch.from_numpy(inputs(rng, "normal", (16, 2000))).float())
            report = tracker.report()["(root)"]
            spread = float(report.running_mean.std()), float(report.running_var.std())
            told = [float(e.square().mean().sqrt()) for e in (report.running_mean_stderr, report.running_var_stderr)]
            assert told == pytest.approx(spread, rel=0.1)


def test_standard_errors_scale_with_the_inputs():
    norm, scaled = nn.BatchNorm1d(5, momentum=0.1), nn.BatchNorm1d(5, momentum=0.1)
    kept = batches(0, [16] * 50, channels=5)
    reports = []
    for module, factor in ((norm, 1), (scaled, 1024)):
        with BatchNormTracker(module) as tracker:
            for x in kept:
                module(factor * x)
        reports.append(tracker.report()["(root)"])
    torch.testing.assert_close(reports[1].running_mean_stderr, 1024 * reports[0].running_mean_stderr, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        reports[1].running_var_stderr, 1024**2 * reports[0].running_var_stderr, rtol=1e-4, atol=0
    )


def test_there_are_no_standard_errors_where_nothing_tells_them():
    model = nn.ModuleDict({"never": nn.BatchNorm1d(3), "stateless": nn.BatchNorm1d(3, track_running_stats=False)})
    with BatchNormTracker(model) as tracker:
        for x in batches(0, [8] * 20):
            model["stateless"](x)
    for layer in tracker.report().values():
        assert layer.running_mean_stderr.isnan().all()
        assert layer.running_var_stderr.isnan().all()
