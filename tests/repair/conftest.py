"""What all tests of repair share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from tests.repair.spoiled_models import healthy, spoil_mean

mpl.use("Agg")


@pytest.fixture(autouse=True)
def seeded_and_no_figure_left() -> Iterator[None]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    plt.close("all")


@pytest.fixture
def spoiled() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model with one layer whose running mean is off, and batches."""
    model, batches = healthy(num_batches=4)
    with torch.no_grad():
        spoil_mean(model.blocks[0].norm)
    return model, batches
