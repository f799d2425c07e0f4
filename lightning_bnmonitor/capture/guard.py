"""Running statistics in which no NaN or Inf stays: they are put back as they were before the call that made them so.

A copy is kept of what the layers have before the first of their calls since the last check. A check comes after each
training step, before a layer that was called since then is called again, and before anybody looks: all layers whose
running statistics are no longer finite, and were before, get theirs back, ``num_batches_tracked`` included. What is
written is chosen on the device, so that nothing waits for it; of layers that are finite these are the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.compat import (
    BatchNorm,
    copy_all,
    current_backward,
    is_abstract,
    is_capturing,
    is_dynamo_compiling,
    is_lazy,
    never_compiled,
    own_buffers,
)


class Guard:
    """Puts running statistics back that a call has made NaN or Inf.

    Compiled code is checked as a whole: what its calls have done since it was entered is undone together.

    Args:
        layers: The layers that are guarded.
        lock: Held while their running statistics are looked at.
    """

    def __init__(self, layers: Iterable[BatchNorm], lock: AbstractContextManager[Any]) -> None:
        self._layers = list(layers)
        self._lock = lock
        self._kept: list[_Kept] = []
        self.called: set[BeforeCall] = set()  # since the copy was made

    @property
    def is_keeping(self) -> bool:
        """Whether there is a copy of what the layers had before their next call."""
        return bool(self._kept)

    @never_compiled
    def prepare(self, x: object, is_training: bool) -> bool:
        """Check the calls so far, and keep a copy for the next. Returns False if that will have no values of its own.

        Args:
            x: What a module is about to be called with.
            is_training: Whether that may update running statistics.
        """
        if is_abstract(x) or is_capturing():
            return False
        with self._lock:
            self.put_back()
            if is_training:
                self._keep()
        return True

    def put_back(self) -> None:
        """Check the calls since the copy was made. Harmless when repeated."""
        if not self._kept or is_capturing():
            return
        with self._lock:
            for kept in self._kept:
                kept.put_back()
            self._kept = []
            self.called.clear()

    def _keep(self) -> None:
        on_devices: dict[torch.device, list[_Buffers]] = {}
        for layer in self._layers:
            buffers = own_buffers(layer)
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            if mean is None or var is None or mean.is_meta or (mean.__class__ is not Tensor and is_lazy(mean)):
                continue
            on_devices.setdefault(mean.device, []).append((mean, var, buffers.get("num_batches_tracked")))
        self._kept = [_Kept(buffers, device) for device, buffers in on_devices.items()]


class BeforeCall(Hook):
    """A forward pre-hook, to be called with keyword arguments, of a layer or of a compiled module with layers.

    Args:
        guard: Checks and keeps.
        module: The module, without what has compiled it.
    """

    def __init__(self, guard: Guard, module: nn.Module) -> None:
        self.guard = guard
        self.module = module

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each call."""
        if is_dynamo_compiling():  # the compiled module around it has a hook of its own
            return
        guard, is_training = self.guard, self.module.training
        # What activation checkpointing makes again, within a backward pass, is undone together with the first time.
        is_again = self in guard.called and current_backward() == -1
        if is_again or (is_training and not guard.is_keeping):
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not guard.prepare(x, is_training):
                return
        if is_training:
            guard.called.add(self)


class BeforeState(Hook):
    """What is called before a layer's ``state_dict`` is made, which may be of a step that was skipped."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def __call__(self, *_: Any) -> None:
        """Called before each."""
        self.guard.put_back()


_Buffers = tuple[Tensor, Tensor, Tensor | None]  # running mean and variance, and the number of updates, of a layer


class _Kept:
    """A copy of the running statistics of the layers on one device."""

    def __init__(self, buffers: Sequence[_Buffers], device: torch.device) -> None:
        self._device = device
        self._stats = [tensor for mean, var, _ in buffers for tensor in (mean, var)]
        self._tracked = [tracked for _, _, tracked in buffers if tracked is not None]
        self._counted = [layer for layer, (_, _, tracked) in enumerate(buffers) if tracked is not None]
        self._stats_before = torch.cat(self._stats)
        self._tracked_before = torch.stack(self._tracked) if self._tracked else None

    def put_back(self) -> None:
        """Write the copy into those layers that are no longer finite. The others get what they have."""
        before, now = self._stats_before, torch.cat(self._stats)
        if now.shape != before.shape or _is_known_finite(now):  # another width: they were replaced in place
            return
        is_spoiled = now.isfinite().logical_not_().logical_and_(before.isfinite())
        sizes = [tensor.numel() for tensor in self._stats]
        layer_of = _repeated(tuple(sizes[::2]), self._device)
        num_spoiled = torch.zeros(len(sizes) // 2, dtype=torch.int64, device=self._device)
        of_layers = num_spoiled.index_add_(0, layer_of, is_spoiled.long()) > 0
        # By `data`: what autograd has saved of them is not taken to be changed, no more than by the call itself.
        with torch.inference_mode(any(tensor.is_inference() for tensor in self._stats)):
            right = torch.where(of_layers[layer_of], before, now)
            copy_all([tensor.data for tensor in self._stats], torch.split(right, sizes))
            if self._tracked_before is not None:
                is_spoiled = of_layers
                if len(self._counted) < len(of_layers):
                    is_spoiled = torch.stack([of_layers[layer] for layer in self._counted])
                counts = torch.where(is_spoiled, self._tracked_before, torch.stack(self._tracked))
                copy_all([tensor.data for tensor in self._tracked], counts.unbind())


def _is_known_finite(values: Tensor) -> bool:
    """On the CPU one sum tells that, in the usual case; elsewhere to ask would mean to wait for the device."""
    return values.device.type == "cpu" and bool(np.isfinite(float(values.sum())))


@lru_cache(maxsize=8)
def _repeated(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of each layer, for its means and its variances."""
    return torch.from_numpy(np.repeat(np.arange(len(widths)), np.multiply(2, widths))).to(device)
