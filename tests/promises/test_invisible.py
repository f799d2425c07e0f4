"""Training with the tracker is bit-identical to training without it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker
from tests.promises.recorded_training import assert_identical, rng_states, seed

STEPS = 40
Forward = Callable[[nn.Module, Tensor], Tensor]


class Network(nn.Module):
    """Convolutions and a head, with layers that are reused, cumulative, frozen and without buffers or affine part."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(dropout),
            nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.ReLU(inplace=True),
            nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, track_running_stats=False),
        )  # fmt: skip
        self.frozen = nn.BatchNorm2d(5)
        self.reused = nn.BatchNorm1d(6)
        self.narrow, self.mixing, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(dropout)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.frozen(self.features(x)).mean((2, 3)))
        return self.head(self.dropout(self.reused(self.mixing(self.reused(x)))))


def eager(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(use_reentrant: bool) -> Forward:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)

    return forward


def saved_on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def channels_last(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.contiguous(memory_format=torch.channels_last))


def train(forward: Forward, dropout: float, tracker_of: Callable[[nn.Module], Any], accumulate: int = 1) -> list[Any]:
    """Everything that training computes, step by step, and the state of everything at its end."""
    seed()
    model = Network(dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    computed: list[Any] = []
    with tracker_of(model):
        for step in range(STEPS):
            shift = torch.from_numpy(np.random.randn(2).astype(np.float32)).view(1, 2, 1, 1)
            x = (torch.randn(random.randint(3, 6), 2, 7, 7) + shift).requires_grad_()
            y = forward(model, x)
            loss = F.cross_entropy(y.float(), torch.randint(3, (len(y),)))
            loss.backward()
            computed += [y.detach().clone(), loss.detach().clone(), x.grad, rng_states()]
            computed += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            if step % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
            if step == STEPS // 2:
                model.eval()
                with torch.no_grad():
                    computed.append(model(torch.ones(2, 2, 7, 7)))
                model.train()
                model.frozen.eval()
    return [*computed, model.state_dict(), optimizer.state_dict(), rng_states()]


def calls_by_path(tracker: BatchNormTracker) -> dict[str, float]:
    """All calls that were counted in the model, by how they were captured."""
    total: dict[str, float] = {}
    for layer in tracker.report().values():
        for name, count in layer.evidence.items():
            if name.startswith("calls_") and count:
                total[name] = total.get(name, 0) + count
    return total


VARIANTS: dict[str, tuple[Forward, float, dict[str, Any], set[str]]] = {
    "eager": (eager, 0.0, {}, {"calls_saved", "calls_pass"}),
    "dropout": (eager, 0.3, {}, {"calls_saved", "calls_pass"}),
    "gradient accumulation": (eager, 0.3, {"accumulate": 3}, {"calls_saved", "calls_pass"}),
    "reentrant checkpointing": (checkpointed(use_reentrant=True), 0.3, {}, {"calls_pass"}),
    "non-reentrant checkpointing": (checkpointed(use_reentrant=False), 0.3, {}, {"calls_pass"}),
    "save_on_cpu": (saved_on_cpu, 0.3, {}, {"calls_pass"}),
    "autocast": (autocast, 0.3, {}, {"calls_saved", "calls_pass"}),
    "channels-last": (channels_last, 0.3, {}, {"calls_saved", "calls_pass"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("forward", "dropout", "options", "paths"), VARIANTS.values(), ids=VARIANTS)
def test_everything_computed_is_bit_identical_with_and_without_the_tracker(
    forward: Forward, dropout: float, options: dict[str, Any], paths: set[str]
) -> None:
    unmonitored = train(forward, dropout, lambda model: contextlib.nullcontext(), **options)
    for capture in ("auto", "pass"):
        trackers: list[BatchNormTracker] = []

        def tracker_of(model: nn.Module, capture: str = capture, trackers: list[Any] = trackers) -> BatchNormTracker:
            trackers.append(BatchNormTracker(model, capture=capture))
            return trackers[0]

        assert_identical(train(forward, dropout, tracker_of, **options), unmonitored)
        captured = calls_by_path(trackers[0])
        assert set(captured) == (paths if capture == "auto" else {"calls_pass"})
        assert sum(captured.values()) == STEPS * 7


@pytest.mark.slow
def test_the_comparison_notices_a_single_further_draw_of_any_generator() -> None:
    draws: list[Callable[[], Any]] = [lambda: torch.rand(1), lambda: np.random.rand(), lambda: random.random()]
    plain = train(eager, 0.0, lambda model: contextlib.nullcontext())
    for draw in draws:

        @contextlib.contextmanager
        def drawing(model: nn.Module, draw: Callable[[], Any] = draw) -> Iterator[None]:
            yield
            draw()

        with pytest.raises(AssertionError):
            assert_identical(train(eager, 0.0, drawing), plain)


def test_whatever_is_asked_of_the_tracker_in_between_changes_nothing() -> None:
    def asked(model: nn.Module) -> BatchNormTracker:
        tracker = BatchNormTracker(model)
        questions = [tracker.report, tracker.state_dict, tracker.flush, tracker.step, tracker.reset]
        model.register_forward_hook(lambda *_: questions[len(asked_so_far) % 5]() and None)
        model.register_forward_hook(lambda *_: asked_so_far.append(1))
        return tracker

    asked_so_far: list[int] = []
    monitored = train(eager, 0.3, asked)
    assert len(asked_so_far) == STEPS + 1
    assert_identical(monitored, train(eager, 0.3, lambda model: contextlib.nullcontext()))


def test_training_mode_and_requires_grad_of_everything_are_left_as_they_were() -> None:
    model = Network(0.1)
    before = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    with BatchNormTracker(model) as tracker:
        model(torch.randn(4, 2, 7, 7)).sum().backward()
        tracker.report()
    assert [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()] == before
    assert [set(vars(module)) for module in model.modules()] == attributes
