"""Documents that version 0.5.0 has written become those of today."""

import json

import numpy as np
import pytest

from lightning_bnmonitor.page import document
from tests.page import made_documents as made
from tests.page.older_documents import as_format_1


def old_data(new):
    return document.encode(as_format_1(new))


def arrays_of(channels):
    return {
        (name, which, key): made.words_of(text, its["of"]).tolist()
        for name, sets in channels["layers"].items()
        for which, its in sets.items()
        for key, text in its["values"].items()
    }


def without_arrays(whole):
    return {name: part for name, part in whole.items() if name not in ("cause", "metrics")}


@pytest.mark.parametrize("make", [made.two_sick_of_53, made.odd_names, made.healthy])
def test_the_run_is_what_it_was(make):
    new = make()
    for old in (document.decode(old_data(new)), document.decode(document.upgraded(old_data(new)))):
        assert without_arrays(old) == without_arrays(new)
        found, expected = document.cells(old), document.cells(new)
        np.testing.assert_array_equal(found.cause, expected.cause)
        np.testing.assert_array_equal(found.attention, expected.attention)
        assert list(found.metrics) == list(expected.metrics)
        for name, values in expected.metrics.items():
            np.testing.assert_array_equal(found.metrics[name], values)


def test_channels_are_what_they_were():
    new = made.channels_document(made.five_layers())
    old = document.decode(old_data(new))
    assert arrays_of(old) == arrays_of(new)
    assert (
        json.loads(json.dumps(old["layers"]["stem.1"]["latest"]["course"]))
        == new["layers"]["stem.1"]["latest"]["course"]
    )


def test_what_is_of_today_or_no_document_stays_as_it_is():
    for data in (document.encode(made.odd_names()), document.encode({"format": 3}), b"", b"no data"):
        assert document.upgraded(data) is data


@pytest.mark.parametrize("broken", [{"cause": "A"}, {"cause": 1, "metrics": []}, {"metrics": {"eval_error": "AAAA"}}])
def test_what_is_damaged_is_told_in_words_and_handed_on(broken):
    data = document.encode({"format": 1} | broken)
    with pytest.raises(ValueError, match="Its data are damaged"):
        document.decode(data)
    assert document.upgraded(data) is data
