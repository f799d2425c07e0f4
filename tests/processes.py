"""Processes of a process group, started for real: their libraries are imported once, not once in each of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":  # a fresh process that imports these, and of which all that are started are copies
    CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "lightning.pytorch"])


def start(function: Callable[..., None], *args: Any, world_size: int) -> None:
    """Call ``function(rank, *args)`` in so many processes and wait for them; what fails in one is raised here."""
    torch.multiprocessing.start_processes(function, args=args, nprocs=world_size, start_method=METHOD)
