"""What all tests share."""

from __future__ import annotations

import os

import pytest

# Inductor's own processes would import torch once more in each of pytest's, which have taken the cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

torch.set_num_threads(1)  # the tensors here are too small for more: threads would only wait for each other

# Assertions in modules that tests import tell what they compare, as those in tests do.
ROOMS = (
    *(
        "page",
        "tensorboard",
        "capture",
        "statistics",
        "diagnosis",
        "report",
        "tracking",
        "repair",
        "callbacks",
        "commands",
    ),
    *("promises", "examples"),
)
pytest.register_assert_rewrite(*(f"tests.{room}" for room in ROOMS))
