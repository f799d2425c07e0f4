"""Hooks that a copy of the model does not take over."""

from __future__ import annotations

from typing import Any


class Hook:
    """A hook whose copies do nothing: a copied model is not monitored, and a pickled one does not carry the tracker.

    It leaves what a layer receives as it is, and enters no context.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class InertHook:
    """What copies of a monitored model carry in the place of our hooks."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""
