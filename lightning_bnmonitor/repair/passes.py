"""Passes of data through a model that leave it as it was, to the bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_bnmonitor.tracking.tracker import trackers_of

Forward = Callable[[nn.Module, Any], Any]
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def forward_of(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, as :func:`recalibrate` does by default."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        batch = move_data_to_device(batch, tensor.device)
        break
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def run(model: nn.Module, batches: Iterable[Any], forward: Forward, num_batches: int | None = None) -> int:
    """Run a model on batches, at most so many. Returns how many there were.

    Raises:
        RuntimeError: If it cannot take one, with its own error as the cause.
    """
    count = 0
    for batch in itertools.islice(batches, num_batches):
        try:
            forward(model, batch)
        except Exception as error:
            raise RuntimeError(
                f"The model cannot take batch {count} of `batches`, a {type(batch).__name__}: {error!r}. Nothing was "
                "changed. Argument `forward`, a function of the model and a batch, tells how to run one."
            ) from error
        count += 1
    return count


@contextmanager
def training_only(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules are in training mode and all others in eval mode, and no BatchNorm updates its running statistics.

    Monitors do not count, and what is compiled runs eagerly. Then all is as before: modes, buffers, random states.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in modes if isinstance(module, _BatchNorm)]
    wrappers = [module for module in modes if isinstance(module, DistributedDataParallel)]
    syncing = {wrapper: wrapper.require_forward_param_sync for wrapper in wrappers}
    tracking = {layer: layer.track_running_stats for layer in layers}
    in_training, buffers = set(modules), Saved(layers)
    updating = [layer for layer in layers if layer in in_training]
    with ExitStack() as stack:
        for tracker in trackers_of(layers):
            stack.enter_context(tracker.paused())
        stack.enter_context(_random_states_as_before())
        stack.enter_context(_buffers_as_before(module for module in modes if module not in tracking))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
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


class Saved:
    """Copies of layers' buffers."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self.buffers = {
            layer: {
                name: buffer.detach().clone()
                for name in _BUFFERS
                if (buffer := getattr(layer, name)) is not None and not is_lazy(buffer)
            }
            for layer in layers
        }

    def of(self, layers: Iterable[_BatchNorm]) -> Saved:
        """Those of some of the layers."""
        some = Saved([])
        some.buffers = {layer: self.buffers[layer] for layer in layers}
        return some

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back into the layers' buffers, which may have moved since."""
        writes = [
            (getattr(layer, name), values) for layer, saved in self.buffers.items() for name, values in saved.items()
        ]
        with torch.inference_mode(any(buffer.is_inference() for buffer, _ in writes)):
            for buffer, values in writes:
                buffer.copy_(values)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """A context that puts them back if it is left by an error or an interrupt."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


@contextmanager
def _buffers_as_before(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever modules write into their buffers, in eval mode too, as the observers of quantisation do."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            module._buffers[name] = buffer
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
