"""Documents of format 1, of version 0.5.0: how they become those of today.

Its arrays were bytes in base64: metrics bfloat16, all high bytes before all low ones; channels little endian float32.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from lightning_bnmonitor.page.planes import packed


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A document, or a part of one, in format 2.

    Raises:
        ValueError: If an array in it is none.
    """
    try:
        return {name: _upgraded(name, part) for name, part in document.items()} | {"format": 2}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"Its data are damaged: {error!r}.") from error


def _upgraded(name: str, part: Any) -> Any:
    if name == "cause" and isinstance(part, str):
        return packed(np.frombuffer(base64.b64decode(part), dtype=np.uint8))
    if name == "metrics":
        return {metric: _of_planes(text) for metric, text in part.items()}
    if name == "values":
        return {which: packed(np.frombuffer(base64.b64decode(text), dtype="<u4")) for which, text in part.items()}
    if isinstance(part, dict):
        return {inner: _upgraded(inner, each) for inner, each in part.items()}
    return part


def _of_planes(text: str) -> str:
    high, low = np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(2, -1).astype(np.uint16)
    return packed(np.bitwise_or(high << 8, low, dtype=np.uint16))
