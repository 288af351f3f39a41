"""Whatever a public callable is given: a value of a wrong type is an error of ours that says which parameter it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

import pvclock
from pvclock import (
    ClockScale,
    CpuidLeaf,
    GuestClock,
    GuestInterface,
    GuestMemory,
    HostBackend,
    HypercallRegisters,
    SimulatedBackend,
    VcpuTsc,
    WrongType,
)
from pvclock.clock.event_log import EventLog
from pvclock.clock.ticker import Ticker
from pvclock.clock.timer_thread import TimerThread
from pvclock.clock.wall_clock import WallClockBase
from pvclock.compat.palacios import PalaciosTime
from pvclock.host.backend import Backend
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.host.watch import HostWatch
from pvclock.meter.stress import RepublishReport
from pvclock.quantities import HostTsc, RefNs
from pvclock.state import clock_state as states
from pvclock.state.clock_state import SavedPolicy
from pvclock.timekeeping.event_timeline import EventTimeline
from pvclock.timekeeping.events import Event, EventKind
from pvclock.timekeeping.timers import Timers, VcpuTimeouts
from pvclock.tsc.agreement import OffsetWrite
from pvclock.tsc.kvm_sync_model import HostInstant, KvmTscSync
from tests.saved_states import TYPICAL
from tests.unit.clocks import a_clock
from tests.unit.public_callables import PublicCallable, public_callables
from tests.unit.wrong_types import assert_right_types_are_taken, assert_wrong_types_are_refused

pytestmark = pytest.mark.row("E13")

HZ: Final = 10**9

EXEMPT: Final = {
    "Machine": "made on /dev/kvm: kvm/test_wrong_types.py",
    "pvclock.guest_cpuid pvclock.set_guest_cpuid": "of an open /dev/kvm: kvm/test_wrong_types.py",
    "Freeze.settle Advance.settle Slew.settle CatchUpTable.settle": "asked by catchup.settle(), which checks",
    "Slew.ppm Slew.is_done CatchUpTable.ppm CatchUpTable.is_done": "asked by a timeline, with its own ns",
    "Merge.share Once.share Replay.share": "asked by Timers, with its own count",
    "Timer": "made by Timers.add(), which checks",
    "pvclock.meter.stress.stress_publishing": "of a guest that meter.guest makes, with seconds of its caller's",
    "DebugChannel": "made by GuestInterface, with what its provider asks for",
}
"""What no VMM calls with values of its own: classes and methods, and why."""

ASKED_BY_CLOCKS: Final = frozenset(name for name in vars(Backend) if not name.startswith("_"))
"""A backend's own methods are called by clocks, often, with what those have checked."""


def nothing(*_: object) -> None:
    """A callback."""


class Vmm:
    """A VMM's services, and a debug device."""

    kick = yield_to = send_ipi = write = staticmethod(nothing)

    @staticmethod
    def read(_count_max: int) -> bytes:
        """Nothing has come."""
        return b""


def paused() -> GuestClock:
    """A clock that stands still."""
    clock = a_clock(HZ)[0]
    clock.pause()
    return clock


def core_time(*calls: str, slaved: bool = False) -> PalaciosTime:
    """Palacios' time of one core after those calls."""
    time = PalaciosTime(10**6, [None])
    time.follow(slaved=slaved)
    for call in calls:
        getattr(time, call)(0, HostTsc(5))
    return time


def sync() -> KvmTscSync:
    """A model of KVM's with one vCPU."""
    made = KvmTscSync((6, 7), 10**6)
    made.create_vcpu(HostInstant(HostTsc(0), RefNs(0)))
    return made


def a_watch() -> HostWatch:
    """A watch of this host."""
    return HostWatch(HZ, interval_ns=10**9)


def host_clock() -> GuestClock:
    """A clock in host time."""
    return GuestClock(GuestMemory(bytearray(1 << 12)), backend=HostBackend())


def interface() -> GuestInterface:
    """A guest's interface."""
    return a_clock(HZ)[0].interface


MAKERS: dict[str, Callable[[], object]] = {
    "GuestClock": lambda: a_clock(HZ)[0],
    "GuestClock.resume": paused,
    "GuestClock.run_for": paused,
    "GuestMemory": lambda: GuestMemory(bytearray(64)),
    "ClockScale": lambda: ClockScale.from_hz(HZ),
    "VcpuTsc": VcpuTsc,
    "SimulatedBackend": lambda: SimulatedBackend(HZ),
    "HostBackend": lambda: HostBackend(HZ),
    "GuestInterface": interface,
    "RepublishReport": lambda: RepublishReport(1, 0, 0, 0, 0),
    "EventLog": EventLog,
    "Event": lambda: Event,
    "EventTimeline": lambda: EventTimeline([an_event()]),
    "HostWatch": a_watch,
    "PalaciosTime": lambda: core_time("start"),
    "PalaciosTime.start": core_time,
    "PalaciosTime.exit": lambda: core_time("start", "enter"),
    "PalaciosTime.restart": lambda: core_time("start", "pause"),
    "DebugChannel": lambda: interface().debug,
    "Ticker": Ticker,
    "TimerThread": lambda: TimerThread(host_clock()),
    "Timers": lambda: Timers(cycles_hz=HZ),
    "VcpuTimeouts": lambda: VcpuTimeouts(Timers()),
    "KvmTscSync": sync,
    "SavedPolicy": lambda: SavedPolicy.named("freeze"),
    "OffsetWrite": lambda: OffsetWrite(0, 0, 1, 0, 1),
    "ExecutionTimeBackend": lambda: ExecutionTimeBackend(SimulatedBackend(HZ)),
}
"""An object of each class, or what a method of it needs."""


def an_event() -> Event:
    """What a clock records."""
    return Event(EventKind.START, "", HostTsc(0), sequence=1, tsc_hz=HZ)


VALID: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("vcpu", "gpa", "core", "leaf", "subleaf", "shift", "value", "offset"), lambda: 0),
    **dict.fromkeys(
        ("ticks", "ns", "target_ns", "missed_ns", "numerator", "publishes", "length", "num", "den"), lambda: 1
    ),
    **dict.fromkeys(("host_tsc", "deadline", "deadline_ns", "now", "vcpus", "count_max", "mul"), lambda: 7),
    **dict.fromkeys(("hz", "tsc_hz", "guest_hz", "host_hz", "scaled_hz", "base_hz", "interval_ns"), lambda: HZ),
    **dict.fromkeys(("khz", "guest_khz", "host_khz", "virtual_khz"), lambda: 10**6),
    **dict.fromkeys(("index", "number"), lambda: 0x10),
    **dict.fromkeys(("policy", "sleep_policy", "text", "SavedPolicy.named.name"), lambda: "freeze"),
    "field": lambda: "policy",
    **dict.fromkeys(("slaved", "tsc_trusted"), lambda: False),
    **dict.fromkeys(("data", "code"), lambda: b"\x0f\x01\xc1"),
    **dict.fromkeys(("callback", "log", "on_dirty", "told"), lambda: nothing),
    "TimerThread.clock": host_clock,
    **dict.fromkeys(("backend", "inner"), lambda: SimulatedBackend(HZ)),
    **dict.fromkeys(("state",), lambda: TYPICAL),
    **dict.fromkeys(("config", "pvclock.providers.guest_interface.combined.options"), dict),
    "memory": lambda: GuestMemory(bytearray(1 << 16)),
    "buffer": lambda: bytearray(8),
    "wall_clock": WallClockBase,
    "reference": lambda: "off",
    "dilations": lambda: [Fraction(1)],
    "registers": lambda: HypercallRegisters(0),
    "GuestClock.patch_cpuid.registers": CpuidLeaf,
    "watch": a_watch,
    "troubles": list,
    "SimulatedBackend.sleep.tsc": lambda: "stops",
    "path": lambda: Path("/nowhere/a.json"),
    "OffsetWrite.applied.tsc": VcpuTsc,
    **{f"pvclock.tsc.emulation.{name}.tsc": VcpuTsc for name in ("rdmsr", "rdtsc", "rdtscp", "tsc_controls")},
    "tscs": lambda: [VcpuTsc()],
    "vendor": lambda: "GenuineIntel",
    "GuestInterface.clock": lambda: interface().provider.clock,
    "GuestInterface.load_unit.data": lambda: interface().save_unit(),
    "clock": lambda: a_clock(HZ)[0],
    "later": lambda: RepublishReport(1, 0, 0, 0, 0),
    "document": lambda: states.to_json(TYPICAL),
    "mapping": lambda: states.to_mapping(TYPICAL),
    "event": an_event,
    "events": lambda: [an_event()],
    "line": lambda: an_event().to_json(),
    "lines": lambda: [an_event().to_json()],
    "cores": lambda: [None],
    "provider": lambda: "KVM",
    "choice": lambda: "kvm",
    "device": Vmm,
    "timer": lambda: Timers().add(pvclock.GuestNs(1), nothing),
    "timers": Timers,
    "PalaciosTime.offset_time.cycles": lambda: 1,
    "linux": lambda: (6, 7),
    "at": lambda: HostInstant(HostTsc(1), RefNs(1)),
}
"""What is right for a parameter: by its callable's name and its own, or by that alone."""


@cache
def checked_callables() -> dict[str, PublicCallable]:
    """All that a VMM calls, by name."""
    exempt, found = set(" ".join(EXEMPT).split()), {}
    for each in public_callables():
        backends = (
            each.owner in (SimulatedBackend, HostBackend, ExecutionTimeBackend) and each.member in ASKED_BY_CLOCKS
        )
        is_exempt = {each.name, each.name.partition(".")[0]} & exempt
        if each.parameters and not is_exempt and (not backends or each.member == "tsc"):
            found[each.name] = each
    return found


@pytest.mark.parametrize("name", checked_callables())
def test_wrong_types_are_refused_by_name(name: str) -> None:
    """WrongType, which is a TypeError, too: it names the parameter, what was given, and what it can be."""
    assert_wrong_types_are_refused(checked_callables()[name], MAKERS, VALID)


@pytest.mark.parametrize("name", checked_callables())
def test_right_types_are_no_wrong_ones(name: str) -> None:
    """The same calls with a right value for each parameter that has one: whatever comes of it, no type was wrong."""
    assert_right_types_are_taken(checked_callables()[name], MAKERS, VALID)


MESSAGES: dict[str, Callable[[], object]] = {
    "value is 1.0, a float; it can be a whole number": lambda: a_clock(HZ)[0].write_msr(0, 0x10, 1.0),  # type: ignore[arg-type]
    "vcpus is 1.5, a float; it can be a whole number": lambda: new_clock(vcpus=1.5),
    "vcpus is '2', a str; it can be a whole number": lambda: new_clock(vcpus="2"),
    "vcpu_host is None; it can be 'emulator', 'kvm'": lambda: new_clock(vcpu_host=None),
    "provider is 5, an int; it can be a provider's name or a configuration": lambda: new_clock(provider=5),
    "reference is 3, an int; it can be off, raw, monotonic, realtime, or a source of samples": (
        lambda: new_clock(reference=3)
    ),
    "tsc_hz is 1.5, a float; it can be a whole number, 1 to 2^64 - 1": lambda: SimulatedBackend(1.5),  # type: ignore[arg-type]
    "hz is 2400000000.0, a float; it can be a whole number": lambda: ClockScale.from_hz(2.4e9),  # type: ignore[arg-type]
    "buffer is 5, an int; it can be a writable, contiguous buffer: a bytearray, an mmap": lambda: GuestMemory(5),
    "backend is the class HostBackend; it can be a Backend: SimulatedBackend(), HostBackend(), KvmBackend() or one": (
        lambda: GuestClock(GuestMemory(bytearray(64)), backend=HostBackend)  # type: ignore[arg-type]
    ),
    "backend is the class SimulatedBackend; it can be a Backend": (
        lambda: GuestClock(GuestMemory(bytearray(64)), backend=SimulatedBackend)  # type: ignore[arg-type]
    ),
    "inner is the class HostBackend; it can be a Backend": lambda: ExecutionTimeBackend(HostBackend),  # type: ignore[arg-type]
    "since is an object; it can be a whole number": lambda: EventLog().read(object()),  # type: ignore[arg-type]
}


def new_clock(**options: Any) -> GuestClock:  # noqa: ANN401  # wrong ones
    """A clock with those options."""
    return GuestClock(GuestMemory(bytearray(64)), backend=SimulatedBackend(HZ), **options)


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_said(message: str) -> None:
    """One line: the parameter, what was given and what it can be."""
    with pytest.raises(WrongType, match=f"^{re.escape(message)}"):
        MESSAGES[message]()


def test_a_clock_that_is_refused_leaves_what_there_was() -> None:
    """Arguments are checked before anything is built: the memory's clock goes on, and no TSC offset was given."""
    clock, backend, memory = a_clock(HZ)
    live = memory.live_clock
    wrong: dict[tuple[str, str], object] = {
        ("vcpus", "a VM with 99999 vCPUs; choose 1 to 4096"): 99_999,
        ("provider", "hints is 0.5"): {"provider": "KVM", "hints": 0.5},
        ("tsc_offset", "tsc_offset is 'x'"): "x",
    }
    for (name, message), value in wrong.items():
        with pytest.raises((WrongType, pvclock.ConfigError), match=message):
            GuestClock(memory, backend=backend, **{"tsc_offset": 7, name: value})  # type: ignore[arg-type]
    assert memory.live_clock is live
    assert backend.tsc_offsets == {0: 0}
    clock.refresh()
