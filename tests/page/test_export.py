"""What the page hands out: the table as CSV, the picture as SVG."""

import csv
import io
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.page import made_documents as made
from tests.page.test_page import COLORS, LEVELS, values_of

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"


def table(text):
    return list(csv.reader(io.StringIO(text)))


def test_the_table_has_all_values(opened):
    document = made.two_sick_of_53()
    opened.open({"run": document})
    opened.button("val_error")
    opened.button("CSV")
    name, text = opened.downloaded("csv")
    assert name == "val_error_run.csv"
    head, *rows = table(text)
    assert head == ["layer", "type", "channels", "cause", *(f"step {step}" for step in document["windows"]["step"])]
    assert [row[:3] for row in rows] == [[layer, "BatchNorm2d", "512"] for layer in document["layers"]["name"]]
    assert [row[0] for row in rows if row[3] == "lagging"] == ["layer2.0.downsample.1", "layer4.1.bn2"]
    values = np.array([[float(each or "nan") for each in row[4:]] for row in rows])
    np.testing.assert_allclose(values, values_of(document, "val_error").T, rtol=1e-3)


def test_only_what_is_shown_is_exported_and_odd_names_are_quoted(opened):
    opened.open({"run": made.odd_names()}, "filter=%2C")
    opened.button("CSV")
    _, text = opened.downloaded("csv")
    assert [row[0] for row in table(text)[1:]] == ["=SUM(A1:A9), x"]


def test_two_runs_are_exported_beside_each_other(opened):
    opened.open({"a": made.five_layers(2), "b": made.five_layers(2, momentum=0.01)}, "versus=run%3Ab")
    opened.button("CSV")
    _, text = opened.downloaded("csv")
    assert table(text)[0][4:] == ["a: step 64", "a: step 128", "b: step 64", "b: step 128"]


def test_the_picture_is_the_whole_heatmap(opened):
    document = made.odd_names()
    opened.open({"run": document})
    opened.button("SVG")
    name, text = opened.downloaded("svg")
    assert name == "eval_error_run.svg"
    picture = ElementTree.fromstring(text)
    assert picture.tag == f"{SVG}svg"
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    assert set(made.ODD_NAMES) <= set(texts)
    assert {"eval_error: run", "X", "L", "10", "20", "30"} <= set(texts)
    steps = {
        COLORS[step] for step in np.searchsorted(LEVELS, values_of(document, "eval_error"), side="right").ravel() - 1
    }
    drawn = {each.get("fill") for each in picture.iter(f"{SVG}path")}
    assert steps - {COLORS[len(COLORS) - 1]} <= drawn
    assert not any("href" in key for each in picture.iter() for key in each.attrib)


def test_the_picture_of_a_thousand_layers_has_them_all(opened):
    document = made.thousand_layers(windows=40)
    opened.open({"run": document})
    opened.button("SVG")
    _, text = opened.downloaded("svg")
    texts = {each.text for each in ElementTree.fromstring(text).iter(f"{SVG}text")}
    assert set(document["layers"]["name"]) <= texts
