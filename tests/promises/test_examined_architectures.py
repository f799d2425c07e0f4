"""Architectures that others wrote, examined: no layer is missed, each is exact, and nothing of the model changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from lightning_bnmonitor import examine
from tests.promises.architectures import ARCHITECTURES
from tests.promises.recorded_training import assert_identical, batch_norms, moments, rng_states, seed

pytestmark = pytest.mark.slow
BATCHES, EVALUATION = 3, 2


class Received:
    """What each BatchNorm layer receives, in float64, and in which mode."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: dict[str, list[np.ndarray]] = {}
        self.modes: set[bool] = set()
        self.handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self.keep(name, module, args[0]))
            for name, layer in batch_norms(model).items()
        ]

    def keep(self, name: str, layer: nn.Module, x: Tensor) -> None:
        self.modes.add(layer.training)
        self.batches.setdefault(name, []).append(x.detach().clone().double().numpy())


def forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    model(**batch)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_is_exact_and_the_model_is_as_it_was(architecture: str, is_training: bool) -> None:
    seed()
    model, inputs = ARCHITECTURES[architecture]()
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            module.reset_parameters()
    model.train(is_training)
    batches, evaluation = [inputs(step) for step in range(BATCHES)], [inputs(step) for step in range(EVALUATION)]
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received, states = Received(model), rng_states()
    report = examine(model, batches, evaluation, forward, num_batches=None)
    assert_identical(rng_states(), states)
    assert_identical(dict(model.state_dict()), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert received.modes == {True, False}
    for handle in received.handles:
        handle.remove()
    assert sorted(report) == sorted(batch_norms(model))
    assert {name for name, layer in report.items() if layer.verdict == "unused"} == set(report) - set(received.batches)
    for name, batches_of_layer in received.batches.items():
        share = len(batches_of_layer) * BATCHES // (BATCHES + EVALUATION)
        layer, (mean, var) = report[name], moments(batches_of_layer[:share])
        assert layer.num_batches == share
        assert np.all(abs(layer.population_mean.numpy() - mean) <= 1e-6 * (np.sqrt(var) + abs(mean)) + 1e-12)
        np.testing.assert_allclose(layer.population_var.numpy(), var, rtol=1e-6, atol=1e-12)
        val_mean, val_var = moments(batches_of_layer[share:])
        assert np.all(abs(layer.validation[0].numpy() - val_mean) <= 1e-6 * (np.sqrt(val_var) + abs(val_mean)) + 1e-12)
        np.testing.assert_allclose(layer.validation[1].numpy(), val_var, rtol=1e-6, atol=1e-12)
    assert torch.is_grad_enabled()
