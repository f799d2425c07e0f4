"""Layers that are monitored for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from torch import nn

from tests.diagnosis.monitored_layers import Monitored


@pytest.fixture
def monitored() -> Iterator[Callable[[nn.Module], Monitored]]:
    """Makes monitored layers, and ends the monitoring of all of them."""
    made: list[Monitored] = []

    def make(layer: nn.Module) -> Monitored:
        made.append(Monitored(layer))
        return made[-1]

    yield make
    for one in made:
        one.tracker.detach()
