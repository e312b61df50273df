"""Child processes that a test kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> int | None:
    """Run in a forked process, which has everything imported; its exit status, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        assert child.pid
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return child.exitcode
