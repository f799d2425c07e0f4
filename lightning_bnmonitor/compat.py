"""Every private or version-dependent name of torch, its compiler and Lightning that this package uses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

__all__ = [
    "_BatchNorm",
    "batches_that_stepped",
    "buffers_of",
    "can_stop_early",
    "is_lazy",
    "logger_prefix",
    "prepared_batch",
    "run_eagerly",
]


def batches_that_stepped(trainer: Any) -> int:
    """The step at which Lightning logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def can_stop_early(trainer: Any) -> bool:
    """Whether ``min_epochs`` and ``min_steps`` are met."""
    return bool(trainer.fit_loop._can_stop_early)


def prepared_batch(pl_module: Any, batch: Any) -> Any:
    """A batch after ``on_before_batch_transfer`` of the model or its data module."""
    return pl_module._on_before_batch_transfer(batch)


def logger_prefix(logger: Any) -> str:
    """What a logger puts before the names of scalars; empty for none."""
    return getattr(logger, "_prefix", "") or ""


def run_eagerly() -> AbstractContextManager[Any]:
    """A context in which what ``torch.compile`` has compiled runs eagerly."""
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, to read and to replace."""
    return module._buffers
