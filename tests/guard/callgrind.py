"""Runs under valgrind and without torch: calls C++ kernels as recorder.py saw them called, on one thread.

    python callgrind.py EXTENSION ISA CALLS

prints what it will call, then calls it. Every call of the extension ends in a dump of callgrind's: the first is that of
`set_isa`, then each kernel has two, the second with its addresses resolved.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any


def placed(memory: dict[int, bytes], held: list[Any]) -> dict[int, int]:
    """Where each piece of memory lies now, as far from a multiple of 64 bytes as before; kept alive by `held`."""
    found = {}
    for base, content in memory.items():
        buffer = ctypes.create_string_buffer(len(content) + 64)
        held.append(buffer)
        address = ctypes.addressof(buffer)
        address += (base - address) % 64
        ctypes.memmove(address, content, len(content))
        found[base] = address
    return found


def moved(address: int, memory: dict[int, bytes], places: dict[int, int]) -> int:
    """Where what lay at an address lies now; 0 stays 0."""
    for base, content in memory.items():
        if base <= address < base + len(content):
            return places[base] + address - base
    assert address == 0, "an address that was not recorded"
    return 0


def main() -> None:
    """Call them all."""
    path, isa, calls = sys.argv[1], sys.argv[2], pickle.loads(Path(sys.argv[3]).read_bytes())
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec and spec.loader
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.set_isa(isa)
    held: list[Any] = []
    ready = []
    for label, kernel, arguments, memory, addresses in calls:
        print(label)
        places = placed(memory, held)
        given = [moved(a, memory, places) if i in addresses else a for i, a in enumerate(arguments)]
        ready.append((getattr(extension, kernel), given))
    for function, given in ready:
        for _ in range(2):
            function(*given)


if __name__ == "__main__":
    main()
