"""What the tests of faults share."""

from __future__ import annotations

import signal
import sys
import threading

import pytest
import torch

from lightning_bnmonitor.capture.attachment import CompilerSettings
from tests.promises.faulty_runs import (
    optimizer_hooks,
)


@pytest.fixture
def everything_restored():
    """No thread, no hook and no setting is left behind."""
    torch.manual_seed(0)
    handler, interval, users = signal.getsignal(signal.SIGINT), sys.getswitchinterval(), CompilerSettings.users
    threads, hooks = set(threading.enumerate()), optimizer_hooks()
    yield
    signal.signal(signal.SIGINT, handler)
    sys.setswitchinterval(interval)
    for late in set(threading.enumerate()) - threads:
        late.join(60)  # a loader does not wait for the threads that feed its workers
    assert set(threading.enumerate()) <= threads
    assert (CompilerSettings.users, optimizer_hooks()) == (users, hooks)
