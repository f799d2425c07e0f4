"""Examination: what one pass says of a model, and that it leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bnmonitor import examine, recalibrate
from tests.repair.exact_population import Recorder, error_in_eval, layers_of, moments
from tests.repair.small_models import Net, trained
from tests.repair.unchanged import Unchanged


def batches(num: int, size: int = 64, shift: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, generator=generator) + shift for _ in range(num)]


@pytest.mark.parametrize("is_training", [True, False])
def test_every_layer_is_compared_with_what_it_receives_in_the_pass(is_training: bool) -> None:
    model, data = trained(Net()).train(is_training), batches(12)
    recorder = Recorder(model)
    with Unchanged(model, entirely=True):
        report = examine(model, data, num_batches=None)
    assert list(report) == ["a", "b", "c"]
    for name, layer in report.items():
        assert recorder.training[name] == [True] * len(data)
        mean, var = moments(recorder[name])
        np.testing.assert_allclose(layer.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer.population_var.numpy(), var, rtol=1e-6)
        assert layer.summary()["eval_error"] == pytest.approx(
            error_in_eval(layers_of(model)[name], recorder[name]), rel=1e-3
        )


def test_what_recalibrate_says_of_before_is_that_report() -> None:
    model, data = trained(Net()), batches(12)
    examined = examine(model, data, num_batches=None)
    before = recalibrate(model, data).before
    assert before.to_dict() == examined.to_dict()
