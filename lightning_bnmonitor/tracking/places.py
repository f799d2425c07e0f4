"""Whether a layer that is called several times in a step is called with its model, or stands at several places of it.

Calls of the outermost module around it that is called are counted beside its own, for one window: as many, and the
model gets several kinds of inputs; fewer, and the layer is used at several places (weight sharing).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.capture.layer_hook import Gate
from lightning_bnmonitor.compat import current_backward
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer

_DEPTH = 4  # modules around a layer that are asked, from the outermost on
_MIN_CALLS = 8


class _Count(Hook):
    """Counts the calls of a module while the root is in training mode."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        root = self.gate.root()
        if root is not None and root.training and current_backward() == -1:  # which would be a recomputed one
            self.calls += 1


class Places:
    """Counts the calls of layers and of the modules around them.

    Hooks on more modules would make compiled code compile once more: nothing is counted where there is any.

    Args:
        gate: Knows the root.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._counts: dict[nn.Module, _Count] = {}
        self._around: dict[TrackedLayer, tuple[list[_Count], _Count]] = {}
        self._handles: list[Any] = []

    def follow(self, layers: Collection[TrackedLayer]) -> None:
        """Count the calls of these layers from now on, if that was not done before."""
        new = [layer for layer in layers if layer not in self._around]
        root = self._gate.root()
        if not new or root is None:
            return
        path_of = {module: path for path, module in root.named_modules()}
        for layer in new:
            around = _modules_around(root, path_of[layer.module]) if layer.module in path_of else []
            counts = [self._count(module) for module in around]
            self._around[layer] = counts, self._count(layer.module) if counts else _Count(self._gate)

    def calls_per_model_call(self, layer: TrackedLayer) -> float:
        """Calls of a layer for each of the outermost module around it that was called; NaN if that is not known."""
        around, own = self._around.get(layer, ([], _Count(self._gate)))
        called = next((count.calls for count in around if count.calls), 0)
        return own.calls / called if called and own.calls >= _MIN_CALLS else math.nan

    def window_ended(self) -> None:
        """Count no more if that was enough, and keep what was counted."""
        if all(own.calls >= _MIN_CALLS for around, own in self._around.values() if around):
            self._stop()

    def forget(self) -> None:
        """Count no more, and anew for the layers that are next to be followed."""
        self._stop()
        self._around = {}

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts = [], {}

    def _count(self, module: nn.Module) -> _Count:
        if module not in self._counts:
            self._counts[module] = count = _Count(self._gate)
            self._handles.append(module.register_forward_hook(count))
        return self._counts[module]


def _modules_around(root: nn.Module, path: str) -> list[nn.Module]:
    """From the outermost on. Not a LightningModule itself: it is called otherwise with several ranks."""
    around: list[nn.Module] = [] if hasattr(root, "training_step") else [root]
    *names, _ = path.split(".")
    module = root
    for name in names:
        module = module.get_submodule(name)
        around.append(module)
    return around[:_DEPTH]
