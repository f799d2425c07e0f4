"""Jumps at the border of two windows: against the definition in numpy, and where data begin anew but weights go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.statistics.borders import Edges, has_jump

C = 6


class Called(nn.Module):
    """A model that is never called itself, so that nothing is known of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)


def offset_of(kind: str, position: float, window: int) -> float:
    """By how much the inputs are moved after a part of a window."""
    return {"data in an order": position, "weights that move": window + position, "neither": 0.0}[kind]


def batches(kind: str, window: int, num: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + window)
    return [torch.randn(32, C, generator=generator) + 3 * offset_of(kind, (t + 0.5) / num, window) for t in range(num)]


@pytest.mark.parametrize("num", [12, 16, 40, 100])
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("data in an order", "ordered-batches"), ("weights that move", "drifting"), ("neither", "healthy")],
)
def test_data_begin_anew_at_a_border_and_weights_go_on(kind: str, verdict: str, num: int) -> None:
    model = Called()
    with BatchNormTracker(model) as tracker:
        for window in range(4):
            tracker.reset()
            for x in batches(kind, window, num, seed=num):
                model.norm(x)
            report = tracker.close()["norm"]
            assert "order_score" not in report.evidence
            is_jump = kind == "data in an order" and window > 0
            assert report.evidence.get("border_jump", 0.0) == is_jump
            if window > 0:
                told = ("drifting", "lagging") if verdict == "drifting" else ("healthy", "noisy")
                assert report.verdict in ((verdict,) if is_jump else told), report.evidence


def test_a_jump_that_is_known_after_a_resume() -> None:
    reports = []
    for resumed in (False, True):
        model = Called()
        tracker = BatchNormTracker(model).attach()
        for window in range(2):
            tracker.reset()
            for t, x in enumerate(batches("data in an order", window, 40, seed=1)):
                if resumed and window == 1 and t in (0, 20):
                    state = tracker.state_dict()
                    tracker.detach()
                    tracker = BatchNormTracker(model).attach()
                    tracker.load_state_dict(state)
                model.norm(x)
            report = tracker.close()["norm"]
        reports.append((report.verdict, report.evidence["border_jump"], report.evidence["ordering_ratio"]))
        tracker.detach()
    assert reports[0] == reports[1]
    assert reports[0][:2] == ("ordered-batches", 1.0)


def edges(rng: np.random.Generator, first: float, last: float) -> Edges:
    counts = np.array([64.0, 48.0])
    near = rng.normal(0, 0.05, (4, C))
    first_two, last_two = np.stack([near[0] + first, near[1] + first]), np.stack([near[2] + last, near[3] + last])
    return Edges(first_two, last_two, counts, rng.gamma(30, 1 / 15, C) * 2, np.array([30.0]), rng.uniform(0.5, 2, C))


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0])
def test_a_jump_is_what_the_definition_says(distance: float) -> None:
    rng, found = np.random.default_rng(3), []
    for _ in range(50):
        before, now = edges(rng, 0.0, 0.0), edges(rng, distance, 0.0)
        s = before.scaled
        v = np.mean((before.within + now.within) / 60 / s)
        c = v * (1 / 64 + 1 / 48)
        j = np.mean((now.first[0] - before.last[1]) ** 2 / s)
        near = max(np.mean((before.last[1] - before.last[0]) ** 2 / s), np.mean((now.first[1] - now.first[0]) ** 2 / s))
        expected = j > 4 * c and j - c > 0.02 and j - c > 3 * near
        assert has_jump(before, now) == expected
        found.append(expected)
    assert any(found) == (distance >= 0.1)
    assert all(found) == (distance >= 0.3)


def test_no_jump_is_told_of_channels_that_are_not_finite() -> None:
    rng = np.random.default_rng(4)
    before, now = edges(rng, 0.0, 0.0), edges(rng, 3.0, 0.0)
    broken = now._replace(first=np.full((2, C), np.nan))
    assert has_jump(before, now)
    assert not has_jump(before, broken)
    one = now.first.copy()
    one[:, 0] = np.nan
    assert has_jump(before, now._replace(first=one))
