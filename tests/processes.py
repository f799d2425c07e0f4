"""Processes that are started for real: their libraries are imported once, not once in each of them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":  # a fresh process that imports these, and of which all that are started are copies
    CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "lightning.pytorch"])


def start(function: Callable[..., None], *args: Any, world_size: int) -> None:
    """Call ``function(rank, *args)`` in so many processes and wait for them; what fails in one is raised here."""
    torch.multiprocessing.start_processes(function, args=args, nprocs=world_size, start_method=METHOD)


@dataclass(frozen=True)
class Done:
    """What a script left behind."""

    code: int | None
    """Its exit status; negative: the signal that ended it."""
    output: str
    errors: str


def run_script(path: Path, *arguments: object, before: Callable[[], None] | None = None, timeout: float = 900) -> Done:
    """Run a script on one thread, as ``python path arguments`` in an empty folder does; kill it after ``timeout`` s.

    ``before``, a function of some module, is called in its process before it begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [str(path), *map(str, arguments)]
        process = CONTEXT.Process(target=_become, args=(words, folder, before))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return Done(process.exitcode, *(Path(folder, name).read_text() for name in ("output", "errors")))


def _become(words: list[str], folder: str, before: Callable[[], None] | None) -> None:
    for stream, name in ((sys.stdout, "output"), (sys.stderr, "errors")):
        with Path(folder, name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.chdir(folder)
    if before is not None:
        before()
    sys.argv, sys.path = words, [str(Path(words[0]).parent), *sys.path]
    runpy.run_path(words[0], run_name="__main__")
