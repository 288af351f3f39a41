"""A slow model of the synthetic timers: every due time is written out, in unbounded integers, and looked at each time.

And the guest's memory as far as they write to it: one message slot for each SINT of each vCPU.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

U64_MAX = 2**64 - 1
ENABLE, PERIODIC, LAZY, AUTO_ENABLE, DIRECT = 1, 2, 4, 8, 1 << 12
RESERVED = U64_MAX & ~(0xF | 0xFF << 4 | DIRECT | 0xF << 16)


class Message(NamedTuple):
    """What a slot shows: the timer's number, and reference times."""

    timer: int
    expiration: int
    delivery: int


class SlowStimer:
    """One timer.  due: the next reference time at which it expires.  waits_since: that of a message that waits."""

    def __init__(self, vcpu: int, index: int) -> None:
        self.vcpu, self.index = vcpu, index
        self.config = self.count = self.fired = self.set_as = 0
        self.due: int | None = None
        self.waits_since: int | None = None
        self.waits_as = 0

    @property
    def slot(self) -> tuple[int, int]:
        """The vCPU and the SINT."""
        return self.vcpu, self.config >> 16 & 0xF


class SlowStimers:
    """The timers of two vCPUs.  sints: the vectors of each vCPU's SINTs; None: no interrupt.  has_page: by vCPU."""

    def __init__(self, sints: list[list[int | None]]) -> None:
        self.sints, self.has_page = sints, [True, True]
        self.stimers = [SlowStimer(vcpu, index) for vcpu in range(2) for index in range(4)]
        self.slots: dict[tuple[int, int], Message] = {}
        self.flags: set[tuple[int, int]] = set()
        self.may_retry = self.was_loaded = False
        self._order = count()

    def waiting(self) -> list[SlowStimer]:
        """Those whose message waits, oldest first."""
        found = [each for each in self.stimers if each.waits_since is not None]
        return sorted(found, key=lambda each: each.waits_as)

    # The guest

    def write_config(self, stimer: SlowStimer, value: int, now_ns: int) -> bool:
        """False is #GP."""
        if value & RESERVED:
            return False
        stimer.config = value
        if value >> 16 & 0xF == 0 and not value & DIRECT:
            stimer.config &= ~ENABLE
        self._start(stimer, now_ns)
        return True

    def write_count(self, stimer: SlowStimer, value: int, now_ns: int) -> None:
        """0 disables; else AUTO_ENABLE enables."""
        stimer.count = value
        if value == 0:
            stimer.config &= ~ENABLE
        if value != 0 and stimer.config & AUTO_ENABLE:
            stimer.config |= ENABLE
        self._start(stimer, now_ns)

    def _start(self, stimer: SlowStimer, now_ns: int) -> None:
        stimer.due = stimer.waits_since = None
        if stimer.config & ENABLE and stimer.count:
            due = stimer.count + (now_ns // 100 if stimer.config & PERIODIC else 0)
            stimer.due = due if due * 100 <= U64_MAX else None
            stimer.set_as = next(self._order)

    def take(self, slot: tuple[int, int]) -> Message | None:
        """Read a slot, free it, and write EOM if the flag is set."""
        found = self.slots.pop(slot, None)
        if slot in self.flags:
            self.end_of_message()
        return found

    def end_of_message(self) -> None:
        """Of any vCPU."""
        self.may_retry = self.may_retry or bool(self.waiting())

    def move_page(self, vcpu: int, *, is_there: bool) -> None:
        """Enable the page anew, which zeroes it, or disable it."""
        self.has_page[vcpu] = is_there
        self.end_of_message()
        if is_there:
            self.slots = {slot: each for slot, each in self.slots.items() if slot[0] != vcpu}
            self.flags = {slot for slot in self.flags if slot[0] != vcpu}

    def load(self) -> None:
        """The state was saved and loaded: timers are set again in the order of their numbers."""
        self.was_loaded, self.may_retry = True, False
        for stimer in self.stimers:
            stimer.set_as, stimer.fired = next(self._order), 0

    # Time

    def next_due_ns(self) -> int | None:
        """The earliest of all."""
        dues = [each.due * 100 for each in self.stimers if each.due is not None]
        return 0 if self.may_retry or self.was_loaded else min(dues, default=None)

    def expire(self, now_ns: int) -> list[tuple[int, int]]:
        """Do all that is due; returns the interrupts, in order."""
        interrupts = self._sent_again() if self.was_loaded else []
        self.may_retry = self.was_loaded = False
        due = [each for each in self.stimers if each.due is not None and each.due * 100 <= now_ns]
        for stimer in sorted(due, key=lambda each: (each.due, each.set_as)):
            interrupts += self._expire(stimer, now_ns)
        busy = set[tuple[int, int]]()
        for stimer in self.waiting():
            if stimer.slot not in busy:
                busy.add(stimer.slot)
                interrupts += self._try(stimer, now_ns)
        return interrupts

    def _sent_again(self) -> list[tuple[int, int]]:
        full = [slot for slot in sorted(self.slots) if self.has_page[slot[0]]]
        return [found for slot in full for found in self._interrupt(slot)]

    def _interrupt(self, slot: tuple[int, int]) -> list[tuple[int, int]]:
        vector = self.sints[slot[0]][slot[1]]
        return [] if vector is None else [(slot[0], vector)]

    def _expire(self, stimer: SlowStimer, now_ns: int) -> list[tuple[int, int]]:
        assert stimer.due is not None
        since, stimer.due = stimer.due, None
        stimer.fired += 1
        if stimer.config & PERIODIC:
            periods = list(range(since, now_ns // 100 + 1, stimer.count))
            stimer.due = periods[-1] + stimer.count if (periods[-1] + stimer.count) * 100 <= U64_MAX else None
        if stimer.config & DIRECT:
            self._told(stimer)
            vector = stimer.config >> 4 & 0xFF
            return [(stimer.vcpu, vector)] if vector >= 16 else []
        if not stimer.config & PERIODIC:
            stimer.waits_since, stimer.waits_as = since, next(self._order)
            return []
        if stimer.slot in {each.slot for each in self.waiting()} or not self._is_free(stimer.slot):
            return []
        return self._post(stimer, since, now_ns, flag=False)

    def _told(self, stimer: SlowStimer) -> None:
        if not stimer.config & PERIODIC:
            stimer.config &= ~ENABLE

    def _is_free(self, slot: tuple[int, int]) -> bool:
        return self.has_page[slot[0]] and slot not in self.slots

    def _try(self, stimer: SlowStimer, now_ns: int) -> list[tuple[int, int]]:
        slot, since = stimer.slot, stimer.waits_since
        assert since is not None
        if not self._is_free(slot):
            self.flags |= {slot} if self.has_page[slot[0]] else set()
            return []
        stimer.waits_since = None
        self._told(stimer)
        return self._post(stimer, since, now_ns, flag=slot in {each.slot for each in self.waiting()})

    def _post(self, stimer: SlowStimer, since: int, now_ns: int, *, flag: bool) -> list[tuple[int, int]]:
        slot = stimer.slot
        self.slots[slot] = Message(stimer.index, since, now_ns // 100)
        self.flags = self.flags | {slot} if flag else self.flags - {slot}
        return self._interrupt(slot)
