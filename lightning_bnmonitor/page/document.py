"""The document of a run: what is kept of all its windows, in JSON's types, and how that becomes bytes and back.

Numbers of all windows and layers are ``(W, L)`` arrays as text (:mod:`lightning_bnmonitor.page.planes`): window after
window, the layers in the model's order. Metrics are float32 of which the upper 16 bits are kept, causes the upper 8 of
32 bits. What else is in it is written by ``report/history.py``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_bnmonitor.page import format_1
from lightning_bnmonitor.page.planes import unpacked

FORMAT = 2
"""The version of the format. Format 1 is read, too; another one is refused."""
METRICS = ("eval_error", "noise", "val_error", "val_shift", "call_shift", "group_shift", "batch_jitter")
"""What may be known of a layer in a window; what is known of none is absent."""
ABSENT = 255
"""In the place of a cause: the layer was not in that window."""
_FORMAT_1 = b'{"format":1,'
MOST_DIGITS = 7
"""Binary digits that bfloat16 has after the first."""
ATTENTION = 128
"""What is added to the cause of a layer that needs attention."""


AVERAGED = " (averaged)"
"""What the names of layers end with that are told of with averaged weights, beside those that are trained."""


class Cells(NamedTuple):
    """What is known of each layer in each window, ``(W, L)`` each."""

    cause: NDArray[np.uint8]
    """Index into the causes of the document, :data:`ABSENT` if the layer was not in that window."""
    attention: NDArray[np.bool_]
    """Whether it needed attention."""
    metrics: dict[str, NDArray[np.float32]]
    """Of :data:`METRICS` those that are known of any layer; NaN where it is not known."""


def encode(document: Mapping[str, Any]) -> bytes:
    """A document as compressed JSON.

    Raises:
        ValueError: If it contains numbers that JSON lacks.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return zlib.compress(text.encode(), 6)


def decode(data: bytes) -> dict[str, Any]:
    """The document that :func:`encode` has made.

    Raises:
        ValueError: If the bytes are no document, or one of another format.
    """
    try:
        document: dict[str, Any] = json.loads(zlib.decompress(data))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"These are no data of lightning_bnmonitor, or they are damaged: {error}.") from error
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError("These are no data of lightning_bnmonitor: they have no format.")
    if document["format"] == 1:
        document = format_1.upgraded(document)
    if document["format"] != FORMAT:
        raise ValueError(
            f"The data have format {document['format']!r}, and this version of lightning_bnmonitor reads format "
            f"{FORMAT}: install the version that has written them, or a newer one."
        )
    return document


def upgraded(data: bytes) -> bytes:
    """What :func:`encode` has made, in today's format if it is in an older one; else as it is."""
    try:
        begin = zlib.decompressobj().decompress(data, len(_FORMAT_1))
        return encode(decode(data)) if begin == _FORMAT_1 else data
    except (zlib.error, ValueError):
        return data


def bfloat16(values: ArrayLike) -> NDArray[np.uint16]:
    """The upper 16 bits of float32, rounded to the nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def as_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers that :func:`bfloat16` has rounded to."""
    values: NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    return values


def with_digits(bits: NDArray[np.uint16], digits: int) -> NDArray[np.uint16]:
    """bfloat16 rounded to fewer binary digits after the first, 1 to 7: to within ``2 ** -(digits + 1)`` of each."""
    dropped = MOST_DIGITS - digits
    half = np.uint16(1 << dropped >> 1)
    rounded: NDArray[np.uint16] = (bits + half) >> dropped << dropped
    return rounded


def cells(document: Mapping[str, Any]) -> Cells:
    """The arrays of a document.

    Raises:
        ValueError: If they have not as many windows and layers as the document.
    """
    shape = len(document["windows"]["step"]), len(document["layers"]["name"])
    count = shape[0] * shape[1]
    cause = (unpacked(document["cause"], count) >> 24).astype(np.uint8).reshape(shape)
    is_there = cause != ABSENT
    metrics = {
        name: unpacked(text, count).view(np.float32).reshape(shape) for name, text in document["metrics"].items()
    }
    return Cells(np.where(is_there, cause & 127, ABSENT), is_there & (cause >= ATTENTION), metrics)
