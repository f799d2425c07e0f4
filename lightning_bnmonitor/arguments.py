"""Checks of what users pass: each error names the argument, the value, and what would be valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_positive(argument: str, value: Any) -> None:
    """Raise ValueError if a value is not a positive integer."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"`{argument}` must be a positive integer, got {value!r}.")


def check_positive_or_none(argument: str, value: Any) -> None:
    """Raise ValueError if a value is neither a positive integer nor None."""
    if value is not None and (not _is_integer(value) or value < 1):
        raise ValueError(f"`{argument}` must be a positive integer or None, got {value!r}.")


def check_positive_or_auto(argument: str, value: Any, or_none: bool = False) -> None:
    """Raise ValueError if a value is neither a positive integer nor ``"auto"`` (nor None, where that may be)."""
    if (isinstance(value, str) and value == "auto") or (value is None and or_none):
        return
    if not _is_integer(value) or value < 1:
        choices = 'a positive integer, "auto" or None' if or_none else 'a positive integer or "auto"'
        raise ValueError(f"`{argument}` must be {choices}, got {value!r}.")


def check_not_negative(argument: str, value: Any) -> None:
    """Raise ValueError if a value is not an integer, or is negative."""
    if not _is_integer(value) or value < 0:
        raise ValueError(f"`{argument}` must be an integer and not negative, got {value!r}.")


def check_bool(argument: str, value: Any) -> None:
    """Raise ValueError if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be True or False, got {value!r}.")


def check_bool_or(argument: str, value: Any, choice: str) -> None:
    """Raise ValueError if a value is neither True nor False nor this string."""
    if not isinstance(value, bool) and value != choice:
        raise ValueError(f'`{argument}` must be True, False or "{choice}", got {value!r}.')


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError if a value is not one of these strings."""
    if value not in choices:
        raise ValueError(f"`{argument}` must be one of {list(choices)}, got {value!r}.")


def check_name(argument: str, value: Any) -> None:
    """Raise ValueError if a value is not a string, or is empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{argument}` must be a string that is not empty, got {value!r}.")


def check_callable_or_none(argument: str, value: Any) -> None:
    """Raise TypeError if a value is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"`{argument}` must be a function or None, got {value!r}.")


def as_patterns(argument: str, patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One pattern or several as a tuple; None stays None.

    Raises:
        TypeError: If there is anything but strings.
    """
    if patterns is None:
        return None
    several = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(several, Sequence) or not all(isinstance(pattern, str) for pattern in several):
        raise TypeError(f"`{argument}` must be a pattern (a string), a sequence of them, or None, got {patterns!r}.")
    return tuple(several)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
