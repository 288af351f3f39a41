"""VMs for the hostile-guest run: memory between guards, a host that honours TSC offsets, callbacks that misbehave."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from pvclock import GuestClock, GuestMemory, HostBackend, PvclockError, TscOffsetNotHonoured
from pvclock.clock.timer_thread import TimerThread
from pvclock.providers.kvm.features import SERVED_BY_VMM, SERVED_ON_EMULATORS
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.timekeeping.events import Event

GUARD_BYTES: Final = 0x1000
GUARD: Final = b"\xa5" * GUARD_BYTES
RAM_BYTES: Final = 0x10000
PLUGGED_BYTES: Final = 0x2000
PLUGGED_GPAS: Final = (RAM_BYTES, 0x100000, (1 << 64) - PLUGGED_BYTES)
"""Where the second slot may come: right behind RAM, away from it, at the end of all addresses."""

QUIET_PAGE: Final = 0x8000
QUIET_REFERENCE_PAGE: Final = 0x9000
QUIET_BYTES: Final = 0x2000
MARGIN: Final = 0x80
"""No guest record is longer: one that begins further away from the quiet page leaves it alone."""

TAKEN_OVER: Final = "another clock has taken over"

SYSTEM_TIME: Final = 0x4B564D01
REFERENCE_TSC: Final = 0x40000021
PAGE_BYTES: Final = 32
REFERENCE_BYTES: Final = 24

FEATURES: Final = int(SERVED_ON_EMULATORS | SERVED_BY_VMM)
KVM_GUESTS: Final[Mapping[str, Mapping[str, object]]] = {
    profile: {"provider": "KVM", "profile": profile, "features": FEATURES} for profile in ("linux", "document")
}
HYPERV_GUESTS: Final[Mapping[str, Mapping[str, object]]] = {
    "HyperV": {"provider": "HyperV", "profile": "document", "vs_interface": True, "hypercall_debug": True},
    "HyperV+KVM": {"provider": "HyperV+KVM", "kvm_features": FEATURES},
    "VirtualBox": {
        "provider": "HyperV",
        "profile": "virtualbox",
        "vendor_id": "Microsoft Hv",
        "vs_interface": True,
        "enforce_cpuid": False,
    },
}
"""The configurations of VMs, by the names of these."""


class Mischief(Exception):  # no error of a program, but what a callback of the VMM's raises on purpose
    """A caller's own exception."""


class Findings:
    """What went wrong, each text once; from any thread."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """Keep it, or count it if it is known."""
        with self._lock:
            self._texts[text] = self._texts.get(text, 0) + 1

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter([f"{count} times: {text}" for text, count in self._texts.items()])


class Gate:
    """Keeps a quiet vCPU out of the guest while anybody holds it out; holders do not wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holds = 0
        self._inside = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """The vCPU is out of the guest meanwhile."""
        self.hold()
        try:
            yield
        finally:
            self.let_go()

    def hold(self) -> None:
        """Return once the vCPU is out of the guest, and keep it out."""
        with self._changed:
            self._holds += 1
            self._changed.wait_for(lambda: not self._inside)

    def let_go(self) -> None:
        """End one hold."""
        with self._changed:
            self._holds -= 1
            self._changed.notify_all()

    @contextmanager
    def in_guest(self) -> Iterator[None]:
        """The vCPU is in the guest meanwhile; each thread reads another page of it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._holds)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()


class OffsetHost:
    """This host, as if it honoured TSC offsets, but now and then; see Backend."""

    counter_follows_host = True

    def __init__(self, host: HostBackend, rng: random.Random) -> None:
        self.gate = Gate()
        self.offsets: dict[int, int] = {}
        self.counter, self.tsc_hz, self.tsc_stable = host.counter, host.tsc_hz, host.tsc_stable
        self.sample, self.stamps, self.tsc_readings = host.sample, host.stamps, host.tsc_readings
        self.vcpus_are_out, self.boot_id = host.vcpus_are_out, host.boot_id
        self._wait_until, self._rng = host.run_until, rng
        self._run_delay_ns = 0

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend: some more each time, or nobody says."""
        self._run_delay_ns += self._rng.randrange(1000)
        return self._rng.choice([None, self._run_delay_ns])

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend; for who holds the quiet vCPU out of the guest."""
        self.gate.let_go()
        try:
            self._wait_until(tsc)
        finally:
            self.gate.hold()

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend: one in 20 is refused, and always the same ones."""
        if offset % 20 == 7:
            raise TscOffsetNotHonoured(offset)
        self.offsets[vcpu] = offset

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend."""
        return self.offsets.get(vcpu)

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend."""
        return self.gate.held()


class Services:
    """A VMM's services for hypercalls, interrupts and resets, which fail now and then."""

    def __init__(self, rng: random.Random, findings: Findings) -> None:
        self._rng, self._findings = rng, findings
        self.interrupts = 0
        """How many were raised."""

    def kick(self, apic_id: int) -> None:
        """See VmmServices."""
        self._fail_sometimes()

    def yield_to(self, apic_id: int) -> None:
        """See VmmServices."""
        self._fail_sometimes()

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """See VmmServices."""
        self._fail_sometimes()
        return len(apic_ids)

    def inject(self, vcpu: int, vector: int) -> None:
        """See InterruptServices."""
        self.interrupts += 1
        if vcpu not in range(Vm.VCPUS) or vector not in range(0x10, 0x100):
            self._findings.add(f"interrupt {vector:#x} for vCPU {vcpu}")
        self._fail_sometimes()

    def request_reset(self) -> None:
        """See ResetServices."""
        self._fail_sometimes()

    def _fail_sometimes(self) -> None:
        if self._rng.random() < 0.1:
            raise Mischief


class Arena:
    """Guest memory of two slots, each between guards; the second one comes and goes."""

    def __init__(self, findings: Findings, *, has_quiet_pages: bool = True) -> None:
        self._findings, self._has_quiet_pages = findings, has_quiet_pages
        ram_begin = GUARD_BYTES
        plugged_begin = ram_begin + RAM_BYTES + GUARD_BYTES
        everything = bytearray(GUARD + bytes(RAM_BYTES) + GUARD + bytes(PLUGGED_BYTES) + GUARD)
        self._view = memoryview(everything)
        self.ram = self._view[ram_begin : ram_begin + RAM_BYTES]
        self._plugged = self._view[plugged_begin : plugged_begin + PLUGGED_BYTES]
        self._guards = [
            self._view[begin : begin + GUARD_BYTES]
            for begin in (0, ram_begin + RAM_BYTES, plugged_begin + PLUGGED_BYTES)
        ]
        self.memory = GuestMemory(self.ram)
        self.memory.on_dirty = self.check_dirty
        self._plugged_gpa: int | None = None
        self._left = bytes(self._plugged)

    def plug(self, gpa: int) -> None:
        """Map the second slot; nobody may have written to it since it was unmapped."""
        if self._plugged_gpa is None:
            self._check_unplugged()
            self.memory.add_slot(gpa, self._plugged)
            self._plugged_gpa = gpa

    def unplug(self) -> None:
        """Unmap it."""
        if self._plugged_gpa is not None:
            self.memory.remove_slot(self._plugged_gpa)
            self._left = bytes(self._plugged)
            self._plugged_gpa = None

    def spoil(self, gpa: int, data: bytes) -> None:
        """What a guest's store does: no dirty page is told, and no lock taken.  RAM only."""
        self.ram[gpa : gpa + len(data)] = data

    def check(self) -> None:
        """All that is not guest memory, or that no guest asked for, is as it was; for the thread that plugs."""
        if any(guard != GUARD for guard in self._guards):
            self._findings.add("a guard of guest memory was written to")
        beside = bytes(self.ram[QUIET_PAGE + PAGE_BYTES : QUIET_REFERENCE_PAGE])
        beside += bytes(self.ram[QUIET_REFERENCE_PAGE + REFERENCE_BYTES : QUIET_PAGE + QUIET_BYTES])
        if self._has_quiet_pages and any(beside):
            self._findings.add("memory beside the quiet pages was written to")
        if self._plugged_gpa is None:
            self._check_unplugged()

    def check_dirty(self, gpa: int, length: int) -> None:
        """An on_dirty: what it is told lies in one of the slots."""
        ranges = [(0, RAM_BYTES), *((begin, PLUGGED_BYTES) for begin in PLUGGED_GPAS)]
        if not any(begin <= gpa and gpa + length <= begin + size for begin, size in ranges):
            self._findings.add(f"on_dirty({gpa:#x}, {length}) is in no slot")

    def _check_unplugged(self) -> None:
        if self._plugged != self._left:
            self._findings.add("a slot was written to after it was removed")


class Moves:
    """Tells whether a page that belongs to all vCPUs was moved meanwhile; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = self._ended = 0

    @contextmanager
    def moving(self) -> Iterator[None]:
        """It may be moved."""
        with self._lock:
            self._begun += 1
        try:
            yield
        finally:
            with self._lock:
                self._ended += 1

    @property
    def number(self) -> int | None:
        """How often it was; None while it may be."""
        with self._lock:
            return self._begun if self._begun == self._ended else None


class Vm:
    """A VM of three vCPUs: 0 and 1 are hostile, 2 is quiet and has its page where the others leave it alone."""

    VCPUS: Final = 3
    QUIET: Final = 2
    can_restore = True

    def __init__(
        self, name: str, config: Mapping[str, object], rng: random.Random, findings: Findings, host: HostBackend
    ) -> None:
        self.name, self._findings = name, findings
        interfaces = str(config["provider"]).split("+")
        self.has_pvclock, self.has_hyperv = "KVM" in interfaces, "HyperV" in interfaces
        self.has_reference_time = self.has_hyperv and config.get("profile") != "virtualbox"
        """Otherwise it is a TSC, divided: it goes back as that does, and knows no timeline."""
        self.arena = Arena(findings, has_quiet_pages=self.has_pvclock or self.has_reference_time)
        self.memory = self.arena.memory
        self.backend = OffsetHost(host, rng)
        self.services = Services(rng, findings)
        self._began_s = time.monotonic()
        self.doing = ""
        """The VMM's present operation, or its last one."""
        self.epoch = 0
        """Odd while a restore may take guest time back, and another one afterwards."""
        self.moves = Moves()
        """Of the reference TSC page."""
        self.clock = GuestClock(self.memory, self.VCPUS, config, backend=self.backend, vmm=self.services)
        self.timers = TimerThread(self.clock)
        self.place_quiet_page()

    def age_s(self) -> float:
        """For how long there has been this VM; its clock's log may be younger."""
        return time.monotonic() - self._began_s

    def place_quiet_page(self) -> None:
        """As the quiet vCPU does when it boots; a reference TSC page may be moved at any time, and it sees to that."""
        if self.has_pvclock:
            self.clock.write_msr(self.QUIET, SYSTEM_TIME, QUIET_PAGE | 1)

    @property
    def is_placed(self) -> bool:
        """Does the quiet vCPU have the page that is its own?"""
        return not self.has_pvclock or self.clock.page(self.QUIET) is not None

    def adopt(self, clock: GuestClock) -> None:
        """Go on with another clock, and with a thread that expires its timers."""
        self.stop_timers()
        self.clock, self.timers = clock, TimerThread(clock)
        self.timers.start()

    def stop_timers(self) -> None:
        """End the thread."""
        self.timers.stop()
        self.look_at_timers()

    def look_at_timers(self) -> None:
        """What the thread met with may be a callback's error or one of ours."""
        for error in self.timers.failures:
            if not isinstance(error, Mischief | PvclockError):
                self._findings.add(f"VM {self.name}: timers: {''.join(traceback.format_exception(error))}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """The quiet vCPU is out of the guest."""
        with self.backend.gate.held():
            yield

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Guest time may go back meanwhile, and the clock be another one."""
        self.epoch += 1
        try:
            yield
        finally:
            self.epoch += 1


def subscriber(rng: random.Random, clock: GuestClock, hold: threading.Event) -> Callable[[Event], None]:
    """One that is slow, raises, calls back, or does nothing."""

    def be_told(_event: Event) -> None:
        match rng.randrange(4):
            case 0:
                hold.wait(0.0002)
            case 1:
                raise Mischief
            case 2:
                clock.now()
                clock.events.read(clock.events.last)

    return be_told


def wild_number(rng: random.Random) -> int:
    """64 bits as a hostile guest chooses them: addresses with flags, ends of memory, all kinds of bits."""
    while True:
        base = rng.choice([0, 0x1000, 0x2000, 0x3000, RAM_BYTES, *PLUGGED_GPAS, 1 << 32, 1 << 63, 1 << 64])
        number = (base + rng.choice([0, 0, 0, rng.randrange(-80, 80)]) + rng.choice([0, 1, 1, 3, 7, 0x39])) & U64_MASK
        if rng.random() < 0.2:
            number = rng.getrandbits(rng.choice([8, 16, 32, 64]))
        if not QUIET_PAGE - MARGIN <= number < QUIET_PAGE + QUIET_BYTES + MARGIN:
            return number
