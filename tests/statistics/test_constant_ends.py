"""Which inputs look padded, and which do not though their ends are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bnmonitor.statistics.constant_ends import ConstantEnds


def share_of(make, num=2):
    ends = ConstantEnds()
    for _ in range(num):
        ends.see([make()])
    return ends.share()


def lengths_mask(low, high, size=32, to=None):
    lengths = torch.randint(low, high, (size,))
    return torch.arange(to or int(lengths.max())) < lengths[:, None]


def padded(low, high, to=None, padding=0.0):
    mask = lengths_mask(low, high, to=to)
    return torch.where(mask[:, None], torch.randn(32, 4, mask.shape[1]), padding)


def tokens(low, high):
    mask = lengths_mask(low, high)
    return torch.where(mask, torch.randint(1, 999, mask.shape), 0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: padded(10, 100),
        lambda: padded(10, 100).mT,
        lambda: padded(20, 120, to=200),
        lambda: padded(10, 100, padding=-11.5),
        lambda: padded(10, 100).half(),
        lambda: tokens(5, 60),
        lambda: tokens(5, 60).int(),
    ],
)
def test_padded_sequences_look_padded(make):
    assert 0.3 < share_of(make) < 0.8


def test_the_share_is_that_of_the_positions():
    x = torch.randn(8, 3, 20)
    x[:4, :, 10:] = 0
    assert share_of(lambda: x) == pytest.approx((4 * 10 + 4) / 160)  # one position is alike with itself


def scribbled(size):
    """Images with empty borders, of any width."""
    x = torch.zeros(32, 28, 28)
    for image in x:
        left, right = torch.randint(1, 8, (2,)).tolist()
        image[:, left : 28 - right] = torch.randn(28, 28 - left - right)
    return nn.functional.interpolate(x[:, None], size)[:, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(32, 4, 50),
        lambda: torch.randn(32, 4, 50).relu(),
        lambda: torch.zeros(32, 4, 50),
        lambda: torch.full((32, 4, 50), float("nan")),
        lambda: (torch.rand(32, 1, 100) < 0.01).float(),  # spikes
        lambda: (torch.rand(32, 1, 100) < 0.05).float(),
        lambda: scribbled(28),
        lambda: scribbled(8),
        lambda: nn.functional.one_hot(torch.randint(4, (32, 100)), 4).float().mT,
        lambda: (torch.randn(32, 1, 64) * torch.exp(-torch.arange(64) / 4.0)).round(decimals=2),  # what fades away
        lambda: nn.functional.pad(torch.randn(32, 4, 30), (0, 20)),  # all alike
        lambda: torch.randint(1, 999, (32, 40)),
        lambda: tokens(58, 60),
        lambda: padded(96, 100),  # too little of it
        lambda: padded(2, 7),  # of so few positions nothing is known
        lambda: torch.randn(0, 4, 50),
        lambda: torch.randn(32, 4, 0),
    ],
)
def test_other_sequences_do_not(make):
    assert share_of(make) is None


@pytest.mark.parametrize("shape", [(32, 3, 8, 8), (32, 20), (32,)])
def test_images_tables_and_numbers_are_not_looked_at(shape):
    ends = ConstantEnds()
    ends.see([torch.zeros(shape)])
    ends.see([])
    assert ends.is_due
    assert ends.share() is None


def test_two_batches_of_a_window_are_looked_at():
    ends = ConstantEnds()
    for _ in range(2):
        assert ends.is_due
        ends.see([padded(10, 100)])
    assert not ends.is_due
    share = ends.share()
    ends.see([torch.randn(32, 4, 50)])
    assert ends.share() == share
    ends.reset()
    assert ends.is_due
    assert ends.share() is None
