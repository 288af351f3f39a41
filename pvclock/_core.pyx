"""The pages of one VM's clock, published together and read back: the compiled heart of pvclock.

It holds no policy: a publish is given what the clock shows as a ClockLine, and takes ticks from a Counter.
"""

cimport cython
from cpython.long cimport PyLong_AsLongAndOverflow
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<time.h>" nogil:
    int nanosleep(const timespec *request, timespec *left)

from pvclock._abi cimport PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE_BIT, pvclock_vcpu_time_info
from pvclock._counter cimport Counter
from pvclock._hyperv cimport (
    HYPERV_PAGE_BYTES, HYPERV_UNIT_NS, hyperv_clock_move, hyperv_clock_resume, hyperv_counter_read,
    hyperv_moved_line_fixed, hyperv_tsc_page, pvclock_page_kind_hyperv
)
from pvclock._math cimport pvclock_line, pvclock_scale_delta
from pvclock._memory cimport GuestMemory, as_u64, as_whole, shortened
from pvclock._publish cimport (
    pvclock_anchor, pvclock_anchor_move, pvclock_anchor_params_of, pvclock_anchor_read,
    pvclock_counter_read, pvclock_own_page, pvclock_own_pages_write_now, pvclock_page_kind_own_line,
    pvclock_page_kind_pvclock, pvclock_page_set, pvclock_publish_at, pvclock_read, pvclock_reading, pvclock_target
)
from pvclock._scale cimport ClockScale

from pvclock.errors import ConfigError, RangeError, StateError
from pvclock.readings import ClockLine, Reading, ReferenceTscPage, TimeInfo

TSC_STABLE_BIT = PVCLOCK_TSC_STABLE_BIT
GUEST_STOPPED = PVCLOCK_GUEST_STOPPED

_NOT_MOVED = (0, 0)

cdef uint64_t TIME_INFO_BYTES = sizeof(pvclock_vcpu_time_info)
cdef uint64_t REFERENCE_BYTES = 24  # of a reference TSC page; the rest is reserved, and left alone

# How often a page is tried before other threads get the GIL, doubled with each round up to a limit, for a page that is
# published all the time; and how long: more than an update of a writer that has to wait for its CPU takes, and short
# enough not to hang on a page that its guest has spoilt.
cdef unsigned int READ_TRIES = 256
cdef int READ_DOUBLINGS = 6
cdef uint64_t READ_LIMIT_NS = 500_000_000


def read_time_info(GuestMemory memory not None, gpa: int) -> TimeInfo:
    """The pvclock page at `gpa` as it lies there, whether or not an update is going on."""
    cdef pvclock_vcpu_time_info info
    memcpy(&info, memory.at(gpa, TIME_INFO_BYTES), TIME_INFO_BYTES)
    return TimeInfo(
        info.version, info.tsc_timestamp, info.system_time, info.tsc_to_system_mul, info.tsc_shift, info.flags
    )


def read_reference_page(GuestMemory memory not None, gpa: int) -> ReferenceTscPage:
    """The reference TSC page at `gpa` as it lies there, whether or not an update is going on."""
    cdef hyperv_tsc_page page
    memcpy(&page, memory.at(gpa, HYPERV_PAGE_BYTES), REFERENCE_BYTES)
    return ReferenceTscPage(page.sequence, page.scale, page.offset)


@cython.final
@cython.no_gc_clear  # it is part of one that is not cleared either
cdef class OwnPages:
    """The pages of one VM that have a line of their own, each written once; part of its TimePages."""

    def __cinit__(self, GuestMemory memory not None, int vcpus) -> None:
        self._memory = memory
        self._wanted = <WantedOwn *>calloc(vcpus, sizeof(WantedOwn))
        self.pages = <pvclock_own_page *>calloc(vcpus, sizeof(pvclock_own_page))
        self.vcpus = <int *>calloc(vcpus, sizeof(int))
        if not (self._wanted and self.pages and self.vcpus):
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self._wanted)
        free(self.pages)
        free(self.vcpus)

    cdef void put(self, int vcpu, uint64_t gpa, pvclock_own_page page) noexcept:
        """Have vCPU's page show that from the next write on."""
        self._wanted[vcpu].gpa, self._wanted[vcpu].page = gpa, page
        self._wanted[vcpu].is_there = True

    cdef void take_away(self, int vcpu) noexcept:
        self._wanted[vcpu].is_there = False

    cdef bint has(self, int vcpu) noexcept:
        return self._wanted[vcpu].is_there

    cdef void add(self, int vcpu, uint8_t *page) noexcept:
        """vCPU's page was found in guest memory."""
        self.pages[self.count], self.vcpus[self.count] = self._wanted[vcpu].page, vcpu
        self.pages[self.count].page = page
        self.count += 1

    cdef bint are_due(self, vcpu) except -1:
        """Is there a page to be written, but `vcpu`'s?"""
        cdef int i
        for i in range(self.count):
            if self.pages[i].is_due and self.vcpus[i] != vcpu:
                return True
        return False

    cdef void set_flags(self, uint8_t flags) noexcept:
        """Have pages that are written show those flags beside their own."""
        cdef int i
        for i in range(self.count):
            self.pages[i].flags = self._wanted[self.vcpus[i]].page.flags | flags

    cdef void note_written(self) noexcept:
        cdef int i
        cdef WantedOwn *wanted
        for i in range(self.count):
            wanted = &self._wanted[self.vcpus[i]]
            wanted.is_unmarked = wanted.is_unmarked or (wanted.page.is_due and not self.pages[i].is_due)
            wanted.page.is_due = self.pages[i].is_due

    cdef int mark_dirty(self) except -1:
        """Tell the memory's on_dirty of the pages that were written and that it was not told of."""
        cdef int i
        cdef WantedOwn *wanted
        for i in range(self.count):
            wanted = &self._wanted[self.vcpus[i]]
            if wanted.is_unmarked:
                wanted.is_unmarked = False
                self._memory.mark_dirty(wanted.gpa, TIME_INFO_BYTES)
        return 0

    cdef uint64_t ns_at(self, int vcpu, uint64_t guest_tsc) noexcept:
        cdef pvclock_anchor *line = &self._wanted[vcpu].page.line
        return line.system_time + pvclock_scale_delta(guest_tsc - line.tsc_timestamp, line.scale)


@cython.final
@cython.no_gc_clear  # as OwnPages
cdef class ReferenceClock:
    """The reference time of one VM, in units of 100 ns: its page, and the counter beside it; part of its TimePages.

    Thread-safety: as TimePages; units() may be called from any thread at any time.
    """

    def __cinit__(self, GuestMemory memory not None, Counter counter not None) -> None:
        self._memory, self._counter = memory, counter

    # What guest and VMM ask for

    def place(self, gpa: int | None) -> None:
        """Put the reference TSC page at `gpa`, or (None) take it away, from the next publish on."""
        self._gpa = 0 if gpa is None else as_u64(gpa, "gpa")
        self._is_placed, self._clock.is_new = gpa is not None, True
        self._generation = self._memory.generation - 1
        self.serve()

    def serve(self) -> None:
        """Have the counter follow a line from the next publish on, with a page or without."""
        self.is_served = True

    @property
    def gpa(self) -> int | None:
        """The guest-physical address of the page, or None."""
        return self._gpa if self._is_placed else None

    @property
    def sequence(self) -> int:
        """The last one of the page; 0 if it never had one."""
        return self._clock.sequence

    def adopt(self, units: int, sequence: int) -> None:
        """Show no less than `units`, nor `sequence` again; for a clock that is restored, before it stands still."""
        cdef uint64_t count = as_u64(sequence, "sequence")
        if count >> 32:
            raise RangeError(f"a page's sequence is {count:#x}; it has 32 bits")
        self._clock.least_units, self._clock.sequence = as_u64(units, "units"), <uint32_t>count

    def units(self) -> int | None:
        """Reference time now, or as it stands; None if no line of it was published.

        Never less than a reading of page or counter that had ended before.  Sleeps while a publish changes the line;
        None, too, if that takes longer than any publish.
        """
        cdef uint64_t units, began_ns = 0
        while not self._stands:
            if hyperv_counter_read(&self._clock, &self._counter.c, &units) == 0:
                return units
            began_ns = began_ns or monotonic_ns()
            if self._clock.line_version == 0 or monotonic_ns() - began_ns > READ_LIMIT_NS:
                return None
            with nogil:
                nanosleep(&MOMENT, NULL)
        if self._clock.line_den == 0:
            self._clock.least_units = max(self._clock.least_units, self._standing_units)
        return self._standing_units

    # What TimePages has it do

    cdef bint prepare(self, ClockScale scale, uint64_t tsc_offset, bint in_step) noexcept:
        """Have all that a publish takes; is there anything to publish?  It writes a page that comes into memory."""
        cdef void *page
        self.set_rate(scale.num, scale.den)
        self._clock.tsc_offset, self._clock.can_read_tsc = tsc_offset, in_step
        if self._generation != self._memory.generation:
            self._generation = self._memory.generation
            page = self._memory.find(self._gpa, HYPERV_PAGE_BYTES) if self._is_placed else NULL
            # Other memory may be at the same address, with nothing of ours in it.
            self._clock.is_new = self._clock.is_new or page is not NULL or self._clock.page is not NULL
            self._clock.page = page
        return self.is_served

    cdef void set_rate(self, uint64_t num, uint64_t den) noexcept nogil:
        """num/den ns a tick, from the next break point on."""
        self._clock.num, self._clock.den = num, den

    cdef void note_published(self, bint written) noexcept:
        self._stands = False
        if written and self._clock.page is not NULL and self._memory._on_dirty is not None:
            self._is_unmarked = True

    cdef void move(self, uint64_t ticks, uint64_t ns) noexcept:
        """As TimePages.move()."""
        if self._clock.line_den != 0 and (ticks or ns):
            hyperv_clock_move(&self._clock, ticks, ns)

    cdef void resume(self, uint64_t tsc, uint64_t ns, ClockScale scale) noexcept:
        """Go on at host TSC `tsc` from the line as it stood, `ns` ahead, at the rate of `scale`."""
        hyperv_clock_resume(&self._clock, self._standing_tsc, tsc - self._standing_tsc, ns, scale.num, scale.den)

    cdef void begin_anew(self) noexcept:
        """Forget the line: the next one may be a step away."""
        self._clock.line_den = 0

    cdef void stop(self, uint64_t tsc, uint64_t ns) noexcept:
        """Have the counter show what it shows at `tsc` until the next publish: `ns`, if it has no line yet."""
        if self._clock.line_den == 0:
            self.stand_still(ns)
            return
        cdef uint64_t begin_tsc = self._clock.line.tsc + self._clock.moved_ticks
        cdef uint64_t shown_tsc = begin_tsc if <int64_t>(tsc - begin_tsc) < 0 else tsc  # on a CPU a little late
        self._standing_units = <uint64_t>(hyperv_moved_line_fixed(&self._clock, shown_tsc) >> 64)
        self._standing_tsc, self._stands = tsc, True

    cdef void stand_still(self, uint64_t ns) noexcept:
        """Have the counter show `ns`, or what was shown before a restore, until the next publish begins a line."""
        self._clock.line_den = self._clock.line_version = 0
        self._standing_units = max(ns // HYPERV_UNIT_NS, self._clock.least_units)
        self._stands = True

    cdef int mark_dirty(self) except -1:
        """Tell the memory's on_dirty, if the page was written and that was not told."""
        if self._is_unmarked:
            self._is_unmarked = False
            self._memory.mark_dirty(self._gpa, REFERENCE_BYTES)
        return 0


@cython.final
@cython.no_gc_clear  # its memory is what tells it that its pointers are stale
cdef class TimePages:
    """The pages of one VM, and the line that they show: pvclock pages, one for each vCPU, and a reference TSC page.

    A pvclock page has either the VM's line, which each publish brings up to date, or a line of its own, which is
    written once.  One that is registered but not in guest memory is left out of a publish, and comes in as soon as a
    slot covers it (as in Linux).

    Thread-safety: one thread at a time may call the methods that register or publish; `read` and `reading` may be
    called from any thread at any time.
    """

    def __cinit__(self, GuestMemory memory not None, vcpus: int, Counter counter not None) -> None:
        if not 1 <= as_whole(vcpus, "vcpus") <= 1 << 20:
            raise ConfigError(f"a VM with {shortened(vcpus)} vCPUs; it has 1 to 2^20")
        self.memory, self.vcpus, self.counter = memory, vcpus, counter
        self._wanted = <Wanted *>calloc(vcpus, sizeof(Wanted))
        self._shown = <Shown *>calloc(vcpus, sizeof(Shown))
        self._targets = <pvclock_target *>calloc(vcpus, sizeof(pvclock_target))
        self._target_vcpu = <int *>calloc(vcpus, sizeof(int))
        if not (self._wanted and self._shown and self._targets and self._target_vcpu):
            raise MemoryError
        self._own = OwnPages(memory, vcpus)
        self.reference = ReferenceClock(memory, counter)
        self._sets[SHARED_LINE] = pvclock_page_set(&pvclock_page_kind_pvclock, self._targets, 0, 0)
        self._sets[OWN_LINE] = pvclock_page_set(&pvclock_page_kind_own_line, self._own.pages, 0, 0)
        self._sets[REFERENCE] = pvclock_page_set(&pvclock_page_kind_hyperv, &self.reference._clock, 0, 0)
        self.break_tsc = pvclock_counter_read(&counter.c)
        self._look_up()

    def __dealloc__(self) -> None:
        free(self._wanted)
        free(self._shown)
        free(self._targets)
        free(self._target_vcpu)

    cdef int _vcpu(self, object vcpu) except -1:
        cdef int overflow
        cdef long number = PyLong_AsLongAndOverflow(as_whole(vcpu, "vcpu"), &overflow)
        if overflow or not 0 <= number < self.vcpus:
            raise RangeError(f"vCPU {shortened(vcpu)}; this VM has vCPUs 0 to {self.vcpus - 1}")
        return <int>number

    def register(self, vcpu: int, gpa: int | None, own=None) -> None:
        """Put vCPU's page at `gpa`, or (None) take it away; guests and readers find it from the next publish on.

        own: (guest TSC, ns, scale, version, flags) of a page with a line of its own, which the next publish or
        write_own_pages() writes, and which later ones leave alone.
        """
        cdef int index = self._vcpu(vcpu)
        cdef uint64_t where = 0 if gpa is None else as_u64(gpa, "gpa")
        if own is None or gpa is None:
            self._own.take_away(index)
        else:
            self._own.put(index, where, as_own_page(own))
        self._wanted[index].gpa = where
        self._wanted[index].registered = gpa is not None
        self._shown[index].flagged = False
        self._look_up_later()

    def registered(self, vcpu: int) -> int | None:
        """The guest-physical address of vCPU's page, or None."""
        cdef Wanted *wanted = &self._wanted[self._vcpu(vcpu)]
        return wanted.gpa if wanted.registered else None

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """vCPU's guest TSC is the host's plus `offset` (ticks modulo 2^64), from the next publish on."""
        cdef int index = self._vcpu(vcpu)
        self._wanted[index].tsc_offset = as_u64(offset, "offset")
        self._look_up_later()

    cdef void _look_up_later(self) noexcept:
        self._changed = True
        self._generation = self.memory.generation - 1

    cdef void _look_up(self) noexcept:
        """Find every page in guest memory, for the next publish and for readers.  Runs no Python code."""
        cdef uint8_t *page
        cdef Wanted *wanted
        cdef int vcpu
        # Other memory may be where a page was, with nothing of ours in it.
        cdef bint is_other_memory = self._flagged_generation != self.memory.generation
        self._count = self._own.count = 0
        self._changed = True
        for vcpu in range(self.vcpus):
            wanted = &self._wanted[vcpu]
            page = self.memory.find(wanted.gpa, TIME_INFO_BYTES) if wanted.registered else NULL
            if page is NULL or is_other_memory:
                self._shown[vcpu].flagged = False
            if page is not NULL and self._own.has(vcpu):
                self._own.add(vcpu, page)
            elif page is not NULL:
                self._targets[self._count] = pvclock_target(page, wanted.tsc_offset, 0, 1)
                self._target_vcpu[self._count] = vcpu
                self._count += 1
            if self._shown[vcpu].published:
                self._shown[vcpu].page = self.memory.find(self._shown[vcpu].gpa, TIME_INFO_BYTES)
        self._sets[SHARED_LINE].count, self._sets[OWN_LINE].count = self._count, self._own.count
        self._generation = self._flagged_generation = self.memory.generation

    def lacks_flags(self, vcpu: int | None) -> bool:
        """Is there a page in guest memory, but `vcpu`'s, whose flags were never written where it is?"""
        cdef int i
        if self._generation != self.memory.generation:
            self._look_up()
        for i in range(self._count):
            if not self._shown[self._target_vcpu[i]].flagged and self._target_vcpu[i] != vcpu:
                return True
        return self._own.are_due(vcpu)

    def publish(
        self, line, ClockScale scale not None, *, flags=0, out_of_guest=(), step=False, moved=_NOT_MOVED, start=None,
        again=False, in_step=False,
    ) -> int:
        """Publish `line` at `scale` into all registered pages at once; returns the break point (host TSC).

        The clock goes on at the break by 0 or +1 ns, unless `step` says that it may jump to the line.  moved: see
        move(), which comes first.  `flags` go to the vCPUs in `out_of_guest` (vCPU numbers) only: a running guest
        writes that byte itself.  The memory's on_dirty is told of all pages that it writes.

        in_step: the vCPUs' TSCs are the host's plus vCPU 0's offset; else nobody may use the reference TSC page.

        start: (host TSC, ns, scale) at which stopped time resumes: from there to the break the line
        published last is the reading that stood, `ns` ahead, at `scale`; its own rate may be another.

        again: on a CPU whose counter is behind the last break point, which stays; for the line published last.

        counter_went_back says of the last publish whether the counter went back, or stood still, before the break
        point: the pages show the line all the same.
        """
        cdef bint at_last_break = again
        cdef uint64_t break_tsc, moved_ticks = 0, moved_ns = 0
        cdef pvclock_anchor standing
        if line is not self._line_read:  # a refresh comes with the same one again
            self._line = as_line(line)
            self._line_read = line if type(line) is ClockLine else None  # which cannot change
        if moved is not _NOT_MOVED:
            ticks, ns = moved
            moved_ticks, moved_ns = as_u64(ticks, "ticks"), as_u64(ns, "ns")
        if start is not None:
            standing = as_standing(start, self._standing_ns)
        self._prepare(scale, as_flags(flags), out_of_guest)
        self._move(moved_ticks, moved_ns)
        if start is not None and self._stands:
            self._anchor = standing
            self.reference.resume(standing.tsc_timestamp, standing.system_time - self._standing_ns, start[2])
        self._sets[REFERENCE].count = self.reference.prepare(scale, self._wanted[0].tsc_offset, in_step)
        if step:
            self._anchor.scale.mul = 0
            self.reference.begin_anew()
        break_tsc = self.break_tsc
        if self._changed:  # readers must not see a page with the offset of another: they need the GIL, so keep it
            self.counter_went_back = publish_pages(self, &break_tsc, at_last_break)
        else:
            self.memory.pin()
            with nogil:
                self.counter_went_back = publish_pages(self, &break_tsc, at_last_break)
            self.memory.unpin()
        self.break_tsc, self._stands = break_tsc, False
        self._show()
        self.reference.note_published(self._sets[REFERENCE].is_due)
        if self._own.count or self.memory._on_dirty is not None:
            self.mark_dirty()
        return break_tsc

    cdef int _prepare(self, ClockScale scale, uint8_t flags, out_of_guest) except -1:
        """Have all in C that a publish takes.  From wait_for_slots() to its end no Python code runs."""
        cdef int i
        for i in range(self.vcpus):
            self._wanted[i].out_of_guest = False
        for vcpu in out_of_guest:
            self._wanted[self._vcpu(vcpu)].out_of_guest = True
        if scale is not self._params_scale:
            self._params, self._params_scale = pvclock_anchor_params_of(scale.c), scale
        self.memory.wait_for_slots()
        if self._generation != self.memory.generation:
            self._look_up()
        for i in range(self._count):
            self._targets[i].flags = flags
            self._targets[i].in_guest = not self._wanted[self._target_vcpu[i]].out_of_guest
        self._own.set_flags(flags)
        return 0

    cdef void _show(self) noexcept:
        """Let readers have what was published."""
        cdef int i, vcpu
        cdef Shown *shown
        if self._changed:
            for vcpu in range(self.vcpus):
                self._shown[vcpu].published = False
        for i in range(self._count):
            shown = &self._shown[self._target_vcpu[i]]
            shown.flagged = shown.flagged or not self._targets[i].in_guest
            if self._changed:
                shown.page = self._targets[i].page
                shown.gpa = self._wanted[self._target_vcpu[i]].gpa
                shown.tsc_offset = self._targets[i].tsc_offset
                shown.published = True
        if self._own.count:
            self._show_own()
        self._changed = False

    cdef void _show_own(self) noexcept:
        """Let readers have the pages with lines of their own that were written, now or before."""
        cdef int i
        cdef Shown *shown
        cdef Wanted *wanted
        self._own.note_written()
        for i in range(self._own.count):
            if not self._own.pages[i].is_due:
                wanted, shown = &self._wanted[self._own.vcpus[i]], &self._shown[self._own.vcpus[i]]
                shown.page, shown.gpa, shown.tsc_offset = self._own.pages[i].page, wanted.gpa, wanted.tsc_offset
                shown.published = True

    def write_own_pages(self, flags: int) -> int:
        """Write the due pages with lines of their own, while no vCPU is in the guest; returns the host TSC now.

        flags: as publish().  The other pages, and the line published last, stay as they are.
        """
        cdef uint8_t beside = as_flags(flags)
        self.memory.wait_for_slots()
        if self._generation != self.memory.generation:
            self._look_up()
        self._own.set_flags(beside)
        pvclock_own_pages_write_now(self._own.pages, self._own.count)
        self._show_own()
        self._own.mark_dirty()
        return pvclock_counter_read(&self.counter.c)

    @property
    def was_published(self) -> bool:
        """Was any line published yet?"""
        return self._anchor.scale.mul != 0

    def move(self, ticks: int, ns: int) -> None:
        """Put the line published last `ticks` later and `ns` ahead: what the next publish goes on from.

        For a declared step: a pause that is left out moves the line by its length, a jump by its height; a host TSC
        that counts anew moves all instants, that at which time stands still, too.
        """
        self._move(as_u64(ticks, "ticks"), as_u64(ns, "ns"))

    cdef void _move(self, uint64_t ticks, uint64_t ns) noexcept:
        pvclock_anchor_move(&self._anchor, ticks, ns)
        self.reference.move(ticks, ns)
        self.break_tsc += ticks
        self._standing_tsc += ticks
        self._standing_ns += ns
        if self._stands:
            self.reference.stop(self._standing_tsc, self._standing_ns)

    def stand_still(self, host_tsc: int, ns: int) -> None:
        """Have readers in this process find `ns`, and the TSC of `host_tsc`, until the next publish."""
        self._standing_tsc, self._standing_ns = as_u64(host_tsc, "host_tsc"), as_u64(ns, "ns")
        self.reference.stand_still(self._standing_ns)
        self._stands = True

    def stop(self) -> int:
        """Have readers in this process find what they would find now, until the next publish; returns the host TSC now.

        Before the first publish there is nothing to find: stand_still() says what a page shows that comes meanwhile.
        """
        cdef uint64_t tsc = pvclock_counter_read(&self.counter.c)
        if self._anchor.scale.mul:
            self._standing_ns = pvclock_anchor_read(&self._anchor, tsc)
            self.reference.stop(tsc, self._standing_ns)
        self._standing_tsc, self._stands = tsc, True
        return tsc

    cpdef mark_dirty(self):
        """Tell the memory's on_dirty of all pages, but those with a line of their own when they are written only.

        The first error that it raises comes out when all are told.
        """
        cdef int i
        self.memory.defer()
        try:
            for i in range(self._count):
                self.memory.mark_dirty(self._wanted[self._target_vcpu[i]].gpa, TIME_INFO_BYTES)
            self._own.mark_dirty()
            self.reference.mark_dirty()
        finally:
            self.memory.tell()

    cdef int _read(self, object vcpu, pvclock_reading *ret) except -1:
        cdef int index = self._vcpu(vcpu)
        cdef Shown *shown = &self._shown[index]
        cdef int doublings = 0
        cdef unsigned int tries
        cdef uint64_t began_ns = 0
        while began_ns == 0 or monotonic_ns() - began_ns < READ_LIMIT_NS or doublings < READ_DOUBLINGS:
            if self._stands:  # asked in each round: time may have been stopped while the GIL was away
                self._read_standing(index, ret)
                if ret.version & 1:
                    raise no_page(vcpu)
                return 0
            if self._generation != self.memory.generation:
                self._look_up()
            if not shown.published or shown.page is NULL:
                raise no_page(vcpu)
            tries = READ_TRIES << doublings
            if pvclock_read(shown.page, shown.tsc_offset, &self.counter.c, tries, ret) == 0:
                return 0
            began_ns = began_ns or monotonic_ns()
            doublings = min(doublings + 1, READ_DOUBLINGS)
            with nogil:
                sched_yield()  # the writer may need this CPU, and other threads the GIL
        raise StateError("read", f"the page of vCPU {vcpu} is always odd or changing",
                         "publish it anew, the guest has spoilt it")

    cdef void _read_standing(self, int vcpu, pvclock_reading *ret) noexcept:
        """What vCPU's guest had when time was stopped; an odd version if it has no page."""
        cdef Wanted *wanted = &self._wanted[vcpu]
        cdef uint8_t *page = self.memory.find(wanted.gpa, TIME_INFO_BYTES) if wanted.registered else NULL
        ret.tsc, ret.ns, ret.version, ret.flags = self._standing_tsc + wanted.tsc_offset, self._standing_ns, 1, 0
        if page is not NULL:
            ret.version = (<pvclock_vcpu_time_info *>page).version & <uint32_t>0xFFFFFFFE
            ret.flags = (<pvclock_vcpu_time_info *>page).flags
        if self._own.has(vcpu):
            ret.ns = self._own.ns_at(vcpu, ret.tsc)

    def read(self, vcpu: int) -> int:
        """GuestNs: what vCPU's guest would compute at this instant; StateError before it registered a page."""
        cdef pvclock_reading reading
        self._read(vcpu, &reading)
        return reading.ns

    def reading(self, vcpu: int) -> Reading:
        """As `read`, with the guest TSC, the version and the flags that belong to it."""
        cdef pvclock_reading reading
        self._read(vcpu, &reading)
        return Reading(reading.tsc, reading.ns, reading.version, reading.flags)

    def shown_at(self, host_tsc: int) -> int:
        """ns that a guest computes from the line published last at `host_tsc`; StateError before the first publish."""
        if self._anchor.scale.mul == 0:
            raise StateError("shown_at", "nothing was published yet", "publish first")
        return pvclock_anchor_read(&self._anchor, as_u64(host_tsc, "host_tsc"))


cdef timespec MOMENT = timespec(0, 10_000)  # a window is some microseconds long


cdef uint64_t monotonic_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef no_page(vcpu):
    return StateError("read", f"vCPU {vcpu} has no page in guest memory", "its guest registers one by MSR first")


cdef bint publish_pages(TimePages pages, uint64_t *break_tsc, bint again) noexcept nogil:
    return pvclock_publish_at(
        pages._sets, KINDS, &pages._line, &pages._params, &pages.counter.c, &pages._anchor, break_tsc, again
    ) != 0


cdef pvclock_anchor as_standing(start, uint64_t standing_ns) except *:
    """The line at which stopped time resumes: see TimePages.publish()."""
    cdef pvclock_anchor standing
    tsc, gain_ns, scale = start
    standing.tsc_timestamp, standing.system_time = as_u64(tsc, "start"), standing_ns + as_u64(gain_ns, "start")
    standing.scale = (<ClockScale?>scale).c
    return standing


cdef pvclock_line as_line(line) except *:
    tsc, ns, rem, num, den = line
    cdef pvclock_line timeline = pvclock_line(
        as_u64(tsc, "tsc"), as_u64(ns, "ns"), as_u64(rem, "rem"), as_u64(num, "num"), as_u64(den, "den")
    )
    if timeline.rem >= timeline.den:
        raise RangeError(f"a line with the remainder {rem}/{den} ns; it must be below 1")
    return timeline


cdef uint8_t as_flags(flags) except? 0:
    cdef int overflow
    cdef long bits = PyLong_AsLongAndOverflow(as_whole(flags, "flags"), &overflow)
    if overflow or not 0 <= bits < 256:
        raise RangeError(f"flags are {shortened(flags)}; a page has 8 of them")
    return <uint8_t>bits


cdef pvclock_own_page as_own_page(own) except *:
    tsc, ns, scale, version, flags = own
    cdef pvclock_own_page page
    cdef uint64_t count = as_u64(version, "version")
    if count >> 32 or count & 1:
        raise RangeError(f"a page's version is {count:#x}; it is even and has 32 bits")
    page.page = NULL
    page.line.tsc_timestamp, page.line.system_time = as_u64(tsc, "tsc"), as_u64(ns, "ns")
    page.line.scale = (<ClockScale?>scale).c
    page.version, page.flags, page.is_due = <uint32_t>count, as_flags(flags), 1
    return page
