"""Signals that ask a process to end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cogsym.signals import Terminated, as_interrupts, exit_status, handled

pytestmark = pytest.mark.usefixtures("heeded_signals")

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_each_is_handled_and_given_back() -> None:
    before = [signal.getsignal(number) for number in STOPS]
    seen: list[int] = []
    with pytest.raises(KeyError), handled(lambda number, frame: seen.append(number)):
        for number in STOPS:
            send(number)
        raise KeyError
    assert seen == list(STOPS)
    assert [signal.getsignal(number) for number in STOPS] == before


def test_one_that_is_ignored_stays_ignored() -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_interrupts():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Terminated):
                send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with handled(lambda *_: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", STOPS)
def test_as_interrupts_they_end_the_work(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt, as_interrupts():
        send(number)
    assert exit_status(interrupt.value) == 128 + number


def test_a_closing_terminal_interrupts_once() -> None:
    with as_interrupts():
        with pytest.raises(Terminated):
            send(signal.SIGHUP)
        send(signal.SIGHUP)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # a person may insist
            send(signal.SIGINT)
