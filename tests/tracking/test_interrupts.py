"""Ctrl-C at any moment while calls are merged: no call is lost, and none counts twice."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_bnmonitor
from lightning_bnmonitor import BatchNormTracker

PACKAGE = str(Path(lightning_bnmonitor.__file__).parent)
IN_EVERY_INSTRUCTION = {"merge", "commit", "_place", "add_layers"}


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that the package runs; in some functions before every instruction.

    That is where Python looks for signals: never within a function that is written in C.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = frame.f_code.co_name in IN_EVERY_INSTRUCTION
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


class Net(nn.Module):
    """Layers that are called unequally often, so that they are merged in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rarely, self.frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()

    def forward(self, x: Tensor) -> None:
        self.often(x)
        self.often(x)
        self.rarely(x[:, :2])
        self.frozen(x[:, :2])


def fed(net: nn.Module, num: int) -> list[Tensor]:
    batches = [torch.randn(4, 3, dtype=torch.float64) + 5 for _ in range(num)]
    for x in batches:
        net(x)
    return batches


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("calls_before", "in_a_window"), [(0, 1), (17, 8)])
def test_an_interrupt_at_any_third_moment_of_a_merge_loses_and_doubles_nothing(
    calls_before: int, in_a_window: int
) -> None:
    torch.manual_seed(0)
    num_interrupts = 0
    for first in itertools.count(1, 3 * in_a_window):
        net = Net().double()
        with BatchNormTracker(net) as tracker:
            batches = fed(net, calls_before)
            for at in range(first, first + 3 * in_a_window, 3):
                tracker.flush()
                batches += fed(net, 3)
                is_interrupted = True
                with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
                    tracker.flush()
                    is_interrupted = False
                num_interrupts += is_interrupted
                batches += fed(net, 2)
            report = tracker.report()
        values = torch.cat(batches).numpy()
        for name, times, width in (("often", 2, 3), ("rarely", 1, 2), ("frozen", 1, 2)):
            layer, own = report[name], values[:, :width]
            assert layer.num_batches == times * len(batches), (name, first)
            assert layer.num_samples == times * len(own), (name, first)
            np.testing.assert_allclose(layer.population_mean, own.mean(axis=0), rtol=1e-9)
            np.testing.assert_allclose(layer.population_var, own.repeat(times, axis=0).var(axis=0, ddof=1), rtol=1e-9)
        if not is_interrupted:
            break
    assert num_interrupts > 100
