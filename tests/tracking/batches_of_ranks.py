"""Layers of several shapes, and what each rank gives to each of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

EPS = 1e-5


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.BatchNorm1d(5), "b": nn.BatchNorm2d(3), "c": nn.BatchNorm1d(2)})


def data(rank, layer, sizes, mean=0.0, std=1.0):
    """What a layer of a rank receives, batch by batch."""
    generator = np.random.default_rng([rank, ord(layer)])
    shape = {"a": (5,), "b": (3, 4, 4), "c": (2,)}[layer]
    return [torch.from_numpy(generator.normal(mean, std, (size, *shape))).float() for size in sizes]


def feed(layers, received):
    for step in range(max(map(len, received.values()))):
        for name, calls in received.items():
            if step < len(calls):
                layers[name](calls[step])


def two_pass(received):
    """Count, mean and unbiased variance of all values, float64."""
    if not received:
        return 0, None, None
    values = np.concatenate([x.double().movedim(1, -1).reshape(-1, x.shape[1]).numpy() for x in received])
    return len(values), values.mean(axis=0), values.var(axis=0, ddof=1) if len(values) > 1 else None
