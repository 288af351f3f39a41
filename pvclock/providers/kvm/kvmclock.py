"""The clock itself: the system-time and wall-clock MSRs.

Source: kvm_write_system_time(), kvm_write_wall_clock(); Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct
from typing import Final

from pvclock._scale import ClockScale
from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.guest_log import GuestLog
from pvclock.providers.interface import ClockServices, OwnPage
from pvclock.providers.kvm.features import (
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)
from pvclock.providers.kvm.msr_state import Msr, Register
from pvclock.providers.kvm.profiles import Profile
from pvclock.quantities import NS_PER_S, U64_MASK, Gpa, GuestNs, GuestTsc
from pvclock.timekeeping.events import EventKind

__all__ = ["KvmClock"]

ENABLED: Final = 1
PAGE_BYTES: Final = 4096
TIME_INFO_BYTES: Final = 32
WALL_CLOCK: Final = Struct("<III")  # version, sec, nsec
VERSION: Final = Struct("<I")
ALIGNMENT: Final = 4


class KvmClock:
    """The guest's registrations, handed to `clock`."""

    def __init__(self, clock: ClockServices, vcpus: int, profile: Profile) -> None:
        self._clock, self._vcpus, self._profile = clock, vcpus, profile
        self._time_page_log, self._wall_clock_log = GuestLog(clock), GuestLog(clock)
        self._system_time = Register("system_time", vcpus)
        self._wall_clock = Register("wall_clock", None)
        self._boot_vcpu_runs_old_kvmclock = Register("boot_vcpu_runs_old_kvmclock", None, flag=True)
        self._version = Register("time_page_version", vcpus, legal=lambda version: version < 1 << 32)
        self._flags = Register("time_page_flags", vcpus, legal=lambda flags: flags < 1 << 8)
        self._tsc, self._ns = Register("time_page_tsc", vcpus), Register("time_page_ns", vcpus)
        self._scale = ClockScale.from_hz(clock.host_tsc_hz) if profile.owns_pages else None
        system_time = Msr(self._system_time, self._write_system_time)
        wall_clock = Msr(self._wall_clock, self._write_wall_clock)
        self.msrs = {
            MSR_KVM_SYSTEM_TIME: system_time,
            MSR_KVM_SYSTEM_TIME_NEW: system_time,
            MSR_KVM_WALL_CLOCK: wall_clock,
            MSR_KVM_WALL_CLOCK_NEW: wall_clock,
        }
        registers = (self._system_time, self._wall_clock, self._boot_vcpu_runs_old_kvmclock)
        own = (self._version, self._flags, self._tsc, self._ns)
        self.registers = (*registers, *own) if profile.owns_pages else registers

    @property
    def boot_vcpu_runs_old_kvmclock(self) -> bool:
        """Did vCPU 0 last write the old system-time MSR?  Guests of that era expect frequent timestamps."""
        return bool(self._boot_vcpu_runs_old_kvmclock[0])

    def take_pages_back(self, begin: Callable[[], object], undo: Callable[[], object], vcpu: int | None = None) -> None:
        """Stop updating every page; begin, undo, vcpu: see ClockServices.place_time_pages()."""
        self._clock.place_time_pages(dict.fromkeys(range(self._vcpus)), begin, undo, vcpu)

    def replace_pages(
        self, system_time: Sequence[int], begin: Callable[[], object], undo: Callable[[], object]
    ) -> None:
        """Publish the pages of those system-time MSRs and no others; not counted as a registration by the guest."""
        pages = {vcpu: self._page_of(value) for vcpu, value in enumerate(system_time)}
        self._clock.place_time_pages(pages, begin, undo)

    def own_page(self, vcpu: int) -> OwnPage | None:
        """What vCPU's page shows where pages have lines of their own; at this host's TSC frequency (V-38)."""
        if self._scale is None:
            return None
        even = (self._version[vcpu] + 1) & 0xFFFFFFFE  # a loaded one may be odd
        return OwnPage(GuestTsc(self._tsc[vcpu]), GuestNs(self._ns[vcpu]), self._scale, even, self._flags[vcpu])

    def _page_of(self, value: int) -> Gpa | None:
        gpa = Gpa(value & ~ENABLED)
        return gpa if value & ENABLED and not self._is_refused(gpa) else None

    # System time

    def _write_system_time(self, vcpu: int, index: int, value: int) -> None:
        gpa = value & ~ENABLED if value & ENABLED else None
        if gpa is not None and self._profile.time_page_must_be_good:
            self._check(index, value, gpa, TIME_INFO_BYTES)
        runs_old = index == MSR_KVM_SYSTEM_TIME if vcpu == 0 else self.boot_vcpu_runs_old_kvmclock
        write = partial(self._set_system_time, vcpu, value, runs_old)
        undo = partial(self._set_system_time, vcpu, self._system_time[vcpu], self.boot_vcpu_runs_old_kvmclock)
        if gpa is None and self._profile.stops_all_pages:
            self.take_pages_back(write, undo, vcpu)
        elif gpa is None:
            self._clock.place_time_page(vcpu, None, write, undo)
        elif self._is_refused(gpa):
            # Linux rejects a page-crossing address before it releases the old one, which stays in use.
            self._clock.keep_time_page(vcpu, write, undo)
        elif self._profile.bad_page_keeps_old:
            self._clock.place_time_page(vcpu, Gpa(gpa), write, undo)
        else:
            self._place_where_there_is_memory(vcpu, Gpa(gpa), write, undo)

    def _set_system_time(self, vcpu: int, value: int, runs_old: bool) -> None:
        self._system_time[vcpu], self._boot_vcpu_runs_old_kvmclock[0] = value, runs_old

    def _is_refused(self, gpa: int) -> bool:
        return self._profile.bad_page_keeps_old and gpa % PAGE_BYTES + TIME_INFO_BYTES > PAGE_BYTES

    def _place_where_there_is_memory(
        self, vcpu: int, gpa: Gpa, write: Callable[[], object], undo: Callable[[], object]
    ) -> None:
        """Unlike Linux, do not wait for memory to appear: enabling fails, though the MSR reads back (trap T6)."""
        if not self._clock.memory.contains(gpa, TIME_INFO_BYTES):
            self._clock.place_time_page(vcpu, None, write, undo)
            self._time_page_log(EventKind.REFUSED, f"vCPU {vcpu}: there is no memory for its clock's page at {gpa:#x}")
        elif self._profile.owns_pages:
            self._place_own(vcpu, gpa, write, undo)
        else:
            self._clock.place_time_page(vcpu, gpa, write, undo)

    def _place_own(self, vcpu: int, gpa: Gpa, write: Callable[[], object], undo: Callable[[], object]) -> None:
        before = self._version[vcpu], self._tsc[vcpu], self._ns[vcpu]

        def capture() -> None:
            write()
            tsc = self._clock.guest_tsc(vcpu)
            hz = self._clock.host_tsc_hz % (1 << 32) or self._clock.host_tsc_hz  # trap T8: a frequency of 32 bits
            self._version[vcpu] = (before[0] + 2) % (1 << 32)
            self._tsc[vcpu], self._ns[vcpu] = tsc, tsc * NS_PER_S // hz & U64_MASK

        def take_back() -> None:
            undo()
            self._version[vcpu], self._tsc[vcpu], self._ns[vcpu] = before

        self._clock.place_time_page(vcpu, gpa, capture, take_back)

    # Wall clock

    def _write_wall_clock(self, vcpu: int, index: int, value: int) -> None:
        # No enable bit and no mask: the value is the address.
        if self._profile.wall_clock_is_now:
            self._write_time_of_day(vcpu, index, value)
            return
        if self._profile.wall_clock_must_be_good:
            self._check(index, value, value, WALL_CLOCK.size)
        write = partial(self._wall_clock.__setitem__, vcpu, value)
        if value:
            self._clock.write_wall_clock(Gpa(value), write)
        else:
            write()

    def _write_time_of_day(self, vcpu: int, index: int, value: int) -> None:
        """Write the present UTC, with all vCPUs out; a guest that adds its own time is ahead by its uptime (T3)."""
        before, memory = self._wall_clock[vcpu], self._clock.memory
        try:
            self._check(index, value, value, WALL_CLOCK.size)
            with self._clock.quiesce(vcpu):
                (version,) = VERSION.unpack(memory.read(value, VERSION.size))
                sec, nsec = divmod(self._clock.utc_ns(), NS_PER_S)
                even = ((version | 1) + 1) % (1 << 32)
                self._wall_clock[vcpu] = value
                memory.write(value, WALL_CLOCK.pack(even, sec % (1 << 32), nsec))
        except (MsrFault, GuestAddressError) as error:  # its memory may go at any time
            self._wall_clock[vcpu] = before
            self._wall_clock_log(EventKind.REFUSED, f"wall clock not written: {error}")
            raise error if isinstance(error, MsrFault) else MsrFault(index, value, str(error)) from None
        self._wall_clock_log(EventKind.PAGE, f"wall clock at {value:#x}: sec {sec}, nsec {nsec}, version {even}")

    def _check(self, index: int, value: int, gpa: int, length: int) -> None:
        if gpa % ALIGNMENT:
            raise MsrFault(index, value, f"the address must be {ALIGNMENT}-byte aligned")
        if not self._clock.memory.contains(gpa, length):
            raise MsrFault(index, value, f"there are no {length} bytes of memory")
