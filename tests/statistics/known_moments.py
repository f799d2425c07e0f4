"""Batches, metrics that have seen them, and the moments that these must have, by two passes over float64 values."""

from __future__ import annotations

import numpy as np
import torch

from lightning_bnmonitor import ChannelMoments, Moments
from tests.statistics.two_pass import rows, two_pass


def normal(shape, mean=0.0, std=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def filled(*tensors, **kwargs):
    metric = ChannelMoments(tensors[0].shape[1], **kwargs)
    for x in tensors:
        metric.update(x)
    return metric


def moments_of(*tensors):
    """Count, mean and unbiased variance of all values."""
    values = np.concatenate([rows(x) for x in tensors])
    return (len(values), *two_pass(values))


def assert_moments(moments, *tensors, ratio=1.0):
    """``ratio`` is mean / std: a rounding of the mean is so many roundings of the standard deviation."""
    count, mean, var = moments_of(*tensors)
    assert isinstance(moments, Moments)
    for field in moments:
        assert field.dtype == torch.float64
        assert field.shape == mean.shape
    assert moments.count.tolist() == [count] * len(mean)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-14, atol=1e-13 * np.sqrt(var.max()))
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=1e-12 + 1e-15 * ratio)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
