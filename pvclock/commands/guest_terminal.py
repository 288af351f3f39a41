"""This process's terminal as a guest's: what is typed goes to its serial port, until the guest ends or the user does.

In a terminal the keys go to the guest as they are, Ctrl-C too; Ctrl-A and then x ends the run, as in QEMU, and Ctrl-A
and then z stops it, as Ctrl-Z does other programs.
"""

from __future__ import annotations

import os
import select
import signal
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

from pvclock.commands.signals import woken_by_signals

__all__ = ["ESCAPE", "Keys", "Settings", "as_it_was", "converse", "raw_terminal", "settings_of"]

ESCAPE: Final = 0x01
"""Ctrl-A."""
ENDS: Final = b"xX"
STOPS: Final = b"zZ"
READ_BYTES: Final = 4096
Settings: TypeAlias = list[Any]
"""As of tcgetattr(3)."""
FULL_S: Final = 0.02
"""How long to wait before more is typed into a serial port that has no room."""


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[bool]:
    """While it is entered a terminal passes on every key and changes nothing; then it is as before.

    Also after the process was stopped and goes on (SIGCONT), for a shell has changed the terminal meanwhile.  Yields
    whether it is a terminal; what is none stays as it is.  Only for the main thread.
    """
    if not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)

    def make_raw(*_signal: object) -> None:
        with suppress(termios.error):  # it was closed, which sends SIGCONT, too
            tty.setraw(descriptor, termios.TCSANOW)

    handler = signal.signal(signal.SIGCONT, make_raw)
    try:
        make_raw()
        yield True
    finally:
        signal.signal(signal.SIGCONT, handler)
        _set(descriptor, before)


@contextmanager
def as_it_was(descriptor: int, settings: Settings | None) -> Iterator[None]:
    """While it is entered a raw terminal has the settings that it had; None for what is no terminal."""
    if settings is None:
        yield
        return
    raw = termios.tcgetattr(descriptor)
    _set(descriptor, settings)
    try:
        yield
    finally:
        _set(descriptor, raw)


def _set(descriptor: int, settings: Settings) -> None:
    """Set a terminal, unless it was closed, at once: TCSADRAIN would wait for a reader that does not read."""
    with suppress(termios.error):
        termios.tcsetattr(descriptor, termios.TCSANOW, settings)


def settings_of(descriptor: int) -> Settings | None:
    """A terminal's; None for what is none."""
    return termios.tcgetattr(descriptor) if os.isatty(descriptor) else None


class Keys:
    """What the keys that were pressed are for: the guest, or an end or a stop of the run.

    has_escape: only a terminal's keys have; Ctrl-A pressed twice is one for the guest.
    """

    def __init__(self, *, has_escape: bool) -> None:
        self._has_escape = has_escape
        self._is_escaped = False
        self.ended = False
        """Has the user ended the run?  What was pressed after that is lost."""
        self.stopped = False
        """Is the run to be stopped?  For the reader to take back."""

    def for_guest(self, pressed: bytes) -> bytes:
        """Those of `pressed` that go to the guest."""
        if not self._has_escape:
            return pressed
        passed = bytearray()
        for key in pressed:
            if self._is_escaped:
                self._is_escaped = False
                if key in ENDS:
                    self.ended = True
                    break
                if key in STOPS:
                    self.stopped = True
                elif key == ESCAPE:
                    passed.append(key)
            elif key == ESCAPE:
                self._is_escaped = True
            else:
                passed.append(key)
        return bytes(passed)


def converse(
    typed: int,
    over: int,
    keys: Keys,
    receive: Callable[[bytes], int],
    deadline_s: float | None = None,
    stop: Callable[[], object] | None = None,
    on_end_of_input: Callable[[], object] | None = None,
) -> bool:
    """Pass on what is typed, until descriptor `over` can be read: True; or the user or the deadline ends it: False.

    typed: a descriptor, which may end; the guest goes on then.  receive: takes bytes, and says how many it took.
    stop: called when the user stops it, or SIGTSTP within told_to_stop().  on_end_of_input: called once `typed` has
    ended and all of it was taken.  What a signal's handler raises ends it, too.
    Only for the main thread.
    """
    with woken_by_signals() as woken:
        sources, waiting = {typed, over, woken}, b""
        while True:
            if waiting:
                waiting = waiting[receive(waiting) :]
            if typed not in sources and not waiting and on_end_of_input is not None:
                on_end_of_input()
                on_end_of_input = None
            if keys.ended:
                return False
            _stop_if_asked(keys, stop)
            wanted = {over, woken} if waiting else sources
            ready, _, _ = select.select(wanted, (), (), _patience_s(deadline_s, is_full=bool(waiting)))
            if over in ready:
                return True
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return False
            if woken in ready:
                keys.stopped = signal.SIGTSTP in os.read(woken, READ_BYTES)
            if typed in ready:
                pressed = os.read(typed, READ_BYTES)
                if not pressed:
                    sources.discard(typed)
                waiting += keys.for_guest(pressed)


def _stop_if_asked(keys: Keys, stop: Callable[[], object] | None) -> None:
    if keys.stopped and stop is not None:
        stop()
    keys.stopped = False


def _patience_s(deadline_s: float | None, *, is_full: bool) -> float | None:
    left_s = None if deadline_s is None else max(deadline_s - time.monotonic(), 0)
    if is_full:
        return FULL_S if left_s is None else min(FULL_S, left_s)
    return left_s
