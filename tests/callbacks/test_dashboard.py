"""Heatmap and text in real Trainer runs: what is in the event files, and what is left alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.report.heatmap import draw
from lightning_bnmonitor.report.history import History
from tests.callbacks.dashboard_fits import (
    BATCHES,
    STEPS,
    SUMMARY,
    At,
    Look,
    Net,
    StoppedError,
    assert_same,
    board,
    data,
    fit,
    interrupt,
    stop,
    verdicts,
    weights,
)
from tests.callbacks.event_files import events, pixels, rendered
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


def test_a_default_run_has_pictures_of_the_first_and_last_window_that_can_be_decoded(run):
    assert set(run.events.images) == {"bn/heatmap"}
    steps = run.events.at("bn/heatmap")
    assert steps[0] == STEPS[0]
    assert steps[-1] == STEPS[-1]
    assert len(steps) == len(set(steps))
    for _, png in run.events.images["bn/heatmap"]:
        height, width, _ = pixels(png).shape
        assert 100 < height <= 1300
        assert 100 < width <= 1000


def test_the_last_picture_shows_all_windows_and_the_first_picture_the_first(run):
    history, pictures = History(), dict(run.events.images["bn/heatmap"])
    for step, report in zip(STEPS, run.reports, strict=True):
        history.add(report, step)
        if step in pictures:
            np.testing.assert_array_equal(pixels(pictures[step]), draw(history.windows))


def test_a_default_run_has_one_text_a_window_at_the_steps_of_the_scalars(run):
    assert set(run.events.texts) == {"bn/report"}
    assert run.events.at("bn/report") == STEPS
    assert {tuple(run.events.at(tag)) for tag in run.tags if tag.startswith("bn")} == {tuple(STEPS)}


def test_tensorboard_itself_reads_all_of_it(run):
    accumulator = EventAccumulator(run.folder, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert tags["images"] == ["bn/heatmap"]
    assert set(tags["tensors"]) == {
        "bn/report/text_summary",
        "custom_scalars__config__",
        "batchnorm/history",
        "batchnorm/channels",
    }
    assert set(tags["scalars"]) == run.tags >= {f"bn/{name}" for name in SUMMARY}
    assert [event.step for event in accumulator.Scalars("bn/eval_error_max")] == STEPS
    assert [event.step for event in accumulator.Tensors("bn/report/text_summary")] == STEPS


def test_the_texts_tell_the_verdict_then_the_changes_then_the_table_then_explanations(run):
    assert [verdicts(report)["quick"] for report in run.reports] == ["warming-up"] * 2 + ["healthy"] * 2
    assert {verdicts(report)["slow"] for report in run.reports} == {"warming-up"}
    for number, (report, (_, text)) in enumerate(zip(run.reports, run.events.texts["bn/report"], strict=True)):
        page = rendered(text)
        assert page.strong[0] == str(report).splitlines()[0]
        worst, names = report.unhealthy[0], ", ".join(layer.name for layer in report.unhealthy)
        assert page.strong[1:] == [names]  # of one cause
        changes = ["quick: warming-up → healthy"] if number == 2 else []
        assert ("Changed since the last window" in text) == bool(changes)
        assert page.items[: len(changes)] == changes
        (explained,) = page.items[len(changes) :]
        assert " ".join(explained.split()).startswith(f"{names}: {worst.verdict}. ")
        assert worst.remedy.split("`")[0].strip() in explained
        assert page.order == ["p", *(["p", "ul"] if changes else []), "table", "ul"]
        header, *rows = page.rows
        assert header[:4] == ["layer", "verdict", "eval_error", "noise"]
        assert [(row[0], row[1]) for row in rows] == [
            (layer.name, ", ".join([layer.verdict, *layer.flags])) for layer in report.worst()
        ]
        assert [row[2] for row in rows] == [f"{layer.summary()['eval_error']:.4f}" for layer in report.worst()]


@pytest.mark.slow
def test_a_text_has_at_most_ten_layers(tmp_path):
    logger, names = board(tmp_path), [f"layer{index}" for index in range(14)]
    fit(logger, BatchNormMonitor(), model=Net(dict.fromkeys(names, 0.1)), max_epochs=3)
    for _, text in events(logger.log_dir).texts["bn/report"]:
        assert len(rendered(text).rows) == 1 + 10
    last = rendered(text)
    assert last.items == [
        *(f"{row[0]}: warming-up → healthy" for row in last.rows[1:]),
        "and 4 more",
    ]


NAMES = {
    "as in Markdown": ["a|b", "a_b*c*", "`tick`", "~~x~~", "[x](y)", "_x_", "a\\b", "![i](u)", "**x", "[x]: y"],
    "as in HTML": ["<b>x</b>", "<script>alert(1)</script>", "<!-- x -->", "&amp;", "&#65;", "&lt;i&gt;", "&", "$x$"],
    "beginning a block": ["# h", "1) x", "- x", "+ x", "> x", "--- ", "* x", "```", ": x", "    x"],
    "of other letters": ["größe", "层", "two words", "\N{ROCKET}", "e\N{COMBINING ACUTE ACCENT}", "http://x-y", "a@b"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",  # as many at a time as an explanation lists
    [
        pytest.param(names[first : first + 5], id=f"{kind}, from {first}")
        for kind, names in NAMES.items()
        for first in range(0, len(names), 5)
    ],
)
def test_names_come_out_of_tensorboards_renderer_as_they_are_and_in_their_cells(tmp_path, names):
    logger, monitor = board(tmp_path), BatchNormMonitor()
    look = Look(monitor)
    fit(logger, monitor, look, model=Net(dict.fromkeys(names, 0.1)), max_epochs=3)
    found = events(logger.log_dir)
    allowed = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    pages = [rendered(text) for _, text in found.texts["bn/report"]]
    for page, report in zip(pages, look.reports, strict=True):
        assert page.tags - {"code"} <= allowed
        ordered = [layer.name for layer in report.worst()]
        assert [row[:2] for row in page.rows[1:]] == [[name.strip(), report[name].verdict] for name in ordered]
        assert {len(row) for row in page.rows} == {len(page.rows[0])}
        sick = ", ".join(name.strip() for name in ordered if report[name].needs_attention)
        assert page.strong[1:] == ([sick] if sick else [])
    assert pages[0].strong[1:]
    assert "code" not in pages[2].tags  # there nothing is explained
    assert pages[2].items == [f"{layer.name.strip()}: warming-up → healthy" for layer in look.reports[2].worst()]


# --------------------------------------------------------------------------------------------------- when there is none


def test_without_dashboard_there_are_only_the_same_scalars(tmp_path, run):
    logger = board(tmp_path)
    fit(logger, BatchNormMonitor(dashboard=False), max_epochs=4)
    found = events(logger.log_dir)
    assert (found.images, found.texts, found.layouts, found.documents) == ({}, {}, [], {})
    assert found.scalars == run.events.scalars


# -------------------------------------------------------------------------------------------------------- short windows


@pytest.mark.slow
def test_of_many_short_windows_few_are_drawn_but_the_first_and_the_last(tmp_path):
    logger, monitor = board(tmp_path), BatchNormMonitor(every_n_train_batches=1, on_unhealthy="ignore")
    look = Look(monitor)
    fit(logger, monitor, look, loader=data(150), max_epochs=1)
    found = events(logger.log_dir)
    steps = found.at("bn/heatmap")
    assert found.at("bn/report") == found.at("bn/eval_error_max") == list(range(150))
    assert len(steps) < 30
    assert (steps[0], steps[-1]) == (0, 149)
    assert steps == sorted(set(steps))
    history = History()
    for step, report in enumerate(look.reports):
        history.add(report, step)
    assert history.windows.steps[-1] == 149
    np.testing.assert_array_equal(pixels(found.images["bn/heatmap"][-1][1]), draw(history.windows))


@pytest.mark.parametrize(("end", "raised"), [(stop, StoppedError), (interrupt, SystemExit)])
def test_a_run_that_breaks_has_a_picture_of_the_last_window_that_ended(tmp_path, end, raised, restored_signals):
    logger, monitor = board(tmp_path), BatchNormMonitor(every_n_train_batches=4, on_unhealthy="ignore")
    look = Look(monitor)
    with pytest.raises(raised):
        fit(logger, monitor, look, At(BATCHES + 10, end))
    found = events(logger.log_dir)
    steps = [4 * window - 1 for window in range(1, 7)]
    assert found.at("bn/report") == steps
    assert found.at("bn/heatmap")[-1] == steps[-1]
    history = History()
    for step, report in zip(steps, look.reports, strict=True):
        history.add(report, step)
    np.testing.assert_array_equal(pixels(found.images["bn/heatmap"][-1][1]), draw(history.windows))


def test_a_run_that_breaks_within_the_first_window_has_nothing(tmp_path):
    logger = board(tmp_path)
    with pytest.raises(StoppedError):
        fit(logger, BatchNormMonitor(), At(5, stop))
    found = events(logger.log_dir)
    assert (found.images, found.texts, found.layouts, found.documents) == ({}, {}, [], {})


# ------------------------------------------------------------------------------------------------------------ invisible


def generators():
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


@pytest.mark.slow
def test_training_is_bit_identical_with_and_without_dashboard_and_monitor(tmp_path):
    def outcome(*callbacks):
        torch.manual_seed(3)
        np.random.seed(4)
        random.seed(5)
        model = Net()
        torch.manual_seed(3)
        model.out = nn.Sequential(nn.Dropout(0.5), model.out)
        model, trainer = fit(board(tmp_path), *callbacks, model=model, max_epochs=3)
        return weights(model, trainer), generators()

    tensors, state = outcome()
    for dashboard in (True, False):
        its_tensors, its_state = outcome(BatchNormMonitor(dashboard=dashboard, every_n_train_batches=5))
        assert_same(tensors, its_tensors)
        assert its_state == state
