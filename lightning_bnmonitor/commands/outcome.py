"""What commands on trained models make of reports: a page, an exit status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_bnmonitor.commands.messages import CommandError
from lightning_bnmonitor.page.html import page
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.report import Report


def check_folder(path: Path) -> None:
    """Raise CommandError if there can be no such file."""
    if not path.parent.is_dir():
        raise CommandError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise CommandError(f"{path} is a folder: give a file.")


def need_attention(reports: Iterable[Report]) -> bool:
    """Whether any layer needs attention.

    Raises:
        CommandError: If no layer of one of them could be judged.
    """
    several = list(reports)
    if not all(any(layer.diagnosis.is_judged for layer in report.values()) for report in several):
        raise CommandError("No layer could be judged: whether they need attention is not known.")
    return any(report.unhealthy for report in several)


def write_page(path: Path, reports: Mapping[str, Report]) -> None:
    """Write TensorBoard's page with each of these reports as a run of one window.

    Raises:
        CommandError: If it cannot be written.
    """
    runs = {}
    for name, report in reports.items():
        history = History()
        history.add(report, 0)
        runs[name] = {"history": history.document(), "channels": history.channels()}
    try:
        path.write_text(page(runs, f"BatchNorm: {', '.join(runs)}"), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"The page could not be written to {path}: {error.strerror}.") from error
