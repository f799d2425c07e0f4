"""A training, all that it computes, and what the BatchNorm layers in it received, by a hook of the tests' own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report

Make = Callable[[], nn.Module]
Inputs = Callable[[int], dict[str, Tensor]]
"""What the model receives in a step, by keyword."""
Step = Callable[[nn.Module, dict[str, Tensor], Callable[[Tensor], None]], Any]
"""A forward and, by what comes third, a backward pass; returns what was computed."""


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


class Received:
    """What each BatchNorm layer of a model receives in training mode, in float64.

    By a hook of all modules, as the hooks of a layer are among what is looked at when it is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in batch_norms(model).items()}
        self.batches: dict[str, list[np.ndarray]] = {name: [] for name in self.names.values()}
        self.serial: set[str] = set()  # layers whose inputs PyTorch sums value by value
        self.listening = True

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        handle = register_module_forward_pre_hook(self._record)
        try:
            yield
        finally:
            handle.remove()

    def _record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in self.names and self.listening and self.model.training:
            x, *_ = args
            name = self.names[module]
            self.batches[name].append(x.detach().clone().double().numpy())
            if not x.is_contiguous() or x.numel() == x.shape[0] * x.shape[1]:
                self.serial.add(name)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While a backward pass may compute a forward again."""
        self.listening = False
        yield
        self.listening = True


@dataclass
class Training:
    """What came out of :func:`train`."""

    model: nn.Module
    received: Received
    computed: list[Any]
    """Outputs, losses and gradients of each step, then the states of model, optimizer and generators."""
    report: Report | None
    """None if no tracker was there."""

    @property
    def scalars(self) -> Tensor:
        """All numbers that were computed, the losses among them."""
        return torch.stack([each for each in self.computed if isinstance(each, Tensor) and not each.ndim])

    @property
    def layer(self) -> LayerReport:
        """Of the only BatchNorm layer."""
        assert self.report is not None
        (layer,) = self.report.values()
        return layer

    def calls(self, name: str) -> dict[str, float]:
        """How often each path was taken, those that never were left out."""
        assert self.report is not None
        evidence = self.report[name].evidence
        return {key: count for key, count in evidence.items() if key in CALLS and count}


CALLS = ("calls_saved", "calls_traced", "calls_pass", "calls_skipped")


def trainable(output: Any) -> list[Tensor]:
    """All tensors in a nested output that gradients go through."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else []
    return [tensor for part in parts for tensor in trainable(part)]


def loss_of(output: Any) -> Tensor:
    """Of everything that comes out: bounded, as some outputs are infinite by design, and steep at 0."""
    return torch.stack([(tensor.float().atan() - 1).square().mean() for tensor in trainable(output)]).sum()


def forward_and_backward(model: nn.Module, inputs: dict[str, Tensor], backward: Callable[[Tensor], None]) -> Any:
    output = model(**inputs)
    if trainable(output):
        loss = loss_of(output)
        backward(loss)
        return loss.detach()
    return None


def train(
    make: Make,
    inputs: Inputs,
    monitored: bool,
    steps: int = 6,
    step: Step = forward_and_backward,
    before_step: Callable[[nn.Module, int], None] = lambda model, index: None,
    capture: str = "auto",
) -> Training:
    """Train what ``make`` returns, from the same seeds each time."""
    seed()
    model = make()
    received = Received(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9) if parameters else None
    computed: list[Any] = []

    def backward(loss: Tensor) -> None:
        with received.deaf():
            loss.backward()

    tracked = BatchNormTracker(model, capture=capture) if monitored else contextlib.nullcontext()
    with tracked as tracker, received.recording():
        for index in range(steps):
            before_step(model, index)
            batch = inputs(index)
            computed.append(step(model, batch, backward))
            computed += [x.grad for x in batch.values()]
            computed += [None if p.grad is None else p.grad.clone() for p in parameters]
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        report = tracker.report() if tracker else None
    states = [model.state_dict(), optimizer.state_dict() if optimizer else None]
    return Training(model, received, [*computed, *states, rng_states()], report)


def seed() -> None:
    """All generators that a training may draw from."""
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)


def rng_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state(), str(random.getstate()), name, keys.tobytes(), rest]


def assert_identical(one: Any, other: Any) -> None:
    """Bit by bit, NaN to NaN."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        if not torch.equal(one, other):  # which NaN is not to itself
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_identical(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    else:
        assert one == other


def moments(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values per channel, in two float64 passes."""
    values = np.concatenate([np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1) for batch in batches], axis=1)
    mean = values.mean(axis=1)
    return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def assert_exact(layer: LayerReport, batches: list[np.ndarray], serial: bool = False) -> None:
    """Within the bounds of ``test_exactness.py``; the rounding of a few batches averages out no better than of one."""
    assert layer.num_batches == len(batches)
    assert layer.num_samples == sum(batch.size // batch.shape[1] for batch in batches)
    mean, var = moments(batches)
    mean_error = np.abs(layer.population_mean.numpy() - mean)
    assert np.all(mean_error <= 2e-8 * (np.sqrt(var) + np.abs(mean)) * (40 if serial else 4) + 1e-12)
    assert np.all(np.abs(layer.population_var.numpy() - var) <= 2e-6 * (var + layer.eps))


def assert_all_exact(training: Training) -> None:
    """Every BatchNorm layer is reported, with every call, and its moments are those of what it received."""
    received = training.received
    assert training.report is not None
    assert sorted(training.report) == sorted(received.batches)
    for name, batches in received.batches.items():
        assert_exact(training.report[name], batches, serial=name in received.serial)
