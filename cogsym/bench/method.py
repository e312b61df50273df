"""How everything is timed and counted.

Variants take turns, A B A B, so that what else the machine does falls on all alike; a turn begins with a call that is
not timed, unless the calls of all are long. A ratio is that of two variants' times in the same round, and its spread is
what the rounds say of it. On a CPU a call is timed by the clock, on a GPU by events, with the cache overwritten between
calls, so that each finds its inputs in memory; and `launch_bound` says whether the GPU waited for Python.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from cogsym.memory import libc_function

LEAST_ROUNDS = 5  # fewer say nothing of the spread
LONG_CALL = 0.5  # seconds: what such a call finds in caches at its start no longer matters
MEMORY_PERCENT = 50  # of the machine's in use, above which freed memory is given back between turns
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
CACHE_BYTES = 256 * 2**20  # more than the second-level cache of any GPU

T = TypeVar("T")
Rounds = dict[str, list[float]]  # numbers of each round by name, "seconds" always among them


@dataclass(frozen=True)
class Variant:
    """One of those that take turns.

    Attributes:
        run: what is timed; or, where it `reports`, what times itself.
        context: entered before its turn and left after it.
        warm_up: whether a turn may begin with an untimed call.
        scale: how many calls one call stands for, which its time is multiplied with.
        reports: `run` returns numbers by name, its own "seconds" among them: a process does, whose start is no part of
            the question. It is called once a turn.
    """

    run: Callable[[], Any]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    warm_up: bool = True
    scale: float = 1.0
    reports: bool = False


def first_calls(variants: dict[str, Variant], device: torch.device) -> dict[str, float]:
    """Seconds of one call of each variant that is warmed up: what it is warmed up with."""
    seconds = {}
    for label, variant in variants.items():
        if variant.warm_up:
            with variant.context():
                start = time.perf_counter()
                variant.run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[label] = time.perf_counter() - start
    return seconds


def interleaved(
    variants: dict[str, Variant],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = 0.05,
    deadline: float | None = None,
    least: int = LEAST_ROUNDS,
    warm_up: bool = True,
) -> dict[str, Rounds]:
    """Seconds a call of each variant in each round, and what else it reports.

    Args:
        variants: in the order of their turns; each has been called once (`first_calls`).
        device: whose time it is.
        rounds: how many.
        seconds: how long a turn lasts at least.
        deadline: of `time.perf_counter`; no round begins after it, but `least` are made.
        least: rounds.
        warm_up: begin the turns of those that may with an untimed call.
    """
    measured: dict[str, Rounds] = {label: {} for label in variants}
    for i in range(rounds):
        if i >= least and deadline is not None and time.perf_counter() > deadline:
            break
        for label, variant in variants.items():
            if psutil.virtual_memory().percent > MEMORY_PERCENT:
                release_freed_memory()
            with variant.context():
                if warm_up and variant.warm_up:
                    variant.run()
                numbers = (
                    variant.run() if variant.reports else {"seconds": seconds_a_call(variant.run, device, seconds)}
                )
            numbers["seconds"] *= variant.scale
            for name, number in numbers.items():
                measured[label].setdefault(name, []).append(number)
    return measured


def fastest(candidates: Mapping[T, Callable[[], object]]) -> dict[T, float]:
    """Seconds of the better of two calls of each candidate, the fastest first; each ends with its answer on the host.

    Options are chosen so, before anything is timed that counts.
    """
    seconds = {}
    for name, run in candidates.items():
        times = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def seconds_a_call(run: Callable[[], object], device: torch.device, seconds: float = 0.05) -> float:
    """Median seconds over as many calls as fit in `seconds`, at least one."""
    if device.type == "cuda":
        return _seconds_a_call_cuda(run, device, seconds)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _seconds_a_call_cuda(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    times: list[float] = []
    count = 1  # enough of a long call
    while not times or sum(times) < seconds:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        measured = [begin.elapsed_time(end) / 1000 for begin, end in events]
        if count == 1 and measured[0] < seconds:
            count = 5  # of a short one several at once: the queue is never empty while Python prepares the next
            continue
        times += measured
    return statistics.median(times)


def launch_bound(run: Callable[[], object], device: torch.device) -> bool:
    """Whether a GPU is done with `run` as soon as Python has queued it: its time is then Python's."""
    if device.type != "cuda":
        return False
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    queued = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return queued > 0.9 * (time.perf_counter() - start)


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed for the next block, however large, in this process.

    glibc gives blocks of more than 32 MB back at once, and the system clears every page of the next one: transformers,
    whose logits and copies of them are such blocks, can take twice as long for that alone. A user has this by
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 in the environment (mallopt(3)).
    """
    mallopt = libc_function("mallopt")
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Return to the system what has been freed: the C library keeps the holes between blocks, of each variant others,
    which is gigabytes where those of many take turns."""
    gc.collect()
    trim = libc_function("malloc_trim")
    if trim:
        trim(0)


def release(device: torch.device) -> None:
    """Give back what the last case held: models are large, and torch.compile holds what it made of one."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    release_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Of the times in the same rounds: the median, the extremes and the quartiles between which its spread lies."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median, "min": min(ratios), "max": max(ratios), "lower": lower, "upper": upper}


def saved_bytes(forward: Callable[[], object], left_out: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass saves for the backward pass, storages once, without those of the tensors left out.

    There is no backward pass through what `forward` returns: the graph is given nothing to unpack. A tensor would hold
    the node that saved it where it is that node's own result, and neither would ever be freed.
    """
    known = {t.untyped_storage().data_ptr() for t in left_out}
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no later one has the same address

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` holds at once above what was there before, by torch's allocators."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler announces itself there, and no setting keeps it from it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
