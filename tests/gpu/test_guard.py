"""The guard on the device: nothing else changes by a bit, bad batches leave nothing, and no step waits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from lightning_bnmonitor import BatchNormTracker
from tests.gpu.training import images, needs_cuda, network, training_step

HALF = torch.bfloat16
STEPS = 30  # in which nothing is merged


def outcome(guard: bool, autocast: torch.dtype | None) -> dict[str, Tensor]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with BatchNormTracker(model, guard=guard):
        for step in range(80):
            training_step(model, optimizer, images(step), autocast)
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("autocast", [None, HALF])
def test_nothing_changes_as_long_as_all_is_finite(autocast):
    plain, guarded = outcome(False, autocast), outcome(True, autocast)
    assert all(torch.equal(value, guarded[name]) for name, value in plain.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_leaves_nothing(bad):
    model = network()
    with BatchNormTracker(model, guard=True) as tracker:
        for step in range(100):
            x = images(step)
            before = copy.deepcopy(model.state_dict())
            if step % 7 == 3:
                x[5, 1, 2, 3] = bad
            model(x)
            tracker.step()
            is_same = [
                torch.equal(value, model.state_dict()[name]) for name, value in before.items() if ".running" in name
            ]
            assert all(is_same) == (step % 7 == 3)
        report = tracker.close()
    for layer in report.values():
        assert (layer.evidence["guarded_calls"], layer.evidence["first_bad_batch"]) == (14, 4)
        assert layer.population_mean.isfinite().all()


@needs_cuda
def test_steps_never_wait_for_the_device():
    model, batches = network(), [images(step) for step in range(STEPS)]
    batches[20][5, 1, 2, 3] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with BatchNormTracker(model, guard=True) as tracker:
        for step, x in enumerate(batches):
            torch.cuda.set_sync_debug_mode("default" if step < 10 else "error")
            if step == 20:
                model(x)  # a step that is skipped
            else:
                training_step(model, optimizer, x, None)
            tracker.step()
        torch.cuda.set_sync_debug_mode("default")
        assert tracker.report()["1"].evidence["guarded_calls"] == 1
    assert model[1].num_batches_tracked == STEPS - 1
