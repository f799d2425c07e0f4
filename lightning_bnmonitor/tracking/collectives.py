"""The process group of our own, and the few collectives that we use in it."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bnmonitor.compat import device_for_objects


def rank() -> int:
    """Number of this process in the default process group; 0 if there is none."""
    return dist.get_rank() if num_ranks() > 1 else 0


def num_ranks() -> int:
    """Size of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def group() -> dist.ProcessGroup:
    """Our own process group of all ranks, on the CPU: what others communicate cannot be taken for ours, or ours for it.

    So a rank that is done with its batches can wait here while the others still communicate for theirs. For the first
    time, all ranks have to call this in the same order as they create other groups.
    """
    world = dist.group.WORLD
    assert world is not None
    if _Own.world is None or _Own.world() is not world:
        _Own.group = dist.new_group(backend="gloo") if dist.is_gloo_available() else world
        _Own.world = weakref.ref(world)
    return _Own.group


def gather(values: Tensor) -> list[Tensor]:
    """CPU tensors of one size of all ranks, on rank 0; an empty list on the others."""
    values = values.to(_device())
    received = [torch.empty_like(values) for _ in range(num_ranks())] if rank() == 0 else None
    dist.gather(values, received, dst=0, group=group())
    return [part.cpu() for part in received or ()]


def broadcast(values: Tensor) -> Tensor:
    """Rank 0's ``values``, a CPU tensor of one size on all ranks."""
    values = values.to(_device())
    dist.broadcast(values, src=0, group=group())
    return values.cpu()


def all_succeeded(success: bool) -> bool:
    """Whether all ranks say so; each has to call this."""
    said = gather(torch.tensor([success], dtype=torch.uint8, device="cpu"))
    return bool(broadcast(torch.stack(said).amin(dim=0) if said else torch.zeros(1, dtype=torch.uint8, device="cpu")))


def _device() -> torch.device:
    """Where our process group takes tensors from."""
    return device_for_objects(group())


class _Own:
    """Our process group, and the default one that it was made beside."""

    world: ClassVar[weakref.ref[dist.ProcessGroup] | None] = None
    group: ClassVar[dist.ProcessGroup]
