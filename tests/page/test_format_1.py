"""Documents that version 0.5.0 has written: its arrays put together by hand, after its format."""

import base64
import json
import zlib

import numpy as np
import pytest

from lightning_bnmonitor.page import document
from tests.page import made_documents as made


def base64_of(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()


def of_format_1(new, count=None):
    """A document as 0.5.0 has written it: bytes of causes, bfloat16 in two planes of bytes, little endian float32."""
    old = new | {"format": 1}
    if "layers" in new and "cause" in new:
        count = len(new["windows"]["step"]) * len(new["layers"]["name"])
        words = {name: made.words_of(text, count) for name, text in new["metrics"].items()}
        planes = {name: np.concatenate([each >> 24, each >> 16 & 255]) for name, each in words.items()}
        old["metrics"] = {name: base64_of(each, np.uint8) for name, each in planes.items()}
        old["cause"] = base64_of(made.words_of(new["cause"], count) >> 24, np.uint8)
    else:
        old["layers"] = {
            name: {
                which: its
                | {
                    "values": {
                        key: base64_of(made.words_of(text, its["of"]), "<u4") for key, text in its["values"].items()
                    }
                }
                for which, its in sets.items()
            }
            for name, sets in new["layers"].items()
        }
    return zlib.compress(json.dumps(old, separators=(",", ":")).encode())


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
    for old in (document.decode(of_format_1(new)), document.decode(document.upgraded(of_format_1(new)))):
        assert without_arrays(old) == without_arrays(new)
        found, expected = document.cells(old), document.cells(new)
        np.testing.assert_array_equal(found.cause, expected.cause)
        np.testing.assert_array_equal(found.attention, expected.attention)
        assert list(found.metrics) == list(expected.metrics)
        for name, values in expected.metrics.items():
            np.testing.assert_array_equal(found.metrics[name], values)


def test_channels_are_what_they_were():
    new = made.channels_document(made.five_layers())
    old = document.decode(of_format_1(new))
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
