"""The document: numbers against torch's bfloat16 and against bytes put together by hand."""

import base64
import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bnmonitor.page import document
from lightning_bnmonitor.page.document import FORMAT, METRICS

NUMBERS = [0.0, -0.0, 1.0, 0.1, 0.25, 1e-40, 3.4e38, 1.00390625, 1.01171875, math.inf, -math.inf]


def rounded(numbers):
    return torch.tensor(numbers, dtype=torch.float32).bfloat16().float().numpy()


def by_hand(numbers):
    """High bytes, then low bytes, of numbers that torch has rounded."""
    bits = torch.tensor(numbers, dtype=torch.float32).bfloat16().view(torch.int16).tolist()
    pairs = [struct.pack(">h", each) for each in bits]
    return b"".join(pair[:1] for pair in pairs) + b"".join(pair[1:] for pair in pairs)


@given(st.lists(st.floats(width=32), max_size=20))
def test_metrics_are_rounded_as_torch_rounds_them(numbers):
    found = document.as_float32(document.bfloat16(numbers))
    np.testing.assert_array_equal(found, rounded(numbers))


def test_planes_are_the_high_bytes_and_then_the_low_bytes():
    text = document.in_planes(document.bfloat16(NUMBERS))
    assert base64.b64decode(text) == by_hand(NUMBERS)
    np.testing.assert_array_equal(document.as_float32(document.from_planes(text)), rounded(NUMBERS))


def test_planes_of_nothing():
    assert document.in_planes(document.bfloat16([])) == ""
    assert document.from_planes("").size == 0


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_packed_numbers_are_little_endian(dtype):
    values = np.array([1.5, -2.25, math.nan], dtype=dtype)
    text = document.packed(values)
    assert base64.b64decode(text)[:8] == struct.pack("<2f", 1.5, -2.25)
    np.testing.assert_array_equal(document.unpacked(text, np.float32), values)


def test_what_is_encoded_is_compressed_json():
    whole = {"format": FORMAT, "layers": {"name": ["größe", '<b>"']}, "windows": {"step": [1], "headline": ["x" * 999]}}
    data = document.encode(whole)
    assert json.loads(zlib.decompress(data)) == whole == document.decode(data)
    assert len(data) < 200


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        document.encode({"format": FORMAT, "value": math.nan})


@pytest.mark.parametrize("version", [0, 2, "1", None])
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
    causes = bytes([0, 3 + 128, 255, 1, 0, 127 + 127])
    errors = [0.5, math.nan, 1.0, 2.0, math.inf, 0.25]
    whole = {
        "format": FORMAT,
        "windows": {"step": [10, 20]},
        "layers": {"name": ["a", "b", "c"]},
        "cause": base64.b64encode(causes).decode(),
        "metrics": {"eval_error": base64.b64encode(by_hand(errors)).decode()},
    }
    found = document.cells(whole)
    assert found.cause.tolist() == [[0, 3, 255], [1, 0, 126]]
    assert found.attention.tolist() == [[False, True, False], [False, False, True]]
    assert list(found.metrics) == ["eval_error"]
    assert set(found.metrics) <= set(METRICS)
    np.testing.assert_array_equal(found.metrics["eval_error"], np.float32(errors).reshape(2, 3))


def test_cells_of_another_number_of_layers_are_refused():
    whole = {"windows": {"step": [1]}, "layers": {"name": ["a"]}, "cause": document.packed(np.zeros(2, np.uint8))}
    with pytest.raises(ValueError, match="reshape"):
        document.cells(whole | {"metrics": {}})
