"""The heatmap: which windows share a column and which layers a row, and the picture."""

import math
import random
import signal
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from lightning_bnmonitor import Report
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.page.document import ABSENT
from lightning_bnmonitor.report.heatmap import draw, grouped, table, windows_in_column
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.kept_windows import CAUSES
from tests.drawing import without_warnings
from tests.report.made_reports import NOT_SICK, layer, stateless, unused, with_error

NAN, INF = math.nan, math.inf
VERDICT_NAMES = list(VERDICTS)
LEVELS = (0.0, 0.02, 0.05, 0.099, 0.1, 0.249, 0.25, 0.59, 0.61, 1.4, 1.6, 1e4, INF)
WHAT_ALL_SAY = {"batch_size": 32.0, "batches": 8.0, "effective_momentum": 0.1}  # what explanations rest on
POOL = (*np.random.default_rng(1).lognormal(-2, 2, size=30).tolist(), INF)
CLASSES = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5)  # which of the six colours each of these has


def history(windows, first_step=1) -> History:
    """A history of windows, each a list of layers."""
    whole = History()
    for step, layers in enumerate(windows, first_step):
        whole.add(Report(layers), step)
    return whole


def table_of(whole: History):
    return table(whole.windows)


def picture_of(whole: History) -> np.ndarray:
    return draw(whole.windows)


def with_errors(**errors):
    return [with_error(name, error) if error == error else unused(name) for name, error in errors.items()]


@cache
def known(name, error, verdict="healthy"):
    """A layer, made once: the history is the matter here."""
    return unused(name) if math.isnan(error) else with_error(name, error, verdict=verdict, evidence=WHAT_ALL_SAY)


def quick_report(errors, verdicts=None) -> Report:
    return Report(known(name, errors[name], (verdicts or {}).get(name, "healthy")) for name in errors)


def rounded(errors) -> np.ndarray:
    """As a history keeps them."""
    return torch.tensor(errors, dtype=torch.float32).bfloat16().float().numpy()


def verdicts_of(whole: History) -> list[list[str]]:
    return [[None if cause == ABSENT else CAUSES[cause]["name"] for cause in row] for row in table_of(whole).causes]


@contextmanager
def not_forever():
    """What does not come to an end fails instead of hanging the suite."""

    def give_up(signum, frame):
        raise AssertionError("it does not come to an end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class AllWindows:
    """The reference: keeps each window as a dict, and merges runs of them when it is asked."""

    def __init__(self):
        self.windows = []

    def add(self, errors, verdicts, step):
        self.windows.append((errors, verdicts, step))

    def columns(self):
        stride = 1
        while len(self.windows) > 60 * stride:
            stride *= 2
        return [self.windows[start : start + stride] for start in range(0, len(self.windows), stride)], stride

    def errors(self, rows):
        runs, _ = self.columns()
        table = np.full((len(rows), len(runs)), NAN, dtype=np.float32)
        for column, run in enumerate(runs):
            for row, name in enumerate(rows):
                known = [errors[name] for errors, _, _ in run if not math.isnan(errors.get(name, NAN))]
                if known:
                    table[row, column] = max(known)
        return table

    def verdicts(self, rows):
        """That of the largest error of those of the run that need attention, if any do; the errors differ."""
        table = []
        for name in rows:
            cells = [[(errors[name], its[name]) for errors, its, _ in run] for run in self.columns()[0]]
            keys = [[(verdict not in NOT_SICK, error, verdict) for error, verdict in cell] for cell in cells]
            table.append([max(cell)[2] for cell in keys])
        return table


# ---------------------------------------------------------------------------------------------------------- the columns


@settings(max_examples=15, deadline=None)
@given(
    num_windows=st.integers(1, 1000), seed=st.integers(0, 2**32 - 1), share_unknown=st.sampled_from([0.0, 0.3, 0.95])
)
def test_columns_are_runs_of_equally_many_windows_and_hold_their_largest_error(num_windows, seed, share_unknown):
    rng = np.random.default_rng(seed)
    whole, reference = History(), AllWindows()
    names = ["first", "second.0", "second.1"]
    for step in np.cumsum(rng.integers(1, 50, size=num_windows)).tolist():
        errors = {name: POOL[rng.integers(len(POOL))] for name in names}
        errors = {name: NAN if rng.random() < share_unknown else error for name, error in errors.items()}
        whole.add(quick_report(errors), step)
        reference.add(errors, {}, step)
    found, (runs, stride) = table_of(whole), reference.columns()
    assert windows_in_column(num_windows, whole.windows.stride) == windows_in_column(num_windows) == stride
    assert len(found.steps) == len(runs) <= 60
    assert found.rows == names
    assert found.steps == [run[-1][2] for run in runs]
    np.testing.assert_array_equal(found.errors, rounded(reference.errors(names)))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(num_windows=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_the_verdict_of_a_column_is_that_of_the_worst_window(num_windows, seed):
    rng = np.random.default_rng(seed)
    whole, reference = History(), AllWindows()
    for step in range(num_windows):
        errors = {name: (step * 7919 % 199) / 256 + index for index, name in enumerate("abc")}  # each is another
        errors = {name: float(rounded(error)) for name, error in errors.items()}
        verdicts = {name: VERDICT_NAMES[rng.integers(len(VERDICT_NAMES))] for name in errors}
        whole.add(quick_report(errors, verdicts), step)
        reference.add(errors, verdicts, step)
    assert verdicts_of(whole) == reference.verdicts("abc")


@pytest.mark.parametrize("unknown_is_later", [False, True])
def test_a_window_without_an_error_does_not_take_the_verdict_from_one_that_has_one(unknown_is_later):
    known, unknown = [with_error("layer", 0.5, verdict="noisy")], [unused("layer")]
    windows = ([known, unknown] if unknown_is_later else [unknown, known]) * 31
    whole = history(windows)
    assert (table_of(whole).errors == np.full((1, 31), 0.5)).all()
    assert verdicts_of(whole) == [["noisy"] * 31]


def test_a_layer_that_one_report_lacks_keeps_its_history():
    found = table_of(history([with_errors(a=0.5, b=0.125), with_errors(b=0.25), with_errors(a=0.375, b=0.125)]))
    assert found.rows == ["a", "b"]
    np.testing.assert_array_equal(found.errors, [[0.5, NAN, 0.375], [0.125, 0.25, 0.125]])


def test_layers_that_come_later_or_in_another_order_keep_what_was():
    whole = history([with_errors(a=0.125, b=0.25), with_errors(c=0.625, b=0.5, a=0.375)])
    assert table_of(whole).rows == ["c", "b", "a"]
    np.testing.assert_array_equal(table_of(whole).errors, [[NAN, 0.625], [0.25, 0.5], [0.125, 0.375]])
    assert verdicts_of(whole)[0] == [None, "healthy"]


NAMES = [f"block{block}.norm{norm}" for block in range(30) for norm in range(4)]


@pytest.mark.parametrize(
    "later",
    [
        [*NAMES[1::2], *NAMES[0::2]],
        [*NAMES[:40], *NAMES[41:], NAMES[40]],
        NAMES[:-1],
    ],
    ids=["other order", "one first called later", "one less"],
)
def test_groups_keep_their_history_when_layers_come_go_or_are_first_called_in_another_order(later):
    first, second = (quick_report(dict.fromkeys(names, error)) for names, error in ((NAMES, 0.5), (later, 0.25)))
    whole = History()
    whole.add(first, 1)
    whole.add(second, 2)
    found = table_of(whole)
    expected = [[0.5, NAN if row == NAMES[-1] and len(later) < len(NAMES) else 0.25] for row in found.rows]
    np.testing.assert_array_equal(found.errors, expected)


# ------------------------------------------------------------------------------------------------------------- the rows


def resnet(blocks, prefix=""):
    yield f"{prefix}bn1"
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            yield from (f"{prefix}layer{stage}.{block}.bn{norm}" for norm in (1, 2, 3))
            if not block:
                yield f"{prefix}layer{stage}.{block}.downsample.1"


def densenet(blocks):
    yield "features.norm0"
    for number, count in enumerate(blocks, 1):
        yield from (f"features.denseblock{number}.denselayer{i + 1}.norm{k}" for i in range(count) for k in (1, 2))
        yield f"features.transition{number}.norm" if number < len(blocks) else "features.norm5"


SCHEMES = {
    "one": ["(root)"],
    "flat, 60": [f"bn{index}" for index in range(60)],
    "flat, 61": [f"bn{index}" for index in range(61)],
    "flat, 300": [f"bn{index}" for index in range(300)],
    "children of one": [f"net.{index}" for index in range(300)],
    "resnet-50": list(resnet((3, 4, 6, 3))),
    "resnet-152": list(resnet((3, 8, 36, 3))),
    "resnet-152 in a LightningModule": list(resnet((3, 8, 36, 3), "model.backbone.")),
    "densenet-201": list(densenet((6, 12, 48, 32))),
    "deep": [".".join(["net"] * 30 + [str(i), *["inner"] * 20, str(j)]) for i in range(40) for j in range(5)],
    "a chain": [".".join(["down"] * depth + ["norm"]) for depth in range(300)],
    "mixed": ["stem", *(f"body.{i}.{j}.norm" for i in range(9) for j in range(i + 3)), *(f"h.{i}" for i in range(70))],
    "two towers": [f"{tower}.layers.{index}.norm" for tower in ("image", "text") for index in range(150)],
    "alternating": [f"{tower}.{index}" for index in range(100) for tower in ("online", "target")],
    "many parents": [f"expert{index // 2}.norm{index % 2}" for index in range(700)],
    "1000": [f"encoder.stage{index // 100}.block{index // 4}.norm{index % 4}" for index in range(1000)],
    "layers beside a module of many": ["bn1", "bn2", *(f"body.{index}" for index in range(100))],
    "layers in layers": [name for index in range(40) for name in (f"m{index}.bn", f"m{index}.bn.inner")],
    "layers in a layer": ["a", "a.0", "a.1", *(f"b.{index}" for index in range(70))],
}

schemes = pytest.mark.parametrize("names", [pytest.param(names, id=id) for id, names in SCHEMES.items()])


def random_names(seed, with_inner):
    """Names in a random tree; in a layer there is another one only ``with_inner``."""
    rng = np.random.default_rng(seed)
    branching, depth = rng.integers(2, 40), rng.integers(1, 6)
    paths = [rng.integers(branching, size=rng.integers(1, depth + 1)) for _ in range(rng.integers(400))]
    names = list(dict.fromkeys(".".join(map(str, path)) for path in paths))
    outer = {name[:end] for name in names for end in range(len(name)) if name[end] == "."}
    return [name for name in names if with_inner or name not in outer]


def check_rows(names):
    with not_forever():
        rows = grouped(names)
    assert list(rows) == names
    members = Counter(rows.values())
    assert len(members) <= 60
    assert all(row.strip() and not row.startswith(" ") for row in members), "a row has no name"
    for name, row in rows.items():
        assert row == name or name.startswith(f"{row}.") or " to " in row
    if len(names) <= 60:
        assert rows == {name: name for name in names}
    return rows


@schemes
def test_every_layer_has_a_row_and_there_are_at_most_60_that_name_it(names):
    check_rows(names)


@settings(max_examples=50, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_of_any_names(seed):
    check_rows(random_names(seed, with_inner=False))


@settings(max_examples=50, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_of_any_names_where_layers_contain_layers(seed):
    check_rows(random_names(seed, with_inner=True))


def test_layers_in_one_row_are_consecutive_siblings_and_the_row_names_the_first_and_the_last():
    assert set(grouped(f"net.{index}" for index in range(61)).values()) == {
        *(f"net.{first} to {first + 1}" for first in range(0, 60, 2)),
        "net.60",
    }


def test_layers_of_one_module_share_the_row_of_that_module():
    rows = grouped(SCHEMES["resnet-152"])
    assert rows["layer3.17.bn1"] == rows["layer3.17.bn2"] == rows["layer3.17.bn3"] == "layer3.17"
    assert rows["bn1"] == "bn1"
    assert len({rows[f"layer3.{block}.bn1"] for block in range(36)}) == 36


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["one", "flat, 300", "resnet-152", "densenet-201", "mixed", "alternating"])
def test_the_rows_are_in_the_order_of_the_reports_layers(scheme):
    names = SCHEMES[scheme]
    whole, rows = history([[with_error(name, 0.1) for name in names]]), grouped(names)
    assert table_of(whole).rows == sorted(set(rows.values()), key=[rows[name] for name in names].index)


@pytest.mark.parametrize("scheme", ["flat, 300", "resnet-152", "densenet-201", "mixed"])
def test_the_error_of_a_group_is_the_largest_of_its_layers(scheme):
    names, rng = SCHEMES[scheme], np.random.default_rng(0)
    errors = {name: float(rng.choice([NAN, *rng.lognormal(-2, 1, size=3)])) for name in names}
    whole = history([with_errors(**errors)])
    expected = {}
    for name, row in grouped(names).items():
        expected[row] = np.fmax(expected.get(row, NAN), rounded(errors[name]))
    found = table_of(whole)
    np.testing.assert_array_equal(found.errors[:, 0], [expected[row] for row in found.rows])
    assert found.sizes == [list(grouped(names).values()).count(row) for row in found.rows]


def test_the_verdict_of_a_group_is_that_of_its_worst_layer():
    layers = [with_error(f"net.{index}", 0.3 * (index % 2), verdict="drifting") for index in range(120)]
    layers[6] = with_error("net.6", 0.2, verdict="tiny-batch")  # needs attention, its neighbour with 0.3 does not
    layers[9] = with_error("net.9", 0.3, verdict="noisy")
    layers[10], layers[11] = unused("net.10"), stateless("net.11")
    whole = history([layers])
    of_row = dict(zip(table_of(whole).rows, verdicts_of(whole), strict=True))
    assert of_row["net.6 to 7"] == ["tiny-batch"]
    assert of_row["net.8 to 9"] == ["noisy"]
    assert of_row["net.10 to 11"][0] in ("unused", "no-running-stats")
    assert of_row["net.0 to 1"] == ["drifting"]


# ---------------------------------------------------------------------------------------------------------- the picture


def plot_of(picture):
    """What lies within the upper black frame."""
    black = (picture == 0).all(axis=2)
    frames = np.flatnonzero(black.sum(axis=1) > 0.9 * black.sum(axis=1).max())
    top, bottom = frames[0], next(below for below in frames if below > frames[0] + 10)
    left, right = np.flatnonzero(black[top])[[0, -1]]
    return slice(top, bottom + 1), slice(left, right + 1)


def cells(picture, num_rows, num_columns, x=0.5, y=0.5):
    """The colours at a point of each cell, ``(rows, columns, 3)``."""
    plot = picture[plot_of(picture)]
    rows = (len(plot) - 1) * (np.arange(num_rows) + y) / num_rows
    columns = (plot.shape[1] - 1) * (np.arange(num_columns) + x) / num_columns
    return plot[np.ix_(rows.round().astype(int), columns.round().astype(int))].astype(int)


def level_colors():
    picture = picture_of(history([[with_error(f"layer{index}", error) for index, error in enumerate(LEVELS)]]))
    return cells(picture, len(LEVELS), 1)[:, 0]


def linear(colors):
    """sRGB to linear light."""
    colors = np.asarray(colors) / 255
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def lightness(linear_colors):
    """CIELAB's L*, under D65."""
    luminance = np.clip(linear_colors, 0, 1) @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > (6 / 29) ** 3, 116 * np.cbrt(luminance) - 16, luminance * (29 / 3) ** 3)


# G. M. Machado, M. M. Oliveira, L. A. F. Fernandes (2009), at severity 1, of linear RGB.
COLOR_VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def worst_case(num_layers=60, num_windows=60, name="encoder.blocks.with_a_rather_long_name_indeed.norm{}"):
    """All verdicts and colours in a picture."""
    whole, names = History(), [name.format(index) for index in range(num_layers)]
    for window in range(num_windows):
        kinds = {name: (index + window) % len(VERDICTS) for index, name in enumerate(names)}
        errors = {name: LEVELS[kind % len(LEVELS)] for name, kind in kinds.items()}
        whole.add(quick_report(errors, {name: VERDICT_NAMES[kind] for name, kind in kinds.items()}), window + 1)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_layers", "num_windows", "name"),
    [
        (1, 1, "{}"),
        (1, 60, "layer{}"),
        (20, 61, "encoder.blocks.with_a_rather_long_name.norm{}"),
        (60, 1, "{}"),
        (60, 60, "{}"),
        (300, 2, "encoder.blocks.with_a_rather_long_name.norm{}"),
    ],
)
def test_a_picture_of_any_size_is_small_enough_and_its_drawing_warns_of_nothing(num_layers, num_windows, name):
    whole = worst_case(num_layers, num_windows, name)
    with without_warnings():
        picture = picture_of(whole)
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert picture.flags.c_contiguous
    assert picture.shape[0] <= 1440
    assert picture.shape[1] <= 1000


def test_nothing_cannot_be_drawn():
    with pytest.raises(ValueError, match="no layer"):
        picture_of(history([[], []]))


PLAIN = ["x" * 200, "W" * 200, "$a", "a\\b", "100%", "{x}", "<b>&amp;", "_x", "#", "a " * 9]
ODD = ["$a_b$", r"$\frac$", "a_b^c", "a\nb", "ä→β", "層"]  # may be drawn as something else


def test_any_name_can_be_drawn():
    whole = history([[with_error(name, 0.3, verdict="noisy") for name in [*PLAIN, *ODD]]] * 3)
    with without_warnings():
        picture = picture_of(whole)
    assert picture.shape[0] <= 1400
    assert picture.shape[1] <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_a_name_is_not_drawn_as_another_of_the_same_length(name):
    picture = picture_of(history([[with_error(name, 0.3)]]))
    other = picture_of(history([[with_error("x" * len(name), 0.3)]]))
    assert picture.shape != other.shape or (picture != other).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "x" * 28, "x" * 29, "W" * 200, "層" * 40])
def test_nothing_is_cut_off_at_the_borders(name):
    whole = history([[with_error(name, 0.3, verdict=verdict)] for verdict in VERDICTS], first_step=1_234_567)
    picture = picture_of(whole)
    for border in (picture[:, :4], picture[:, -4:], picture[:4], picture[-4:]):
        assert (border == 255).all()


@pytest.mark.parametrize("num_windows", [1, 7, 30, 60])
def test_the_steps_under_the_columns_stay_apart(num_windows):
    picture = picture_of(history([with_errors(layer=0.0)] * num_windows, first_step=1_234_567))
    bottom = plot_of(picture)[0].stop
    ink = np.flatnonzero((picture[bottom + 3 : bottom + 18] < 128).any(axis=(0, 2)))
    labels = np.split(ink, np.flatnonzero(np.diff(ink) > 4) + 1)
    assert min(num_windows, 3) <= len(labels) <= num_windows
    assert all(40 < label[-1] - label[0] < 70 for label in labels), "seven digits take less than 70 pixels"


@pytest.mark.slow
def test_the_same_history_is_the_same_picture():
    first, second = worst_case(20, 30), worst_case(20, 30)
    picture = picture_of(first)
    np.testing.assert_array_equal(picture_of(first), picture)
    np.testing.assert_array_equal(picture_of(second), picture)
    resumed = History()
    resumed.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(picture_of(resumed), picture)


def test_a_cells_colour_is_that_of_its_error():
    colors = level_colors()
    for index, error in enumerate(LEVELS):
        for other, other_error in enumerate(LEVELS):
            same = (colors[index] == colors[other]).all()
            assert same == (CLASSES[index] == CLASSES[other]), f"{error} and {other_error}"


def test_infinite_errors_are_darkest_and_unknown_ones_white():
    picture = picture_of(history([with_errors(known=0.0, infinite=INF, unknown=NAN)]))
    colors = cells(picture, 3, 1, x=0.1)[:, 0]
    assert (colors[2] == 255).all()
    assert not (colors[0] == 255).all()
    assert lightness(linear(colors[1])) == lightness(linear(level_colors())).min()


def test_every_window_of_every_layer_has_its_cell():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 6, size=(17, 12))
    errors = np.array([0.01, 0.05, 0.15, 0.4, 1.0, 5.0])[classes]
    whole = history([with_error(f"layer{i}", error) for i, error in enumerate(column)] for column in errors.T)
    palette = level_colors()[[CLASSES.index(index) for index in range(6)]]
    np.testing.assert_array_equal(cells(picture_of(whole), 17, 12), palette[classes])


@pytest.mark.parametrize("vision", COLOR_VISION)
def test_larger_errors_are_darker_in_the_eyes_of_anyone(vision):
    palette = level_colors()[[CLASSES.index(index) for index in range(6)]]
    steps = -np.diff(lightness(linear(palette) @ np.transpose(COLOR_VISION[vision])))
    assert (steps > 8).all(), steps


@pytest.mark.parametrize("error", [0.0, 0.05, 0.15, 0.3, 1.0, 5.0, NAN])
def test_a_letter_says_where_a_verdict_begins_and_stands_out_from_its_cell(error):
    def window(verdict):
        return [layer("layer", running_mean=[error], verdict=verdict), with_error("other", 0.0)]

    picture = picture_of(history([window(verdict) for verdict in ("healthy", "noisy", "noisy", "lagging", "healthy")]))
    plot = picture[plot_of(picture)]
    row = plot[3 : len(plot) // 2 - 3]
    width = plot.shape[1] // 5
    ink = []
    for left in range(0, 5 * width, width):
        light = lightness(linear(row[:, left + 4 : left + width - 4]))
        ink.append(np.abs(light - light[0, 0]).max())
    assert ink[0] == ink[4] == 0
    assert min(ink[1], ink[3]) > 40  # letters
    assert ink[2] > 20  # a dot


def test_the_picture_of_healthy_layers_has_no_legend_of_verdicts():
    healthy, sick = history([with_errors(a=0.01)]), history([[with_error("a", 0.01, verdict="noisy")]])
    assert (picture_of(healthy) != picture_of(sick)).any()


@pytest.fixture
def odd_settings():
    """What a user may have set for figures of their own."""
    with mpl.rc_context():
        plt.style.use("dark_background")
        odd = {
            **{"font.size": 30, "image.cmap": "hot", "image.interpolation": "bicubic", "image.origin": "lower"},
            **{"savefig.dpi": 7, "figure.dpi": 33, "axes.grid": True, "font.family": "serif", "axes.linewidth": 5},
            **{"figure.autolayout": True, "axes.xmargin": 0.4, "xtick.labelsize": 3, "savefig.bbox": "tight"},
            **{"lines.antialiased": False, "text.antialiased": False, "path.sketch": (1, 100, 2)},
            **{"font.monospace": ["DejaVu Serif"], "axes.unicode_minus": False, "scatter.marker": "x"},
            **{"text.color": "red", "figure.facecolor": "green", "ytick.left": False, "image.aspect": "equal"},
        }
        mpl.rcParams.update(odd)
        yield


def test_settings_of_matplotlib_do_not_change_the_picture(request):
    whole = worst_case(5, 7)
    picture = picture_of(whole)
    request.getfixturevalue("odd_settings")
    np.testing.assert_array_equal(picture_of(whole), picture)


@pytest.mark.usefixtures("odd_settings")
def test_drawing_leaves_the_settings_and_figures_of_the_user_and_all_random_states_as_they_are():
    fig, ax = plt.subplots()
    whole = worst_case(5, 7)
    torch.manual_seed(3)
    before = dict(mpl.rcParams), plt.get_fignums(), plt.gcf(), plt.gca(), mpl.get_backend(), warnings.filters[:]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        picture_of(whole)
        after = dict(mpl.rcParams), plt.get_fignums(), plt.gcf(), plt.gca(), mpl.get_backend(), warnings.filters[:]
        assert after == before
        assert (plt.gcf(), plt.gca()) == (fig, ax)
    finally:
        plt.close(fig)
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_drawing_changes_nothing_of_the_history():
    whole = worst_case(5, 7)
    before = whole.document()
    picture_of(whole)
    assert whole.document() == before


def test_a_flag_that_needs_attention_has_a_mark_of_its_own():
    healthy = with_error("a", 0.01)
    whole = history([[with_error("a", 0.01, flags=("never-updated",), needs_attention=True)]])
    assert verdicts_of(whole) == [["never-updated"]]
    picture, other = (plot[plot_of(plot)] for plot in (picture_of(whole), picture_of(history([[healthy]]))))
    assert picture.shape == other.shape
    assert (picture != other).any()
