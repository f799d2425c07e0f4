"""Layers whose ``forward`` is their own: what reaches the kernel is another thing than what the layer receives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_bnmonitor import BatchNormTracker, recalibrate
from lightning_bnmonitor.capture import reduction, saved
from lightning_bnmonitor.capture.reduction import moments_of
from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS, batch_norm_kernel
from tests.promises.recorded_training import moments


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(10 * x)


class Twice(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(3 * x + 1)


class WithAnother(nn.BatchNorm2d):
    """Normalises in two parts, the second by a layer within."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x[:2]), self.other(x[2:])])


class OtherEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean, self.running_var, self.weight, self.bias
        return F.relu(F.batch_norm(x, *own, self.training, self.momentum, max(self.eps, 1e-3)))


class OtherWeight(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean, self.running_var, self.weight.abs(), self.bias
        return F.batch_norm(2 * x, *own, self.training, self.momentum, self.eps)


BATCHES = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(5)]


@pytest.mark.parametrize(
    ("kind", "reaches"),
    [
        (Scaled, lambda x: [10 * x]),
        (Twice, lambda x: [x, 3 * x + 1]),
        (WithAnother, lambda x: [x[:2]]),
        (OtherEps, lambda x: [x]),
        (OtherWeight, lambda x: [2 * x]),
    ],
)
def test_recalibrate_writes_the_moments_of_what_reaches_the_kernel(kind: Any, reaches: Any) -> None:
    layer = kind(3)
    result = recalibrate(nn.Sequential(layer), BATCHES)
    received = [part.double().numpy() for x in BATCHES for part in reaches(x)]
    mean, var = moments(received)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-6)
    assert result.after["0"].num_samples == sum(part.size // 3 for part in received)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_forward_that_fails_leaves_no_context_behind() -> None:
    class Failing(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        recalibrate(nn.Sequential(Failing(3)), BATCHES)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_forward_with_an_eps_of_its_own_is_read_by_that() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), OtherEps(3))
    received = []
    with BatchNormTracker(model) as tracker:
        for x in BATCHES:
            received.append(model[0](0.03 * x).detach().double().numpy())
            model(0.03 * x).sum().backward()
    layer = tracker.report()["1"]
    assert layer.evidence["calls_saved" if HAS_UNPACK_HOOKS else "calls_pass"] == len(BATCHES)
    np.testing.assert_allclose(layer.population_var.numpy(), moments(received)[1], rtol=1e-5)
    assert layer.verdict != "stale"  # its updates are not counted, but made


class ByRunningStats(nn.BatchNorm2d):
    """Normalises by its running statistics, in training mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean, self.running_var, self.weight, self.bias
        return F.relu(F.batch_norm(x, *own, False, 0.0, self.eps))


def test_a_forward_that_normalises_by_running_statistics_is_frozen_and_not_stale() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ByRunningStats(3))
    with BatchNormTracker(model) as tracker:
        for x in BATCHES:
            model(x).sum().backward()
    layer = tracker.report()["1"]
    assert layer.verdict == "frozen"
    assert "not-updating" not in layer.flags  # it was not to
    assert layer.num_batches == len(BATCHES)


def test_where_hooks_cannot_be_told_a_layer_is_not_said_to_be_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "HAS_UNPACK_HOOKS", False)  # as before torch 2.10
    model = nn.Sequential(nn.Conv2d(3, 3, 1), OtherEps(3))
    with BatchNormTracker(model) as tracker:
        for x in BATCHES:
            model(x).sum().backward()
    tracker.report()
    (layer,) = tracker._recorder.layers
    assert layer.counts.paths["pass"] == len(BATCHES)
    assert not layer.hook.checkpointed


@pytest.mark.parametrize("num", [2, 16, 17, 31, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_sample_unlike_all_others_costs_no_digits(num: int, layout: torch.memory_format) -> None:
    x = 1e-3 * torch.randn(num, 4, 50, 50, generator=torch.Generator().manual_seed(num))
    x[0] += 1e4 * torch.tensor([1.0, -1.3, 0.7, 3.33]).view(-1, 1, 1)
    assert x.numel() > reduction._SMALL
    mean, var = moments_of(x.contiguous(memory_format=layout))
    values = x.double().movedim(1, 0).flatten(1)
    std = values.std(dim=1, correction=0)
    assert ((mean - values.mean(dim=1)).abs() <= 1e-6 * std).all()
    assert ((var - std**2).abs() <= 2e-6 * std**2).all()


def test_classes_of_nodes_are_not_kept() -> None:
    class Node:
        pass

    reference = weakref.ref(Node)
    assert batch_norm_kernel(Node) is None
    del Node
    gc.collect()
    assert reference() is None
