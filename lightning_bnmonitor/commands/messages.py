"""What commands on trained models tell on stderr, and the error that ends one with exit status 2."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_OTHERS = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), _PACKAGE, "<frozen")


class CommandError(Exception):
    """It could not be done; the sentence says why, and what to give instead."""


def told(error: BaseException) -> str:
    """An error that other people's code has raised, in one line: its class, what it says, and where in their code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OTHERS)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def say(sentence: str) -> None:
    """Tell on stderr."""
    print(f"bnmonitor: {sentence}", file=sys.stderr)


@contextmanager
def quietly() -> Iterator[None]:
    """A context in which stdout is kept for what the command has found, and our warnings look like what it tells."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        show = warnings.showwarning

        def show_shortly(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
            if filename.startswith(_PACKAGE):
                say(str(message))
            else:
                show(message, category, filename, *rest)

        warnings.showwarning = show_shortly  # type: ignore[assignment]
        warnings.filterwarnings("ignore", r".*Trainer\(barebones=True\)")
        yield


@contextmanager
def as_command_error() -> Iterator[None]:
    """A context in which errors of the data or the model, or of what is done with them, end the command."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        is_ours = frames[-1].filename.startswith(_PACKAGE)
        raise CommandError(str(error) if is_ours else f"{told(error)}.") from error
