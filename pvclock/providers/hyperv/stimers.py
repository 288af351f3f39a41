"""The synthetic timers, four a vCPU, which expire in the partition's reference time.

A timer that expires sends a message to its SINT, or interrupts its vCPU itself (direct mode).  Reference time is guest
time in units of 100 ns; so these timers stand still while it is paused, and follow it wherever it skips.

Periods that have ended by the time that a timer is served are one expiry, that of the oldest, and the next one keeps
the grid: KVM's rule, under which the lazy bit says nothing.  A periodic message that finds its slot taken is dropped,
as there; a one-shot message waits for the slot, and its timer stays enabled until then.

Beyond KVM: reserved bits are #GP, as on VirtualBox; a periodic timer without a SIM page goes on; messages that wait
come in the order of their expiry.

Source: TLFS "Timers and Time Services"; Linux stimer_set_config(), stimer_set_count(), kvm_hv_process_stimers().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from struct import pack
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.errors import ConfigError, MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.saved_numbers import saved_numbers
from pvclock.providers.hyperv.synic import FIRST_VECTOR, Synic, message
from pvclock.providers.interface import ClockServices, InterruptServices, MsrValue
from pvclock.quantities import U64_MASK, GuestNs
from pvclock.timekeeping.timers import Firing, Timer, Timers

__all__ = ["STIMERS", "SyntheticTimers"]

MSR_STIMER0_CONFIG: Final = 0x400000B0
MSR_STIMER0_COUNT: Final = 0x400000B1
STIMERS: Final = 4
"""Synthetic timers of a vCPU."""
NS_PER_UNIT: Final = 100

ENABLE: Final = 1 << 0
PERIODIC: Final = 1 << 1
LAZY: Final = 1 << 2
AUTO_ENABLE: Final = 1 << 3
APIC_VECTOR_SHIFT: Final = 4
APIC_VECTOR: Final = 0xFF << APIC_VECTOR_SHIFT
DIRECT_MODE: Final = 1 << 12
SINT_SHIFT: Final = 16
SINT: Final = 0xF << SINT_SHIFT
BY_MESSAGE: Final = ENABLE | PERIODIC | LAZY | AUTO_ENABLE | SINT
"""The bits that a timer has without direct mode."""

TIMER_EXPIRED: Final = 0x80000010
"""The type of its message."""

Interrupt = tuple[int, int]
"""A vCPU and a vector."""


class Stimer:
    """One synthetic timer.  config, count: its MSRs.  timer: what it waits for in guest time.

    expiration: reference time at which it expired, while its message waits or is sent.  fired: how often it expired.
    """

    __slots__ = ("config", "count", "expiration", "fired", "index", "timer", "vcpu")

    def __init__(self, vcpu: int, index: int) -> None:
        self.vcpu, self.index = vcpu, index
        self.config = self.count = self.expiration = self.fired = 0
        self.timer: Timer | None = None

    @property
    def slot(self) -> tuple[int, int]:
        """The vCPU and the SINT of its messages."""
        return self.vcpu, (self.config & SINT) >> SINT_SHIFT

    @property
    def due(self) -> int:
        """Reference time at which it expires, or did if its message waits; 0 if it does not run."""
        if self.timer is None or not self.timer.active:
            return self.expiration
        return self.timer.deadline_ns // NS_PER_UNIT

    def message(self, now: int, *, pending: bool) -> bytes:
        """What it tells at reference time `now`.  pending: another message waits for the slot."""
        return message(TIMER_EXPIRED, pack("<IIQQ", self.index, 0, self.expiration, now), pending=pending)

    def delivered(self) -> None:
        """The guest has been told of the expiry."""
        self.expiration = 0
        if not self.config & PERIODIC:
            self.config &= ~ENABLE


class SyntheticTimers:
    """Every vCPU's timers.  synic: where messages are posted.  vmm: whom to ask for interrupts.

    offers_direct_mode: may a timer interrupt its vCPU without a message?
    """

    def __init__(
        self,
        clock: ClockServices,
        vcpus: int,
        synic: Synic,
        vmm: InterruptServices,
        *,
        offers_direct_mode: bool = True,
    ) -> None:
        self._clock, self._synic, self._vmm = clock, synic, vmm
        self._config = BY_MESSAGE | DIRECT_MODE | APIC_VECTOR if offers_direct_mode else BY_MESSAGE
        self._stimers = [Stimer(vcpu, index) for vcpu in range(vcpus) for index in range(STIMERS)]
        self._forget()
        synic.on_free = self._slot_may_be_free
        self.msrs: Mapping[int, Msr] = {}
        for index in range(STIMERS):
            read_config, read_count = partial(self._read_config, index), partial(self._read_count, index)
            config = Msr(Privilege.SYNTHETIC_TIMERS, read_config, partial(self._write_config, index))
            count = Msr(Privilege.SYNTHETIC_TIMERS, read_count, partial(self._write_count, index))
            self.msrs |= {MSR_STIMER0_CONFIG + 2 * index: config, MSR_STIMER0_COUNT + 2 * index: count}

    def _stimer(self, index: int, vcpu: int) -> Stimer:
        return self._stimers[vcpu * STIMERS + index]

    def fired(self, vcpu: int, index: int) -> int:
        """How often vCPU's timer `index` has expired, in this process; periods that were merged count once."""
        return self._stimer(index, vcpu).fired

    # The guest's side

    def _read_config(self, index: int, vcpu: int) -> int:
        return self._stimer(index, vcpu).config

    def _read_count(self, index: int, vcpu: int) -> int:
        return self._stimer(index, vcpu).count

    def _write_config(self, index: int, vcpu: int, value: int) -> None:
        stimer = self._stimer(index, vcpu)
        if value & ~self._config:
            msr = MSR_STIMER0_CONFIG + 2 * index
            raise MsrFault(msr, value, f"bits {value & ~self._config:#x} are reserved or not offered")
        self._stop(stimer)
        has_target = value & (DIRECT_MODE | SINT)
        stimer.config = value if has_target else value & ~ENABLE
        self._start(stimer)

    def _write_count(self, index: int, vcpu: int, value: int) -> None:
        stimer = self._stimer(index, vcpu)
        self._stop(stimer)
        stimer.count = value
        if not value:
            stimer.config &= ~ENABLE
        elif stimer.config & AUTO_ENABLE:
            stimer.config |= ENABLE
        self._start(stimer)

    def _stop(self, stimer: Stimer) -> None:
        """Forget what it waits for, and the message that waits for a slot."""
        if stimer.timer is not None:
            self._timers.remove(stimer.timer)
        self._waiting.pop(stimer, None)
        stimer.timer, stimer.expiration = None, 0

    def _start(self, stimer: Stimer) -> None:
        """A periodic timer counts from now; the count of another one is the reference time at which it expires."""
        if stimer.config & ENABLE and stimer.count:
            start = self._clock.reference_units(stimer.vcpu) if stimer.config & PERIODIC else 0
            self._arm(stimer, start + stimer.count)
        self._clock.timers_changed()

    def _arm(self, stimer: Stimer, due: int) -> None:
        if due * NS_PER_UNIT <= U64_MASK:  # else guest time ends before
            period_ns = stimer.count * NS_PER_UNIT if stimer.config & PERIODIC else None
            deadline_ns = GuestNs(due * NS_PER_UNIT)
            stimer.timer = self._timers.add(deadline_ns, partial(self._note, stimer), period_ns=period_ns)

    def _slot_may_be_free(self) -> None:
        if self._waiting:
            self._is_retry_due = True
            self._clock.timers_changed()

    # Expiry

    def next_due_ns(self) -> int | None:
        """See Hooks: the next expiry; 0 if a message may be posted now, or interrupts are to be sent again."""
        if self._is_retry_due or self._synic.is_resend_due:
            return 0
        return self._timers.next_due_ns

    def expire(self, now_ns: int) -> Callable[[], None] | None:
        """See Hooks: writes the messages; what it returns raises the interrupts."""
        memory = self._clock.memory
        memory.defer_dirty()  # on_dirty may raise, and the interrupts of what was written have to come all the same
        try:
            interrupts = [*self._synic.resend(), *self._expire(now_ns), *self._retry()]
        finally:
            errors = _told(memory)
        return partial(self._interrupt, interrupts, errors) if interrupts or errors else None

    def _note(self, stimer: Stimer, firing: Firing) -> None:
        """The callback of its timer."""
        stimer.fired += 1
        stimer.expiration = firing.deadline_ns // NS_PER_UNIT
        self._expired.append(stimer)

    def _expire(self, now_ns: int) -> Iterator[Interrupt]:
        """Serve the timers that are due; messages that have to wait are left to _retry()."""
        self._timers.advance(GuestNs(max(now_ns, self._timers.now)))
        expired = self._expired.copy()
        self._expired.clear()
        for stimer in expired:
            if stimer.config & DIRECT_MODE:
                stimer.delivered()
                vector = (stimer.config & APIC_VECTOR) >> APIC_VECTOR_SHIFT
                if vector >= FIRST_VECTOR:  # an APIC takes no other
                    yield stimer.vcpu, vector
            elif not stimer.config & PERIODIC:
                self._waiting[stimer] = None
            else:
                is_first = all(stimer.slot != other.slot for other in self._waiting)
                if is_first and self._post(stimer, waits=False):
                    yield from self._interrupts(stimer.slot)
                stimer.delivered()

    def _retry(self) -> Iterator[Interrupt]:
        """Post the first of the messages that wait for each slot; the pending flag in it says that there are more."""
        self._is_retry_due = False
        queues: dict[tuple[int, int], list[Stimer]] = {}
        for stimer in self._waiting:
            queues.setdefault(stimer.slot, []).append(stimer)
        for slot, (first, *others) in queues.items():
            if not self._synic.is_free(*slot):
                continue
            config = first.config
            first.config &= ~ENABLE  # before the guest sees the message, for its reads do not wait for the lock
            if self._post(first, waits=True, pending=bool(others)):
                yield from self._interrupts(slot)
                del self._waiting[first]
                first.delivered()
            else:  # the guest has filled the slot itself meanwhile
                first.config = config

    def _post(self, stimer: Stimer, *, waits: bool, pending: bool = False) -> bool:
        # The page's rounding may show the guest less than the time at which it asked to be told.
        now = max(self._clock.reference_units(stimer.vcpu), stimer.expiration)
        return self._synic.post(*stimer.slot, stimer.message(now, pending=pending), waits=waits)

    def _interrupts(self, slot: tuple[int, int]) -> list[Interrupt]:
        """What has to be raised for a message in that slot: one interrupt or none."""
        vector = self._synic.vector(*slot)
        return [] if vector is None else [(slot[0], vector)]

    def _interrupt(self, interrupts: Iterable[Interrupt], errors: list[Exception]) -> None:
        """Raise all interrupts; the first error is raised after them, the others are its notes."""
        for vcpu, vector in interrupts:
            try:
                self._vmm.inject(vcpu, vector)
            except Exception as error:  # noqa: BLE001  # the VMM's; the other interrupts are due all the same
                errors.append(error)
        if errors:
            first, *others = errors
            for other in others:
                first.add_note(f"at the same expiry of timers: {other!r}")
            raise first

    # Life

    def reset(self) -> None:
        """All MSRs are 0, and no timer runs."""
        for stimer in self._stimers:
            stimer.config = stimer.count = 0
        self._forget()
        self._clock.timers_changed()

    def _forget(self) -> None:
        """No timer runs, and no message waits."""
        for stimer in self._stimers:
            stimer.timer, stimer.expiration = None, 0
        self._timers = Timers()
        self._waiting: dict[Stimer, None] = {}  # for their slots, in the order of expiry
        self._expired: list[Stimer] = []
        self._is_retry_due = False

    def save(self) -> Mapping[str, MsrValue]:
        """The timers of each vCPU after the other's; stimer_waiting: the numbers of those whose messages wait."""
        number = {stimer: place for place, stimer in enumerate(self._stimers)}
        return {
            "stimer_config": tuple(stimer.config for stimer in self._stimers),
            "stimer_count": tuple(stimer.count for stimer in self._stimers),
            "stimer_due": tuple(stimer.due for stimer in self._stimers),
            "stimer_waiting": tuple(number[stimer] for stimer in self._waiting),
        }

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        every = len(self._stimers)
        configs = saved_numbers(saved, "stimer_config", every, lambda config: not config & ~self._config)
        counts = saved_numbers(saved, "stimer_count", every)
        dues = saved_numbers(saved, "stimer_due", every)
        waiting = saved_numbers(saved, "stimer_waiting", None, lambda number: number < every)
        written = list(zip(configs, counts, dues, strict=True))
        if not all(_may_be(*each) for each in written) or len(set(waiting)) != len(waiting):
            raise ConfigError("provider 'HyperV': timers were found that no guest can have set")
        if not all(dues[number] and not configs[number] & (PERIODIC | DIRECT_MODE) for number in waiting):
            raise ConfigError("provider 'HyperV': a message waits of a timer that sends none")
        return partial(self._adopt, written, waiting)

    def _adopt(self, written: list[tuple[int, int, int]], waiting: list[int]) -> None:
        self._forget()
        for number, (stimer, (config, count, due)) in enumerate(zip(self._stimers, written, strict=True)):
            stimer.config, stimer.count = config, count
            if number in waiting:
                stimer.expiration = due
            elif due:
                self._arm(stimer, due)
        self._waiting = dict.fromkeys(self._stimers[number] for number in waiting)


def _may_be(config: int, count: int, due: int) -> bool:
    """Can a timer have these MSRs and be due then?"""
    if not due:
        return True
    runs = bool(config & ENABLE and count) and due * NS_PER_UNIT <= U64_MASK
    return runs and (due >= count if config & PERIODIC else due == count)


def _told(memory: GuestMemory) -> list[Exception]:
    """Report what was written; return on_dirty's error, if there is one."""
    try:
        memory.tell_dirty()
    except Exception as error:  # noqa: BLE001  # the VMM's
        return [error]
    return []
