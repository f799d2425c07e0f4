"""Networks of layers with an activation in them cost no pass, are exact, and train as without the tracker."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS
from tests.promises.activated_layers import FUSED_ARCHITECTURES, NETWORKS, Model, SplitBatchNorm2d
from tests.promises.recorded_training import (
    Training,
    assert_all_exact,
    assert_identical,
    batch_norms,
    train,
)

STEPS = 4
reads_behind = pytest.mark.skipif(not HAS_UNPACK_HOOKS, reason="before torch 2.10 a pass is made")


@functools.cache
def trained(network: str, monitored: bool) -> Training:
    """A training, from which several tests read."""
    build = {**NETWORKS, **FUSED_ARCHITECTURES}[network]
    torch.manual_seed(10)
    _, inputs = build()

    def make() -> nn.Module:
        model, _ = build()
        for module in model.modules():  # others' initial weights are so small that variances would be below eps
            if isinstance(module, nn.Linear | _ConvNd | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
        return model

    return train(make, inputs, monitored, STEPS)


@pytest.fixture(
    scope="module", params=[*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in FUSED_ARCHITECTURES)]
)
def network(request: pytest.FixtureRequest) -> str:
    """Of the module, so that all tests of one follow each other and read from the same training."""
    return request.param


@reads_behind
def test_no_call_costs_a_pass(network: str) -> None:
    training = trained(network, monitored=True)
    for name, batches in training.received.batches.items():
        assert training.calls(name) == {"calls_saved": len(batches)}


def test_every_layer_is_exact(network: str) -> None:
    training = trained(network, monitored=True)
    assert_all_exact(training)
    assert all(len(batches) == STEPS for batches in training.received.batches.values())


def test_a_pass_is_as_exact(network: str) -> None:
    build = {**NETWORKS, **FUSED_ARCHITECTURES}[network]
    torch.manual_seed(10)
    _, inputs = build()
    training = train(lambda: build()[0], inputs, monitored=True, steps=2, capture="pass")
    for name, batches in training.received.batches.items():
        assert training.calls(name) == {"calls_pass": len(batches)}
    assert_all_exact(training)


def test_training_is_bit_identical_without_the_tracker(network: str) -> None:
    training = trained(network, monitored=True)
    assert_identical(training.computed, trained(network, monitored=False).computed)
    assert torch.isfinite(training.scalars).all()


def test_the_networks_are_of_layers_whose_output_is_not_the_kernels() -> None:
    assert len(NETWORKS) + len(FUSED_ARCHITECTURES) >= 20
    for build in NETWORKS.values():
        model, inputs = build()
        nodes: list[str] = []

        def note(layer: nn.Module, args: object, output: torch.Tensor, nodes: list[str] = nodes) -> None:
            nodes.append(output.grad_fn.name())

        for layer in batch_norms(model).values():
            layer.register_forward_hook(note)
        model(**inputs(0))
        assert len(nodes) == len(batch_norms(model))
        assert any("BatchNorm" not in node for node in nodes)


def test_frozen_reimplementations_are_left_out() -> None:
    training = trained("partly frozen", monitored=True)
    modules = dict(training.model.named_modules())
    assert "FrozenBatchNormAct2d" in {type(module).__name__ for module in modules.values()}
    assert {type(modules[name]).__name__ for name in training.report} == {"BatchNormAct2d"}


@reads_behind
@pytest.mark.parametrize("num_splits", [2, 3])
def test_of_a_layer_that_leaves_a_part_of_the_batch_to_others_it_is_what_its_own_kernel_receives(
    num_splits: int,
) -> None:
    def make() -> nn.Module:
        return Model(nn.Conv2d(3, 6, 3), SplitBatchNorm2d(6, num_splits), nn.ReLU(), nn.Conv2d(6, 2, 3))

    def inputs(step: int) -> dict[str, torch.Tensor]:
        parts = [torch.randn(2 + step % 2, 3, 8, 8) + shift for shift in range(num_splits)]
        return {"x": torch.cat(parts)}

    training = train(make, inputs, monitored=True, steps=STEPS)
    assert_identical(training.computed, train(make, inputs, monitored=False, steps=STEPS).computed)
    received = training.received.batches
    received["body.1"] = [batch[: len(batch) // num_splits] for batch in received["body.1"]]
    assert_all_exact(training)
    first, other, *_ = received.values()
    assert not np.allclose(first[0].mean((0, 2, 3)), other[0].mean((0, 2, 3)), atol=1e-3)
    for name in received:
        assert training.calls(name) == {"calls_saved": STEPS}
