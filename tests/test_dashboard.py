"""Heatmap, text and charts in real Trainer runs: what is in the event files, and what is left alone."""

from __future__ import annotations

import copy
import html.parser
import inspect
import io
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.report.heatmap import Heatmap

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
C = 3
BATCHES, BATCH_SIZE = 16, 32  # in an epoch
LAYERS = ("quick", "slow")
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
SUMMARY = ("eval_error_max", "eval_error_p90", "eval_error_median", "act_rmse_max", "mean_shift_max")


# -------------------------------------------------------------------------------------------------------------- running


class Net(LightningModule):
    """A layer that is healthy in the third epoch, and one that never is."""

    def __init__(self, momenta=None):
        super().__init__()
        torch.manual_seed(0)
        for name, momentum in (momenta or dict(zip(LAYERS, (0.1, 0.02), strict=True))).items():
            self.add_module(name, nn.BatchNorm1d(C, momentum=momentum))
        self.out = nn.Linear(C, 1)

    def training_step(self, batch, batch_idx):
        # By the step, so that a run that is resumed in mid-epoch has the same data.
        generator = torch.Generator().manual_seed(2 * self.trainer.global_step + self.global_rank)
        x = torch.randn(batch[0].shape, generator=generator) + 4
        layers = [module for module in self.children() if isinstance(module, nn.BatchNorm1d)]
        return self.out(sum(layer(x) for layer in layers)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(num_batches=BATCHES):
    return DataLoader(TensorDataset(torch.zeros(num_batches * BATCH_SIZE, C)), batch_size=BATCH_SIZE)


def fit(logger, *callbacks, model=None, loader=None, ckpt_path=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, "num_sanity_val_steps": 0, **quiet, **options}
    model = model or Net()
    trainer = Trainer(logger=logger, callbacks=list(callbacks), **options)
    trainer.fit(model, loader or data(), ckpt_path=ckpt_path)
    return model, trainer


def board(tmp_path, **options):
    return TensorBoardLogger(tmp_path, name="run", **options)


def board_again(tmp_path):
    """On the directory of version 0. Its files are read by name, which begins with the second they were made in."""
    time.sleep(1)
    return board(tmp_path, version=0)


class Look(Callback):
    """Keeps the report of every window. Comes after the monitor."""

    def __init__(self, monitor):
        self.monitor, self.reports = monitor, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        report = self.monitor.report()
        if report is not self.monitor.report():
            return  # of a window that has not ended: a new one each time
        if not self.reports or report is not self.reports[-1]:
            self.reports.append(report)


class At(Callback):
    """Calls a function with the trainer at the end of a training batch, counted from 1."""

    def __init__(self, batch, function):
        self.batch, self.function, self.count = batch, function, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            self.function(trainer)


class Save:
    def __init__(self, path):
        self.path = path

    def __call__(self, trainer):
        trainer.save_checkpoint(self.path)


class StoppedError(Exception):
    pass


def stop(_):
    raise StoppedError


# ------------------------------------------------------------------------------------------------ what event files hold


class Events(NamedTuple):
    scalars: dict
    images: dict
    texts: dict
    layouts: list

    def at(self, tag):
        """The steps of a tag of any kind."""
        (kind,) = [kind for kind in self[:3] if tag in kind]
        return [step for step, _ in kind[tag]]

    def categories(self):
        return [category.title for category in self.layouts[-1].category]


def events(folder) -> Events:
    """Everything in the event files of one directory, in the order written; anything else is an error."""
    found = Events(defaultdict(list), defaultdict(list), defaultdict(list), [])
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if value.tag == "custom_scalars__config__":
                    found.layouts.append(layout_pb2.Layout.FromString(value.tensor.string_val[0]))
                elif kind == "simple_value":
                    found.scalars[value.tag].append((event.step, value.simple_value))
                elif kind == "image":
                    found.images[value.tag].append((event.step, value.image.encoded_image_string))
                elif value.metadata.plugin_data.plugin_name == "text":
                    (text,) = value.tensor.string_val
                    found.texts[value.tag.removesuffix("/text_summary")].append((event.step, text.decode()))
                else:
                    raise AssertionError(f"what is {value.tag}?")
    return found


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def matched(pattern, tags):
    """As TensorBoard matches them (`custom_scalars_plugin.download_data_impl`)."""
    return {tag for tag in tags if re.compile(pattern).match(tag)}


class Page(html.parser.HTMLParser):
    """What a page shows: the tags in it, the text of all, of each table row and of each list item."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.items, self.strong, self.order = set(), [], [], [], []
        self.into = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("p", "table", "ul"):
            self.order.append(tag)
        if tag == "tr":
            self.rows.append([])
        target = {"td": self.rows and self.rows[-1], "th": self.rows and self.rows[-1]}
        target |= {"li": self.items, "strong": self.strong}
        if tag in target:
            target[tag].append("")
            self.into.append(target[tag])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "li", "strong"):
            self.into.pop()

    def handle_data(self, text):
        for target in self.into:
            target[-1] += text


def rendered(text):
    return Page(plugin_util.markdown_to_safe_html(text))


# ------------------------------------------------------------------------------------------------------ the default run


class Run(NamedTuple):
    folder: Path
    events: Events
    reports: list
    tags: set


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    monitor = BatchNormMonitor()
    look, logger = Look(monitor), board(tmp_path_factory.mktemp("default"))
    fit(logger, monitor, look, max_epochs=4)
    found = events(logger.log_dir)
    return Run(logger.log_dir, found, look.reports, set(found.scalars))


STEPS = [BATCHES * epoch - 1 for epoch in (1, 2, 3, 4)]


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
    heatmap, pictures = Heatmap(), dict(run.events.images["bn/heatmap"])
    for step, report in zip(STEPS, run.reports, strict=True):
        heatmap.add(report, step)
        if step in pictures:
            np.testing.assert_array_equal(pixels(pictures[step]), heatmap.draw())


def test_a_default_run_has_one_text_a_window_at_the_steps_of_the_scalars(run):
    assert set(run.events.texts) == {"bn/report"}
    assert run.events.at("bn/report") == STEPS
    assert {tuple(run.events.at(tag)) for tag in run.tags if tag.startswith("bn")} == {tuple(STEPS)}


def test_tensorboard_itself_reads_all_of_it(run):
    accumulator = EventAccumulator(run.folder, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert tags["images"] == ["bn/heatmap"]
    assert set(tags["tensors"]) == {"bn/report/text_summary", "custom_scalars__config__"}
    assert set(tags["scalars"]) == run.tags >= {f"bn/{name}" for name in SUMMARY}
    assert [event.step for event in accumulator.Scalars("bn/eval_error_max")] == STEPS
    assert [event.step for event in accumulator.Tensors("bn/report/text_summary")] == STEPS


def verdicts(report):
    return {name: layer.verdict for name, layer in report.items()}


def test_the_texts_tell_the_verdict_then_the_changes_then_the_table_then_explanations(run):
    assert [verdicts(report)["quick"] for report in run.reports] == ["warming-up"] * 2 + ["healthy"] * 2
    assert {verdicts(report)["slow"] for report in run.reports} == {"warming-up"}
    for number, (report, (_, text)) in enumerate(zip(run.reports, run.events.texts["bn/report"], strict=True)):
        page = rendered(text)
        assert page.strong[0] == str(report).splitlines()[0]
        assert page.strong[1:] == [layer.name for layer in report.unhealthy]
        changes = ["quick: warming-up → healthy"] if number == 2 else []
        assert ("Changed since the last window" in text) == bool(changes)
        assert page.items[: len(changes)] == changes
        explained = page.items[len(changes) :]
        assert [item.split(":")[0] for item in explained] == [layer.name for layer in report.unhealthy]
        for item, layer in zip(explained, report.unhealthy, strict=True):
            assert " ".join(item.split()).startswith(f"{layer.name}: {layer.verdict}. ")
            assert layer.remedy.split("`")[0].strip() in item
        assert page.order == ["p", *(["p", "ul"] if changes else []), "table", "ul"]
        header, *rows = page.rows
        assert header[:4] == ["layer", "verdict", "eval_error", "noise"]
        assert [(row[0], row[1]) for row in rows] == [
            (layer.name, ", ".join([layer.verdict, *layer.flags])) for layer in report.worst()
        ]
        assert [row[2] for row in rows] == [f"{layer.summary()['eval_error']:.4f}" for layer in report.worst()]


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


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
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
        assert page.strong[1:] == [name.strip() for name in ordered if report[name].needs_attention][:3]
    assert pages[0].strong[1:]
    assert "code" not in pages[2].tags  # there nothing is explained
    assert pages[2].items == [f"{layer.name.strip()}: warming-up → healthy" for layer in look.reports[2].worst()]


# --------------------------------------------------------------------------------------------------------------- charts


def scalar_tags(prefix, layers=LAYERS):
    summary = {f"{prefix}/{name}" for name in (*SUMMARY, "unhealthy_layers")}
    return summary | {f"{prefix}.{metric}/{layer}" for metric in METRICS for layer in layers}


def charts_of(layout):
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


@pytest.mark.parametrize("prefix", ["bn", "b.n+x", "a (b)/c-d"])
def test_the_charts_match_the_tags_that_are_meant_and_no_others(tmp_path, prefix):
    logger = board(tmp_path)
    for decoy in (
        *("bxn+x/eval_error_max", "b.nnx.eval_error/a", "bn_x/unhealthy_layers", f"x{prefix}/eval_error_max"),
        *(f"{prefix}/eval_error_max_2", f"{prefix}x.eval_error/a", f"{prefix}xeval_error/a", f"x{prefix}.mean_shift/a"),
        *(f"{prefix}.eval_errors/a", f"{prefix}/unhealthy_layers/a", "val_loss"),
    ):
        logger.experiment.add_scalar(decoy, 0, 0)
    fit(logger, BatchNormMonitor(log_key_prefix=prefix), max_epochs=1)
    found = events(logger.log_dir)
    assert scalar_tags(prefix) <= set(found.scalars)
    assert (set(found.images), set(found.texts)) == ({f"{prefix}/heatmap"}, {f"{prefix}/report"})
    (layout,) = found.layouts
    suffix = "" if prefix == "bn" else f" ({prefix})"
    assert found.categories() == [f"BatchNorm health{suffix}", f"BatchNorm layers{suffix}"]
    health, layers = charts_of(layout).values()
    errors, attention = ([matched(pattern, found.scalars) for pattern in patterns] for patterns in health.values())
    assert errors == [{f"{prefix}/eval_error_{of}"} for of in ("max", "p90", "median")]
    assert attention == [{f"{prefix}/unhealthy_layers"}]
    assert set(layers) == set(METRICS)
    for metric, (pattern,) in layers.items():
        assert matched(pattern, found.scalars) == {f"{prefix}.{metric}/{layer}" for layer in LAYERS}


def test_without_scalars_of_layers_there_are_no_charts_of_them(tmp_path):
    logger = board(tmp_path)
    fit(logger, BatchNormMonitor(per_layer=False), max_epochs=1)
    assert events(logger.log_dir).categories() == ["BatchNorm health"]


@pytest.mark.parametrize(("num_layers", "has_layers"), [(100, True), (101, False)])
def test_there_are_charts_of_layers_where_there_are_scalars_of_them(tmp_path, num_layers, has_layers):
    logger = board(tmp_path)
    model = Net({f"layer{index}": 0.1 for index in range(num_layers)})
    fit(logger, BatchNormMonitor(), model=model, loader=data(2), max_epochs=1)
    found = events(logger.log_dir)
    assert any(tag.startswith("bn.") for tag in found.scalars) == has_layers
    assert found.categories() == ["BatchNorm health", *["BatchNorm layers"] * has_layers]
    assert found.at("bn/heatmap") == [1]


OURS = ["BatchNorm health", "BatchNorm layers"]
THEIRS = {
    "mine": {"both": ["Multiline", ["loss/.*", "val_loss"]], "band": ["Margin", ["mid", "low", "high"]]},
    "second": {"one": ["Multiline", ["x"]]},
}


def test_a_layout_that_was_set_before_is_replaced(tmp_path):
    logger = board(tmp_path)
    logger.experiment.add_custom_scalars(THEIRS)
    fit(logger, BatchNormMonitor(), max_epochs=1)
    found = events(logger.log_dir)
    assert [len(layout.category) for layout in found.layouts] == [2, 2]
    assert found.categories() == OURS


def test_a_layout_that_is_set_later_stands(tmp_path):
    logger = board(tmp_path)
    later = At(BATCHES + 3, lambda trainer: trainer.logger.experiment.add_custom_scalars(THEIRS))
    fit(logger, BatchNormMonitor(), later, max_epochs=3)
    found = events(logger.log_dir)
    assert [len(layout.category) for layout in found.layouts] == [2, 2]
    assert found.categories() == list(THEIRS)


def test_a_run_resumed_into_the_same_directory_has_our_charts_once(tmp_path):
    path = tmp_path / "saved.ckpt"
    first = board(tmp_path, version=0)
    fit(first, BatchNormMonitor(), At(BATCHES + 3, Save(path)))
    fit(board_again(tmp_path), BatchNormMonitor(), ckpt_path=path, max_epochs=3)
    assert events(first.log_dir).categories() == OURS


def test_two_monitors_have_both_their_charts_pictures_and_texts(tmp_path):
    logger = board(tmp_path)
    one, other = BatchNormMonitor(include="quick"), BatchNormMonitor(include="slow", log_key_prefix="z")
    fit(logger, one, other)
    found = events(logger.log_dir)
    assert found.categories() == [*OURS, *(f"{title} (z)" for title in OURS)]
    assert found.at("bn/heatmap")[-1] == found.at("z/heatmap")[-1] == STEPS[1]
    for prefix, layer in (("bn", "quick"), ("z", "slow")):
        assert found.at(f"{prefix}/report") == STEPS[:2]
        assert [[row[0] for row in rendered(text).rows[1:]] for _, text in found.texts[f"{prefix}/report"]] == [
            [layer]
        ] * 2


# --------------------------------------------------------------------------------------------------- when there is none


def test_without_dashboard_there_are_only_the_same_scalars(tmp_path, run):
    logger = board(tmp_path)
    fit(logger, BatchNormMonitor(dashboard=False), max_epochs=4)
    found = events(logger.log_dir)
    assert (found.images, found.texts, found.layouts) == ({}, {}, [])
    assert found.scalars == run.events.scalars


@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_anything_but_true_or_false_is_refused(value):
    with pytest.raises(ValueError, match=rf"`dashboard` must be True or False, got {value!r}\."):
        BatchNormMonitor(dashboard=value)


def child(folder):
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
    print(json.dumps({"drawn": drawn, "left": left, "changed": changed, "figures": plt.get_fignums()}))


@pytest.fixture(scope="module")
def in_a_child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("child")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


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
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]
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


# -------------------------------------------------------------------------------------------------------- other loggers


class Plain(Logger):
    """Keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.metrics, self.images, self.texts = [], [], []

    name, version = "memory", 0

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def of_ours(self):
        return [(step, metrics) for step, metrics in self.metrics if "bn/unhealthy_layers" in metrics]


class OnlyText(Plain):
    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.texts.append((key, columns, data, dataframe, step))


class OnlyImages(Plain):
    def log_image(self, key, images, step=None, **kwargs):
        if not isinstance(images, list):
            raise TypeError("a list is expected, as WandbLogger does")
        self.images.append((key, images, step, kwargs))


class LikeWandb(OnlyText, OnlyImages):
    pass


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
        heatmap = Heatmap()
        for (key, images, step, kwargs), report in zip(logger.images, run.reports[:2], strict=True):
            assert (key, kwargs) == ("bn/heatmap", {})
            heatmap.add(report, step)
            (image,) = images
            assert image.dtype == np.uint8
            np.testing.assert_array_equal(image, heatmap.draw())
    else:
        assert logger.images == []


@pytest.mark.parametrize("cls", [LikeWandb, OnlyText, OnlyImages, Plain])
def test_a_logger_gets_what_it_has_a_method_for(run, cls):
    logger = cls()
    fit(logger, BatchNormMonitor())
    assert_got_everything(logger, run)


def test_several_loggers_get_theirs_each(tmp_path, run):
    loggers = [board(tmp_path), OnlyText(), CSVLogger(tmp_path), LikeWandb(), Plain(), TensorBoardLogger(tmp_path)]
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


# ------------------------------------------------------------------------------------------------------------- failures


class Broken(RuntimeError):  # noqa: N818
    pass


def failing(base, methods, error):
    """A class of loggers or writers some methods of which raise."""

    def fail(self, *args, **kwargs):
        raise error

    return type(f"Failing{base.__name__}", (base,), dict.fromkeys(methods, fail))


class Writes(TensorBoardLogger):
    """A TensorBoardLogger with a writer of another class."""

    def __init__(self, folder, writer_class, **kwargs):
        super().__init__(folder, **kwargs)
        self._experiment = writer_class(log_dir=self.log_dir)


def weights(model, trainer):
    (optimizer,) = trainer.optimizers
    state = [value for of in optimizer.state.values() for value in of.values()]
    return [*model.state_dict().values(), *state]


def assert_same(tensors, others):
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def messages(caught):
    return [str(w.message) for w in caught if "did not log" in str(w.message)]


@pytest.mark.parametrize(
    ("methods", "what"),
    [
        (["add_image"], {"heatmap"}),
        (["add_text"], {"report"}),
        (["add_custom_scalars"], {"charts"}),
        (["add_image", "add_text", "add_custom_scalars"], {"heatmap", "report", "charts"}),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_a_writer_cannot_take_is_warned_of_once_and_all_else_is_logged(tmp_path, run, methods, what, first):
    broken = Writes(tmp_path / "broken", failing(SummaryWriter, methods, Broken("no")))
    whole, other = TensorBoardLogger(tmp_path / "whole"), LikeWandb()
    loggers = [broken, whole, other] if first else [whole, other, broken]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit(loggers, BatchNormMonitor(), max_epochs=4))
    assert sorted(messages(caught)) == sorted(f"Writes did not log the BatchNorm {kind}: Broken('no')" for kind in what)
    assert_same(outcome, weights(*fit(False, max_epochs=4)))
    found, expected = events(broken.log_dir), events(whole.log_dir)
    assert found.scalars == expected.scalars == run.events.scalars
    assert len(found.texts["bn/report"]) == 4 * ("report" not in what)
    assert len(found.images["bn/heatmap"]) == len(expected.images["bn/heatmap"]) * ("heatmap" not in what)
    assert len(found.layouts) == ("charts" not in what)
    assert expected.texts == run.events.texts
    assert expected.at("bn/heatmap")[-1] == STEPS[-1]
    assert expected.categories() == OURS
    assert [text[-1] for text in other.texts] == STEPS
    assert other.images[-1][2] == STEPS[-1]


@pytest.mark.parametrize(("method", "kind"), [("log_image", "heatmap"), ("log_text", "report")])
def test_what_a_logger_cannot_take_is_warned_of_once_and_all_else_is_logged(tmp_path, method, kind):
    broken, whole = failing(LikeWandb, [method], Broken("no"))(), LikeWandb()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit([broken, whole], BatchNormMonitor(every_n_train_batches=8)))
    assert messages(caught) == [f"FailingLikeWandb did not log the BatchNorm {kind}: Broken('no')"]
    assert_same(outcome, weights(*fit(False)))
    assert broken.of_ours() == whole.of_ours()
    assert len(whole.of_ours()) == 4
    assert len(whole.texts) == 4
    assert len(broken.texts) == 4 * (kind == "heatmap")
    assert len(broken.images) == len(whole.images) * (kind == "report")
    assert whole.images[-1][2] == STEPS[1]


class Lost(TensorBoardLogger):
    """Loses what it writes to, in the midst of the run."""

    is_lost = False

    @property
    def experiment(self):
        if self.is_lost:
            raise Broken("no")
        return super().experiment

    def save(self):
        pass

    def finalize(self, status):
        pass


@pytest.mark.parametrize("batch", [3, BATCHES + 3], ids=["in the first window", "in the second window"])
def test_a_logger_that_loses_its_writer_does_not_end_the_run(tmp_path, batch):
    broken, whole = Lost(tmp_path), LikeWandb()
    lose = At(batch, lambda _: setattr(broken, "is_lost", True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit([broken, whole], BatchNormMonitor(), lose, log_every_n_steps=1000))
    assert_same(outcome, weights(*fit(False)))
    assert any("Lost did not log the BatchNorm report" in message for message in messages(caught))
    assert len(whole.texts) == 2
    assert whole.images[-1][2] == STEPS[1]


@pytest.mark.parametrize("method", ["add_image", "add_text", "add_custom_scalars"])
def test_a_keyboard_interrupt_while_a_writer_logs_comes_through(tmp_path, method, restored_signals):
    logger = Writes(tmp_path, failing(SummaryWriter, [method], KeyboardInterrupt()))
    count, model = At(0, stop), Net()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(logger, BatchNormMonitor(), count, model=model)
    assert count.count == BATCHES - 1
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["log_image", "log_text"])
def test_a_keyboard_interrupt_while_a_logger_logs_comes_through(method, restored_signals):
    count = At(0, stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(failing(LikeWandb, [method], KeyboardInterrupt())(), BatchNormMonitor(), count)
    assert count.count == BATCHES - 1


@pytest.fixture
def restored_signals():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


# -------------------------------------------------------------------------------------------------------- short windows


def test_of_many_short_windows_few_are_drawn_but_the_first_and_the_last(tmp_path):
    logger, monitor = board(tmp_path), BatchNormMonitor(every_n_train_batches=1, on_unhealthy="ignore")
    look = Look(monitor)
    fit(logger, monitor, look, loader=data(300), max_epochs=1)
    found = events(logger.log_dir)
    steps = found.at("bn/heatmap")
    assert found.at("bn/report") == found.at("bn/eval_error_max") == list(range(300))
    assert len(steps) < 30
    assert (steps[0], steps[-1]) == (0, 299)
    assert steps == sorted(set(steps))
    heatmap = Heatmap()
    for step, report in enumerate(look.reports):
        heatmap.add(report, step)
    assert heatmap.steps[-1] == 299
    np.testing.assert_array_equal(pixels(found.images["bn/heatmap"][-1][1]), heatmap.draw())


def interrupt(_):
    raise KeyboardInterrupt


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
    heatmap = Heatmap()
    for step, report in zip(steps, look.reports, strict=True):
        heatmap.add(report, step)
    np.testing.assert_array_equal(pixels(found.images["bn/heatmap"][-1][1]), heatmap.draw())


def test_a_run_that_breaks_within_the_first_window_has_nothing(tmp_path):
    logger = board(tmp_path)
    with pytest.raises(StoppedError):
        fit(logger, BatchNormMonitor(), At(5, stop))
    found = events(logger.log_dir)
    assert (found.images, found.texts, found.layouts) == ({}, {}, [])


# --------------------------------------------------------------------------------------------------------------- resume


def of_monitor(path):
    (state,) = [
        state
        for key, state in torch.load(path, weights_only=True)["callbacks"].items()
        if key.startswith("BatchNormMonitor")
    ]
    return state


def interrupted(folder, path, at=2 * BATCHES + 5, **options):
    """Saves, and breaks in the third epoch, before the quick layer is said to be healthy."""

    def save_and_stop(trainer):
        trainer.save_checkpoint(path)
        raise StoppedError

    with pytest.raises(StoppedError):
        fit(folder, BatchNormMonitor(**options), At(at, save_and_stop), max_epochs=4)


def test_a_resumed_run_goes_on_with_the_history(tmp_path, run):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path)
    saved = of_monitor(path)["dashboard"]
    assert saved["heatmap"]["steps"] == STEPS[:2]
    assert sorted(saved["heatmap"]["rows"]) == sorted(LAYERS)
    fit(logger, BatchNormMonitor(), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.at("bn/report") == STEPS[2:]
    assert found.at("bn/heatmap") == STEPS[2:]
    assert found.texts["bn/report"] == run.events.texts["bn/report"][2:]
    assert "quick: warming-up → healthy" in found.texts["bn/report"][0][1]
    assert found.categories() == OURS
    resumed, whole = found.images["bn/heatmap"][-1], run.events.images["bn/heatmap"][-1]
    assert resumed[0] == whole[0]
    np.testing.assert_array_equal(pixels(resumed[1]), pixels(whole[1]))


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_made_with_or_without_dashboard_loads_without_or_with(tmp_path, run, before):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path, dashboard=before)
    assert (of_monitor(path)["dashboard"] is not None) == before
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The BatchNorm statistics")
        fit(logger, BatchNormMonitor(dashboard=not before), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.at("bn/eval_error_max") == STEPS[2:]
    assert dict(found.scalars)["bn/eval_error_max"] == run.events.scalars["bn/eval_error_max"][2:]
    if before:
        assert (found.images, found.texts, found.layouts) == ({}, {}, [])
        return
    assert found.at("bn/heatmap") == STEPS[2:]  # a history that begins with the resume
    assert "Changed" not in found.texts["bn/report"][0][1]


def test_a_checkpoint_from_before_there_was_a_dashboard_loads(tmp_path, run):
    path, logger = tmp_path / "saved.ckpt", board(tmp_path, version="resumed")
    interrupted(board(tmp_path, version="first"), path)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.pop("dashboard", None)
    torch.save(checkpoint, path)
    assert "dashboard" not in of_monitor(path)
    fit(logger, BatchNormMonitor(), ckpt_path=path, max_epochs=4)
    found = events(logger.log_dir)
    assert found.scalars["bn/eval_error_max"] == run.events.scalars["bn/eval_error_max"][2:]
    assert found.at("bn/heatmap") == STEPS[2:]


def test_the_state_of_a_hundred_windows_is_small(tmp_path):
    path = tmp_path / "saved.ckpt"
    names = {f"layer{index}": 0.1 for index in range(10)}
    monitor = BatchNormMonitor(every_n_train_batches=1, on_unhealthy="ignore", per_layer=False)
    fit(board(tmp_path), monitor, At(101, Save(path)), model=Net(names), loader=data(102), max_epochs=1)
    state = of_monitor(path)
    assert len(state["dashboard"]["heatmap"]["steps"]) > 30
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() <= 1024 * C * len(names) + 64 * 1024


def test_a_second_fit_begins_a_new_history(tmp_path, run):
    monitor, first, second = BatchNormMonitor(), board(tmp_path), board(tmp_path, version="second")
    fit(first, monitor)
    fit(second, monitor, max_epochs=3)
    found = events(second.log_dir)
    assert found.texts["bn/report"] == run.events.texts["bn/report"][:3]
    assert found.at("bn/heatmap")[0] == STEPS[0]
    assert found.images["bn/heatmap"][0] == run.events.images["bn/heatmap"][0]
    assert found.categories() == OURS


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_in_mid_fit_has_the_report_and_changes_nothing(tmp_path, run, copied):
    logger, monitor, copies = board(tmp_path), BatchNormMonitor(), []
    at = At(2 * BATCHES + 5, lambda trainer: copies.append(copied(monitor)))
    fit(logger, monitor, at, max_epochs=4)
    found = events(logger.log_dir)
    assert found.texts == run.events.texts
    assert found.images["bn/heatmap"][-1] == run.events.images["bn/heatmap"][-1]
    (twin,) = copies
    assert verdicts(twin.report()) == verdicts(run.reports[1])
    again = board(tmp_path, version="again")
    fit(again, twin, max_epochs=1)
    assert events(again.log_dir).texts["bn/report"] == run.events.texts["bn/report"][:1]


# ------------------------------------------------------------------------------------------------------------ invisible


def generators():
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


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


def test_what_is_set_in_matplotlib_stays(tmp_path):
    before, figures = dict(mpl.rcParams), plt.get_fignums()
    fit(board(tmp_path), BatchNormMonitor())
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures


# ------------------------------------------------------------------------------------------------------------ two ranks


def rank_of(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logger = LikeWandb()
    loggers = [TensorBoardLogger(folder, name="run", version=0), logger]
    monitor = BatchNormMonitor()
    _, trainer = fit(loggers, monitor, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=3)
    result = {
        "drawn": "matplotlib.backends.backend_agg" in sys.modules,
        "images": [step for _, _, step, _ in logger.images],
        "texts": [text[-1] for text in logger.texts],
        "text": logger.texts[-1][2][0][0] if logger.texts else None,
        "verdicts": verdicts(monitor.report()),
    }
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_of_two_ranks_only_the_first_draws_and_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "test"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), "rank"],
            env={
                **os.environ,
                **{name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        complaints = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], complaints
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    steps = [BATCHES // 2 * epoch - 1 for epoch in (1, 2, 3)]
    assert first["texts"] == steps
    assert (first["images"][0], first["images"][-1]) == (steps[0], steps[-1])
    assert first["drawn"]
    assert (second["texts"], second["images"], second["drawn"]) == ([], [], False)
    assert first["verdicts"] == second["verdicts"]
    found = events(tmp_path / "run" / "version_0")
    assert len(list((tmp_path / "run" / "version_0").glob("events.*"))) == 1
    assert found.at("bn/report") == steps
    assert found.texts["bn/report"][-1][1] == first["text"]
    assert found.categories() == OURS


if __name__ == "__main__":
    (rank_of if sys.argv[2:] else child)(sys.argv[1])


def test_a_prefix_of_the_logger_is_that_of_pictures_texts_and_charts_as_of_scalars(tmp_path):
    logger = board(tmp_path, prefix="exp")
    fit(logger, BatchNormMonitor())
    found = events(logger.log_dir)
    assert found.at("exp-bn/heatmap") == found.at("exp-bn/report") == found.at("exp-bn/unhealthy_layers")
    patterns = [tag for chart in charts_of(found.layouts[-1]).values() for tags in chart.values() for tag in tags]
    assert patterns
    assert all(matched(pattern, found.scalars) for pattern in patterns)


def test_charts_of_layers_go_when_a_run_goes_on_in_the_same_directory_without_them(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(board(tmp_path, version=0), BatchNormMonitor(), At(BATCHES + 3, Save(path)))
    second = board_again(tmp_path)
    fit(second, BatchNormMonitor(per_layer=False), ckpt_path=path, max_epochs=3)
    assert events(second.log_dir).categories() == OURS[:1]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path):
    monitor = BatchNormMonitor()

    def spoil(trainer):
        monitor._dashboard._heatmap.rows = []

    class Spoil(Callback):
        def on_train_end(self, trainer, pl_module):
            spoil(trainer)

    logger = board(tmp_path)
    with pytest.warns(UserWarning, match="could not be drawn: ValueError"):
        fit(logger, Spoil(), monitor)
    assert events(logger.log_dir).at("bn/heatmap") == STEPS[:1]
