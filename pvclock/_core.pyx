"""Guest memory, pvclock pages and the arithmetic between them: the compiled heart of pvclock.

Raw pointers live in this module and in the C headers it wraps, nowhere else above them.  It holds no policy: what a
clock shall show is handed in as a ClockLine, and where ticks come from as a Counter.
"""

cimport cython
from cpython.long cimport PyLong_AsLongAndOverflow
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<sched.h>" nogil:
    int sched_yield()

from pvclock._abi cimport PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE_BIT, pvclock_vcpu_time_info
from pvclock._counter cimport Counter
from pvclock._math cimport (
    pvclock_guest_tsc, pvclock_line, pvclock_line_at, pvclock_line_turn, pvclock_scale, pvclock_scale_delta,
    pvclock_time_scale, pvclock_time_scale_of_rate, pvclock_tsc_ratio, pvclock_unscale_delta
)
from pvclock._memory cimport GuestMemory, as_u64, as_whole, shortened
from pvclock._publish cimport (
    pvclock_anchor, pvclock_anchor_move, pvclock_anchor_read, pvclock_counter_read, pvclock_publish, pvclock_publish_at,
    pvclock_publish_wall_clock, pvclock_rate, pvclock_rate_of, pvclock_read, pvclock_reading, pvclock_target
)

from pvclock.errors import ConfigError, RangeError, StateError, WrongType
from pvclock.quantities import NS_PER_S as _NS_PER_S
from pvclock.readings import Churn, ClockLine, Reading, TimeInfo

TSC_STABLE_BIT = PVCLOCK_TSC_STABLE_BIT
GUEST_STOPPED = PVCLOCK_GUEST_STOPPED

cdef uint64_t TIME_INFO_BYTES = sizeof(pvclock_vcpu_time_info)
cdef uint64_t WALL_CLOCK_BYTES = 12

# How often a page is tried before other threads get the GIL, doubled with each round up to a limit, for a page that is
# published all the time; and how long: more than an update of a writer that has to wait for its CPU takes, and short
# enough not to hang on a page that its guest has spoilt.
cdef unsigned int READ_TRIES = 256
cdef int READ_DOUBLINGS = 6
cdef uint64_t READ_LIMIT_NS = 500_000_000


# Arithmetic


def time_scale(scaled_hz: int, base_hz: int) -> tuple[int, int]:
    """(mul, shift) that turns `base_hz` ticks into `scaled_hz` ticks, as Linux's kvm_get_time_scale() does.

    Both in [1, 2^64), scaled_hz below 2^63; else RangeError (Linux would not end).
    """
    cdef pvclock_scale scale
    if pvclock_time_scale(as_u64(scaled_hz, "scaled_hz"), as_u64(base_hz, "base_hz"), &scale) != 0:
        raise RangeError(f"no (mul, shift) from {base_hz} Hz to {scaled_hz} Hz: both must be at least 1, "
                         "the second below 2^63")
    return scale.mul, scale.shift


def tsc_ratio(guest_khz: int, host_khz: int, frac_bits: int = 48) -> int:
    """Hardware TSC ratio floor(2^frac_bits * guest_khz / host_khz): 48 fraction bits on VMX, 32 on SVM.

    RangeError if a frequency is not in [1, 2^32) kHz or the ratio does not fit the hardware's field.
    """
    cdef uint64_t ratio
    frac_bits = as_whole(frac_bits, "frac_bits")
    if frac_bits not in (32, 48):
        raise ConfigError(f"TSC ratio with {shortened(frac_bits)} fraction bits; hardware has 48 (VMX) or 32 (SVM)")
    guest_khz, host_khz = as_whole(guest_khz, "guest_khz"), as_whole(host_khz, "host_khz")
    if not (0 < guest_khz < 1 << 32 and 0 < host_khz < 1 << 32):
        raise RangeError(f"TSC ratio {shortened(guest_khz)}/{shortened(host_khz)} kHz: each must be in [1, 2^32)")
    if pvclock_tsc_ratio(guest_khz, host_khz, frac_bits, &ratio) != 0:
        raise RangeError(f"TSC ratio {guest_khz}/{host_khz} does not fit the hardware's field")
    return ratio


def guest_tsc(host_tsc: int, offset: int = 0, ratio: int = 1 << 48, frac_bits: int = 48) -> int:
    """What RDTSC returns in the guest, in ticks: ((host_tsc * ratio) >> frac_bits) + offset, modulo 2^64."""
    frac_bits = as_whole(frac_bits, "frac_bits")
    if not 0 <= frac_bits < 128:
        raise RangeError(f"a TSC ratio with {shortened(frac_bits)} fraction bits; a 128-bit product has 0 to 127")
    return pvclock_guest_tsc(as_u64(host_tsc, "host_tsc"), as_u64(ratio, "ratio"), frac_bits, as_u64(offset, "offset"))


@cython.final
cdef class ClockScale:
    """A pair (mul, shift) that turns TSC ticks into ns as a pvclock guest does: ((ticks << shift) * mul) >> 32.

    mul: 1 to 2^32 - 1.  shift: -63 to 31, negative is a right shift.  hz: the frequency that it was made for, or the
    one that it expresses, rounded.  Immutable, hashable, comparable by (mul, shift).
    """

    cdef pvclock_scale c
    cdef readonly object hz

    def __cinit__(self, mul: int, shift: int, hz: int | None = None) -> None:
        mul, shift = as_whole(mul, "mul"), as_whole(shift, "shift")
        if not (0 < mul < 1 << 32 and -64 < shift < 32):
            raise RangeError(f"(mul, shift) = ({shortened(mul)}, {shortened(shift)}); mul must be in [1, 2^32), "
                             "shift in [-63, 31]")
        self.c.mul, self.c.shift = mul, shift
        denominator = mul << (shift + 63)
        if hz is not None and as_whole(hz, "hz") < 1:
            raise RangeError(f"TSC frequency is {shortened(hz)} Hz; it must be at least 1 Hz")
        self.hz = hz if hz is not None else ((_NS_PER_S << 95) + denominator // 2) // denominator

    @staticmethod
    def from_hz(hz: int, *, rounding: str = "floor") -> ClockScale:
        """The scale of a TSC of `hz` (1 to 2^64 - 1), else RangeError.

        rounding "floor" is Linux's kvm_get_time_scale() to the bit; "nearest" is the closest pair there is.
        """
        cdef pvclock_scale scale
        cdef uint64_t frequency = as_u64(hz, "hz")
        if rounding == "floor":
            failed = pvclock_time_scale(_NS_PER_S, frequency, &scale)
        elif rounding == "nearest":
            failed = pvclock_time_scale_of_rate(_NS_PER_S, frequency, True, &scale)
        elif not isinstance(rounding, str):
            raise WrongType("rounding", rounding, '"floor" or "nearest"')
        else:
            raise ConfigError(f'rounding {rounding!r} is unknown; use "floor" (as Linux) or "nearest"')
        if failed:
            raise RangeError("TSC frequency is 0 Hz; give the frequency of the guest's TSC, at least 1 Hz")
        return ClockScale(scale.mul, scale.shift, hz)

    @staticmethod
    def from_khz(khz: int, *, rounding: str = "floor") -> ClockScale:
        """The scale of a TSC of `khz` kHz, the unit of KVM_GET_TSC_KHZ."""
        return ClockScale.from_hz(as_whole(khz, "khz") * 1000, rounding=rounding)

    @staticmethod
    def from_rate(num: int, den: int) -> ClockScale:
        """The pair for num/den ns a tick, each in [1, 2^64), rounded down: never fast, at most 0.466 ppb slow.

        For every frequency of whole kHz below 16 GHz it is that of from_hz().  RangeError if there is none.
        """
        cdef pvclock_scale scale
        if pvclock_time_scale_of_rate(as_u64(num, "num"), as_u64(den, "den"), False, &scale) != 0:
            raise RangeError(f"no (mul, shift) shows {num}/{den} ns a tick")
        return ClockScale(scale.mul, scale.shift)

    @property
    def mul(self) -> int:
        """tsc_to_system_mul of the page."""
        return self.c.mul

    @property
    def shift(self) -> int:
        """tsc_shift of the page."""
        return self.c.shift

    @property
    def rate_error_ppb(self) -> float:
        """How much faster than true time the pair runs at `hz`, in parts per 10^9."""
        exact = _NS_PER_S << 95
        shown = self.hz * self.c.mul << (self.c.shift + 63)
        return (shown - exact) * _NS_PER_S / exact

    def to_ns(self, ticks: int) -> int:
        """ns that a guest makes of `ticks`; both modulo 2^64, and a left shift loses high bits as it does there."""
        return pvclock_scale_delta(as_u64(ticks, "ticks"), self.c)

    def to_ticks(self, ns: int) -> int:
        """The fewest ticks that show at least `ns`; RangeError if no number of ticks below 2^64 does."""
        cdef uint64_t ticks
        if pvclock_unscale_delta(as_u64(ns, "ns"), self.c, &ticks) != 0:
            raise RangeError(f"{ns} ns are more ticks than mul {self.c.mul:#x}, shift {self.c.shift} can carry")
        return ticks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClockScale):
            return NotImplemented
        return (self.mul, self.shift) == (other.mul, other.shift)

    def __hash__(self) -> int:
        return hash((self.c.mul, self.c.shift))

    def __repr__(self) -> str:
        return f"ClockScale(mul={self.c.mul:#x}, shift={self.c.shift}, hz={self.hz})"


# Records in guest memory


def read_time_info(GuestMemory memory not None, gpa: int) -> TimeInfo:
    """The pvclock page at `gpa` as it lies there, whether or not an update is going on."""
    cdef pvclock_vcpu_time_info info
    memcpy(&info, memory.at(gpa, TIME_INFO_BYTES), TIME_INFO_BYTES)
    return TimeInfo(
        info.version, info.tsc_timestamp, info.system_time, info.tsc_to_system_mul, info.tsc_shift, info.flags
    )


def publish_wall_clock(GuestMemory memory not None, gpa: int, epoch_ns: int) -> bool:
    """Write the wall-clock record at `gpa`: the UTC instant `epoch_ns` (ns since 1970) at which system time was 0.

    Returns False, with nothing written, where the record is not in guest memory, which Linux ignores as well.
    Seconds are 32 bits in the ABI and wrap in 2106.
    """
    cdef uint64_t where = as_u64(gpa, "gpa")
    sec, nsec = divmod(as_whole(epoch_ns, "epoch_ns"), _NS_PER_S)
    cdef uint32_t sec_bits = sec & 0xFFFFFFFF
    cdef uint32_t nsec_bits = nsec
    cdef uint8_t *record = memory.find(where, WALL_CLOCK_BYTES)
    if record is NULL:
        return False
    pvclock_publish_wall_clock(record, sec_bits, nsec_bits)
    memory.mark_dirty(where, WALL_CLOCK_BYTES)
    return True


# Pages


cdef struct Wanted:
    # What a vCPU's guest and VMM have asked for.
    uint64_t gpa
    uint64_t tsc_offset
    bint registered
    bint out_of_guest  # in the publish at hand


cdef struct Shown:
    # What readers may use of a vCPU's page: set when a publish that wrote it has ended.
    void *page
    uint64_t gpa
    uint64_t tsc_offset
    bint published
    bint flagged  # flags and pads were written, too, since the page is where it is


@cython.final
@cython.no_gc_clear  # its memory is what tells it that its pointers are stale
cdef class TimePages:
    """The pvclock pages of one VM, one for each vCPU, and the line that they show.

    A page that is registered but not in guest memory is left out of a publish, and comes in as soon as a slot covers
    it (as in Linux).

    Thread-safety: one thread at a time may call the methods that register or publish; `read` and `reading` may be
    called from any thread at any time.
    """

    cdef readonly GuestMemory memory  # keeps the buffers behind the targets' pointers
    cdef readonly Counter counter
    cdef readonly int vcpus
    cdef readonly bint counter_went_back  # during the last publish, or stood still: the pages are even all the same
    cdef readonly uint64_t break_tsc  # of the last publish, moved as its line was; at first, when this was made
    cdef bint _stands  # does time stand still, at _standing_ns since _standing_tsc?
    cdef uint64_t _standing_tsc, _standing_ns
    cdef Wanted *_wanted  # by vCPU
    cdef Shown *_shown  # by vCPU
    cdef pvclock_target *_targets  # compact: only pages that can be written
    cdef int *_target_vcpu  # by target
    cdef int _count
    cdef bint _changed  # a page or an offset, since the last publish
    cdef uint64_t _generation  # of the memory that all pointers were looked up in
    cdef uint64_t _flagged_generation  # of the memory whose pages may be flagged
    cdef pvclock_anchor _anchor
    cdef pvclock_rate _rate
    cdef ClockScale _rate_scale  # that _rate was made from

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

    def register(self, vcpu: int, gpa: int | None) -> None:
        """Put vCPU's page at `gpa`, or (None) take it away; guests and readers find it from the next publish on."""
        cdef int index = self._vcpu(vcpu)
        cdef uint64_t where = 0 if gpa is None else as_u64(gpa, "gpa")
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
        self._count = 0
        self._changed = True
        for vcpu in range(self.vcpus):
            wanted = &self._wanted[vcpu]
            page = self.memory.find(wanted.gpa, TIME_INFO_BYTES) if wanted.registered else NULL
            if page is NULL or is_other_memory:
                self._shown[vcpu].flagged = False
            if page is not NULL:
                self._targets[self._count] = pvclock_target(page, wanted.tsc_offset, 0, 1)
                self._target_vcpu[self._count] = vcpu
                self._count += 1
            if self._shown[vcpu].published:
                self._shown[vcpu].page = self.memory.find(self._shown[vcpu].gpa, TIME_INFO_BYTES)
        self._generation = self._flagged_generation = self.memory.generation

    def lacks_flags(self, vcpu: int | None) -> bool:
        """Is there a page in guest memory, but `vcpu`'s, whose flags were never written where it is?"""
        cdef int i
        if self._generation != self.memory.generation:
            self._look_up()
        for i in range(self._count):
            if not self._shown[self._target_vcpu[i]].flagged and self._target_vcpu[i] != vcpu:
                return True
        return False

    def publish(
        self,
        line,
        ClockScale scale not None,
        *,
        flags=0,
        out_of_guest=(),
        step=False,
        moved=(0, 0),
        going_on=None,
        again=False,
    ) -> int:
        """Publish `line` at `scale` into all registered pages at once; returns the break point (host TSC).

        The clock goes on at the break by 0 or +1 ns, unless `step` says that it may jump to the line.  moved: see
        move(), which comes first.  `flags` go to the vCPUs in `out_of_guest` (vCPU numbers) only: a running guest
        writes that byte itself.  The memory's on_dirty is told of all pages.

        going_on: (host TSC, ns, scale) at which time that stood still goes on: from there to the break the line
        published last is the reading that stood, `ns` ahead, at `scale`; its own rate may be another.

        again: on a CPU whose counter is behind the last break point, which stays; for the line published last.

        counter_went_back says of the last publish whether the counter went back, or stood still, before the break
        point: the pages show the line all the same.
        """
        cdef pvclock_line timeline = as_line(line)
        cdef bint may_step = step
        cdef bint at_last_break = again
        cdef uint64_t break_tsc
        ticks, ns = moved
        cdef uint64_t moved_ticks = as_u64(ticks, "ticks")
        cdef uint64_t moved_ns = as_u64(ns, "ns")
        cdef pvclock_anchor standing
        if going_on is not None:
            resumed_tsc, gain_ns, standing_scale = going_on
            standing.tsc_timestamp = as_u64(resumed_tsc, "going_on")
            standing.system_time = self._standing_ns + as_u64(gain_ns, "going_on")
            standing.scale = (<ClockScale?>standing_scale).c
        self._prepare(scale, as_flags(flags), out_of_guest)
        self._move(moved_ticks, moved_ns)
        if going_on is not None and self._stands and self._anchor.scale.mul:
            self._anchor = standing
        if may_step:
            self._anchor.scale.mul = 0
        break_tsc = self.break_tsc
        if self._changed:  # readers must not see a page with the offset of another: they need the GIL, so keep it
            self.counter_went_back = self._publish(&timeline, &break_tsc, at_last_break)
        else:
            self.memory.pin()
            with nogil:
                self.counter_went_back = self._publish(&timeline, &break_tsc, at_last_break)
            self.memory.unpin()
        self.break_tsc, self._stands = break_tsc, False
        self._show()
        self.mark_dirty()
        return break_tsc

    cdef bint _publish(self, pvclock_line *timeline, uint64_t *break_tsc, bint again) noexcept nogil:
        return pvclock_publish_at(
            self._targets, self._count, timeline, &self._rate, &self.counter.c, &self._anchor, break_tsc, again
        ) != 0

    cdef int _prepare(self, ClockScale scale, uint8_t flags, out_of_guest) except -1:
        """Have all in C that a publish takes.  From wait_for_slots() to its end no Python code runs."""
        cdef int i
        for i in range(self.vcpus):
            self._wanted[i].out_of_guest = False
        for vcpu in out_of_guest:
            self._wanted[self._vcpu(vcpu)].out_of_guest = True
        if scale is not self._rate_scale:
            self._rate, self._rate_scale = pvclock_rate_of(scale.c), scale
        self.memory.wait_for_slots()
        if self._generation != self.memory.generation:
            self._look_up()
        for i in range(self._count):
            self._targets[i].flags = flags
            self._targets[i].in_guest = not self._wanted[self._target_vcpu[i]].out_of_guest
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
        self._changed = False

    @property
    def was_published(self) -> bool:
        """Was any line published yet?"""
        return self._anchor.scale.mul != 0

    def move(self, ticks: int, ns: int) -> None:
        """Put the line published last `ticks` later and `ns` ahead: what the next publish goes on from.

        For a declared step: a pause that is left out moves the line by its length, a jump by its height; a host TSC
        that counts anew moves all instants, that at which time stands still, too.
        """
        cdef uint64_t moved_ticks = as_u64(ticks, "ticks")
        cdef uint64_t moved_ns = as_u64(ns, "ns")
        self._move(moved_ticks, moved_ns)

    cdef void _move(self, uint64_t ticks, uint64_t ns) noexcept:
        pvclock_anchor_move(&self._anchor, ticks, ns)
        self.break_tsc += ticks
        self._standing_tsc += ticks
        self._standing_ns += ns

    def stand_still(self, host_tsc: int, ns: int) -> None:
        """Have readers in this process find `ns`, and the TSC of `host_tsc`, until the next publish."""
        cdef uint64_t standing_tsc = as_u64(host_tsc, "host_tsc")
        cdef uint64_t standing_ns = as_u64(ns, "ns")
        self._standing_tsc, self._standing_ns, self._stands = standing_tsc, standing_ns, True

    def stop(self) -> int:
        """Have readers in this process find what they would find now, until the next publish; returns the host TSC now.

        Before the first publish there is nothing to find: stand_still() says what a page shows that comes meanwhile.
        """
        cdef uint64_t tsc = pvclock_counter_read(&self.counter.c)
        if self._anchor.scale.mul:
            self._standing_ns = pvclock_anchor_read(&self._anchor, tsc)
        self._standing_tsc, self._stands = tsc, True
        return tsc

    def mark_dirty(self) -> None:
        """Tell the memory's on_dirty of all pages; the first error that it raises comes out when all are told."""
        cdef int i
        if self.memory._on_dirty is None:
            return
        self.memory.defer()
        try:
            for i in range(self._count):
                self.memory.mark_dirty(self._wanted[self._target_vcpu[i]].gpa, TIME_INFO_BYTES)
        finally:
            self.memory.tell()

    def churn(self, line, rates, publishes: int, max_ticks: int = 2**63 - 1) -> tuple[ClockLine, Churn]:
        """Publish over and over in one call without the GIL, taking the rates in turn; the clock never steps.

        rates: (num, den, scale) with num/den ns a tick.  Ends after `publishes`, or after `max_ticks` of the counter,
        or when the counter goes back (counter_went_back), but not before the first.  Returns the line at the last break
        point, at the last rate, and what was seen.
        """
        cdef pvclock_line timeline = as_line(line)
        cdef Churner churner
        cdef uint64_t limit = as_u64(max_ticks, "max_ticks")
        cdef uint64_t most = as_u64(publishes, "publishes")
        turns = tuple(rates)
        if not turns or most < 1:
            raise ConfigError("churn: give at least one rate and one publish")
        churner = Churner(turns)
        self._prepare(<ClockScale?>turns[0][2], 0, ())
        if self._changed:
            raise StateError("churn", "a page, an offset or the memory was changed", "publish first")
        self.memory.pin()
        with nogil:
            self.counter_went_back = churner.run(self, &timeline, most, limit)
        self.memory.unpin()
        self._rate_scale = None
        return ClockLine(timeline.tsc, timeline.ns, timeline.rem, timeline.num, timeline.den), churner.report()

    cdef int _read(self, object vcpu, pvclock_reading *ret) except -1:
        cdef int index = self._vcpu(vcpu)
        cdef Shown *shown = &self._shown[index]
        cdef int doublings = 0
        cdef unsigned int tries
        cdef uint64_t began_ns = 0
        while began_ns == 0 or monotonic_ns() - began_ns < READ_LIMIT_NS or doublings < READ_DOUBLINGS:
            if self._stands:  # asked in each round: time may have been stopped while the GIL was away
                self._read_standing(&self._wanted[index], ret)
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

    cdef void _read_standing(self, Wanted *wanted, pvclock_reading *ret) noexcept:
        """What vCPU's guest had when time was stopped; an odd version if it has no page."""
        cdef uint8_t *page = self.memory.find(wanted.gpa, TIME_INFO_BYTES) if wanted.registered else NULL
        ret.tsc, ret.ns, ret.version, ret.flags = self._standing_tsc + wanted.tsc_offset, self._standing_ns, 1, 0
        if page is not NULL:
            ret.version = (<pvclock_vcpu_time_info *>page).version & <uint32_t>0xFFFFFFFE
            ret.flags = (<pvclock_vcpu_time_info *>page).flags

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


cdef uint64_t monotonic_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef no_page(vcpu):
    return StateError("read", f"vCPU {vcpu} has no page in guest memory", "its guest registers one by MSR first")


cdef pvclock_line as_line(line) except *:
    tsc, ns, rem, num, den = line
    cdef pvclock_line timeline = pvclock_line(
        as_u64(tsc, "tsc"), as_u64(ns, "ns"), as_u64(rem, "rem"), as_u64(num, "num"), as_u64(den, "den")
    )
    if timeline.rem >= timeline.den:
        raise RangeError(f"a line with the remainder {rem}/{den} ns; it must be below 1")
    return timeline


cdef uint8_t as_flags(flags) except? 0:
    if not 0 <= as_whole(flags, "flags") < 256:
        raise RangeError(f"flags are {shortened(flags)}; a page has 8 of them")
    return flags


@cython.final
@cython.internal
cdef class Churner:
    """The loop behind TimePages.churn and its tally."""

    cdef pvclock_rate *_rates
    cdef uint64_t *_nums
    cdef uint64_t *_dens
    cdef size_t _count
    cdef uint64_t _publishes
    cdef int64_t _least_step, _most_step, _most_behind, _most_ahead

    def __cinit__(self, rates: tuple) -> None:
        self._count = len(rates)
        self._rates = <pvclock_rate *>calloc(self._count, sizeof(pvclock_rate))
        self._nums = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        self._dens = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        if not (self._rates and self._nums and self._dens):
            raise MemoryError
        for i, (num, den, scale) in enumerate(rates):
            self._rates[i] = pvclock_rate_of((<ClockScale?>scale).c)
            self._nums[i], self._dens[i] = as_u64(num, "num"), as_u64(den, "den")
            if num < 1 or den < 1:
                raise RangeError(f"a rate of {num}/{den} ns a tick; both must be at least 1")
        self._least_step, self._most_step = INT64_MAX, INT64_MIN
        self._most_behind, self._most_ahead = INT64_MIN, INT64_MIN

    def __dealloc__(self) -> None:
        free(self._rates)
        free(self._nums)
        free(self._dens)

    cdef bint run(self, TimePages pages, pvclock_line *timeline, uint64_t publishes, uint64_t max_ticks) noexcept nogil:
        """Returns whether the counter went back, which ends it."""
        cdef uint64_t begin = pvclock_counter_read(&pages.counter.c)
        cdef uint64_t last_tsc, break_tsc = begin
        cdef pvclock_anchor old
        cdef bint went_back = False
        cdef size_t turn = 0
        while self._publishes == 0 or (
            self._publishes < publishes and break_tsc - begin < max_ticks and not went_back
        ):
            old, last_tsc = pages._anchor, break_tsc
            went_back = pvclock_publish(
                pages._targets, pages._count, timeline, &self._rates[turn], &pages.counter.c, &pages._anchor, &break_tsc
            ) != 0 or <int64_t>(break_tsc - last_tsc) < 0
            timeline[0] = pvclock_line_at(timeline[0], break_tsc)
            self._tally(&old, &pages._anchor, timeline)
            timeline[0] = pvclock_line_turn(timeline[0], self._nums[turn], self._dens[turn])
            turn = turn + 1 if turn + 1 < self._count else 0
        pages.break_tsc = break_tsc
        return went_back

    cdef void _tally(self, pvclock_anchor *old, pvclock_anchor *new, pvclock_line *timeline) noexcept nogil:
        cdef uint64_t shown = pvclock_anchor_read(new, timeline.tsc)
        cdef int64_t behind = <int64_t>(timeline.ns - shown)
        cdef int64_t step = <int64_t>(shown - pvclock_anchor_read(old, timeline.tsc))
        self._publishes += 1
        if old.scale.mul != 0:
            self._least_step = min(self._least_step, step)
            self._most_step = max(self._most_step, step)
        self._most_behind = max(self._most_behind, behind)
        self._most_ahead = max(self._most_ahead, -behind)

    cdef report(self):
        return Churn(self._publishes, self._least_step, self._most_step, self._most_behind, self._most_ahead)
