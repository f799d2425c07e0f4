"""Figures of reports: what is drawn against the numbers of the report, in axes of our own and in given ones."""

import math

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from torch import nn

from lightning_bnmonitor import BatchNormTracker, Report
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.drawing import without_warnings
from tests.report.made_reports import layer, stateless, unused, with_error

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_warning_and_no_figure_left():
    with without_warnings():
        yield
    plt.close("all")


def discs(ax):
    """Height and colour of the markers by position, the letters on them left out."""
    found = {}
    for points in ax.collections:
        color = to_hex(points.get_facecolor()[0]) if len(points.get_facecolor()) else None
        if color == "#ffffff":
            continue
        for x, y in np.ma.getdata(points.get_offsets()).tolist():
            assert x not in found
            found[x] = (y, color)
    return found


# ------------------------------------------------------------------------------------------------ the layers of a model


def test_the_markers_are_the_eval_errors_and_the_bars_the_noise_in_the_order_of_the_layers():
    errors, noise = [0.3, 0.02, 0.9, 0.1], [0.01, 0.2, 0.05, 0.03]
    names = [f"layer{index}" for index in (2, 0, 3, 1)]
    layers = [
        with_error(name, error, evidence={"noise_error": floor})
        for name, error, floor in zip(names, errors, noise, strict=True)
    ]
    fig, ax = Report(layers).plot()
    fig.canvas.draw()
    found = discs(ax)
    assert [found[index][0] for index in range(4)] == pytest.approx(errors)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(noise)
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx(range(4))
    assert [label.get_text() for label in ax.get_xticklabels()] == names


def test_layers_have_the_colour_and_the_letter_that_the_legend_gives_for_their_verdict():
    fig, ax = Report([with_error(verdict, 0.2, verdict=verdict) for verdict in VERDICTS]).plot()
    fig.canvas.draw()
    handles, labels = ax.get_legend_handles_labels()
    of_verdict = {
        label.split(": ")[1]: to_hex(handle.get_facecolor()[0])
        for handle, label in zip(handles, labels, strict=True)
        if ": " in label
    }
    assert set(of_verdict) == set(VERDICTS)
    found = discs(ax)
    assert [found[index][1] for index in range(len(VERDICTS))] == [of_verdict[verdict] for verdict in VERDICTS]
    letters = [label.split(": ")[0] for label in labels if ": " in label]
    assert len(set(letters)) == len(VERDICTS)


def test_the_legend_has_no_verdict_that_no_layer_has():
    _, ax = Report([with_error("a", 0.1, verdict="noisy"), with_error("b", 0.1)]).plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(label.split(": ")[1] for label in labels if ": " in label) == ["healthy", "noisy"]


def test_errors_beyond_the_scale_are_drawn_at_its_ends_and_unknown_ones_not_at_all():
    errors = [INF, 1e6, 0.5, 0.0, 1e-9]
    layers = [with_error(f"layer{index}", error) for index, error in enumerate(errors)]
    fig, ax = Report([*layers, unused("unused"), stateless("stateless")]).plot()
    fig.canvas.draw()
    found = discs(ax)
    assert sorted(found) == [0, 1, 2, 3, 4]
    heights = [found[index][0] for index in range(5)]
    bottom, top = ax.get_ylim()
    assert heights[0] == heights[1] > heights[2] == 0.5 > heights[3] == heights[4]
    assert all(bottom <= height < top for height in heights)
    assert len(ax.get_xticks()) == 7


def test_a_layer_without_a_noise_floor_has_no_bar():
    without = with_error("without", 0.2, evidence={"noise_error": NAN})
    _, ax = Report([without, with_error("with", 0.2)]).plot()
    assert [bar.get_height() for bar in ax.patches] == [0, 0.05]


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [0, 1, 60, 61, 200])
def test_any_number_of_layers_is_drawn_and_named_as_far_as_there_is_room(num_layers):
    layers = [with_error(f"layer{index}", 0.01 * (1 + index)) for index in range(num_layers)]
    fig, ax = Report(layers).plot()
    fig.canvas.draw()
    assert len(discs(ax)) == num_layers
    ticks = ax.get_xticks()
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"layer{int(tick)}" for tick in ticks]
    assert min(num_layers, 30) <= len(ticks) <= 60
    left, right = ax.get_xlim()
    assert left < 0
    assert right > num_layers - 1


def test_any_name_is_a_label_as_it_is():
    names = ["$a", "$a_b$", r"$\frac$", "a_b^c", "a\\b", "ä→β", "a\nb", "_hidden", "", "x" * 200]
    fig, ax = Report([with_error(name, 0.3) for name in names]).plot()
    fig.canvas.draw()
    *labels, long = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [name.replace("\n", " ") for name in names[:-1]]
    assert long[0] == "…"
    assert names[-1].endswith(long[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", [r"$\frac$", "a\nb", ""])
def test_any_name_can_be_the_title_of_a_layers_figure(name):
    fig, _ = layer(name).plot()
    fig.canvas.draw()


def drawers():
    return {"report": (Report([with_error("a", 0.1)]), 1), "layer": (tracked(), 4)}


def tracked(channels=3, num_batches=40, change=None):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(channels)
    with BatchNormTracker(norm) as tracker, torch.no_grad():
        for index in range(num_batches):
            x = torch.randn(16, channels) * torch.linspace(0.5, 2, channels) + torch.linspace(-1, 1, channels)
            norm(x if change is None else change(x, index))
    return tracker.report()["(root)"]


@pytest.mark.parametrize("of", ["report", "layer"])
def test_a_figure_is_made_if_there_are_no_axes(of):
    what, count = drawers()[of]
    fig, ax = what.plot()
    assert plt.get_fignums() == [fig.number]
    assert len(fig.axes) == count == np.size(ax)
    assert list(np.ravel(ax)) == fig.axes


@pytest.mark.parametrize("of", ["report", "layer"])
@pytest.mark.parametrize("within", ["figure", "subfigure of a subfigure"])
def test_given_axes_are_drawn_in_and_their_own_figure_is_returned(of, within):
    what, count = drawers()[of]
    fig = plt.figure()
    parent = fig
    for _ in range(("figure", "subfigure", "subfigure of a subfigure").index(within)):
        parent = parent.subfigures(1, 2)[0]
    axes = parent.subplots(1, count)
    returned, ax = what.plot(axes)
    assert returned is fig
    assert ax is axes
    assert plt.get_fignums() == [fig.number]
    assert len(fig.axes) == count
    assert all(each.has_data() for each in np.ravel(axes))
    fig.canvas.draw()


@pytest.mark.parametrize("shape", ["list", "tuple", "flat", "square", "column"])
def test_four_axes_may_come_in_any_array(shape):
    fig, axes = plt.subplots(2, 2)
    flat = axes.ravel()
    given = {"list": list(flat), "tuple": tuple(flat), "flat": flat, "square": axes, "column": flat[:, None]}[shape]
    returned, _ = tracked().plot(given)
    assert returned is fig
    assert all(ax.has_data() for ax in flat)
    assert [ax.get_ylabel() for ax in flat] == ["mean", "std", "mean", "std"]


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_another_number_of_axes_is_an_error_that_says_what_is_valid(count):
    axes = list(np.ravel(plt.subplots(1, 5)[1])[:count])
    with pytest.raises(ValueError, match=rf"`ax` must be four axes, got {count}"):
        tracked().plot(axes)


def test_one_axes_alone_is_an_error_that_says_what_is_valid():
    with pytest.raises(ValueError, match=r"`ax` must be four axes, got 1"):
        tracked().plot(plt.subplots()[1])


# ---------------------------------------------------------------------------------------------- the channels of a layer


def drawn(ax):
    """Heights of exact and running values, and the half lengths of the error bars of the latter."""
    exact = next(line for line in ax.lines if line.get_label() == "exact").get_ydata()
    (container,) = [each for each in ax.containers if hasattr(each, "has_yerr")]
    running, _, (bars,) = container
    half = [(segment[1, 1] - segment[0, 1]) / 2 if len(segment) else NAN for segment in bars.get_segments()]
    return np.asarray(exact), np.asarray(running.get_ydata()), np.array(half)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3, 60])
def test_all_channels_are_drawn_with_two_standard_errors(channels):
    report = tracked(channels)
    fig, axes = report.plot()
    fig.canvas.draw()
    exact, running, half = drawn(axes[0, 0])
    np.testing.assert_allclose(exact, report.population_mean)
    np.testing.assert_allclose(running, report.running_mean)
    np.testing.assert_allclose(half, 2 * report.running_mean_stderr)
    exact, running, half = drawn(axes[0, 1])
    np.testing.assert_allclose(exact, report.population_var.sqrt())
    np.testing.assert_allclose(running, report.running_var.sqrt())
    np.testing.assert_allclose(half, report.running_var_stderr / report.running_var.sqrt())  # half of it, twice
    assert axes[0, 0].get_xlabel() == "channel"


def test_of_many_channels_the_60_worst_are_drawn_in_their_order():
    rng = np.random.default_rng(0)
    errors = rng.lognormal(-2, 1, size=2048)
    zeros, ones = np.zeros(2048), np.ones(2048)
    report = layer(mean=zeros, var=ones, running_mean=errors, running_var=ones, verdict="noisy")
    fig, axes = report.plot()
    fig.canvas.draw()
    worst = np.sort(np.argsort(-errors)[:60])
    np.testing.assert_allclose(drawn(axes[0, 0])[1], errors[worst])
    assert "60 worst of 2048" in axes[0, 0].get_xlabel()
    for tick, label in zip(axes[0, 0].get_xticks(), axes[0, 0].get_xticklabels(), strict=True):
        assert int(label.get_text()) == worst[int(tick)]
    assert f"channel {errors.argmax()}" in axes[1, 0].get_xlabel()


@pytest.mark.slow
def test_below_is_the_course_of_the_worst_channel():
    report = tracked(5, num_batches=40, change=lambda x, index: x + 3 * (index > 30) * torch.eye(5)[2])
    fig, axes = report.plot()
    fig.canvas.draw()
    worst = int(report.eval_error.argmax())
    assert worst == 2
    ends = report.course.num_batches.cumsum(0)
    pairs = (
        (axes[1, 0], report.course.mean, report.population_mean, report.running_mean),
        (axes[1, 1], report.course.var.sqrt(), report.population_var.sqrt(), report.running_var.sqrt()),
    )
    for ax, course, exact, running in pairs:
        lines = {line.get_label(): line for line in ax.lines}
        np.testing.assert_allclose(lines["batches"].get_ydata(), course[:, worst])
        np.testing.assert_allclose(lines["batches"].get_xdata(), ends - report.course.num_batches / 2)
        assert set(lines["exact"].get_ydata()) == {float(exact[worst])}
        assert set(lines["running ± 2 standard errors"].get_ydata()) == {float(running[worst])}
        assert f"channel {worst}" in ax.get_xlabel()


def one_bad(bad, channel=1):
    def change(x, index):
        return x.index_fill(1, torch.tensor(channel), bad) if index == 3 else x

    return change


ODD_LAYERS = {
    "never called": lambda: tracked(num_batches=0),
    "one batch": lambda: tracked(num_batches=1),
    "no running statistics": lambda: stateless("layer"),
    "NaN": lambda: tracked(change=one_bad(NAN)),
    "Inf": lambda: tracked(change=one_bad(INF)),
    "all NaN": lambda: tracked(1, change=one_bad(NAN, 0)),
    "dead": lambda: tracked(num_batches=400, change=lambda x, index: x * torch.tensor([0.0, 1, 1])),
    "all dead": lambda: tracked(change=lambda x, index: x * 0),
    "huge": lambda: tracked(change=lambda x, index: x * 1e15),
    "infinite buffers": lambda: layer(running_mean=[INF], running_var=[INF]),
    "negative infinite buffers": lambda: layer(
        mean=[0.0] * 2, var=[1.0] * 2, running_mean=[-INF, 0], running_var=[1, 1]
    ),
    "no variance in the buffer": lambda: layer(running_var=[0.0], running_var_stderr=[0.1]),
    "negative variance": lambda: layer(running_var=[-1.0], running_var_stderr=[0.1]),
    "unknown standard errors": lambda: layer(running_mean_stderr=[NAN], running_var_stderr=[NAN]),
    "2048 channels": lambda: tracked(2048, num_batches=20),
}


ODD_CHANNELS = ("NaN", "Inf", "dead")


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=id) for id, make in ODD_LAYERS.items() if id not in ODD_CHANNELS],
)
def test_any_layer_is_drawn_without_an_error_or_a_warning(make):
    report = make()
    fig, axes = report.plot()
    fig.canvas.draw()
    assert axes.shape == (2, 2)
    fig, _ = Report([report]).plot()
    fig.canvas.draw()


@pytest.mark.slow
@pytest.mark.parametrize("bad", ODD_CHANNELS)
def test_an_odd_channel_leaves_the_others_as_they_are_drawn(bad):
    report = ODD_LAYERS[bad]()
    fig, axes = report.plot()
    fig.canvas.draw()
    for ax, expected in ((axes[0, 0], report.running_mean), (axes[0, 1], report.running_var.sqrt())):
        np.testing.assert_allclose(drawn(ax)[1], np.where(expected.isfinite(), expected, np.nan))
        low, high = ax.get_ylim()
        shown = [value for value in expected.tolist() if math.isfinite(value)]
        assert low <= min(shown) <= max(shown) <= high < 1e3
    fig, _ = Report([report]).plot()
    fig.canvas.draw()
