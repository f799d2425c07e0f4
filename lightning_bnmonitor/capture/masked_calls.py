"""The moments of those values of a call that count: by a hook beside the layer's own, with passes over the input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.capture.layer_hook import Gate, by_keyword, has_channels
from lightning_bnmonitor.capture.masks import BatchMasks
from lightning_bnmonitor.capture.reduction import masked_moments_of, moments_of
from lightning_bnmonitor.compat import (
    BatchNorm,
    current_backward,
    is_abstract,
    is_capturing,
    is_dynamo_compiling,
    never_compiled,
)


class MaskedMoments(NamedTuple):
    """One call of a layer of whose values some count, on the layer's device; float64 where that has it."""

    total: int
    """Values per channel."""
    num_kept: Tensor
    """Those that count, ``()``."""
    kept: Tensor
    """Mean and biased variance of those, ``(2, C)``; 0 if there are none."""
    every: Tensor
    """Mean and biased variance of all, ``(2, C)``."""


class MaskHook(Hook):
    """The forward hook of one layer, beside the one that takes the moments of all values.

    Args:
        name: The layer's.
        gate: Tells whether a call counts.
        masks: Those of the present batch.
        take: Called with the moments of each call that a mask fits.
    """

    def __init__(self, name: str, gate: Gate, masks: BatchMasks, take: Callable[[MaskedMoments], None]) -> None:
        self.name = name
        self.gate = gate
        self.masks = masks
        self.take = take
        self._has_warned = False

    def __call__(self, module: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        """The forward hook. Compiled code has none of it."""
        if not is_dynamo_compiling():
            self._look_at(module, args[0] if args else by_keyword(kwargs))

    # Where a graph breaks at a layer, its hook runs eagerly, but what that calls would be compiled.
    @never_compiled
    def _look_at(self, module: BatchNorm, x: object) -> None:
        gate = self.gate
        root = gate.root()
        if (root is not None and not root.training) or gate.paused or gate.is_closed or current_backward() != -1:
            return  # in a backward pass, activation checkpointing makes a call again that has counted
        if is_abstract(x) or not has_channels(x, module) or not x.numel() or is_capturing():
            return
        mask = self.masks.of(self.name, x)
        if mask is None:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                count, *kept = masked_moments_of(x, mask)
                every = torch.stack(moments_of(x)).to(count.dtype)
                self.take(MaskedMoments(x.numel() // x.shape[1], count, torch.stack(kept), every))
        except Exception as error:  # as a pass that finds no memory: no reason not to train
            if not self._has_warned:
                warnings.warn(f"Values of layer {self.name!r} without padding are left out: {error!r}", stacklevel=2)
            self._has_warned = True
