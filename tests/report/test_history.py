"""The history: what it remembers against all windows kept, its documents, and what it can be saved as."""

import copy
import csv
import io
import json
import math
import pickle
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor import Report
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.page import document
from lightning_bnmonitor.report.channel_values import MAX_CHANNELS, channel_values, largest_share
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.kept_windows import CAUSES, MAX_WINDOWS, KeptWindows, Row
from tests.page.made_documents import words_of
from tests.page.older_documents import old_set
from tests.report.made_reports import NOT_SICK, branches_report, layer, stateless, unused, with_error

NAN, INF = math.nan, math.inf
NAMES = ("a", "b.0", "b.1")
ERRORS = (0.0, 0.03125, 0.125, 0.25, 0.5, 1.0, 8.0, INF, NAN)  # bfloat16 has them exactly
WHAT_ALL_SAY = {"batch_size": 32.0, "batches": 8.0, "effective_momentum": 0.1}  # what explanations rest on


@cache
def known(name, error, verdict, val_error):
    """A layer, made once: the history is the matter here."""
    evidence = WHAT_ALL_SAY if math.isnan(val_error) else WHAT_ALL_SAY | {"val_error": val_error}
    if math.isnan(error):
        return layer(name, mean=[NAN], var=[NAN], num_samples=0, verdict=verdict, evidence=evidence)
    return with_error(name, error, verdict=verdict, evidence=evidence)


def drawn_window(rng, names=NAMES):
    """A report of some of the layers."""
    there = [name for name in names if rng.random() < 0.9]
    verdicts = ("healthy", "drifting", "noisy", "lagging")
    return Report(
        known(name, *(values[rng.integers(len(values))] for values in (ERRORS, verdicts, ERRORS))) for name in there
    )


def worse(first, second):
    """Of two cells the worse one; of equal ones, the later."""
    if first is None or second is None:
        return first or second

    def key(cell):
        _, attention, numbers = cell
        return attention, max((n for n in (numbers[0], numbers[2]) if not math.isnan(n)), default=-1.0)

    return first if key(first) > key(second) else second


def cell_of(report, name):
    if name not in report:
        return None
    its = report[name]
    numbers = [its.evidence.get("noise_error" if key == "noise" else key, NAN) for key in document.METRICS]
    return its.verdict, its.needs_attention, torch.tensor(numbers).bfloat16().float().tolist()


class AllWindows:
    """The reference: keeps each window, and merges runs of them when it is asked."""

    def __init__(self):
        self.windows = []

    def columns(self):
        """All windows but the last in runs of ``stride``, each begun where a multiple of that is; then the last."""
        stride = 1
        while -(-(len(self.windows) - 1) // stride) + 1 > MAX_WINDOWS:
            stride *= 2
        before = self.windows[:-1]
        return [*(before[start : start + stride] for start in range(0, len(before), stride)), self.windows[-1:]]

    def cell(self, run, name):
        cell = None
        for report, _ in run:
            cell = worse(cell, cell_of(report, name))
        return cell


def assert_remembers(history, reference):
    windows, cells = history.windows, history.windows.cells()
    columns = reference.columns()
    assert windows.steps == [run[-1][1] for run in columns]
    assert windows.starts == [sum(map(len, columns[:index])) for index in range(len(columns))]
    for index, run in enumerate(columns):
        for position, name in enumerate(windows.layers):
            expected = reference.cell(run, name)
            cause = cells.cause[index, position]
            if expected is None:
                assert cause == document.ABSENT
                continue
            assert (CAUSES[cause]["name"], cells.attention[index, position]) == expected[:2]
            found = [cells.metrics[key][index, position] if key in cells.metrics else NAN for key in document.METRICS]
            np.testing.assert_array_equal(found, expected[2])


@settings(max_examples=10, deadline=None)
@given(num_windows=st.one_of(st.integers(1, 12), st.integers(398, 404), st.integers(700, 900)), seed=st.integers(0, 99))
def test_it_remembers_runs_of_windows_by_their_worst_and_the_last_by_itself(num_windows, seed):
    rng, history, reference = np.random.default_rng(seed), History(), AllWindows()
    for step in range(num_windows):
        reference.windows.append((drawn_window(rng), 10 * step))
        history.add(*reference.windows[-1])
        assert len(history) <= MAX_WINDOWS
    assert_remembers(history, reference)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(at=st.integers(1, 500), more=st.integers(1, 500), seed=st.integers(0, 99))
def test_a_saved_history_goes_on_as_one_that_never_stopped(at, more, seed):
    rng, history, resumed = np.random.default_rng(seed), History(), History()
    for step in range(at):
        history.add(drawn_window(rng), step)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.document() == history.document()
    for step in range(at, at + more):
        report = drawn_window(rng)
        history.add(report, step)
        resumed.add(report, step)
    assert resumed.document() == history.document()
    assert resumed.channels() == history.channels()


def test_a_validation_changes_the_last_window_only():
    first, second = Report([with_error("a", 0.5)]), Report([with_error("a", 0.25)])
    validated = Report([with_error("a", 0.25, evidence={"val_error": 2.0}, verdict="lagging")])
    history, expected = History(), History()
    for step, report in enumerate((first, second)):
        history.add(report, step)
    history.update(validated)
    expected.add(first, 0)
    expected.add(validated, 1)
    assert history.document() == expected.document()
    assert history.channels() == expected.channels()


def test_before_the_first_window_there_is_nothing_to_change():
    with pytest.raises(ValueError, match="add"):
        History().update(Report([]))


@pytest.mark.parametrize(("num_layers", "most"), [(1000, 400), (2000, 200), (300_000, 2)])
def test_many_layers_have_fewer_windows(num_layers, most):
    windows = KeptWindows()
    layers = {f"bn{index}": ("healthy", False, [0.5] * len(document.METRICS)) for index in range(num_layers)}
    for step in range(most + 1):
        windows.append(Row(step, "", layers))
    assert most / 2 < len(windows.steps) <= most
    assert windows.steps[-1] == most


def test_the_sentence_of_merged_windows_is_that_of_the_one_with_more_sick_layers():
    sick, healthy = (
        [known(name, 0.5, "noisy", NAN) for name in "ab"],
        [known(name, 0.0, "healthy", NAN) for name in "ab"],
    )
    history = History()
    for step in range(MAX_WINDOWS + 1):
        history.add(Report(sick if step % 4 == 0 else healthy), step)
    said = history.to_dict()["windows"]
    assert [window["headline"].split(" ")[0] for window in said[:4]] == ["2", "None", "2", "None"]
    assert said[0]["layers"]["a"]["cause"] == "noisy"


# -------------------------------------------------------------------------------------------------------- the documents


def decoded(history):
    """The document as its reader has it."""
    return document.decode(document.encode(history.document()))


def test_the_document_tells_of_real_layers_what_the_report_says():
    report, history = branches_report(), History("mine")
    history.add(report, 7)
    found = decoded(history)
    assert (found["format"], found["prefix"]) == (2, "mine")
    assert found["windows"] == {"step": [7], "headline": [str(report).splitlines()[0]]}
    assert found["layers"]["name"] == list(report)
    assert found["layers"]["type"] == [its.type for its in report.values()]
    assert found["layers"]["channels"] == [its.num_features for its in report.values()]
    assert found["latest"]["window"] == 0
    assert found["latest"]["text"] == report.brief()
    texts = [*found["texts"], ""]  # -1 is the last
    for its, said in zip(report.values(), found["latest"]["layers"], strict=True):
        assert found["causes"][said["cause"]]["name"] == its.diagnosis.cause
        assert said["words"] == ", ".join([its.verdict, *its.flags])
        assert its.explanation == f"{its.name}: {its.verdict}. {texts[said['explanation']]}"
        assert texts[said["remedy"]] == its.remedy
        assert said["evidence"].keys() == its.evidence.keys() <= found["evidence"].keys()
        for key, value in said["evidence"].items():
            assert float(value) == pytest.approx(its.evidence[key], rel=1e-3)
    cells = document.cells(found)
    assert "val_error" not in cells.metrics  # nobody has it
    for position, its in enumerate(report.values()):
        assert float(cells.metrics["eval_error"][0, position]) == pytest.approx(
            its.evidence.get("eval_error", NAN), rel=2**-8, nan_ok=True
        )


def test_causes_are_all_verdicts_and_flags_with_letters_and_colours():
    history = History()
    history.add(Report([with_error("a", 0.0)]), 1)
    causes = {cause["name"]: cause for cause in decoded(history)["causes"]}
    for name, verdict in VERDICTS.items():
        letter = "" if name == "healthy" else verdict.letter
        assert causes[name] == {"name": name, "letter": letter, "color": verdict.color, "kind": "verdict"}
    flags = [cause for cause in causes.values() if cause["kind"] == "flag"]
    assert len(flags) == len(causes) - len(VERDICTS)
    assert len(causes) < 127  # what a byte has room for
    assert {cause["color"] for cause in flags}.isdisjoint(verdict.color for verdict in VERDICTS.values())


def test_what_json_lacks_is_spelled_out():
    history = History()
    odd = layer("<a>&\"'/ä", running_mean=[NAN], verdict="non-finite", evidence={"eval_error": INF, "z_mean": NAN})
    history.add(Report([odd, unused("b"), stateless("c")]), 1)
    found = decoded(history)
    assert found["layers"]["name"][0] == "<a>&\"'/ä"
    assert found["latest"]["layers"][0]["evidence"]["eval_error"] == "Infinity"
    assert found["latest"]["layers"][0]["evidence"]["z_mean"] == "NaN"
    assert document.cells(found).metrics["eval_error"][0, 0] == INF


def test_a_layer_that_the_last_window_lacks_has_no_latest():
    history = History()
    history.add(Report([with_error("a", 0.5), with_error("b", 0.5)]), 1)
    history.add(Report([with_error("b", 0.25)]), 2)
    found = decoded(history)
    assert found["layers"]["name"] == ["b", "a"]
    assert [said is None for said in found["latest"]["layers"]] == [False, True]
    assert [said["window"] for said in found["worst"]["layers"]] == [1, 1]
    assert list(history.channels()["layers"]) == ["b"]


def test_a_history_of_no_layers_is_a_document():
    history = History()
    history.add(Report([]), 3)
    found = decoded(history)
    assert (found["windows"]["step"], found["layers"]["name"], found["latest"]["layers"]) == ([3], [], [])
    assert document.cells(found).cause.shape == (1, 0)
    assert history.channels()["layers"] == {}


def numbers(text, count=3):
    """As float32 of which the bits are six digits of 64 each, all first ones first; what is not there is zero."""
    return words_of(text, count).view(np.float32)


def of_channels(seed, channels, **fields):
    rng = np.random.default_rng(seed)
    moments = {
        f"{of}_{moment}": rng.lognormal(size=channels) for of in ("now", "running") for moment in ("mean", "var")
    }
    errors = {f"running_{moment}_stderr": rng.lognormal(size=channels) for moment in ("mean", "var")}
    return layer("a", mean=rng.normal(size=channels), var=rng.lognormal(size=channels), **moments, **errors, **fields)


def test_channels_are_those_of_the_last_window_and_of_the_worst_one():
    reports, history = (
        [of_channels(seed, 5, evidence={"eval_error": error}) for seed, error in ((1, 0.5), (2, 2.0), (3, 1.0))],
        History(),
    )
    for step, its in enumerate(reports):
        history.add(Report([its]), step)
    found = json.loads(json.dumps(history.channels()))["layers"]["a"]
    for which, step in (("latest", 2), ("worst", 1)):
        kept, its = found[which], reports[step]
        assert (kept["step"], kept["of"], kept["index"], kept["course"]) == (step, 5, None, None)
        std = its.now_var.sqrt()
        for name, value, scale in (
            ("exact_mean", its.now_mean, std),
            ("exact_var", its.now_var, its.now_var),
            ("running_mean", its.running_mean, std),
            ("running_var", its.running_var, its.running_var),
            ("stderr_mean", its.running_mean_stderr, its.running_mean_stderr),
            ("stderr_var", its.running_var_stderr, its.running_var_stderr),
            ("eval_error", its.eval_error, its.eval_error),
        ):
            precision = 1e-2 if "err" in name else 1e-3
            assert (np.abs(numbers(kept["values"][name], 5) - value.numpy()) <= precision * scale.numpy()).all(), name
        assert "val_mean" not in kept["values"]


def test_channels_tell_of_validation_where_there_was_one():
    received, running = torch.rand(2, 2, 3, dtype=torch.float64)
    its = of_channels(0, 3, validation=received, val_running=running)
    values = channel_values(its, 1, 9).to_dict()["values"]
    np.testing.assert_allclose(numbers(values["val_var"]), received[1], rtol=1e-3)
    np.testing.assert_allclose(numbers(values["val_error"]), its.val_error, rtol=1e-2)


def test_what_is_not_finite_and_dead_channels_stay_so():
    its = layer(
        "a", mean=[NAN, 1.0, 0.0], var=[NAN, 0.0, 1.0], running_mean=[1.0, 1e30, INF], running_var=[1.0, 0.0, 1.0]
    )
    values = channel_values(its, 1, 9).to_dict()["values"]
    np.testing.assert_array_equal(numbers(values["exact_mean"]), [NAN, 1, 0])
    np.testing.assert_array_equal(numbers(values["running_mean"]), np.float32([1.0, 1e30, INF]))
    np.testing.assert_array_equal(numbers(values["exact_var"]), [NAN, 0, 1])


def test_of_too_many_channels_the_worst_are_kept_in_their_order():
    errors = [0.1, NAN, 3.0, 0.2, INF, 1.0]
    its = layer("a", mean=[0.0] * 6, var=[1.0] * 6, running_mean=errors, running_var=[1.0] * 6)
    kept = channel_values(its, 1, 3)
    assert kept.to_dict()["index"] == [1, 2, 4]  # what is NaN gives NaN in eval()
    assert (kept.num_channels, len(kept.values["exact_mean"])) == (6, 3)


@given(st.lists(st.integers(0, 9000), max_size=30))
def test_layers_share_the_channels_that_may_be_kept(channels):
    share = largest_share(channels)
    kept = sum(min(count, share) for count in channels)
    assert kept <= MAX_CHANNELS
    assert kept == sum(channels) or sum(min(count, share + 1) for count in channels) > MAX_CHANNELS


def test_the_course_is_that_of_the_channel_that_is_worst():
    history, report = History(), branches_report()
    history.add(report, 1)
    for name, kept in history.channels()["layers"].items():
        course, its = kept["latest"]["course"], report[name]
        if not len(its.course.num_batches):
            assert course is None
            continue
        worst = its.eval_error.argmax() if its.has_running_stats else 0
        assert course["channel"] == worst
        assert course["batches"] == its.course.num_batches.tolist()
        np.testing.assert_allclose(course["mean"], its.course.mean[:, worst], rtol=1e-5)
        np.testing.assert_allclose(course["var"], its.course.var[:, worst], rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- what it gives


def small_history():
    history = History()
    history.add(Report([known("a,b", 0.5, "noisy", NAN), known("c", NAN, "healthy", NAN)]), 10)
    history.add(Report([known("a,b", INF, "noisy", 0.25)]), 20)
    return history


def test_as_a_dict_it_has_windows_of_layers():
    first, second = json.loads(small_history().to_json())["windows"]
    assert (first["step"], second["step"]) == (10, 20)
    assert first["headline"] == "1 of 2 BatchNorm layers needs attention: 1 noisy."
    assert first["layers"]["a,b"] | {"noise": 0} == {
        "cause": "noisy",
        "needs_attention": True,
        "eval_error": 0.5,
        "noise": 0,
    }
    assert "eval_error" not in first["layers"]["c"]
    assert second["layers"]["a,b"]["eval_error"] == "Infinity"
    assert second["layers"]["a,b"]["val_error"] == 0.25
    assert list(second["layers"]) == ["a,b"]


def test_as_csv_it_has_a_row_for_each_layer_in_each_window():
    rows = list(csv.DictReader(io.StringIO(small_history().to_csv())))
    assert [(row["step"], row["layer"], row["cause"], row["needs_attention"]) for row in rows] == [
        ("10", "a,b", "noisy", "True"),
        ("10", "c", "healthy", "False"),
        ("20", "a,b", "noisy", "True"),
    ]
    assert [row["eval_error"] for row in rows] == ["0.5", "", "Infinity"]
    assert [row["val_error"] for row in rows] == ["", "", "0.25"]


@pytest.mark.parametrize("make", [lambda: small_history(), lambda: branches_report()])
def test_as_html_it_is_one_page_with_its_data_inside(tmp_path, make):
    made = make()
    made.to_html(tmp_path / "page.html")
    made.to_html(str(tmp_path / "again.html"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "again.html").read_text(encoding="utf-8")
    data = text.split('id="bnmonitor-data">')[1].split("</script>")[0]
    (run,) = json.loads(data)["runs"].values()
    names = run["history"]["layers"]["name"]
    assert names == (list(made) if isinstance(made, Report) else ["a,b", "c"])
    assert set(run["channels"]["layers"]) <= set(names)


# ------------------------------------------------------------------------------------------------------------ its state


def test_a_saved_state_and_a_copy_stay_as_they_are_when_the_history_goes_on():
    history = small_history()
    state, twins, before = (
        history.state_dict(),
        [copy.deepcopy(history), pickle.loads(pickle.dumps(history))],
        history.document(),
    )
    for step in range(30, 34):
        history.add(Report([known("a,b", 1.0, "lagging", NAN), known("d", 0.5, "noisy", NAN)]), step)
    resumed = History()
    resumed.load_state_dict(state)
    assert [each.document() == before for each in (resumed, *twins)] == [True] * 3
    assert all(twin.channels() == small_history().channels() for twin in twins)


def test_a_state_of_another_version_keeps_what_this_one_knows():
    history = small_history()
    state = history.state_dict()
    names = ["an old one", *reversed(state["windows"]["names"])]
    renamed = {before: names.index(name) for before, name in enumerate(state["windows"]["names"])}
    causes = [
        [cause if cause == 255 else renamed[cause & 127] + (cause & 128) for cause in row]
        for row in state["windows"]["causes"].tolist()
    ]
    causes[0][1] = names.index("an old one")
    resumed = History()
    resumed.load_state_dict(
        {**state, "windows": {**state["windows"], "names": names, "causes": torch.tensor(causes, dtype=torch.uint8)}}
    )
    expected = history.windows.causes.copy()
    expected[0, 1] = document.ABSENT
    np.testing.assert_array_equal(resumed.windows.causes, expected)


def test_the_state_in_a_checkpoint_of_version_0_5_is_gone_on_from():
    history = History()
    for step, error in ((1, 0.5), (2, 0.25)):
        history.add(Report([of_channels(step, 5, evidence={"eval_error": error})]), step)
    state = history.state_dict()
    rest = json.loads(zlib.decompress(state["rest"].numpy().tobytes()))
    kept = rest["worst"]["a"]
    old = {"format": 1} | rest | {"format": 1, "worst": {"a": kept | {"channels": old_set(kept["channels"])}}}
    state["rest"] = torch.tensor(list(document.encode(old)), dtype=torch.uint8)
    resumed = History()
    resumed.load_state_dict(state)
    assert resumed.document() == history.document()
    worst = history.channels()["layers"]["a"]["worst"]
    for each in (history, resumed):
        each.add(Report([of_channels(3, 5, evidence={"eval_error": 0.125})]), 3)
        assert each.channels()["layers"]["a"]["worst"] == worst


def test_a_state_of_another_format_is_refused():
    state = small_history().state_dict()
    other = document.encode({"format": 3})
    with pytest.raises(ValueError, match="format 3"):
        History().load_state_dict(state | {"rest": torch.tensor(list(other), dtype=torch.uint8)})


def test_the_state_is_small():
    history = History()
    report = Report([known(f"net.{index}", 0.5, "noisy", NAN) for index in range(100)])
    for step in range(MAX_WINDOWS):
        history.add(report, step)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    cells = 100 * MAX_WINDOWS
    assert file.tell() < cells * (1 + 2 * len(document.METRICS)) + 50 * MAX_WINDOWS + 40_000


def test_verdicts_that_are_not_sick_are_those_of_the_table():
    assert {name for name, verdict in VERDICTS.items() if verdict.attention != "always"} == set(NOT_SICK) | {
        "own-forward",
        "averaged",
    }
