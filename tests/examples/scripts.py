"""The examples as a user runs them, and ways to spare what takes long and is not what is tested."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from torch import nn

from tests.processes import Done, run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: object, before: Callable[[], None] | None = None) -> Done:
    """Run an example to its end. In its process, ``before`` is called first."""
    return run_script(EXAMPLES / script, *arguments, before=before)


def printed(script: str, *arguments: object, before: Callable[[], None] | None = None) -> str:
    """What an example that succeeds has printed."""
    done = run(script, *arguments, before=before)
    assert done.code == 0, done.errors
    return done.output


def without_inductor() -> None:
    """It would compile for minutes what is asserted of no other backend: that it is exact is asserted elsewhere."""
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]


def with_copies() -> None:
    """Processes that a script starts are copies of its own, with all that it has imported."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: fork  # type: ignore[assignment]
