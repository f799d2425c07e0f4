"""Every form in which a report is read: printed, brief, Markdown and HTML."""

import re

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, Report
from tests.report.made_reports import METRICS, NAN, layer, stateless, unused, with_error
from tests.report.read_tables import FORMS, Cells, as_shown, markdown_rows, text_rows

MARKDOWN_COLUMNS = ["layer", "verdict", "eval_error", "noise"]
COLUMNS = ["layer", "verdict", "eval_error", "noise", *METRICS[1:], "channels", "batches", "samples"]


def sample_report() -> Report:
    return Report(
        [
            with_error("encoder.0", 0.25, verdict="drifting", flags=("dead-channels", "missed-calls")),
            stateless("encoder.1"),
            layer("10", running_mean=[NAN], verdict="non-finite", evidence={"non_finite_running_stats": 1.0}),
            unused("head"),
            with_error("tail", 0.125, verdict="lagging", evidence={"noise_error": NAN}),
        ]
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_every_layer(form):
    text = FORMS[form](sample_report())
    assert all(name in text for name in sample_report())


def test_tables_have_a_row_for_each_layer_with_the_worst_first():
    order = ["10", "tail", "encoder.0", "encoder.1", "head"]
    report = sample_report()
    assert [row[0] for row in text_rows(str(report))] == order
    assert [row[0] for row in markdown_rows(report.to_markdown())[2:]] == order
    assert [row[0].strip() for row in Cells(report._repr_html_()).rows if row] == order


def test_tables_show_verdict_flags_counts_and_the_numbers_of_the_summary():
    report = sample_report()
    rows = {row[0]: row for row in text_rows(str(report))}
    assert str(report).split("\n\n")[1].splitlines()[0].split() == COLUMNS
    counts = ["1", "10", "80"]
    errors = ["0.2500", "0.0500", "0.2500", "0.2500", "0.0000"]
    assert rows["encoder.0"] == ["encoder.0", "drifting, dead-channels, missed-calls", *errors, *counts]
    assert rows["10"] == ["10", "non-finite", "inf", "0.0500", "-", "-", "0.0000", *counts]
    assert rows["tail"] == ["tail", "lagging", "0.1250", "-", "0.1250", "0.1250", "0.0000", *counts]
    assert rows["head"] == ["head", "unused", "-", "0.0500", "-", "-", "-", "1", "0", "0"]
    in_html = [[cell.strip() for cell in row] for row in Cells(report._repr_html_()).rows if row]
    assert in_html == [rows[name] for name in ("10", "tail", "encoder.0", "encoder.1", "head")]
    in_markdown = markdown_rows(report.to_markdown())
    assert in_markdown[0] == MARKDOWN_COLUMNS
    assert in_markdown[2:] == [[row[COLUMNS.index(name)] for name in MARKDOWN_COLUMNS] for row in in_html]


def test_the_column_noise_is_the_floor_of_the_evidence():
    report = Report([layer("known", evidence={"noise_error": 0.0625}), layer("unknown", evidence={"noise_error": NAN})])
    del report["unknown"].diagnosis.evidence["noise_error"]
    assert {row[0]: row[3] for row in text_rows(str(report))} == {"known": "0.0625", "unknown": "-"}


def test_what_validation_shows_has_columns_of_its_own_where_it_is_known():
    report = Report([layer("a", evidence={"val_error": 0.375, "val_shift": 0.5}), layer("b")])
    header = [*COLUMNS[:4], "val_error", "val_shift", *COLUMNS[4:]]
    assert str(report).split("\n\n")[1].splitlines()[0].split() == header
    rows = [dict(zip(header, row, strict=True)) for row in text_rows(str(report))]
    assert [(row["layer"], row["val_error"], row["val_shift"]) for row in rows] == [
        ("a", "0.3750", "0.5000"),
        ("b", "-", "-"),
    ]
    assert markdown_rows(report.to_markdown())[0] == header[:6]
    only_error = Report([layer("a", evidence={"val_error": 0.375})])
    assert markdown_rows(only_error.to_markdown())[0] == [*MARKDOWN_COLUMNS, "val_error"]


@pytest.mark.parametrize(
    ("layers", "headline"),
    [
        ([layer("a")], "None of 1 BatchNorm layer needs attention."),
        (
            [layer("a"), unused("b")],
            "1 of 2 BatchNorm layers could be judged, and none of these needs attention; the others are 1 unused.",
        ),
        (
            [layer("a"), unused("b"), layer("c", verdict="insufficient-data"), unused("d")],
            "1 of 4 BatchNorm layers could be judged, and none of these needs attention; "
            "the others are 2 unused, 1 insufficient-data.",
        ),
        (
            [layer("a", verdict="insufficient-data"), unused("b")],
            "2 BatchNorm layers could not be judged: 1 insufficient-data, 1 unused.",
        ),
        ([layer("a", verdict="insufficient-data")], "1 BatchNorm layer could not be judged: 1 insufficient-data."),
        (
            [layer("a", verdict="insufficient-data", evidence={"val_error": 0.01})],  # but by validation
            "None of 1 BatchNorm layer needs attention.",
        ),
        (
            [layer("a", verdict="noisy"), unused("b"), layer("c")],
            "1 of 3 BatchNorm layers needs attention: 1 noisy. 1 could not be judged: 1 unused.",
        ),
        (
            [layer("a", verdict="insufficient-data", flags=("never-updated",), needs_attention=True), layer("b")],
            "1 of 2 BatchNorm layers needs attention: 1 never-updated.",
        ),
        (
            [layer("a", verdict="noisy", flags=("never-updated",)), layer("b")],
            "1 of 2 BatchNorm layers needs attention: 1 noisy.",
        ),
        ([layer("a", verdict="noisy")], "1 of 1 BatchNorm layer needs attention: 1 noisy."),
        ([layer("a", verdict="noisy"), layer("b")], "1 of 2 BatchNorm layers needs attention: 1 noisy."),
        (
            [
                layer("a", verdict="noisy"),
                layer("b"),
                with_error("c", 0.5, verdict="lagging"),
                layer("d", verdict="noisy"),
            ],
            "3 of 4 BatchNorm layers need attention: 2 noisy, 1 lagging.",
        ),
        ([], "No BatchNorm layer was monitored."),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else "",
)
def test_every_form_begins_with_one_sentence_on_the_model(layers, headline):
    report = Report(layers)
    assert str(report).split("\n")[0] == headline
    assert report.to_markdown().split("\n")[0] == f"**{headline}**"
    assert Cells(report._repr_html_()).texts[0] == headline
    assert report.brief(0) == headline


CAUSES = {"a": "lagging", "b": "noisy", "c": "lagging", "d": "non-finite", "e": "stale"}


def sick_report() -> Report:
    """Six layers, five of which need attention for four causes; in the order of their errors a, b, c, d, e."""
    sick = [
        with_error(name, error := 0.9 - index / 10, verdict=cause, needs_attention=True, evidence={"eval_error": error})
        for index, (name, cause) in enumerate(CAUSES.items())
    ]
    return Report([with_error("fine", 2.0, evidence={"eval_error": 2.0, "now_error": 0.1}), *sick[::-1]])


SICK = "5 of 6 BatchNorm layers need attention: 1 stale, 1 non-finite, 2 lagging, 1 noisy."
EXPLAINED = {"a": "a, c", "b": "b", "d": "d"}
"""The worst layer of each cause that is explained, and the names of all that have it."""


def test_a_printed_report_is_a_headline_a_table_and_the_first_three_causes_explained():
    report = sick_report()
    headline, _, *texts = str(report).split("\n\n")
    assert headline == SICK
    assert [row[0] for row in text_rows(str(report))] == ["a", "b", "c", "d", "e", "fine"]
    told = {name: f"{report[name].diagnosis.explanation} {report[name].remedy}" for name in EXPLAINED}
    assert [text.split() for text in texts] == [
        f"{names}: {CAUSES[name]}. {told[name]}".split() for name, names in EXPLAINED.items()
    ]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120


def test_a_cause_is_explained_once_with_the_numbers_of_the_worst_and_the_names_of_five():
    evidence = {"eval_error": 0.0, "lag_error": 0.5, "now_error": 0.25}
    layers = [
        with_error(f"layer{index}", 0.5, verdict="lagging", evidence=evidence | {"eval_error": 0.3 + index / 100})
        for index in range(7)
    ]
    (text,) = Report(layers).brief().split("\n\n")[2:]
    assert text.startswith("layer6, layer5, layer4, layer3, layer2 and 2 more: lagging. ")
    assert " ".join(text.split()).endswith(f"{layers[-1].diagnosis.explanation} {layers[-1].remedy}")
    assert "0.36" in text
    assert "0.35" not in text


def test_layers_whose_flags_differ_are_explained_each():
    layers = [layer("a", verdict="noisy"), layer("b", verdict="noisy", flags=("half-frozen",))]
    texts = Report(layers).brief().split("\n\n")[2:]
    assert [text.split(". ")[0] for text in texts] == ["a: noisy", "b: noisy, half-frozen"]


def test_what_the_flags_of_layers_that_need_no_attention_say_comes_last_and_once():
    flags = [("half-frozen",), ("written-outside",), ("half-frozen",), ("interrupted-batch",), ("not-updating",)]
    numbers = {"calls_not_updating": 3.0}
    layers = [layer(f"{index}", flags=its, evidence=numbers) for index, its in enumerate(flags)]
    report = Report([*layers, layer("sick", verdict="noisy")])
    texts = [" ".join(text.split()) for text in report.brief(1).split("\n\n")[2:]]
    assert [text.split(". ")[0] for text in texts] == [
        "sick: noisy",
        "0, 2: half-frozen",
        "1: written-outside",
        "3: interrupted-batch",
    ]
    assert texts[1].endswith(report["0"].diagnosis.notes)
    assert report["0"].diagnosis.notes.startswith("Its weights do not train")
    assert report["0"].diagnosis.notes.endswith("call `layer.eval()` after every `model.train()`.")
    items = [line for line in report.to_markdown(1).splitlines() if line.startswith("- **")]
    assert [as_shown(item).split(". ")[0] for item in items] == [
        "- **sick**: noisy",
        "- **0, 2**: half-frozen",
        "- **1**: written-outside",
        "- **3**: interrupted-batch",
    ]


def test_a_report_without_sick_layers_explains_none():
    report = Report([with_error("one", 0.5), with_error("two", 0.5)])
    assert len(str(report).split("\n\n")) == 2
    assert report.to_markdown().count("\n\n") == 1
    assert "li" not in Cells(report._repr_html_()).tags


def test_a_report_says_why_a_layer_could_not_be_judged():
    report = Report([with_error("one", 0.5), unused("two"), unused("three")])
    _, _, text = str(report).split("\n\n")
    assert text == "two, three: unused. It was not called in this window while the model was in training mode."
    assert f"- **two, three**: {text.partition(': ')[2]}" in report.to_markdown()


@pytest.mark.parametrize("n", [1, 2, 4, 6, 9])
def test_a_brief_report_has_the_n_worst_layers_and_explains_the_causes_of_all(n):
    report = sick_report()
    headline, _, *texts = report.brief(n).split("\n\n")
    assert headline == SICK
    assert [row[0] for row in text_rows(report.brief(n))] == ["a", "b", "c", "d", "e", "fine"][:n]
    assert [text.split(":")[0] for text in texts] == list(EXPLAINED.values())


def test_a_report_of_no_layers_is_its_headline():
    report = sick_report()
    assert report.brief(0) == SICK
    assert report.to_markdown(0) == f"**{SICK}**"


def test_a_brief_report_has_ten_layers_if_not_told_otherwise():
    report = Report(layer(f"layer{index}") for index in range(12))
    assert len(text_rows(report.brief())) == 10
    assert len(text_rows(str(report))) == 12
    assert report.brief(None) == str(report)


def test_markdown_and_html_explain_the_first_three_causes():
    report = sick_report()
    told = {name: f"{report[name].diagnosis.explanation} {report[name].remedy}".strip() for name in EXPLAINED}
    items = [line for line in report.to_markdown().splitlines() if line.startswith("- ")]
    assert [as_shown(item) for item in items] == [
        f"- **{names}**: {CAUSES[name]}. {told[name]}" for name, names in EXPLAINED.items()
    ]
    html_report = Cells(report._repr_html_())
    assert html_report.texts[1:] == [f"{names}: {CAUSES[name]}. {told[name]}" for name, names in EXPLAINED.items()]


ODD_NAMES = [
    "a|b",
    "<b>bold</b>",
    "x & y",
    "layer_1_norm",
    "1e5",
    "007",
    "nan",
    "back\\slash",
    "**x**",
    "[a](b)",
    "{x}",
]
ODD_NAMES += ["`c`", "'q\"", "-"]


def odd_report() -> Report:
    """Layers of odd names, all noisy."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.BatchNorm1d(2, momentum=0.9) for name in ODD_NAMES})
    with BatchNormTracker(model) as tracker:
        for _ in range(20):
            for module in model.values():
                module(torch.randn(8, 2))
    return tracker.report()


def test_html_shows_odd_layer_names_as_they_are_and_lets_none_become_a_tag():
    cells = Cells(odd_report()._repr_html_())
    assert {row[0].strip() for row in cells.rows if row} == set(ODD_NAMES)
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(cells.tags) == table | {"p", "ul", "li", "strong", "code", "span"}
    assert cells.badges == ["N"] * len(ODD_NAMES)


def test_plain_text_shows_odd_layer_names_as_they_are():
    assert {row[0] for row in text_rows(str(odd_report()))} == set(ODD_NAMES)


@pytest.mark.parametrize("name", [*ODD_NAMES, "&lt;i&gt;", "new\nline"])
def test_html_keeps_a_layer_name_in_its_cell_and_item_and_lets_none_become_a_tag(name):
    report = Report([with_error(name, 0.5, verdict="lagging")])
    cells = Cells(report._repr_html_())
    assert [row[0].strip() for row in cells.rows if row] == [name]
    assert cells.texts[1] == f"{report[name].explanation} {report[name].remedy}"
    assert {"b", "i"}.isdisjoint(cells.tags)


@pytest.mark.parametrize(
    "name",
    [
        *ODD_NAMES,
        "&lt;i&gt;",
        "new\nline",
    ],
)
def test_markdown_keeps_a_layer_name_in_its_cell_and_item_and_lets_none_become_a_tag(name):
    report = Report([with_error(name, 0.5, verdict="lagging")])
    source = report.to_markdown()
    rows = markdown_rows(source)
    assert len(rows) == 3
    assert [len(row) for row in rows] == [len(MARKDOWN_COLUMNS)] * 3
    item = as_shown(source.split("\n\n")[-1])
    shown = " ".join(name.split("\n"))
    assert rows[-1][0] == shown
    assert item == f"- **{shown}**: lagging. {report[name].diagnosis.explanation} {report[name].remedy}"
    assert not re.search(r"(?<!\\)<[bi]>", source)
    emphasis = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", source.split("\n\n")[-1]))  # what is not escaped nor code
    assert emphasis.count("**") == 2


def test_markdown_lists_what_has_changed_since_an_earlier_window_before_the_table():
    report = sick_report()
    before = {"fine": "healthy", "a": "noisy", "b": "noisy", "d": "healthy", "gone": "noisy"}
    headline, introduction, changes, table, _ = report.to_markdown(since=before).split("\n\n")
    assert headline == f"**{SICK}**"
    assert introduction == "Changed since the last window:"
    assert changes.splitlines() == ["- a: noisy → lagging", "- d: healthy → non-finite"]
    assert table.startswith("| layer")


def test_markdown_lists_ten_changes_and_counts_the_others():
    report = Report(layer(f"a_{index}") for index in range(13))
    changes = report.to_markdown(since=dict.fromkeys(report, "noisy")).split("\n\n")[2].splitlines()
    assert changes == [rf"- a\_{index}: noisy → healthy" for index in range(10)] + ["- and 3 more"]


@pytest.mark.parametrize("since", [None, {}, {"a": "lagging", "fine": "healthy"}])
def test_markdown_lists_no_changes_if_there_are_none(since):
    assert sick_report().to_markdown(since=since) == sick_report().to_markdown()


@pytest.mark.parametrize("n", [1, 4, 9])
def test_markdown_has_the_n_worst_layers_and_explains_the_causes_of_all(n):
    source = sick_report().to_markdown(n)
    assert [row[0] for row in markdown_rows(source)[2:]] == ["a", "b", "c", "d", "e", "fine"][:n]
    assert sum(line.startswith("- **") for line in source.splitlines()) == 3


def test_an_empty_report_has_every_form():
    report = Report([])
    assert len(report) == 0
    assert report.summary() == {}
    assert report.worst() == report.worst(3) == report.unhealthy == []
    assert report.layer_summaries() == {}
    assert report.to_dict() == {"rank": None, "remarks": [], "summary": {}, "layers": {}}
    assert str(report) == report.brief() == "No BatchNorm layer was monitored."
    assert report.to_markdown() == "**No BatchNorm layer was monitored.**"
    assert Cells(report._repr_html_()).tags == ["p", "strong"]
    assert repr(report) == "Report([])"
    with pytest.raises(KeyError, match="'any'"):
        report["any"]
