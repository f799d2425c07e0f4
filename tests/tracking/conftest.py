"""What the tests of the tracker share."""

from __future__ import annotations

import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
