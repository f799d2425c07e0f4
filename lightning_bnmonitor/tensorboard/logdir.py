"""The documents in the event files of a log directory, read without a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from lightning_bnmonitor.tensorboard.events import CHANNELS, HISTORY, PLUGIN_NAME, by_monitor, in_natural_order


class RunDocuments(NamedTuple):
    """The newest documents of one monitor in one run, as they are in the files; None if there is none."""

    history: bytes | None
    channels: bytes | None


def runs_in(logdir: Path) -> dict[str, RunDocuments]:
    """The documents in the event files below a folder, by run: the name of its folder, as in TensorBoard.

    Of further monitors in a run the prefix follows in parentheses. Files that are being written, cut off or damaged are
    read as far as that is possible.
    """
    found = {}
    for run, paths in event_files(logdir).items():
        newest = _newest_in(paths)
        for name, tags in by_monitor(run, sorted(newest)).items():
            found[name] = RunDocuments(*(newest[tags[kind]] if kind in tags else None for kind in (HISTORY, CHANNELS)))
    return found


def event_files(logdir: Path, on_error: Callable[[OSError], None] | None = None) -> dict[str, list[Path]]:
    """The event files below a folder by run, each run's in the order in which they were begun.

    Args:
        logdir: The folder.
        on_error: Called for each folder that cannot be read.
    """
    found = {}
    for folder, _, names in os.walk(logdir, onerror=on_error, followlinks=True):  # as TensorBoard does
        if paths := [Path(folder, name) for name in sorted(names) if "tfevents" in name]:
            found[Path(folder).relative_to(logdir).as_posix()] = paths
    return {run: found[run] for run in sorted(found, key=in_natural_order)}


def _newest_in(paths: list[Path]) -> dict[str, bytes]:
    """Of each of our tags the newest document in event files."""
    newest = {}
    for path in paths:
        for record in _records(path):
            if PLUGIN_NAME.encode() not in record:  # which is quicker than to parse it
                continue
            for value in Event.FromString(record).summary.value:
                if value.tag.startswith((HISTORY, CHANNELS)) and value.tensor.string_val:
                    newest[value.tag] = value.tensor.string_val[0]
    return newest


def _records(path: Path) -> Iterator[bytes]:
    with suppress(Exception):  # TensorBoard's reader has one kind or another for damage
        yield from RawEventFileLoader(str(path)).Load()
