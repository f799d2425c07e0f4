"""What not every version of Lightning can do: tests of it are skipped where it cannot."""

from __future__ import annotations

import lightning
import pytest
from lightning.pytorch import Callback, callbacks

LIGHTNING = tuple(int(part) for part in lightning.__version__.split(".")[:3])

takes_callbacks_of_the_other = pytest.mark.skipif(
    LIGHTNING < (2, 6), reason="a Trainer takes callbacks of Lightning's other package from 2.6 on"
)


def averaging(name: str) -> type[Callback]:
    """The class of a callback that averages weights."""
    if not hasattr(callbacks, name):
        pytest.skip(f"Lightning has {name} from 2.6 on")
    found: type[Callback] = getattr(callbacks, name)
    return found
