"""Numbers as text that compresses well: a character of base64's alphabet for every six bits of each.

The highest six bits of all numbers, then the next six of all, and so on: what resembles each other stands together, and
a character has bits of one number alone. What is zero in all of them at the end is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", dtype=np.uint8)
_CODES = np.zeros(256, dtype=np.uint64)
_CODES[_ALPHABET] = np.arange(64, dtype=np.uint64)
_SHIFTS = (30, 24, 18, 12, 6, 0)  # of each six bits, where four zeros are behind the 32 bits of a number


def packed(numbers: NDArray[np.unsignedinteger[Any]]) -> str:
    """Numbers of 32, 16 or 8 bits as text: the upper ones of 32."""
    flat = numbers.ravel().astype(np.uint64) << (36 - 8 * numbers.itemsize)
    planes = [(flat >> shift & 63).astype(np.uint8) for shift in _SHIFTS]
    while planes and not planes[-1].any():
        planes.pop()
    return _ALPHABET[np.array(planes, dtype=np.uint8).ravel()].tobytes().decode()


def unpacked(text: str, count: int) -> NDArray[np.uint32]:
    """So many numbers that :func:`packed` was given, flat.

    Raises:
        ValueError: If the text is not that of so many numbers.
    """
    codes = _CODES[np.frombuffer(text.encode(), dtype=np.uint8)]
    if len(codes) % count if count else len(codes):
        raise ValueError(f"Its data are damaged: {len(codes)} characters are no text of {count} numbers.")
    words = np.zeros(count, dtype=np.uint64)
    for index, shift in enumerate(_SHIFTS[: len(codes) // max(count, 1)]):
        words |= codes[index * count : (index + 1) * count] << shift
    return (words >> 4).astype(np.uint32)
