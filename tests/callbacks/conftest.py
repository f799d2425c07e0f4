"""What the tests of the callbacks share."""

from __future__ import annotations

import signal

import pytest

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.dashboard_fits import Look, Run, board, fit
from tests.callbacks.event_files import events


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Four epochs with the monitor as it is by default, in TensorBoard."""
    monitor = BatchNormMonitor()
    look, logger = Look(monitor), board(tmp_path_factory.mktemp("default"))
    fit(logger, monitor, look, max_epochs=4)
    found = events(logger.log_dir)
    return Run(logger.log_dir, found, look.reports, set(found.scalars))


@pytest.fixture
def restored_signals():
    """Lightning ignores SIGINT once it has handled a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
