"""What is done to each guest: the script of the life-cycle cross-check."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from typing import Final, NamedTuple

from pvclock.meter.lifecycle.guest import LifecycleGuest
from pvclock.payloads import probe

__all__ = ["Kind", "Operation", "Stopped", "operations"]

PAUSES_S: Final = (0.1, 1.0, 10.0)
STOPS: Final = 100
LOADED_PAUSE_S: Final = 1.0

BUSY: Final = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"


class Kind(StrEnum):
    """What an operation is, whatever its length."""

    STOP = "stop"
    RESET = "reset"
    LOAD = "load"


class Stopped(NamedTuple):
    """For how long a guest was stopped, by the host's clock; all its stops together.

    least_ns: from stop answered to cont asked for.  most_ns: from stop asked for to cont answered.  longest_ns: the
    least of the longest stop.
    """

    least_ns: int = 0
    most_ns: int = 0
    longest_ns: int = 0


class Operation(NamedTuple):
    """Something that a VMM does to its guest.  name: for people, and in JSON.  perform: does it to a running guest."""

    name: str
    kind: Kind
    perform: Callable[[LifecycleGuest], Stopped]


def operations(
    pauses_s: Sequence[float] = PAUSES_S, stops: int = STOPS, loaded_pause_s: float = LOADED_PAUSE_S
) -> list[Operation]:
    """The script: stops of `pauses_s`, so many `stops` in a row, one on a busy host, a reset, save and load."""
    return [
        *(Operation(f"stop, cont after {pause_s:g} s", Kind.STOP, partial(_stop, pause_s)) for pause_s in pauses_s),
        Operation(f"{stops} times stop, cont", Kind.STOP, partial(_stop_often, stops)),
        Operation(f"stop, cont after {loaded_pause_s:g} s, host busy", Kind.STOP, partial(_stop_busy, loaded_pause_s)),
        Operation("system_reset", Kind.RESET, _reset),
        Operation("save, load in a new VM, cont", Kind.LOAD, _save_and_load),
    ]


def _stop(pause_s: float, guest: LifecycleGuest) -> Stopped:
    return _stopped(guest, lambda: time.sleep(pause_s))


def _stop_often(times: int, guest: LifecycleGuest) -> Stopped:
    each = [_stopped(guest) for _ in range(times)]
    return Stopped(
        sum(one.least_ns for one in each), sum(one.most_ns for one in each), max(one.longest_ns for one in each)
    )


def _stop_busy(pause_s: float, guest: LifecycleGuest) -> Stopped:
    with _busy_host():
        return _stop(pause_s, guest)


def _reset(guest: LifecycleGuest) -> Stopped:
    guest.reset()
    return Stopped()


def _save_and_load(guest: LifecycleGuest) -> Stopped:
    return _stopped(guest, guest.save_and_load)


def _stopped(guest: LifecycleGuest, meanwhile: Callable[[], object] = lambda: None) -> Stopped:
    """Stop the guest, forget its largest gaps so far, call `meanwhile`, and continue."""
    asked = _raw_ns()
    guest.pause()
    answered = _raw_ns()
    probe.clear_largest_gaps(guest.memory, guest.vcpus)
    meanwhile()
    asked_again = _raw_ns()
    guest.resume()
    return Stopped(asked_again - answered, _raw_ns() - asked, asked_again - answered)


@contextmanager
def _busy_host() -> Iterator[None]:
    """As many busy processes as this one may use CPUs; each ends with this one, too."""
    with ExitStack() as processes:
        for _ in os.sched_getaffinity(0):
            process = processes.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            processes.callback(process.kill)
        yield


def _raw_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
