"""What the tests on a CUDA device share: without one, they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.training import DEVICE, ON_CUDA

# Read when CUDA is initialised: without it cuBLAS may add in another order each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if ON_CUDA and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def full_precision_and_deterministic_kernels() -> Iterator[None]:
    """No TF32, whose convolutions differ by 1e-3 from each other, and no kernel that is chosen by how fast it is."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield
    if DEVICE.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()  # what fails late, fails in its own test
