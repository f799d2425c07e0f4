"""What all tests share."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the tensors here are too small for more: threads would only wait for each other
