"""What a guest sees of its clock in QEMU, and what any guest sees of a pause.

`observe_qemu` is pvclock.meter.observe.observe for a QEMU.  `interrupt` looks at a running clockprobe from the
outside, by this host's clocks and without a word from whoever serves the guest's, so it is the same for all.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Final, Literal, NamedTuple, Protocol

from pvclock import GuestMemory, StateError, TimeInfo
from pvclock.meter.observe import Observation, Steered, finish, probe_machine, wait_until_reading
from pvclock.payloads import clockprobe, probe
from qemu_glue.peer.launch import Qemu

__all__ = ["Interruption", "Pause", "Sight", "interrupt", "probe_qemu", "see_machine", "see_qemu"]

NS_PER_S: Final = 1_000_000_000
BOOT_LIMIT_S: Final = 60.0
EXIT_LIMIT_S: Final = 10.0
LOOKS: Final = 10
LOOKS_LIMIT_S: Final = 0.3
LOOK_PAUSE_S: Final = 0.0002
LOOK_BOUND_NS: Final = 50_000
"""How old a guest's newest reading may be when it is compared with a host's clock."""
STALE_LOOK_BOUND_NS: Final = 10_000_000
"""The same where nobody looks while a vCPU runs, for want of a second CPU: a change of threads, and a slow one."""
SPAN_S: Final = 0.5
PAUSE_S: Final = 0.3
"""Well above the time for which a busy host may keep a vCPU waiting, tens of ms."""

READS_PER_FLUSH: Final = 1 << 14
"""clockprobe brings a record's `reads` up to date every so many."""

TIME_INFO: Final = struct.Struct("<I4xQQIbB2x")
"""The page by the document (K-11), not by the engine that is under test."""


class Pause(NamedTuple):
    """A pause as this host saw it: it took least_ns to most_ns.

    least_ns: from when pausing had been done to when resuming was asked for; most_ns: from asked for to done.  pages:
    what lay there meanwhile.  by_monitor: the same as QEMU itself reads them; empty for a machine of our own.
    """

    least_ns: int
    most_ns: int
    pages: list[TimeInfo]
    by_monitor: list[TimeInfo]


class Interruption(NamedTuple):
    """One clock before, during and after a pause of its guest.

    wall_clock_error_ns: the record plus the guest's time against CLOCK_REALTIME.  progress_ns: what the guest's clock
    gained on CLOCK_MONOTONIC_RAW within span_s, undisturbed.  left_out_ns: what it lost on it over the pause; both true
    to look_bound_ns.  before, after: pages.
    """

    look_bound_ns: int
    wall_clock_error_ns: int
    progress_ns: int
    span_s: float
    left_out_ns: int
    pause: Pause
    before: list[TimeInfo]
    after: list[TimeInfo]
    records: list[probe.ProbeRecord]


class Sight(NamedTuple):
    """All that is seen of one clock: left alone, interrupted and, if it can, following a clock of the host."""

    alone: Observation
    interrupted: Interruption
    steered: Steered | None = None


class Guest(Protocol):
    """A running VM; `Machine` and `Qemu` are such."""

    @property
    def memory(self) -> GuestMemory:
        """The guest's."""

    def pause(self) -> None:
        """Keep the vCPUs from running."""

    def resume(self) -> None:
        """Let them go on."""


def see_machine(clock: Literal["engine", "kernel"], alone: Observation, vcpus: int) -> Sight:
    """`alone` and, in another machine with the same clock, an interruption."""
    with probe_machine(clock, vcpus) as machine:
        machine.start()
        wait_until_reading(machine)
        return Sight(alone, interrupt(machine, vcpus, lambda: finish(machine)))


def see_qemu(features: int, seconds: float, vcpus: int) -> Sight:
    """QEMU's clock for a guest that is offered `features`: left alone for `seconds`, and interrupted.

    QemuError, or StateError if clockprobe does not do its work there.
    """
    alone = _observe_qemu(features, seconds, vcpus)
    with probe_qemu(features, vcpus) as qemu:
        _wait_until_reading(qemu)
        try:
            return Sight(alone, interrupt(qemu, vcpus, lambda: _finish(qemu), lambda: _pages_by_monitor(qemu)))
        except StateError:
            qemu.check_running()  # a dead QEMU is the better explanation
            raise


def probe_qemu(features: int, vcpus: int) -> Qemu:
    """A QEMU with clockprobe booting in it."""
    return Qemu(clockprobe(), features=features, vcpus=vcpus, cmdline=f"cpus={vcpus}")


def interrupt(
    guest: Guest,
    vcpus: int,
    end: Callable[[], list[probe.ProbeRecord]],
    read_by_monitor: Callable[[], list[TimeInfo]] = list,
) -> Interruption:
    """Look at a guest that reads its clock, pause and resume it, look again, and end it with `end`."""
    memory = guest.memory
    wall_clock_error_ns = _wall_clock_error_ns(memory)
    begin_ns, first = _raw_ns(), _look(memory, time.CLOCK_MONOTONIC_RAW)
    time.sleep(SPAN_S)
    second, end_ns = _look(memory, time.CLOCK_MONOTONIC_RAW), _raw_ns()
    before = _pages(memory, vcpus)
    pause = _pause(guest, vcpus, read_by_monitor)
    _wait_for_more_reads(memory, vcpus)
    third = _look(memory, time.CLOCK_MONOTONIC_RAW)
    return Interruption(
        look_bound_ns=max(look.bound_ns for look in (first, second, third)),
        wall_clock_error_ns=wall_clock_error_ns,
        progress_ns=first.lag_ns - second.lag_ns,
        span_s=(end_ns - begin_ns) / NS_PER_S,
        left_out_ns=third.lag_ns - second.lag_ns,
        pause=pause,
        before=before,
        after=_pages(memory, vcpus),
        records=end(),
    )


def _pause(guest: Guest, vcpus: int, read_by_monitor: Callable[[], list[TimeInfo]]) -> Pause:
    asked_to_pause = _raw_ns()
    guest.pause()
    paused = _raw_ns()
    pages, by_monitor = _pages(guest.memory, vcpus), read_by_monitor()
    time.sleep(PAUSE_S)
    asked_to_resume = _raw_ns()
    guest.resume()
    return Pause(asked_to_resume - paused, _raw_ns() - asked_to_pause, pages, by_monitor)


def _wait_for_more_reads(memory: GuestMemory, vcpus: int) -> None:
    """Return once every vCPU has read its own page again, many times, and the newest reading is from then or later.

    At first that may be one from ahead: who reads a page that is yet to be set is ahead of all who come after.
    StateError if they do not read on.
    """
    goals = [probe.read_record(memory, vcpu).reads + 2 * READS_PER_FLUSH for vcpu in range(vcpus)]
    _wait_until(lambda: all(probe.read_record(memory, vcpu).reads >= goal for vcpu, goal in enumerate(goals)))
    newest = _newest_ns(memory)
    _wait_until(lambda: _newest_ns(memory) > newest)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + EXIT_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise StateError("interrupt", f"not all vCPUs read on within {EXIT_LIMIT_S:g} s of a pause", "try again")
        time.sleep(0.001)


def _observe_qemu(features: int, seconds: float, vcpus: int) -> Observation:
    with probe_qemu(features, vcpus) as qemu:
        _wait_until_reading(qemu)
        tsc_hz = qemu.tsc_hz()
        time.sleep(seconds)
        qemu.check_running()
        wall_clock_error_ns = _wall_clock_error_ns(qemu.memory)
        records = _finish(qemu)
        pages = _pages(qemu.memory, vcpus)
        wall_clock_ns = _wall_clock_ns(qemu.memory)
    first = records[0]
    nominal_ns = Fraction((first.last_tsc - first.first_tsc) * NS_PER_S, tsc_hz)
    return Observation(
        clock="qemu",
        pages=pages,
        tsc_hz=tsc_hz,
        rate_ppb=float(((first.last_ns - first.first_ns) / nominal_ns - 1) * NS_PER_S),
        rate_bound_ppb=float(2 * NS_PER_S / nominal_ns),
        wall_clock_ns=wall_clock_ns,
        wall_clock_error_ns=wall_clock_error_ns,
        records=records,
    )


def _wait_until_reading(qemu: Qemu) -> None:
    deadline = time.monotonic() + BOOT_LIMIT_S
    while (block := probe.read_block(qemu.memory)) is None or block.phase < probe.Phase.READING:
        qemu.check_running()
        if time.monotonic() > deadline:
            what = f"clockprobe has not begun after {BOOT_LIMIT_S:g} s in QEMU, and said {_said(qemu)}"
            raise StateError("observe", what, "try again")
        time.sleep(0.001)
    if block.cpus_arrived != qemu.vcpus:
        raise StateError("observe", f"not all {qemu.vcpus} vCPUs of clockprobe began in QEMU: {block}", "try again")


def _finish(qemu: Qemu) -> list[probe.ProbeRecord]:
    probe.stop(qemu.memory)
    code = qemu.wait(EXIT_LIMIT_S)
    records = [probe.read_record(qemu.memory, vcpu) for vcpu in range(qemu.vcpus)]
    if code != probe.EXIT_FINE or any(record.state != probe.State.DONE for record in records):
        what = f"clockprobe ended with {code} in QEMU, and said {_said(qemu)}; its vCPUs: {records}"
        raise StateError("observe", what, "try again")
    return records


def _said(qemu: Qemu) -> str:
    return qemu.console.strip() or "nothing"


class Look(NamedTuple):
    """How far a guest's newest reading is behind a clock of the host; too much by up to bound_ns."""

    lag_ns: int
    bound_ns: int


def _look(memory: GuestMemory, clock: int) -> Look:
    """The best of many looks.

    A look counts if the newest reading changed during it: then a vCPU was running, and the reading is no older than the
    look was long.  Where none does within LOOKS_LIMIT_S (a host with a single CPU), the least of all must do.
    """
    fresh: list[int] = []
    stale: list[int] = []
    deadline = time.monotonic() + LOOKS_LIMIT_S
    while len(fresh) < LOOKS and time.monotonic() < deadline:
        begin, first = _raw_ns(), _newest_ns(memory)
        newest, now, end = _newest_ns(memory), time.clock_gettime_ns(clock), _raw_ns()
        looks = fresh if newest != first and end - begin < LOOK_BOUND_NS else stale
        looks.append(now - newest)
        time.sleep(LOOK_PAUSE_S)  # who waits, runs at once when it wants to, and leaves the CPU to the guest
    return Look(min(fresh), LOOK_BOUND_NS) if fresh else Look(min(stale), STALE_LOOK_BOUND_NS)


def _newest_ns(memory: GuestMemory) -> int:
    block = probe.read_block(memory)
    if block is None:
        raise StateError("observe", "clockprobe's block is gone from its memory", "is another guest running there?")
    return block.shared_last


def _wall_clock_error_ns(memory: GuestMemory) -> int:
    return _wall_clock_ns(memory) - _look(memory, time.CLOCK_REALTIME).lag_ns


def _wall_clock_ns(memory: GuestMemory) -> int:
    _, sec, nsec = struct.unpack("<III", memory.read(probe.WALL_CLOCK, 12))
    return int(sec * NS_PER_S + nsec)


def _pages(memory: GuestMemory, vcpus: int) -> list[TimeInfo]:
    """All pages, as they lie there; torn if they are changed at this moment."""
    return [_time_info(memory.read(probe.time_page_address(vcpu), TIME_INFO.size)) for vcpu in range(vcpus)]


def _pages_by_monitor(qemu: Qemu) -> list[TimeInfo]:
    addresses = map(probe.time_page_address, range(qemu.vcpus))
    return [_time_info(qemu.read_by_monitor(address, TIME_INFO.size)) for address in addresses]


def _time_info(page: bytes) -> TimeInfo:
    return TimeInfo._make(TIME_INFO.unpack(page))


def _raw_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
