"""Layers whose weights do not train: whether they stay as they are, or follow others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker


class WithTeacher(nn.Module):
    """A model with a copy of it whose weights do not train, called with the same batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.net(x) - self.teacher(x) - 1).square().mean()


def train(model: WithTeacher, rate: float, steps: int = 12) -> None:
    """Train the model; the teacher follows it at this rate."""
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).backward()
        optimizer.step()
        for own, other in zip(model.teacher.parameters(), model.net.parameters(), strict=True):
            own.data.lerp_(other.data, rate)


@pytest.mark.parametrize("closed", [False, True])
def test_an_averaged_copy_is_not_half_frozen_and_what_stays_is(closed: bool) -> None:
    torch.manual_seed(0)
    model = WithTeacher()
    with BatchNormTracker(model) as tracker:
        for rate, flags in ((0.1, ()), (0.0, ("half-frozen",)), (0.1, ())):
            tracker.reset()
            train(model, rate)
            report = tracker.close() if closed else tracker.report()
            assert report["teacher.1"].flags == flags
            assert report["net.1"].flags == ()


def test_a_resumed_window_tells_from_there_on() -> None:
    torch.manual_seed(0)
    model = WithTeacher()
    with BatchNormTracker(model) as tracker:
        train(model, 0.0)
        state = tracker.state_dict()
    with BatchNormTracker(model) as tracker:
        tracker.load_state_dict(state)
        assert tracker.report()["teacher.1"].flags == ("half-frozen",)
        train(model, 0.1)
        assert tracker.report()["teacher.1"].flags == ()


@pytest.mark.parametrize(
    ("how", "is_new"),
    [*((how, False) for how in ("no gradient", "detached", "no rate", "in no optimizer")), ("no gradient", True)],
)
def test_weights_that_nothing_trains_are_half_frozen_whatever_keeps_them(how: str, is_new: bool) -> None:
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 1)
    for _ in range(0 if is_new else 100):
        backbone(torch.randn(16, 4))
    rates = [{"params": head.parameters()}]
    if how != "in no optimizer":
        rates.append({"params": backbone.parameters(), "lr": 0.0 if how == "no rate" else 0.1})
    optimizer = torch.optim.SGD(rates, lr=0.1)
    model = nn.ModuleList([backbone, head])
    with BatchNormTracker(model) as tracker:
        for _ in range(40):
            optimizer.zero_grad()
            with torch.set_grad_enabled(how != "no gradient"):
                features = backbone(torch.randn(16, 4))
            head(features.detach() if how == "detached" else features).square().mean().backward()
            optimizer.step()
        layer = tracker.close()["0.1"]
    assert layer.flags == (() if is_new else ("half-frozen",))
    assert ("`layer.eval()`" in layer.remedy) != is_new


def test_weights_are_not_said_to_stay_before_an_optimizer_has_stepped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BatchNormTracker(model) as tracker:
        for steps in (0, 1):
            tracker.reset()
            for _ in range(12):  # as gradients are accumulated
                model(torch.randn(16, 4)).square().mean().backward()
            for _ in range(steps):
                optimizer.step()
            assert tracker.close()["1"].flags == ()
