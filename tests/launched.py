"""Commands of several ranks, as torchrun starts them on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

LIMIT = 240  # seconds


class Launched:
    """`torchrun` with the command line of cogsym on two ranks.

    Attributes:
        process: torchrun's.
    """

    def __init__(self, *words: object, console_script: bool = False, ranks: int = 2) -> None:
        """Start it, as a module or, with `console_script`, as the command that pip installs."""
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0"]
        command[3:3] = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        script = Path(sys.executable).with_name("cogsym")
        if console_script and not script.exists():
            pytest.skip("the command cogsym is not installed beside this Python")
        command += ["--no-python", str(script)] if console_script else ["-m", "cogsym.cli"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rank(self, number: int) -> int:
        """The process of a rank, once it is there."""
        found: list[psutil.Process] = []

        def there() -> bool:
            children = psutil.Process(self.process.pid).children(recursive=True)
            found[:] = [c for c in children if c.environ().get("RANK") == str(number)]
            return bool(found)

        self.wait_until(there)
        return found[0].pid

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Look again and again while it runs."""
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None and time.monotonic() - began < LIMIT, self.end()
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Its exit status, and what all ranks said on standard output and error."""
        try:
            out, said = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, said


def sentences(said: str) -> int:
    """How many errors the ranks told; none with a traceback, which torchrun itself has."""
    assert "cli.py" not in said, said
    return sum(line.startswith("cogsym: ") for line in said.splitlines())
