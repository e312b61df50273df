"""Child processes that a test kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def own_progress() -> None:
    """Give a forked process a lock for progress bars of its own: else one that is killed may hold that of all."""
    tqdm.set_lock(threading.RLock())


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> int | None:
    """Run in a forked process, which has everything imported; its exit status, negative for a signal."""

    def alone() -> None:
        own_progress()
        work()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        assert child.pid
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return child.exitcode
