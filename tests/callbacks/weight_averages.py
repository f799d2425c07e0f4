"""Callbacks that Lightning has from 2.6 on."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback, callbacks


def averaging(name: str) -> type[Callback]:
    """The class of a callback that averages weights; skips the test where Lightning has none yet."""
    if not hasattr(callbacks, name):
        pytest.skip(f"Lightning has {name} from 2.6 on")
    found: type[Callback] = getattr(callbacks, name)
    return found
