"""Moments in two passes over float64 values, which streaming ones are compared with."""

from __future__ import annotations

import numpy as np


def rows(x):
    """All values of an ``(N, C, *)`` tensor, ``(n, C)`` float64."""
    array = x.detach().double().numpy()
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def two_pass(values):
    """Mean and unbiased variance of ``(n, C)``, NaN where there are not enough values."""
    missing = np.full(values.shape[1], np.nan)
    mean = values.sum(axis=0) / len(values) if len(values) else missing
    return mean, np.square(values - mean).sum(axis=0) / (len(values) - 1) if len(values) > 1 else missing
