"""A terminal for a guest: which keys reach it, when the conversation ends, and that the terminal is as before."""

from __future__ import annotations

import os
import pty
import signal
import termios
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pvclock.commands.guest_terminal import Keys, as_it_was, converse, raw_terminal, settings_of
from pvclock.commands.signals import told_to_stop
from tests.unit.other_threads_signal import taken_by_another_thread
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E22")

"""For what takes some ms: less than mutants have, so that one that waits for ever fails here."""


class Pipe(NamedTuple):
    """Both of its ends."""

    reads: int
    writes: int


@pytest.fixture
def typed() -> Iterator[Pipe]:
    """What is typed."""
    yield from a_pipe()


@pytest.fixture
def over() -> Iterator[Pipe]:
    """What says that the run is over."""
    yield from a_pipe()


def a_pipe() -> Iterator[Pipe]:
    """A pipe, closed at last."""
    pipe = Pipe(*os.pipe())
    yield pipe
    for end in pipe:
        try:
            os.close(end)
        except OSError:  # the test has closed it
            continue


# Keys


@pytest.mark.parametrize(
    ("pressed", "passed", "ended"),
    [
        (b"ls\r", b"ls\r", False),
        (b"\x03\x1a\x04", b"\x03\x1a\x04", False),
        (b"a\x01xb", b"a", True),
        (b"a\x01Xb", b"a", True),
        (b"a\x01\x01b", b"a\x01b", False),
        (b"a\x01\x01x", b"a\x01x", False),
        (b"a\x01qb", b"ab", False),
        (b"\x01", b"", False),
    ],
    ids=["text", "control", "end", "END", "one-for-the-guest", "then-x", "another", "begun"],
)
def test_keys(pressed: bytes, passed: bytes, ended: bool) -> None:
    """Ctrl-A and x end the run, Ctrl-A twice is one; all others are the guest's.  So, too, if each comes alone."""
    at_once, one_by_one = Keys(has_escape=True), Keys(has_escape=True)
    assert (at_once.for_guest(pressed), at_once.ended) == (passed, ended)
    seen = b""
    for key in pressed:
        if not one_by_one.ended:
            seen += one_by_one.for_guest(bytes([key]))
    assert (seen, one_by_one.ended) == (passed, ended)


def test_what_is_no_terminal_has_no_escape() -> None:
    """A file goes to the guest as it is."""
    keys = Keys(has_escape=False)
    assert (keys.for_guest(b"\x01x\x01\x01"), keys.ended) == (b"\x01x\x01\x01", False)


# The conversation


def test_what_is_typed_is_passed_on_until_the_run_is_over(typed: Pipe, over: Pipe) -> None:
    """The end of what is typed is not the run's."""
    received = bytearray()

    def receive(data: bytes) -> int:
        received.extend(data)
        if received.endswith(b"two"):
            os.write(over.writes, b".")
        return len(data)

    def type_it() -> None:
        os.write(typed.writes, b"one, ")
        os.write(typed.writes, b"two")
        os.close(typed.writes)

    typing = threading.Thread(target=type_it)
    typing.start()
    with alarm_after(HANG_S):
        assert converse(typed.reads, over.reads, Keys(has_escape=False), receive)
    typing.join()
    assert received == b"one, two"


def test_the_end_of_what_is_typed_is_not_the_runs(typed: Pipe, over: Pipe) -> None:
    """A guest goes on without its user, and ends by itself."""
    os.close(typed.writes)
    later = threading.Timer(0.05, os.write, (over.writes, b"."))
    later.start()
    with alarm_after(HANG_S):
        assert converse(typed.reads, over.reads, Keys(has_escape=False), len)
    later.join()


def test_a_port_without_room_gets_it_later(typed: Pipe, over: Pipe) -> None:
    """Nothing is lost where the guest takes little at a time, or nothing for a while."""
    sent = bytes(range(256)) * 8
    received, turns = bytearray(), iter(range(10**6))

    def receive(data: bytes) -> int:
        taken = data[: (0, 1, 300)[next(turns) % 3]]
        received.extend(taken)
        if len(received) == len(sent):
            os.write(over.writes, b".")
        return len(taken)

    os.write(typed.writes, sent)
    with alarm_after(HANG_S):
        assert converse(typed.reads, over.reads, Keys(has_escape=False), receive)
    assert received == sent


def test_the_user_ends_it(typed: Pipe, over: Pipe) -> None:
    """What was typed before reaches the guest."""
    received = bytearray()

    def receive(data: bytes) -> int:
        received.extend(data)
        return len(data)

    os.write(typed.writes, b"text\x01x")
    keys = Keys(has_escape=True)
    with alarm_after(HANG_S):
        assert not converse(typed.reads, over.reads, keys, receive)
    assert (keys.ended, bytes(received)) == (True, b"text")


def test_a_deadline_ends_it(typed: Pipe, over: Pipe) -> None:
    """Also one that has passed."""
    keys = Keys(has_escape=True)
    for deadline_s in (time.monotonic() + 0.01, time.monotonic() - 1):
        with alarm_after(HANG_S):
            assert not converse(typed.reads, over.reads, keys, len, deadline_s)
    assert not keys.ended


def test_a_signal_that_another_thread_took_ends_it(typed: Pipe, over: Pipe) -> None:
    """As a vCPU's may: what its handler raises is raised at once, and not at the next key."""

    def leave(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with alarm_after(HANG_S), taken_by_another_thread(signal.SIGTERM), pytest.raises(InterruptedError):
            converse(typed.reads, over.reads, Keys(has_escape=False), len)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_the_user_stops_it(typed: Pipe, over: Pipe) -> None:
    """Ctrl-A and z, each time; it goes on then, with what was typed before and after."""
    received, stops = bytearray(), []

    def receive(data: bytes) -> int:
        received.extend(data)
        return len(data)

    def stop() -> None:
        stops.append(bytes(received))
        os.write(typed.writes if len(stops) == 1 else over.writes, b"c\x01zd")

    os.write(typed.writes, b"a\x01Zb")
    keys = Keys(has_escape=True)
    with alarm_after(HANG_S):
        assert converse(typed.reads, over.reads, keys, receive, stop=stop)
    assert stops == [b"ab", b"abcd"]
    assert not keys.stopped


def test_sigtstp_stops_it(typed: Pipe, over: Pipe) -> None:
    """Whichever thread took it, and the process goes on until it stops itself; afterwards it is as before."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    try:
        with alarm_after(HANG_S), told_to_stop(), taken_by_another_thread(signal.SIGTSTP):
            assert converse(
                typed.reads, over.reads, Keys(has_escape=False), len, stop=lambda: os.write(over.writes, b".")
            )
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        with told_to_stop():
            assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTSTP, before)


# The terminal


def test_a_terminal_is_raw_and_then_as_before() -> None:
    """Also after an error: no key is handled, nothing is echoed, and all of it comes back."""
    ours, its = pty.openpty()
    before = termios.tcgetattr(its)

    def fail_within() -> None:
        with raw_terminal(its) as is_terminal:
            assert is_terminal
            flags = termios.tcgetattr(its)[3]
            assert flags & (termios.ECHO | termios.ICANON | termios.ISIG) == 0
            os.write(ours, b"\x03")
            assert os.read(its, 1) == b"\x03"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert termios.tcgetattr(its) == before
    os.close(ours)
    os.close(its)


def test_a_process_that_goes_on_after_a_stop() -> None:
    """A shell has made the terminal its own meanwhile: it is raw again, and at last as before."""
    ours, its = pty.openpty()
    before, handler = termios.tcgetattr(its), signal.getsignal(signal.SIGCONT)
    with raw_terminal(its):
        termios.tcsetattr(its, termios.TCSANOW, before)
        signal.raise_signal(signal.SIGCONT)
        assert termios.tcgetattr(its)[3] & (termios.ECHO | termios.ICANON | termios.ISIG) == 0
    assert (termios.tcgetattr(its), signal.getsignal(signal.SIGCONT)) == (before, handler)
    os.close(ours)
    os.close(its)


def test_a_stopped_runs_terminal_is_as_it_was() -> None:
    """While it is stopped, and raw again after that."""
    ours, its = pty.openpty()
    before = settings_of(its)
    with raw_terminal(its):
        raw = settings_of(its)
        with as_it_was(its, before):
            assert settings_of(its) == before
        assert settings_of(its) == raw != before
    os.close(ours)
    os.close(its)


def test_a_terminal_that_is_closed() -> None:
    """There is nothing to be put right, and no error; not of the SIGCONT either that its end sends."""
    ours, its = pty.openpty()
    with raw_terminal(its):
        os.close(ours)
        signal.raise_signal(signal.SIGCONT)
    os.close(its)


def test_what_is_no_terminal_stays_as_it_is(typed: Pipe) -> None:
    """A pipe, for one."""
    with raw_terminal(typed.reads) as is_terminal, as_it_was(typed.reads, settings_of(typed.reads)):
        assert not is_terminal


@pytest.mark.row("E17")
def test_the_end_of_input_is_told(typed: Pipe, over: Pipe) -> None:
    """Once, and not before all of it was taken."""
    room = iter([0, 1, 1])
    taken = bytearray()
    told: list[bytes] = []

    def receive(data: bytes) -> int:
        length = next(room)
        taken.extend(data[:length])
        return length

    def end() -> None:
        told.append(bytes(taken))
        os.write(over.writes, b".")

    os.write(typed.writes, b"ab")
    os.close(typed.writes)
    with alarm_after(HANG_S):
        assert converse(typed.reads, over.reads, Keys(has_escape=False), receive, on_end_of_input=end)
    assert told == [b"ab"]
