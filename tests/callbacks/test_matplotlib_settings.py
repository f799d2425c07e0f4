"""Nothing is drawn that nobody takes, and the user's settings of matplotlib matter to nothing and stay."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_bnmonitor import BatchNormMonitor
from tests import processes
from tests.callbacks.dashboard_fits import OnlyText, board, fit, scalar_tags
from tests.callbacks.event_files import events, pixels
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.slow]  # a process of its own draws and logs


def child(rank, folder):
    """In a process of its own, where nothing has been drawn before: what is drawn when, and in which style."""
    warnings.simplefilter("ignore")
    drawn = {}

    def note(what):
        drawn[what] = "matplotlib.backends.backend_agg" in sys.modules

    note("import")
    fit(board(folder), BatchNormMonitor(), fast_dev_run=True, default_root_dir=folder)
    note("fast_dev_run")
    left = [str(path) for path in Path(folder).rglob("*")]
    fit(False, BatchNormMonitor(), default_root_dir=folder)
    note("no logger")
    fit(CSVLogger(folder, name="csv"), BatchNormMonitor(), max_epochs=4)
    note("CSVLogger")
    fit(OnlyText(), BatchNormMonitor())
    note("texts only")
    fit(board(folder, version="off"), BatchNormMonitor(dashboard=False))
    note("dashboard=False")
    mpl.use("pdf")
    plt.style.use("dark_background")
    mpl.rcParams.update({"font.size": 30, "image.origin": "lower", "axes.grid": True})
    before = dict(mpl.rcParams)
    fit(board(folder, version="dark"), BatchNormMonitor(), max_epochs=4)
    note("TensorBoardLogger")
    changed = [name for name, value in mpl.rcParams.items() if value != before[name]]
    result = {"drawn": drawn, "left": left, "changed": changed, "figures": plt.get_fignums()}
    Path(folder, "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def in_a_child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("child")
    processes.start(child, str(folder), world_size=1)
    return folder, json.loads((folder / "result.json").read_text())


def test_nothing_is_drawn_where_nobody_takes_pictures(in_a_child):
    drawn = in_a_child[1]["drawn"]
    assert drawn.pop("TensorBoardLogger")
    assert len(drawn) == 6
    assert not any(drawn.values())


def test_a_fast_dev_run_leaves_no_trace(in_a_child):
    assert in_a_child[1]["left"] == []


def test_a_csv_logger_gets_all_scalars_and_nothing_else(in_a_child, run):
    folder = in_a_child[0] / "csv" / "version_0"
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert {path.name for path in folder.iterdir()} - {"hparams.yaml"} == {"metrics.csv"}  # the logger's own, once
    assert {tag for tag in header.split(",") if tag.startswith("bn")} == scalar_tags("bn")
    assert len(rows) == 4
    column = header.split(",").index("bn/eval_error_max")
    expected = [value for _, value in run.events.scalars["bn/eval_error_max"]]
    assert [float(row.split(",")[column]) for row in rows] == pytest.approx(expected)


def test_the_style_and_backend_of_the_user_change_neither_the_picture_nor_are_changed(in_a_child, run):
    folder, result = in_a_child
    dark = events(folder / "run" / "dark")
    (_, mine), (_, default) = dark.images["bn/heatmap"][-1], run.events.images["bn/heatmap"][-1]
    np.testing.assert_array_equal(pixels(mine), pixels(default))
    assert result["changed"] == []
    assert result["figures"] == []
