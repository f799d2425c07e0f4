"""The figure of an attribution."""

import pytest
from matplotlib import pyplot as plt

from lightning_bnmonitor.repair.eval_gap import Contribution
from tests.drawing import without_warnings
from tests.repair.gap_results import CASES, attribution
from tests.repair.spoiled_models import INF, NAN


def drawn(ax):
    """Names from the top, texts by position, bars as (left, right) by position."""
    ax.get_figure().canvas.draw()
    names = [label.get_text() for label in ax.get_yticklabels()]
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first is at the top
    texts = {round(text.xy[1]): text.get_text() for text in ax.texts}
    bars = {
        round(bar.get_y() + bar.get_height() / 2): (bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches
    }
    return names, [texts[index] for index in range(len(names))], bars


def points(ax):
    return {round(line.get_ydata()[0]): line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"}


def test_the_figure_leads_from_eval_mode_to_training_mode():
    fig, ax = CASES["usual"].plot()
    assert ax.get_figure() is fig
    names, texts, bars = drawn(ax)
    assert names == [
        *("eval mode as it is", "a.norm", "b.norm", "7 other layers", "exact statistics"),
        *("normalising by the batch", "dropout, other modules in training mode", "training mode"),
    ]
    assert texts == ["2.5", "-0.75", "-0.2475", "-0.0025", "1.5", "-0.25", "-0.125", "1.125"]
    assert points(ax) == pytest.approx({0: 2.5, 4: 1.5, 7: 1.125})
    expected = {1: (1.75, 2.5), 2: (1.5025, 1.75), 3: (1.5, 1.5025), 5: (1.25, 1.5), 6: (1.125, 1.25)}
    assert set(bars) == set(expected)
    for position, ends in expected.items():
        assert sorted(bars[position]) == pytest.approx(ends)
    assert ax.get_xlabel() == "loss"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_result_is_drawn_without_a_warning_and_within_the_axes(case):
    found = CASES[case]
    with without_warnings():
        _, ax = found.plot()
        names, texts, bars = drawn(ax)
    assert texts[0] == f"{found.eval_loss:.4g}"
    assert texts[-1] == f"{found.train_loss:.4g}"
    assert not any("+nan" in text or "-nan" in text for text in texts)
    assert len(names) == (9 if found.has_evaluation else 5) + len(found._layers)
    low, high = ax.get_xlim()
    for value in (*points(ax).values(), *(end for ends in bars.values() for end in ends)):
        assert low < value < high
    inside, renderer = ax.get_window_extent(), ax.get_figure().canvas.get_renderer()
    for text in ax.texts:
        extent = text.get_window_extent(renderer)
        assert inside.x0 - 1 <= extent.x0
        assert extent.x1 <= inside.x1 + 1


def test_steps_after_the_one_that_makes_the_loss_finite_are_drawn():
    contributions = (Contribution("x", INF, INF, NAN), Contribution("y", 0.5, 0.5, 0.1))
    found = attribution(eval_loss=NAN, gap=INF, gap_stderr=NAN, contributions=contributions, rest=None)
    _, ax = found.plot()
    names, texts, bars = drawn(ax)
    assert texts[:4] == ["nan", "-inf", "-0.5", "1.5"]
    assert sorted(bars[names.index("y")]) == pytest.approx((1.5, 2.0))
    assert names.index("x") not in bars
    assert set(points(ax)) == {3, 6}


def test_small_steps_from_a_large_loss_can_be_seen():
    found = attribution(
        eval_loss=100.02,
        exact_loss=100.01,
        batch_loss=100.01,
        train_loss=100.0,
        gap=0.01,
        gap_stderr=0.001,
        contributions=(Contribution("x", 0.3, 0.01, 0.001),),
        rest=None,
    )
    _, ax = found.plot()
    _, _, bars = drawn(ax)
    low, high = ax.get_xlim()
    assert abs(bars[1][1] - bars[1][0]) > 0.2 * (high - low)


def test_odd_names_are_drawn():
    names = ["encoder." * 30 + "norm", "$x_1$ and $", "line\nbreak", "漢字.norm", "nan", "5", "a_b^c", "% {}", ""]
    found = attribution(contributions=tuple(Contribution(name, 0.5, 0.1, 0.01) for name in names))
    with without_warnings():
        _, ax = found.plot()
        labels = drawn(ax)[0][1 : 1 + len(names)]
    for name, shown in zip(names, labels, strict=True):
        assert len(shown) <= 40
        assert name.isascii() is False or shown[-4:] == " ".join(name.split())[-4:]
        assert name.split() == [] or name.split()[0] in str(found)


def test_given_axes_are_drawn_in():
    fig, axes = plt.subplots(1, 2)
    result = CASES["usual"].plot(axes[1])
    assert result[0] is fig
    assert result[1] is axes[1]
    assert not axes[0].patches
    assert len(plt.get_fignums()) == 1
    same = plt.subplots()[1]
    assert CASES["usual"].plot(ax=same)[1] is same
    assert drawn(same)[0] == drawn(axes[1])[0]
