"""``examine(mask=)``: what counts of what a trained model receives."""

from __future__ import annotations

import pytest
import torch

from lightning_bnmonitor import examine
from tests.tracking.padded_models import Records, assert_unpadded, batches, lengths_to_mask, network


def test_statistics_without_padding_are_those_of_what_counts_and_nothing_changes():
    model, its = network(), batches(20, offset=3.0)
    records = Records(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def forward(module, batch):
        records.mask = lengths_to_mask(batch)
        return module(batch[0])

    random = torch.get_rng_state()
    report = examine(model, its, forward=forward, num_batches=None, mask=lengths_to_mask)
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    for name in ("1", "4", "7", "11"):
        assert_unpadded(report[name], records, name)
    assert "padded" in report["1"].flags
    assert report["1"].evidence["padding_shift"] > 0.1
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 4  # those of this test


def test_without_a_mask_nothing_is_said_of_padding():
    report = examine(network(), batches(12), num_batches=None)
    assert all(layer.unpadded is None for layer in report.values())


def test_a_frozen_layer_is_not_moved_by_padding():
    model = network()
    model[1].eval()
    report = examine(model, batches(20, offset=3.0), num_batches=None, mask=lengths_to_mask)
    assert "padded" not in report["1"].flags
    assert report["1"].evidence["padding_shift"] > 0.1
    assert "padded" in report["4"].flags


def test_a_function_that_fails_is_told_of_and_the_rest_is_examined():
    with pytest.warns(UserWarning, match="`mask` failed"):
        report = examine(network(), batches(12), num_batches=None, mask=lambda batch: batch["lengths"])
    assert report["1"].num_batches == 12
    with pytest.raises(TypeError, match="`mask` must be a function or None"):
        examine(network(), batches(2), mask=torch.ones(3) > 0)
