"""The page of a vCPU whose TSC moves, and a guest's usual writes of IA32_TSC and IA32_TSC_ADJUST in compiled code.

A write is a usual one if the TSC of its vCPU, and the page that follows that, are all that changes by it.  All others
are for the path in Python, which gives usual ones the same results, at twenty times the cost.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pvclock._abi cimport pvclock_vcpu_time_info
from pvclock._core cimport Shown, TimePages, Wanted
from pvclock._guest_budget cimport GuestBudget
from pvclock._publish cimport pvclock_counter_read, pvclock_page_follow_tsc
from pvclock._transaction cimport Transaction, to_the_end

from functools import partial

from pvclock._transaction import commit

cdef enum:
    MSR_IA32_TSC = 0x10
    MSR_IA32_TSC_ADJUST = 0x3B

cdef uint64_t NS_PER_S = 1_000_000_000


def shows_line_alone(TimePages pages not None, vcpu: int) -> bool:
    """Is vCPU's page, if it has one, all that follows its TSC, and does it show the line published last?"""
    cdef int index = pages._vcpu(vcpu)
    cdef Wanted *wanted = &pages._wanted[index]
    cdef Shown *shown = &pages._shown[index]
    if pages._generation != pages.memory.generation:
        pages._look_up()
    if pages._stands or pages._own.count or pages.reference.is_served or not pages.was_published:
        return False
    return not wanted.registered or (shown.published and shown.flagged and shown.gpa == wanted.gpa)


def follow_tsc(TimePages pages not None, vcpu: int) -> int:
    """Have vCPU's page show the line published last by the TSC offset that it has now; returns the host TSC.

    All else stays as it is.  For a vCPU that is out of the guest, and for which shows_line_alone().
    """
    cdef int index = pages._vcpu(vcpu)
    show_by_tsc(pages, index)
    if pages._wanted[index].registered:
        pages.memory.mark_dirty(pages._wanted[index].gpa, sizeof(pvclock_vcpu_time_info))
    return pvclock_counter_read(&pages.counter.c)


cdef void show_by_tsc(TimePages pages, int vcpu) noexcept:
    cdef int i
    if pages._generation != pages.memory.generation:
        pages._look_up()
    for i in range(pages._count):
        if pages._target_vcpu[i] == vcpu:
            pvclock_page_follow_tsc(&pages._targets[i], &pages._anchor)
    pages._shown[vcpu].tsc_offset = pages._wanted[vcpu].tsc_offset


cdef void move_tsc(TimePages pages, int vcpu, uint64_t offset) noexcept:
    pages._wanted[vcpu].tsc_offset = offset
    pages._look_up_later()
    show_by_tsc(pages, vcpu)


cdef bint would_agree(TimePages pages, int vcpu, uint64_t offset) noexcept:
    """Would all TSCs, of several vCPUs, have one offset, if vCPU's were that?"""
    cdef int other
    for other in range(pages.vcpus):
        if other != vcpu and pages._wanted[other].tsc_offset != offset:
            return False
    return pages.vcpus > 1


@cython.final
cdef class TscWrites:
    """Serves guests' usual TSC writes to the clock that changes in `changing` and shows itself in `pages`.

    usual: which writes are usual ones, and their events: a UsualWrites.  events: the clock's log.  tsc_hz: the host's.
    has_adjust: does the guest have IA32_TSC_ADJUST?

    A usual write runs no Python code, unless an event of it is to be recorded: after a guest's exit little of this
    process is in the CPU's caches.

    Thread-safety: serve() may be called from any thread, and does not wait for one that changes the clock.
    """

    cdef Transaction _changing
    cdef TimePages _pages
    cdef GuestBudget _budget
    cdef object _usual, _events
    cdef uint64_t _tsc_hz
    cdef bint _has_adjust
    # What was found after that transaction, in memory with those slots; it holds for a second until the next one.
    cdef uint64_t _count, _generation
    cdef dict _tscs  # (VcpuTsc, what sets its offset on the host), or None, by vCPU; None if no write is a usual one
    cdef uint64_t _least_tsc, _stamp_tsc, _stamp_raw_ns

    def __cinit__(
        self, Transaction changing not None, TimePages pages not None, usual: object, events: object,
        tsc_hz: int, has_adjust: bool,
    ) -> None:
        self._changing, self._pages = changing, pages
        self._usual, self._events = usual, events
        self._budget = events.guest_budget
        self._tsc_hz, self._has_adjust = tsc_hz, has_adjust
        self._count = changing.count - 1

    def serve(self, vcpu: int, index: int, value: int) -> bool:
        """Serve this WRMSR; False, with nothing changed, if it is not a usual one.

        vcpu: of this VM, and out of the guest.  index, value: of 32 and 64 bits.
        """
        cdef uint32_t msr = index
        cdef bint has_event = False
        if msr != MSR_IA32_TSC and not (msr == MSR_IA32_TSC_ADJUST and self._has_adjust):
            return False
        if not self._changing.try_enter():
            return False
        try:
            return self._serve(vcpu, msr, value, &has_event)
        finally:
            self._changing.leave()
            if has_event:
                self._events.deliver()

    cdef bint _serve(self, int vcpu, uint32_t msr, uint64_t value, bint *has_event) except -1:
        cdef uint64_t now, before, offset, adjust, moved
        found = self._movable(vcpu)
        now = self._now()
        if found is None or <int64_t>(now - self._least_tsc) < 0:
            return False
        tsc, set_offset = <tuple>found
        before, adjust = tsc.offset, tsc.adjust
        moved = value - (now + before if msr == MSR_IA32_TSC else adjust)
        offset = before + moved
        if would_agree(self._pages, vcpu, offset) or not is_set(set_offset, offset, before):
            return False
        # From here on all is done, whatever interrupts.
        tsc.offset, tsc.adjust = offset, adjust + moved
        move_tsc(self._pages, vcpu, offset)
        has_event[0] = not self._budget.suppress(self._raw_ns(now))
        if has_event[0]:
            commit(partial(int, now), partial(self._usual.change, vcpu, before, offset), nothing, self._events)
        return True

    cdef uint64_t _now(self) noexcept:
        return pvclock_counter_read(&self._pages.counter.c)

    cdef uint64_t _raw_ns(self, uint64_t tsc) noexcept:
        """CLOCK_MONOTONIC_RAW at a TSC of the second that follows the stamps."""
        return self._stamp_raw_ns + (tsc - self._stamp_tsc) * NS_PER_S // self._tsc_hz

    cdef object _movable(self, int vcpu):
        """vCPU's TSC and what sets its offset on the host; None if no write to it is a usual one."""
        if (
            self._count != self._changing.count
            or self._generation != self._pages.memory.generation
            or self._now() - self._stamp_tsc > self._tsc_hz
        ):
            self._look()
        if self._tscs is None:
            return None
        if vcpu not in self._tscs:
            self._tscs[vcpu] = self._usual.tsc(vcpu)
        return self._tscs[vcpu]

    cdef int _look(self) except -1:
        """Find anew what is kept from one write to the next."""
        self._tscs = None
        found = self._usual.look()
        if found is not None:
            self._least_tsc, self._stamp_tsc, self._stamp_raw_ns = found
            self._tscs = {}
        self._count, self._generation = self._changing.count, self._pages.memory.generation
        return 0


cdef bint is_set(object set_offset, uint64_t offset, uint64_t before) except -1:
    """Set the offset on the host; False if that refuses."""
    try:
        set_offset(offset)
    except Exception:  # the path in Python says why, and undoes what may have been done
        return False
    except BaseException:
        to_the_end(set_offset, before, [])
        raise
    return True


def nothing(_: object) -> None:
    """Take no new state: time goes on as it was."""
