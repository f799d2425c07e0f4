"""``bnmonitor show LOGDIR``: what the event files of runs tell, as text, as JSON, as a page, as an exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.commands.window import Window, window_at
from lightning_bnmonitor.page.document import decode
from lightning_bnmonitor.page.html import page
from lightning_bnmonitor.tensorboard.logdir import RunDocuments, event_files, runs_in

_DESCRIPTION = """Print what the last window of each run has shown of its BatchNorm layers, as the event files below
LOGDIR tell. Exits with 2 if something cannot be read."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("show", help="what runs have found, from their event files", description=_DESCRIPTION)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="a folder with event files in it or below it")
    parser.add_argument("--window", type=int, metavar="STEP", help="the window with this training step in it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write TensorBoard's page of all runs to this file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--fail-on", choices=["unhealthy"], help="exit with 1 if a layer needs attention")
    parser.set_defaults(run=run)


class _Run(NamedTuple):
    """What can be shown of a run."""

    history: dict[str, Any]
    channels: dict[str, Any] | None
    window: Window


def run(arguments: argparse.Namespace) -> int:
    """Show what was asked for. Returns the exit status.

    Raises:
        CommandError: If there is nothing to show at all.
    """
    runs, troubles = _read(arguments.logdir, arguments.window)
    windows = {name: shown.window for name, shown in runs.items()}
    if arguments.json:
        print(json.dumps({name: window.to_dict() for name, window in windows.items()}, ensure_ascii=False))
    elif windows:
        print("\n\n\n".join(f"{name}, step {window.step}\n\n{window.text}" for name, window in windows.items()))
    if arguments.html is not None and runs:
        documents = {name: {"history": shown.history, "channels": shown.channels} for name, shown in runs.items()}
        try:
            arguments.html.write_text(page(documents, f"BatchNorm: {arguments.logdir}"), encoding="utf-8")
        except OSError as error:
            troubles.append(f"The page could not be written to {arguments.html}: {error.strerror}.")
    for trouble in troubles:
        print(f"bnmonitor: {trouble}", file=sys.stderr)
    if troubles:
        return 2
    return int(arguments.fail_on == "unhealthy" and any(window.num_unhealthy for window in windows.values()))


def _read(logdir: Path, step: int | None) -> tuple[dict[str, _Run], list[str]]:
    """All runs, and what could not be read, in sentences."""
    try:
        if not logdir.is_dir():
            raise CommandError(f"{logdir} is no folder." if logdir.exists() else f"There is no folder {logdir}.")
    except OSError as error:
        raise CommandError(f"{logdir} cannot be read: {error.strerror}.") from error
    troubles: list[str] = []
    files = event_files(logdir, lambda error: troubles.append(f"{error.filename} cannot be read: {error.strerror}."))
    troubles += [f"{path} cannot be read." for each in files.values() for path in each if not os.access(path, os.R_OK)]
    if not files and not troubles:
        raise CommandError(f"There are no event files (*tfevents*) in {logdir} or below it.")
    read: dict[str, _Run] = {}
    for name, documents in runs_in(logdir).items():
        shown = _decoded(documents, step)
        if isinstance(shown, _Run):
            read[name] = shown
        else:
            troubles.append(f"{name}: {shown}")
    if not read and not troubles:
        raise CommandError(
            f"The event files in {logdir} have no BatchNorm data, or are cut off or damaged before any. They come from "
            "`Trainer(callbacks=[BatchNormMonitor()])` with a logger that writes to TensorBoard."
        )
    return read, troubles


def _decoded(documents: RunDocuments, step: int | None) -> _Run | str:
    """What can be shown of a run, or why nothing can."""
    if documents.history is None:
        return "There is no history in its event files: they may be cut off."
    try:
        history = decode(documents.history)
        channels = None if documents.channels is None else decode(documents.channels)
        return _Run(history, channels, window_at(history, step))
    except ValueError as error:
        return str(error)
