"""Which logger gets what of the dashboard."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.report.heatmap import draw
from lightning_bnmonitor.report.history import History
from tests.callbacks.dashboard_fits import (
    OURS,
    STEPS,
    CometExperiment,
    LikeMlflow,
    LikeWandb,
    OnlyImages,
    OnlyText,
    Plain,
    TakesFiles,
    WandbRun,
    board,
    fit,
)
from tests.callbacks.event_files import events
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.loggers_of_lightning import LoggersOfLightning

pytestmark = EXPECTED_WARNINGS


@pytest.mark.parametrize("method", ["log_text", "log_image"])
def test_the_loggers_here_take_what_the_one_of_lightning_takes(method):
    def parameters(cls):
        its = inspect.signature(getattr(cls, method)).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in its]

    assert parameters(LikeWandb) == parameters(WandbLogger)


def assert_got_everything(logger, run):
    steps = STEPS[:2]
    assert [step for step, _ in logger.of_ours()] == steps
    if isinstance(logger, OnlyText):
        for (key, columns, table, dataframe, step), (_, text) in zip(
            logger.texts, run.events.texts["bn/report"][:2], strict=True
        ):
            assert (key, dataframe, len(columns)) == ("bn/report", None, 1)
            assert table == [[text]]
            assert step == steps.pop(0)
    else:
        assert logger.texts == []
    if isinstance(logger, OnlyImages):
        assert [step for _, _, step, _ in logger.images] == STEPS[:2]
        history = History()
        for (key, images, step, kwargs), report in zip(logger.images, run.reports[:2], strict=True):
            assert (key, kwargs) == ("bn/heatmap", {})
            history.add(report, step)
            (image,) = images
            assert image.dtype == np.uint8
            np.testing.assert_array_equal(image, draw(history.windows))
    else:
        assert logger.images == []


@pytest.mark.slow
def test_several_loggers_get_theirs_each(tmp_path, run):
    loggers = [
        board(tmp_path),
        OnlyText(),
        CSVLogger(tmp_path),
        LikeWandb(),
        OnlyImages(),
        Plain(),
        TensorBoardLogger(tmp_path),
    ]
    fit(loggers, BatchNormMonitor())
    for logger in loggers:
        if isinstance(logger, Plain):
            assert_got_everything(logger, run)
        elif isinstance(logger, TensorBoardLogger):
            found = events(logger.log_dir)
            assert found.texts["bn/report"] == run.events.texts["bn/report"][:2]
            assert found.at("bn/heatmap") == STEPS[:2]
            assert found.categories() == OURS


def test_the_tensorboard_logger_of_pytorch_lightning_gets_the_same(tmp_path, run):
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    logger = loggers.TensorBoardLogger(tmp_path)
    fit(logger, BatchNormMonitor(), max_epochs=4)
    found = events(logger.log_dir)
    assert found.texts == run.events.texts
    assert found.layouts == run.events.layouts
    assert found.images["bn/heatmap"][-1] == run.events.images["bn/heatmap"][-1]


def test_loggers_that_take_files_get_the_page_at_the_end(tmp_path):
    loggers = [LikeMlflow(), TakesFiles(WandbRun()), TakesFiles(CometExperiment()), board(tmp_path), Plain()]
    monitor = BatchNormMonitor()
    fit(loggers, monitor)
    monitor.history.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    name = "batchnorm.html"
    assert [logger.experiment.files for logger in loggers[:3]] == [
        [(name, page, "the run", None)],
        [(name, page, None, "report")],
        [(name, page)],
    ]


def test_lightnings_own_loggers_take_all_of_it_with_the_methods_that_they_have(tmp_path, run, recwarn):
    with LoggersOfLightning(tmp_path) as loggers:
        monitor = BatchNormMonitor()
        fit(loggers, monitor)
        found = [logger.experiment for logger in loggers]
    assert [str(each.message) for each in recwarn if "did not log" in str(each.message)] == []
    page = monitor.history.page()
    wandb, mlflow, comet = found
    assert wandb.files == [("batchnorm.html", page, "report")]
    assert mlflow.files == [("batchnorm.html", page, "the run")]
    assert comet.files == [("batchnorm.html", page)]
    for each in found:
        assert sum("bn/unhealthy_layers" in metrics for metrics in each.logged) == 2
    tables = [logged["bn/report"] for logged in wandb.logged if "bn/report" in logged]
    assert [table.data for table in tables] == [[[text]] for _, text in run.events.texts["bn/report"][:2]]
    pictures = [logged["bn/heatmap"] for logged in wandb.logged if "bn/heatmap" in logged]
    assert [image.data.dtype for (image,) in pictures] == [np.uint8, np.uint8]


@pytest.mark.parametrize(("prefix", "name"), [("mine", "batchnorm-mine.html"), ("a/b c", "batchnorm-a_b_c.html")])
def test_the_file_has_a_prefix_in_its_name_as_far_as_file_names_allow(prefix, name):
    logger = LikeMlflow()
    fit(logger, BatchNormMonitor(log_key_prefix=prefix), max_epochs=1)
    assert [file for file, *_ in logger.experiment.files] == [name]


def test_without_dashboard_no_file_is_logged():
    logger = LikeMlflow()
    fit(logger, BatchNormMonitor(dashboard=False), max_epochs=1)
    assert logger.experiment.files == []
