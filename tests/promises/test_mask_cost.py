"""What a mask costs: nothing without one, no wait for the device, and a bounded number of bytes a channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from tests.promises.test_cost import Operations, bytes_held
from tests.tracking.padded_models import batches, lengths_to_mask

C, STEPS = 64, 40


def network(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [(nn.Conv1d(C if k else 4, C, 3, padding=1), nn.BatchNorm1d(C)) for k in range(depth)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def operations_of_training(depth: int, mask: object) -> Operations:
    model, its = network(depth), batches(STEPS, longest=9)
    tracker = BatchNormTracker(model, mask=mask)
    with tracker, Operations() as operations:
        for batch in its:
            tracker.see_inputs(batch)
            model(batch[0]).square().mean().backward()
            tracker.step()
    return operations


def test_without_a_mask_nothing_of_it_is_there() -> None:
    model = network(2)
    with BatchNormTracker(model) as tracker:
        assert tracker._recorder.masks is None
        assert tracker._recorder.windows.paddings is None
        assert [len(module._forward_hooks) for module in model.modules()] == [0, 0, 1, 0, 1]


@pytest.mark.slow
def test_a_mask_waits_for_no_device() -> None:
    operations = operations_of_training(3, lengths_to_mask)
    forbidden = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
    assert not [name for name in operations.names if any(name.split(".")[1].startswith(word) for word in forbidden)]
    assert not operations.copies_elsewhere


@pytest.mark.slow
def test_a_mask_is_some_tens_of_operations_for_each_layer() -> None:
    def added(depth: int) -> float:
        with_, without = (operations_of_training(depth, mask) for mask in (lengths_to_mask, None))
        return (len(with_.names) - len(without.names)) / STEPS

    a_layer = (added(6) - added(2)) / 4
    print(f"operations that a mask adds, a layer and step: {a_layer:.1f}")
    assert 20 < a_layer < 60


def test_training_steps_do_without_the_values_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("layer_hook", "masked_calls"):  # that would skip them
        monkeypatch.setattr(f"lightning_bnmonitor.capture.{module}.is_abstract", lambda x: False)
    model = network(2)
    with BatchNormTracker(model, mask=lambda x: torch.ones(6, x.shape[-1], device="meta") > 0) as tracker:
        model.to("meta")  # a device that raises if a value is copied from it
        for _ in range(STEPS):
            x = torch.randn(6, 4, 12, device="meta")
            tracker.see_inputs(x)
            model(x).square().mean().backward()
            tracker.step()
        assert len(tracker._recorder.windows.paddings._sums) == 2


def test_memory_does_not_grow_with_steps_and_is_a_few_hundred_bytes_a_channel() -> None:
    def most(mask: object) -> int:
        model, held = network(2), 0
        with BatchNormTracker(model, mask=mask) as tracker:
            for batch in batches(STEPS, longest=9):
                tracker.see_inputs(batch)
                model(batch[0])
                tracker.step()
                held = max(held, bytes_held(tracker))
        return held

    added = (most(lengths_to_mask) - most(None)) / (2 * C)
    print(f"bytes that a mask adds, a channel: {added:.0f}")
    assert added < 48 + 7 * 32 + 48  # and the mask itself
