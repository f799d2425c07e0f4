"""Runs in event files, made by hand, without a training."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_bnmonitor import Report
from lightning_bnmonitor.page.document import FORMAT, encode
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.tensorboard.events import CHANNELS, HISTORY, summary, tag
from tests.page.older_documents import as_format_1
from tests.report.made_reports import with_error

WHAT_ALL_SAY = {"batch_size": 32.0, "batches": 8.0, "effective_momentum": 0.1}  # what explanations rest on
ODD_NAMES = ("<b>&amp;</b>", "a/b \"'c'", "größe.层", "../../etc")


def history(windows, prefix="bn") -> History:
    """A history of windows, each a step with the errors of layers: those above 0.1 are lagging."""
    made = History(prefix)
    for step, errors in windows.items():
        made.add(
            Report(
                with_error(name, error, verdict="lagging" if error > 0.1 else "healthy", evidence=WHAT_ALL_SAY)
                for name, error in errors.items()
            ),
            step,
        )
    return made


GOOD = {10: {"stem": 0.5, "head": 0.25}, 20: {"stem": 0.03125, "head": 0.0625}}
SICK = {10: {"stem": 0.03125, "head": 0.0}, 20: {"stem": 0.25, "head": 0.0}, 30: {"head": 0.0, "stem": 1.0}}


def write(folder: Path, *histories: History, format: int = FORMAT) -> Path:
    """Event files of a folder with the documents of histories, of whatever format. Returns the newest."""
    writer = SummaryWriter(str(folder))
    for made in histories:
        writer.add_scalar("loss", 1.0, 1)
        for kind, document in ((HISTORY, made.document()), (CHANNELS, made.channels())):
            data = encode(as_format_1(document) if format == 1 else document | {"format": format})
            writer.file_writer.add_summary(summary(tag(kind, made.prefix), data), made.windows.steps[-1])
    writer.close()
    return max(folder.glob("*tfevents*"))
