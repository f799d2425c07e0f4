"""Passes of data through a model that leave it as it was, to the bit."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bnmonitor.compat import BatchNorm, is_lazy, own_buffers, run_eagerly
from lightning_bnmonitor.tracking.buffers import SavedBuffers
from lightning_bnmonitor.tracking.recorder import recorders_of

Forward = Callable[[nn.Module, Any], Any]


def forward_of(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, as :func:`recalibrate` does by default."""
    batch = on_device_of(model, batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """A batch, with all in it that can be moved on the device of a model."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return apply_to_collection(batch, _Movable, _moved, tensor.device)
    return batch


def run(model: nn.Module, batches: Iterable[Any], forward: Forward, argument: str = "batches") -> int:
    """Run a model on batches, which are called ``argument`` in errors. Returns how many there were.

    Raises:
        RuntimeError: If it cannot take one, with its own error as the cause.
    """
    count = 0
    for batch in batches:
        try:
            forward(model, batch)
        except Exception as error:
            raise RuntimeError(
                f"The model cannot take batch {count} of `{argument}`, a {type(batch).__name__}: {error!r}. Nothing "
                "was changed. Argument `forward`, a function of the model and a batch, tells how to run one."
            ) from error
        count += 1
    return count


@contextmanager
def training_only(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which only these modules are in training mode, and no BatchNorm updates its running statistics.

    Monitors do not count, and what is compiled runs eagerly. Afterwards modes, buffers and random states are as before.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in modes if isinstance(module, BatchNorm)]
    wrappers = [module for module in modes if isinstance(module, DistributedDataParallel)]
    syncing = {wrapper: wrapper.require_forward_param_sync for wrapper in wrappers}
    tracking = {layer: layer.track_running_stats for layer in layers}
    in_training, buffers = set(modules), SavedBuffers(layers)
    updating = [layer for layer in layers if layer in in_training]
    with ExitStack() as stack:
        for recorder in recorders_of(layers):
            stack.enter_context(recorder.paused())
        stack.enter_context(_random_states_as_before())
        stack.enter_context(_buffers_as_before(module for module in modes if module not in tracking))
        stack.enter_context(run_eagerly())
        try:
            for module in modes:
                module.training = module in in_training
            for layer in updating:
                layer.track_running_stats = False
            for wrapper in syncing:  # ranks may have different numbers of batches
                wrapper.require_forward_param_sync = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for layer, tracks in tracking.items():
                layer.track_running_stats = tracks
            for wrapper, syncs in syncing.items():
                wrapper.require_forward_param_sync = syncs
            buffers.restore()  # a subclass may update them all the same


@contextmanager
def generators_as_before(batches: Iterable[Any]) -> Iterator[None]:
    """A context after which the generators that a loader draws from are as before it."""
    samplers = [batches, batches.sampler, batches.batch_sampler] if isinstance(batches, DataLoader) else []
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]  # of a batch sampler that was given
    generators = {getattr(sampler, "generator", None) for sampler in samplers}
    states = [(generator, generator.get_state()) for generator in generators if generator is not None]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


class _Movable(ABC):
    """What has a method ``to`` by its class: tensors, and the batches of some libraries."""

    @abstractmethod
    def to(self, device: torch.device) -> Any:
        """Move it to a device."""

    @classmethod
    def __subclasshook__(cls, subclass: type) -> bool:
        return callable(getattr(subclass, "to", None))


def _moved(data: Any, device: torch.device) -> Any:
    """Data on a device. What changes itself and returns nothing has been moved, too."""
    moved = data.to(device, non_blocking=True) if _is_async(data, device) else data.to(device)
    return data if moved is None else moved


def _is_async(data: Any, device: torch.device) -> bool:
    # Nothing waits for a copy to the CPU to arrive, nor, by a bug of PyTorch's (issue 83015), for one to MPS.
    return isinstance(data, Tensor) and device.type not in ("cpu", "mps")


@contextmanager
def _buffers_as_before(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo whatever modules write into their buffers, in eval mode too, as the observers of quantisation do."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in own_buffers(module).items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            own_buffers(module)[name] = buffer
            if buffer.shape != values.shape:
                buffer.resize_(values.shape)
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@contextmanager
def _random_states_as_before() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
