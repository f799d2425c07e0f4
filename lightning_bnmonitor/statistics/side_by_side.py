"""The calls of several layers side by side: what each has of its own, over all their channels on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.statistics.channel_layout import FloatArray


def rows_of(columns: Sequence[Any]) -> FloatArray:
    """Rows of a column for each layer, or one row if these are all alike. None becomes NaN."""
    if all(column.count(column[0]) == len(column) for column in columns):
        columns = [column[:1] for column in columns]
    rows: FloatArray = np.array(columns, dtype=float).T
    return rows


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, without waiting for that."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # or the copy would wait for the device
    return tensor.to(device, non_blocking=True)


def joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors end to end on the device."""
    try:
        return torch.cat(list(tensors)).to(device)
    except RuntimeError:  # they are on several devices, as the model has been moved meanwhile
        return torch.cat([tensor.to(device) for tensor in tensors])


def to_unbiased_variances(spread: Tensor, eps: Tensor, bessel: Tensor, has_eps: NDArray[np.bool_]) -> None:
    """Turn the spread of calls, ``(N, C)``, into their unbiased variances, in place.

    Args:
        spread: Biased variances, or (var + eps)^-1/2.
        eps: NaN where it is a variance, ``(N, C)`` or ``(1, C)``.
        bessel: n / (n - 1), of the same shape as either.
        has_eps: Where ``eps`` is not NaN, of each layer: it is known on the CPU.
    """
    if has_eps.all():
        spread.pow_(-2).sub_(eps)
    elif has_eps.any():
        spread.copy_(torch.where(torch.isnan(eps), spread, spread.pow(-2).sub_(eps)))
    spread.clamp_min_(0).mul_(bessel)
