"""A recalibration can be undone, copied and printed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_bnmonitor import Report, recalibrate
from tests.repair.exact_population import SIZES, data
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import buffers_of


def test_restore_brings_every_bit_back_also_after_further_training() -> None:
    model, batches = trained(Net()), data()
    with torch.no_grad():
        model.a.running_mean.copy_(torch.tensor([torch.nan, -0.0, 1e-45]))
    before = buffers_of(model)
    result = recalibrate(model, batches)
    assert buffers_of(model) != before
    result.restore()
    assert buffers_of(model) == before
    trained(model)
    assert model.a.num_batches_tracked == 10
    result.restore()
    assert buffers_of(model) == before
    result.restore()
    assert buffers_of(model) == before


def test_restore_goes_with_a_model_that_was_converted_since() -> None:
    model = trained(Net())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = recalibrate(model, data())
    model.double()
    result.restore()
    for name, buffer in model.named_buffers():
        assert buffer.is_floating_point() == before[name].is_floating_point()
        assert torch.equal(buffer, before[name].to(buffer.dtype))
    assert model.a.running_mean.dtype == torch.float64


def test_restored_in_part_only_what_was_written() -> None:
    model = trained(Net())
    before = buffers_of(model)
    result = recalibrate(model, data(), include="b")
    trained(model)
    moved = buffers_of(model)
    result.restore()
    for name, value in buffers_of(model).items():
        assert value == (before if name.startswith("b.") else moved)[name]


def test_the_second_undo_goes_back_to_the_first_state() -> None:
    model = trained(Net())
    before = buffers_of(model)
    first = recalibrate(model, data())
    between = buffers_of(model)
    second = recalibrate(model, data(mean=-2.0))
    second.restore()
    assert buffers_of(model) == between
    first.restore()
    assert buffers_of(model) == before


def test_twice_the_same_data_write_the_same_bits() -> None:
    model = trained(Net())
    recalibrate(model, data())
    once = buffers_of(model)
    recalibrate(model, data())
    assert buffers_of(model) == once


def test_reports_can_be_copied_and_pickled() -> None:
    result = recalibrate(trained(Net()), data())
    for report in (result.before, result.after):
        for twin in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
            assert isinstance(twin, Report)
            assert str(twin) == str(report)
            assert twin.to_dict() == report.to_dict()


def test_printed_it_is_a_table_of_before_and_after() -> None:
    model = trained(Net())
    model.c.eval()
    with pytest.warns(UserWarning, match="has left layers alone"):
        result = recalibrate(model, data())
    text = str(result)
    assert text.startswith("2 BatchNorm layers recalibrated on 10 batches.")
    assert text.endswith(f"Left alone: c (frozen, eval_error {result.misfits['c']:.4f}).")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:2] in ("a ", "b ")}
    for name in "ab":
        assert float(rows[name][2]) == pytest.approx(result.before[name].summary()["eval_error"], abs=1e-4)
        assert rows[name][3] == "0.0000"
        assert rows[name][-1] == str(sum(SIZES))
    assert "1 BatchNorm layer recalibrated on 1 batch." in str(recalibrate(single(), data()[:1]))


def test_a_model_is_not_kept_from_being_copied_by_its_recalibration() -> None:
    model = trained(Net())
    recalibrate(model, data())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert buffers_of(twin) == buffers_of(model)
