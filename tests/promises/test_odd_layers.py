"""Odd layers and spoilt batches are reported, where every warning is an error, too."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from tests.promises.faulty_runs import (
    BATCHES,
    MARKS,
    C,
    Net,
    assert_population,
    data,
    feed,
    layer_of,
    moments,
    single,
    trainer_for,
)

pytestmark = MARKS


def spoilt(value):
    def make(index):
        x = torch.randn(8, C)
        if index == 1:
            x[2, 1] = value
        return x

    return make


def scaled(factor, dtype=torch.float32):
    return lambda index: (torch.randn(8, C, dtype=dtype) * factor).to(dtype)


ODD = {
    "plain": ({}, scaled(1)),
    "NaN": ({}, spoilt(torch.nan)),
    "Inf": ({}, spoilt(torch.inf)),
    "overflow in float32": ({}, scaled(1e30)),
    "overflow in float64": ({"dtype": torch.float64}, scaled(1e160, torch.float64)),
    "underflow in float32": ({}, scaled(1e-30)),
    "underflow in float64": ({"dtype": torch.float64}, scaled(1e-200, torch.float64)),
    "constant": ({}, lambda index: torch.ones(8, C)),
    "two values": ({}, lambda index: torch.randn(2, C)),
    "momentum 0": ({"momentum": 0.0}, scaled(1)),
    "momentum 1": ({"momentum": 1.0}, scaled(1)),
    "momentum None": ({"momentum": None}, scaled(1)),
    "momentum 1.5": ({"momentum": 1.5}, scaled(1)),
    "momentum 3": ({"momentum": 3.0}, scaled(1)),
    "momentum 100": ({"momentum": 100.0}, scaled(1)),
    "momentum below 0": ({"momentum": -0.1}, scaled(1)),
    "momentum NaN": ({"momentum": float("nan")}, scaled(1)),
    "no affine": ({"affine": False}, scaled(1)),
    "no statistics": ({"track_running_stats": False}, scaled(1)),
    "half": ({"dtype": torch.float16}, scaled(1, torch.float16)),
    "half, overflow": ({"dtype": torch.float16}, lambda index: (torch.randn(8, C) * 6e4).half()),
    "bfloat16": ({"dtype": torch.bfloat16}, scaled(1, torch.bfloat16)),
}


@pytest.mark.parametrize("case", list(ODD))
def test_where_every_warning_and_every_numpy_flag_is_an_error_odd_layers_are_reported(case):
    kwargs, make = ODD[case]
    model = single(**kwargs)
    with warnings.catch_warnings(), np.errstate(all="raise"), BatchNormTracker(model) as tracker:
        warnings.simplefilter("error")
        for num_batches in (1, 2, 40):
            batches = [make(index) for index in range(num_batches)]
            for x in batches:
                model(x)
            report = tracker.close()
            assert str(report)
            assert report.brief()
            report.to_dict()
            report.summary()
            tracker.state_dict()
            tracker.reset()
    layer = report["0"]
    if case in ("plain", "two values", "no affine", "no statistics", "half", "bfloat16") or "momentum" in case:
        assert_population(layer, batches, 2e-5)
        if layer.has_running_stats:
            assert torch.equal(layer.running_mean.nan_to_num(), model[0].running_mean.double().nan_to_num())


class Jittered(nn.Module):
    """A weight that is another one whenever it is looked up."""

    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


def test_a_weight_that_is_computed_whenever_it_is_looked_up_is_not_looked_up(tmp_path):
    def states(*callbacks):
        torch.manual_seed(0)
        model = Net()
        register_parametrization(model.a, "weight", Jittered())
        trainer_for(tmp_path, *callbacks, max_epochs=2).fit(model, data(), data())
        return [*model.state_dict().values(), torch.rand(3)]

    assert all(map(torch.equal, states(BatchNormMonitor(on_unhealthy="ignore")), states()))


def test_a_layer_without_eps_that_is_frozen_is_counted():
    model = single(eps=0.0)
    model[0].eval()  # in training mode BatchNorm refuses it
    try:
        feed(model)
    except ValueError:
        pytest.skip("this version of torch refuses it in eval mode, too")
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        assert_population(layer_of(tracker), batches)
        model[0].train()
        with contextlib.suppress(ValueError):  # before torch 2.13 it does not
            batches += feed(model)
        assert_population(layer_of(tracker), batches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_default_dtype_while_reporting_disturbs_nothing(dtype):
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model, 40)
        expected = tracker.report()
        torch.set_default_dtype(dtype)
        try:
            report = tracker.close()
            assert report.to_dict() == expected.to_dict()
            assert str(report) == str(expected)
            tracker.reset()
            batches = feed(model, 40)
            report = tracker.report()
        finally:
            torch.set_default_dtype(torch.float32)
    assert_population(report["0"], batches)


def test_empty_batches_count_nothing_and_what_batch_norm_says_of_them_is_the_same(tmp_path):
    def outcome(model, x):
        try:
            return tuple(model(x).shape)
        except Exception as error:
            return type(error), str(error)

    model, batches = single(), []
    shapes = [(0, C), (0, C, 4), (8, C, 0)]
    without = [outcome(single(), torch.randn(shape)) for shape in shapes]
    with BatchNormTracker(model) as tracker:
        for shape, expected in zip(shapes, without, strict=True):
            batches += feed(model)
            assert outcome(model, torch.randn(shape)) == expected
        assert_population(layer_of(tracker), batches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_in_a_run_is_named_and_spoils_no_later_window(tmp_path, value):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                batch[0][2, 1] = value

    class OfInput(Net):
        """Its loss does not depend on what is spoilt, so that only the input is."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return self.linear(torch.ones(4, C)).square().mean()

    reports = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            reports.append(monitor.report())
            for layer in (pl_module.a, pl_module.b):
                layer.reset_running_stats()

    monitor, model = BatchNormMonitor(), OfInput()
    loader = data()
    loader = DataLoader([x.clone() for (x,) in loader.dataset], batch_size=8, collate_fn=lambda x: [torch.stack(x)])
    trainer_for(tmp_path, Spoil(), monitor, Look(), max_epochs=3).fit(model, loader)
    assert [report["a"].verdict == "non-finite" for report in reports] == [False, True, False]
    mean, _ = moments(model.received("a", BATCHES, 2 * BATCHES))
    assert reports[1]["a"].population_mean.isnan().tolist() == [False, True, False]
    np.testing.assert_allclose(reports[1]["a"].population_mean[[0, 2]], mean[[0, 2]], atol=1e-6)
    model.assert_reported(reports[0], 0, BATCHES)
    model.assert_reported(reports[2], 2 * BATCHES, 3 * BATCHES)
