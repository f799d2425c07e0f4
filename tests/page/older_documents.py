"""Documents as version 0.5.0 has written them: their arrays put together by hand, after its format."""

import base64

import numpy as np

from tests.page.made_documents import words_of


def as_format_1(new):
    """A document of today with bytes of causes, bfloat16 in two planes of bytes, little endian float32."""
    old = {"format": 1} | {name: part for name, part in new.items() if name != "format"}
    if "cause" not in new:
        layers = {name: {which: old_set(its) for which, its in sets.items()} for name, sets in new["layers"].items()}
        return old | {"layers": layers}
    count = len(new["windows"]["step"]) * len(new["layers"]["name"])
    words = {name: words_of(text, count) for name, text in new["metrics"].items()}
    return old | {
        "cause": _base64(words_of(new["cause"], count) >> 24, np.uint8),
        "metrics": {
            name: _base64(np.concatenate([each >> 24, each >> 16 & 255]), np.uint8) for name, each in words.items()
        },
    }


def old_set(its):
    """Of a layer's channels."""
    return its and its | {
        "values": {name: _base64(words_of(text, its["of"]), "<u4") for name, text in its["values"].items()}
    }


def _base64(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()
