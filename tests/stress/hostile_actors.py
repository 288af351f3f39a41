"""Who acts on a VM of the hostile-guest run: vCPUs that do anything, one that reads its page, and a VMM.

Each has `step()`, which returns the name of what it did and how that ended, or adds a finding.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import count
from typing import Final

from pvclock import (
    CpuidLeaf,
    GuestAddressError,
    GuestClock,
    HypercallRegisters,
    MsrFault,
    PvclockError,
    Sample,
    StateError,
    read_tsc,
)
from pvclock._guest_budget import GUEST_BURST, GUEST_EVENTS_PER_S
from pvclock.clock.ticker import Ticker
from pvclock.clock.wall_clock import WallClockBase
from pvclock.meter.stress import republish
from pvclock.quantities import U64_MASK, Gpa, HostTsc
from pvclock.readings import Reference
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.events import EventCause, EventKind
from tests import oracle
from tests.stress.hostile_hyperv import HYPERV_MSRS, hostile_registers, hostile_value
from tests.stress.hostile_vm import (
    PAGE_BYTES,
    PLUGGED_GPAS,
    QUIET_PAGE,
    RAM_BYTES,
    REFERENCE_TSC,
    TAKEN_OVER,
    Findings,
    Mischief,
    Vm,
    subscriber,
    wild_number,
)
from tests.waiting import HANG_S

GUEST_EVENTS_FACTOR: Final = 2
"""An event that tells of those suppressed may come with each one that is not."""
PVCLOCK_MSRS: Final = (0x11, 0x12, *range(0x4B564D00, 0x4B564D0A))
MSRS: Final = (0x10, 0x3B, *PVCLOCK_MSRS, 0xC0000103)
SPOILED_GPAS: Final = (0x1000, 0x2000, 0x3000)
POLICIES: Final = ("freeze", "advance", "slew", "catchup", "", None)
BAD_SLOTS: Final = (
    (0, bytearray(64)),
    (RAM_BYTES - 1, bytearray(2)),
    (1 << 62, b"read only"),
    (1 << 62, bytearray()),
    ((1 << 64) - 1, bytearray(2)),
    (-1, bytearray(1)),
    (1 << 64, bytearray(1)),
)
VENDORS: Final = ("GenuineIntel", "AuthenticAMD")
OPCODES: Final = (b"\x0f\x01\xc1", b"\x0f\x01\xd9", b"\x0f\x0b", b"\x90" * 15, b"")


class HostileVcpu:
    """A vCPU whose guest does everything that it can, in any order and with any values."""

    def __init__(self, vm: Vm, vcpu: int, rng: random.Random) -> None:
        self._vm, self._vcpu, self._rng = vm, vcpu, rng
        self._actions: tuple[tuple[str, Callable[[GuestClock], object]], ...] = (
            ("wrmsr", self._wrmsr),
            ("wrmsr", self._wrmsr),
            ("rdmsr", lambda clock: clock.read_msr(vcpu, self._index())),
            ("cpuid", lambda clock: (clock.cpuid(0x40000000 + rng.randrange(32)), clock.cpuid_leaves)),
            ("patch_cpuid", lambda clock: clock.patch_cpuid(rng.choice([1, 7, 0x80000007]), 0, CpuidLeaf())),
            ("hypercall", lambda clock: clock.hypercall(vcpu, self._registers())),
            ("vmcall", lambda clock: clock.interface.execute(vcpu, self._registers(), rng.choice(OPCODES))),
            ("ud", self._ud),
            ("spoil", self._spoil),
            ("spoil", self._spoil),
            ("store", lambda _: self._vm.memory.write(wild_number(rng), rng.randbytes(rng.randrange(9)))),
            ("page", lambda clock: clock.page(vcpu)),
            ("read", lambda clock: clock.read(vcpu)),
        )

    def step(self) -> str:
        """One action.  A guest meets #GP and nothing else, but for a callback's own errors and a clock that is gone."""
        name, act = self._rng.choice(self._actions)
        clock = self._vm.clock
        try:
            act(clock)
        except MsrFault:
            return f"{name}: #GP"
        except Mischief:
            return f"{name}: callback's"
        except (StateError, GuestAddressError) as error:
            no_page = name == "read" and isinstance(error, StateError)
            no_memory = name == "store" and isinstance(error, GuestAddressError)
            if not (no_page or no_memory or TAKEN_OVER in str(error)):
                raise
            return f"{name}: not now"
        return name

    def _index(self) -> int:
        near: int = self._rng.choice(self._msrs())
        far: int = self._rng.choice([near ^ 1 << self._rng.randrange(32), self._rng.getrandbits(32)])
        return near if self._rng.random() < 0.6 else far

    def _msrs(self) -> Sequence[int]:
        """Those of an interface that it has; TSCs that differ forbid the reference TSC page, so they do so at times."""
        if not self._vm.has_hyperv or self._rng.random() < 0.02:
            return MSRS
        return PVCLOCK_MSRS if self._vm.has_pvclock and self._rng.random() < 0.3 else HYPERV_MSRS

    def _wrmsr(self, clock: GuestClock) -> None:
        index = self._index()
        value = hostile_value(self._rng, index) if index in HYPERV_MSRS else wild_number(self._rng)
        with self._vm.moves.moving() if index == REFERENCE_TSC else nullcontext():
            clock.write_msr(self._vcpu, index, value)

    def _registers(self) -> HypercallRegisters:
        rng = self._rng
        if self._vm.has_hyperv and rng.random() < 0.7:
            return hostile_registers(rng)
        call = rng.choice([rng.randrange(14), rng.getrandbits(64)])
        rbx, rcx, rdx, rsi, rdi = (wild_number(rng) for _ in range(5))
        return HypercallRegisters(call, rbx, rcx, rdx, rsi, rdi, rng.choice([0, 0, 3]), rng.random() < 0.5)

    def _ud(self, clock: GuestClock) -> None:
        rng = self._rng
        code = rng.choice(OPCODES)
        gpa = Gpa(rng.choice([0x3F00, 0x3FFF, wild_number(rng)]))
        if rng.random() < 0.5 and gpa < 0x4000:
            self._vm.arena.spoil(gpa, code)
        clock.interface.handle_ud(self._vcpu, self._registers(), code, gpa, rng.choice(VENDORS), fix=rng.random() < 0.8)

    def _spoil(self, _clock: GuestClock) -> None:
        """Store into its pages and records: versions, flags, the rest, while they are updated or not."""
        rng = self._rng
        gpa = rng.choice(SPOILED_GPAS) + rng.choice([0, rng.randrange(64)])
        self._vm.arena.spoil(gpa, rng.choice([b"\x01", b"\xff\xff\xff\xff", rng.randbytes(8)]))


class QuietVcpu:
    """A vCPU that reads its page as a guest does; the clock that it sees never goes back."""

    def __init__(self, vm: Vm, findings: Findings) -> None:
        self._vm, self._findings = vm, findings
        self._epoch = -1
        self._seen_ns = self._read_ns = 0

    def step(self) -> str:
        """One reading by the page and one by read()."""
        vm = self._vm
        with vm.backend.gate.in_guest():
            epoch = vm.epoch
            seen_ns = self._through_page()
        if epoch != self._epoch:
            self._epoch, self._seen_ns, self._read_ns = epoch, 0, 0
        if seen_ns < self._seen_ns:
            self._findings.add(f"VM {vm.name}: a page went back{_by(self._seen_ns - seen_ns)}, VMM: {vm.doing}")
        self._seen_ns = seen_ns
        try:
            read_ns = vm.clock.read(vm.QUIET)
        except StateError:  # reset meanwhile, or not yet resumed
            return "read page"
        if epoch == vm.epoch and not epoch & 1:
            if read_ns < self._read_ns:
                self._findings.add(f"VM {vm.name}: read() went back{_by(self._read_ns - read_ns)}, VMM: {vm.doing}")
            self._read_ns = read_ns
        return "read page and clock"

    def _through_page(self) -> int:
        """Linux' loop around the page; one whose publisher has lost its CPU stays odd for as long."""
        ram = self._vm.arena.ram
        page = ram[QUIET_PAGE : QUIET_PAGE + PAGE_BYTES]
        end_s = time.monotonic() + HANG_S
        while time.monotonic() < end_s:
            (version,) = struct.unpack_from("<I", page)
            tsc = read_tsc() + self._vm.backend.offsets.get(self._vm.QUIET, 0)
            body = bytes(page)
            if not version & 1 and body[:4] == bytes(page[:4]) == version.to_bytes(4, "little"):
                return oracle.TimeInfo.parse(body).read(tsc & U64_MASK)
        raise AssertionError(f"VM {self._vm.name}: a page stays odd")


def _by(ns: int) -> str:
    """Its power of ten, so that findings are counted by kind."""
    return f" by 10^{len(str(ns)) - 1} ns or more"


class Vmm:
    """A VMM thread that does every operation of a clock and of its memory; it alone plugs memory and restores."""

    def __init__(self, vm: Vm, ticker: Ticker, findings: Findings, rng: random.Random, hold: threading.Event) -> None:
        self._vm, self._ticker, self._findings, self._rng, self._hold = vm, ticker, findings, rng, hold
        self._ends: list[Callable[[], None]] = []
        self._saved: ClockState | None = None
        self._operations = self._on_time() + self._on_the_rest()

    def step(self) -> str:
        """One operation, good or bad: an error of ours is an answer, a callback's own is its own."""
        name, operate = self._rng.choice(self._operations)
        clock = self._vm.clock
        before = clock.events.last
        self._vm.doing = name
        try:
            operate(clock)
        except PvclockError as error:
            return f"{name}: {type(error).__name__}"
        except Mischief:
            name += ": callback's"
        kind = {"dilate": EventKind.DILATE, "skip": EventKind.SKIP}.get(name.partition(":")[0])
        if kind is not None and not self._was_recorded(clock, kind, before):
            self._findings.add(f"VM {self._vm.name}: {name} left no event")
        return name

    def _was_recorded(self, clock: GuestClock, kind: EventKind, since: int) -> bool:
        events = clock.events.read(since).events
        return any(event.kind is kind and event.cause is EventCause.VMM for event in events)

    def _on_time(self) -> tuple[tuple[str, Callable[[GuestClock], object]], ...]:
        rng = self._rng
        return (
            ("dilate", lambda clock: clock.dilate(rng.randrange(1, 2000), rng.randrange(500, 1000))),
            ("dilate badly", self._dilate_badly),
            ("slew", lambda clock: clock.slew(rng.randrange(-(10**6), 10**6), rng.randrange(1, 1000))),
            ("slew badly", lambda clock: clock.slew(self._any_int() << 64, self._any_int())),
            ("skip", lambda clock: clock.skip(rng.randrange(10**6))),
            ("skip badly", lambda clock: clock.skip(-1 - rng.getrandbits(70))),
            ("offset", lambda clock: clock.offset(rng.randrange(-(10**6), 10**6))),
            ("pause", self._pause),
            ("run_for", self._run_for),
            (
                "republish",
                lambda clock: republish(clock, rng.randrange(1, 20), [Fraction(1), Fraction(rng.randrange(1, 9), 7)]),
            ),
            ("refresh", lambda clock: clock.refresh()),
            ("tick", lambda clock: clock.tick()),
            ("expire", lambda clock: clock.expire_timers()),
            ("follow", self._follow),
            ("policy", self._set_policies),
            ("repair_tsc", lambda clock: clock.repair_tsc(adjust=rng.choice(["keep", "carry"]))),
            (
                "host_write_msr",
                lambda clock: clock.host_write_msr(rng.randrange(-1, 3), rng.choice(MSRS), self._any_u64()),
            ),
        )

    def _on_the_rest(self) -> tuple[tuple[str, Callable[[GuestClock], object]], ...]:
        vm, rng = self._vm, self._rng
        return (
            ("read", self._read_everything),
            ("events", self._read_events),
            ("subscribe", self._subscribe),
            ("unsubscribe", lambda _: self._ends and self._ends.pop(rng.randrange(len(self._ends)))()),
            ("on_dirty", self._set_on_dirty),
            ("plug", lambda _: vm.arena.plug(rng.choice(PLUGGED_GPAS))),
            ("unplug", lambda _: vm.arena.unplug()),
            ("add_slot badly", self._add_bad_slot),
            ("remove_slot badly", lambda _: vm.memory.remove_slot(rng.choice([1, RAM_BYTES - 1, 1 << 70, -1]))),
            ("check", lambda _: vm.arena.check()),
            ("pairing", lambda clock: clock.pairing(rng.randrange(3))),
            ("wall clock", self._set_wall_clock),
            ("unit", lambda clock: clock.interface.save_unit()),
            ("save", self._save),
            ("restore", self._restore),
            ("reset", self._reset),
        )

    # Time

    def _any_int(self) -> int:
        return self._rng.choice([0, 1, -1, 7, (1 << 64) - 1, 1 << 64, 1 << 2000, self._rng.getrandbits(64)])

    def _any_u64(self) -> int:
        return self._rng.choice([0, (1 << 64) - 1, self._rng.getrandbits(64)])

    @contextmanager
    def _paused(self, clock: GuestClock) -> Iterator[None]:
        """Time stands still and the quiet vCPU is out of the guest."""
        with self._vm.held():
            self._whole(clock.pause)
            try:
                yield
            finally:
                self._resume(clock)

    def _resume(self, clock: GuestClock) -> None:
        """Until it is done: an offset may be refused, a policy may be none."""
        while clock.is_paused:
            with suppress(PvclockError):
                self._whole(lambda: clock.resume(self._rng.choice(POLICIES)))

    def _whole(self, operate: Callable[[], object]) -> None:
        """Operate; what a callback raises comes after it."""
        with suppress(Mischief):
            operate()

    def _pause(self, clock: GuestClock) -> None:
        with self._paused(clock):
            inside = (self._read_everything, self._save, self._follow, self._set_wall_clock)
            for operate in self._rng.sample(inside, 2):
                operate(clock)

    def _dilate_badly(self, clock: GuestClock) -> None:
        """Where it is a rate after all, not for long: run_for() would last for years."""
        try:
            clock.dilate(self._any_int(), self._any_int())
        finally:
            self._whole(lambda: clock.dilate(1))

    def _run_for(self, clock: GuestClock) -> None:
        with self._paused(clock):
            report = clock.run_for(self._rng.choice([1, 1000, 10**5, 0, 1 << 80]), self._rng.choice(POLICIES))
            if report.overshoot_ns < 0:
                self._findings.add(f"VM {self._vm.name}: run_for() ended {-report.overshoot_ns} ns early")

    def _follow(self, clock: GuestClock) -> None:
        clock.follow(
            self._rng.choice(["off", *Reference, self._sample, "moon"]), max_ppm=self._rng.choice([500, 0, 1e9])
        )

    def _sample(self) -> Sample:
        if self._rng.random() < 0.2:
            raise Mischief
        return self._vm.backend.sample(Reference.RAW)

    def _set_policies(self, clock: GuestClock) -> None:
        policy = self._rng.choice(POLICIES) or "freeze"
        clock.policy = policy
        clock.sleep_policy = policy

    # Everything else

    def _read_everything(self, clock: GuestClock) -> None:
        tsc = HostTsc(self._vm.backend.counter.read())
        for vcpu in range(3):
            clock.page(vcpu), clock.tsc(vcpu), clock.guest_tsc(vcpu, tsc)
        clock.now(), clock.line, clock.scale, clock.dilation, clock.rate, clock.skew_ns, clock.steering
        clock.at(tsc), clock.interface.statistics, clock.refused_offset, clock.reference
        self._vm.memory.read(self._any_u64(), self._rng.randrange(64))

    def _read_events(self, clock: GuestClock) -> None:
        log = clock.events
        batch = log.read(self._rng.choice([0, log.last, log.last + 5]))
        numbers = [event.sequence for event in batch.events]
        if numbers != sorted(set(numbers)) or len(log) > 2 * log.capacity:
            self._findings.add(f"VM {self._vm.name}: a log of {len(log)} events in a wrong order or beyond its bound")
        guests = sum(event.cause is EventCause.GUEST for event in log.read().events)
        if guests > GUEST_EVENTS_FACTOR * (GUEST_BURST + GUEST_EVENTS_PER_S * (self._vm.age_s() + 1)):
            self._findings.add(f"VM {self._vm.name}: {guests} events of the guest's in {self._vm.age_s():.0f} s")
        log.json_lines(max(log.last - 5, 0))
        log.flush(0)
        if foreign := [failure for failure in log.failures if not isinstance(failure.error, Mischief)]:
            self._findings.add(f"VM {self._vm.name}: a subscriber met {foreign[0].error!r}")

    def _subscribe(self, clock: GuestClock) -> None:
        if len(self._ends) < 5:
            self._ends.append(clock.events.subscribe(subscriber(self._rng, clock, self._hold)))

    def _set_on_dirty(self, _clock: GuestClock) -> None:
        calls = count(1)

        def raise_now_and_then(gpa: int, length: int) -> None:
            self._vm.arena.check_dirty(gpa, length)
            if next(calls) % 7 == 0:
                raise Mischief

        self._vm.memory.on_dirty = self._rng.choice([None, self._vm.arena.check_dirty, raise_now_and_then])

    def _add_bad_slot(self, _clock: GuestClock) -> None:
        gpa, buffer = self._rng.choice(BAD_SLOTS)
        self._vm.memory.add_slot(gpa, buffer)
        self._findings.add(f"add_slot({gpa:#x}, {len(buffer)} bytes) was accepted")

    def _set_wall_clock(self, clock: GuestClock) -> None:
        clock.wall_clock = WallClockBase(self._any_int(), self._rng.choice([None, self._any_int()]))

    def _save(self, clock: GuestClock) -> None:
        state = clock.save()
        if clock_state.from_json(clock_state.to_json(state)) != state:
            self._findings.add(f"VM {self._vm.name}: a state that is not what was saved")
        self._saved = self._rng.choice([state, self._saved])

    def _restore(self, clock: GuestClock) -> None:
        """Go on from the state now, or roll back to an earlier one; the clock before is another's then."""
        vm = self._vm
        if not vm.can_restore:
            return
        with vm.held():
            self._whole(clock.pause)
            try:
                state = self._rng.choice([self._saved, None]) or clock.save()
                policy = self._rng.choice(POLICIES)
                restored = GuestClock.restore(state, vm.memory, backend=vm.backend, policy=policy, vmm=vm.services)
            except BaseException:
                self._resume(clock)
                raise
            self._ends.clear()
            self._ticker.remove(clock)
            with vm.going_back():
                vm.adopt(restored)
                self._boot(restored)
            self._ticker.add(restored)

    def _reset(self, clock: GuestClock) -> None:
        with self._vm.held():
            with self._vm.moves.moving():
                self._whole(clock.reset)
            self._boot(clock)

    def _boot(self, clock: GuestClock) -> None:
        self._resume(clock)
        while not self._vm.is_placed:
            self._whole(self._vm.place_quiet_page)
