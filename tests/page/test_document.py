"""The document: numbers against torch's bfloat16 and against bytes put together by hand."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bnmonitor.page import document
from lightning_bnmonitor.page.document import FORMAT, METRICS
from tests.page import made_documents as made

NUMBERS = [0.0, -0.0, 1.0, 0.1, 0.25, 1e-40, 3.4e38, 1.00390625, 1.01171875, math.inf, -math.inf]


def rounded(numbers):
    return torch.tensor(numbers, dtype=torch.float32).bfloat16().float().numpy()


@given(st.lists(st.floats(width=32), max_size=20))
def test_metrics_are_rounded_as_torch_rounds_them(numbers):
    found = document.as_float32(document.bfloat16(numbers))
    np.testing.assert_array_equal(found, rounded(numbers))


@given(st.lists(st.floats(width=32), max_size=20), st.integers(1, 7))
def test_fewer_digits_are_as_near_as_they_can_be(numbers, digits):
    bits = document.bfloat16(numbers)
    found, before = document.as_float32(document.with_digits(bits, digits)), document.as_float32(bits)
    usual = (np.abs(before) > 1e-37) & (np.abs(before) < 1e38)
    np.testing.assert_allclose(found[usual], before[usual], rtol=2.0 ** -(digits + 1))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(before))
    assert np.isinf(found[np.isinf(before)]).all()


def test_what_is_encoded_is_compressed_json():
    whole = {"format": FORMAT, "layers": {"name": ["größe", '<b>"']}, "windows": {"step": [1], "headline": ["x" * 999]}}
    data = document.encode(whole)
    assert json.loads(zlib.decompress(data)) == whole == document.decode(data)
    assert len(data) < 200


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        document.encode({"format": FORMAT, "value": math.nan})


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_is_refused_in_words(version):
    data = zlib.compress(json.dumps({"format": version}).encode())
    with pytest.raises(ValueError, match=rf"format {version!r}.*reads format {FORMAT}: install"):
        document.decode(data)


@pytest.mark.parametrize(
    "data", [b"", b"text", zlib.compress(b"{"), zlib.compress(b"\xff"), zlib.compress(b"[1]"), zlib.compress(b"{}")]
)
def test_what_is_no_document_is_refused_in_words(data):
    with pytest.raises(ValueError, match="no data of lightning_bnmonitor"):
        document.decode(data)


def test_cells_are_window_after_window():
    causes = np.array([0, 3 + 128, 255, 1, 0, 127 + 127])
    errors = [0.5, math.nan, 1.0, 2.0, math.inf, 0.25]
    whole = {
        "format": FORMAT,
        "windows": {"step": [10, 20]},
        "layers": {"name": ["a", "b", "c"]},
        "cause": made.planes(causes << 24, 2),
        "metrics": {"eval_error": made.bfloats(errors)},
    }
    found = document.cells(whole)
    assert found.cause.tolist() == [[0, 3, 255], [1, 0, 126]]
    assert found.attention.tolist() == [[False, True, False], [False, False, True]]
    assert list(found.metrics) == ["eval_error"]
    assert set(found.metrics) <= set(METRICS)
    np.testing.assert_array_equal(found.metrics["eval_error"], np.float32(errors).reshape(2, 3))


def test_cells_of_another_number_of_layers_are_refused():
    whole = {"windows": {"step": [1]}, "layers": {"name": ["a", "b"]}, "cause": "AAA"}
    with pytest.raises(ValueError, match="3 characters are no text of 2 numbers"):
        document.cells(whole | {"metrics": {}})
