"""What all tests share."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are too small for more: threads would only wait for each other

# Assertions in modules that tests import tell what they compare, as those in tests do.
ROOMS = ("capture", "statistics", "diagnosis", "report", "tracking", "repair", "callbacks", "promises", "examples")
pytest.register_assert_rewrite(*(f"tests.{room}" for room in ROOMS))
