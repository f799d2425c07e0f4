"""What a training step is given: which tensors of a batch tell of the order and the making of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_bnmonitor.capture.hooks import Hook
from lightning_bnmonitor.compat import is_abstract, is_dynamo_compiling, is_stream_capturing

_MOST = 4  # inputs of a batch that are looked at
_TOKENS = (torch.int32, torch.int64)


class InputHook(Hook):
    """What is called before the ``forward`` of a model with what that is given.

    Args:
        see: Told of it.
    """

    def __init__(self, see: Callable[[object], None]) -> None:
        self.see = see

    def __call__(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        if not is_dynamo_compiling():
            self.see((args, kwargs))


def inputs_in(batch: object) -> list[Tensor]:
    """The inputs ``(B, *)`` in a batch of any structure: at most 4, with as many samples as the first.

    Floating-point numbers or images in bytes, with more than one value a sample: one value, or an integer, is a label.
    If there are none, token ids ``(B, L)``, and if there are none either, a number a sample.

    Returns:
        An empty list if the batch has no such tensor, or one without values of its own (abstract, or in a CUDA graph).
    """
    tensors: list[Tensor] = []
    _collect(batch, tensors)
    numbers = [x for x in tensors if x.is_floating_point() or x.dtype == torch.uint8]
    inputs = [x for x in numbers if _is_wide(x)] or [x for x in tensors if x.dtype in _TOKENS and _is_wide(x)]
    inputs = (inputs or numbers[:1])[:_MOST]
    if any(is_abstract(x) or (x.is_cuda and is_stream_capturing()) for x in inputs):
        return []
    return [x for x in inputs if x.shape[0] == inputs[0].shape[0] and x.device == inputs[0].device]


def _is_wide(x: Tensor) -> bool:
    """Whether it has more than one value a sample."""
    return x.numel() > x.shape[0]


def _collect(batch: object, tensors: list[Tensor]) -> None:
    """Add the tensors in a batch that may be inputs."""
    if type(batch) is Tensor:
        if batch.layout is torch.strided and batch.ndim and batch.numel() and not batch.is_nested:
            tensors.append(batch)
    elif isinstance(batch, list | tuple):
        for part in batch:
            _collect(part, tensors)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            _collect(part, tensors)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            _collect(getattr(batch, field.name), tensors)
