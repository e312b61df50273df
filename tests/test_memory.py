"""Sizes of memory as people write them, and what is free."""

from __future__ import annotations

import psutil
import pytest
import torch

from cogsym import CogsymError
from cogsym.memory import free_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("512 MiB", 2**29), ("1.5kb", 1500), ("2e9", 2 * 10**9), ("10 TB", 10**13), ("7B", 7)],
)
def test_sizes_of_memory_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 GB of", "1.2.3GB", "0", "4G", "nan"])
def test_what_is_not_a_size_of_memory(text: str) -> None:
    with pytest.raises(CogsymError, match="is not understood; give a number with a unit, such as 4GB"):
        parse_bytes(text)


def test_free_memory_of_the_host() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_free_memory_of_a_gpu_counts_what_the_allocator_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert free_bytes(torch.device("cuda")) == 1200
