"""Records shared with the guest besides the time pages: wall clock, steal time, EOI byte, message slots and others.

Each function accesses one record of a vCPU that may be running.  If the record is not in guest memory it does nothing,
like Linux, and those that return a result report it.  RangeError if an address or a value does not fit its type.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pvclock._abi cimport (
    PVCLOCK_PAGE_NOT_PRESENT, PVCLOCK_PAGE_READY, PVCLOCK_VCPU_FLUSH_TLB, PVCLOCK_VCPU_PREEMPTED, pvclock_async_pf,
    pvclock_clock_pairing, pvclock_steal_time, pvclock_wall_clock
)
from pvclock._hyperv cimport HYPERV_MESSAGE_BYTES, hyperv_message_header, hyperv_message_post
from pvclock._memory cimport GuestMemory, as_u64, as_whole
from pvclock._publish cimport (
    pvclock_add_steal_time, pvclock_clear_preempted, pvclock_eoi_offer, pvclock_eoi_take, pvclock_load32,
    pvclock_publish_steal_time, pvclock_publish_wall_clock, pvclock_set_preempted, pvclock_store32
)

from pvclock.errors import RangeError

STEAL_TIME_BYTES = sizeof(pvclock_steal_time)
ASYNC_PF_BYTES = sizeof(pvclock_async_pf)
CLOCK_PAIRING_BYTES = sizeof(pvclock_clock_pairing)
VCPU_PREEMPTED = PVCLOCK_VCPU_PREEMPTED
VCPU_FLUSH_TLB = PVCLOCK_VCPU_FLUSH_TLB
PAGE_NOT_PRESENT = PVCLOCK_PAGE_NOT_PRESENT
PAGE_READY = PVCLOCK_PAGE_READY
MESSAGE_BYTES = HYPERV_MESSAGE_BYTES

cdef uint64_t NS_PER_S = 1_000_000_000


cdef uint8_t *byte_of(bytearray by_vcpu, object vcpu) except NULL:
    """Address of vCPU's byte, valid until Python code can run."""
    cdef Py_ssize_t index = as_whole(vcpu, "vCPU")
    if not 0 <= index < PyByteArray_GET_SIZE(by_vcpu):
        raise RangeError(f"vCPU {index}; there are {len(by_vcpu)}")
    return <uint8_t *>PyByteArray_AS_STRING(by_vcpu) + index


def publish_wall_clock(GuestMemory memory not None, gpa: int, epoch_ns: int) -> bool:
    """Write the wall-clock record at `gpa`: the UTC instant `epoch_ns` (ns since 1970) at which system time was 0.

    False, with nothing written, if the record is not in guest memory, which Linux ignores as well.
    Seconds are 32 bits in the ABI and wrap in 2106.
    """
    cdef uint64_t where = as_u64(gpa, "gpa")
    sec, nsec = divmod(as_whole(epoch_ns, "epoch_ns"), NS_PER_S)
    cdef uint32_t sec_bits = sec & 0xFFFFFFFF
    cdef uint32_t nsec_bits = nsec
    cdef uint8_t *record = memory.find(where, sizeof(pvclock_wall_clock))
    if record is NULL:
        return False
    pvclock_publish_wall_clock(record, sec_bits, nsec_bits)
    memory.mark_dirty(where, sizeof(pvclock_wall_clock))
    return True


def add_steal_time(GuestMemory memory not None, gpa: int, ns: int) -> None:
    """Add `ns` to the steal time at `gpa`, whether its vCPU runs or not; leaves the `preempted` byte alone."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint64_t stolen_ns = as_u64(ns, "steal time")
    cdef uint8_t *record = memory.find(where, sizeof(pvclock_steal_time))
    if record is not NULL:
        pvclock_add_steal_time(record, stolen_ns)
        memory.mark_dirty(where, sizeof(pvclock_steal_time))


def record_steal_time(GuestMemory memory not None, gpa: int, ns: int, bytearray said not None, vcpu: int) -> None:
    """Add `ns` to the steal time at `gpa` and clear `preempted` (the vCPU runs); OR the old byte into said[vcpu]."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint64_t stolen_ns = as_u64(ns, "steal time")
    cdef uint8_t *preempted = byte_of(said, vcpu)
    cdef uint8_t *record = memory.find(where, sizeof(pvclock_steal_time))
    if record is not NULL:
        preempted[0] |= pvclock_publish_steal_time(record, stolen_ns)
        memory.mark_dirty(where, sizeof(pvclock_steal_time))


def set_preempted(GuestMemory memory not None, gpa: int) -> None:
    """Set `preempted` in the steal time at `gpa`: its vCPU was scheduled out."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint8_t *record = memory.find(where, sizeof(pvclock_steal_time))
    if record is not NULL:
        pvclock_set_preempted(record)
        memory.mark_dirty(where, sizeof(pvclock_steal_time))


def clear_preempted(GuestMemory memory not None, gpa: int, bytearray said not None, vcpu: int) -> None:
    """Clear `preempted` in the steal time at `gpa`: its vCPU runs again.  ORs the old byte into said[vcpu]."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint8_t *preempted = byte_of(said, vcpu)
    cdef uint8_t *record = memory.find(where, sizeof(pvclock_steal_time))
    if record is not NULL:
        preempted[0] |= pvclock_clear_preempted(record)
        memory.mark_dirty(where, sizeof(pvclock_steal_time))


def offer_eoi(GuestMemory memory not None, gpa: int) -> bool:
    """Set bit 0 of the EOI byte at `gpa`; False if `gpa` is not in guest memory."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint8_t *flag = memory.find(where, 1)
    if flag is NULL:
        return False
    pvclock_eoi_offer(flag)
    memory.mark_dirty(where, 1)
    return True


def take_eoi(GuestMemory memory not None, gpa: int, bytearray ended not None, vcpu: int) -> None:
    """Clear bit 0 of the EOI byte at `gpa`; set ended[vcpu] to 1 if the guest had cleared it or it is not there."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint8_t *answer = byte_of(ended, vcpu)
    cdef uint8_t *flag = memory.find(where, 1)
    answer[0] = 1
    if flag is not NULL:
        answer[0] = pvclock_eoi_take(flag) != 0
        memory.mark_dirty(where, 1)


def load_word(GuestMemory memory not None, gpa: int) -> int | None:
    """The 32-bit word at `gpa`; None if `gpa` is not in guest memory."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint8_t *word = memory.find(where, 4)
    return None if word is NULL else pvclock_load32(word)


def store_word(GuestMemory memory not None, gpa: int, value: int) -> bool:
    """Store `value` in the 32-bit word at `gpa`; False if `gpa` is not in guest memory."""
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef uint64_t wide = as_u64(value, "value")
    if wide >> 32:
        raise RangeError(f"a word of {wide:#x}; it must fit in 32 bits, unsigned")
    cdef uint8_t *word = memory.find(where, 4)
    if word is NULL:
        return False
    pvclock_store32(word, <uint32_t>wide)
    memory.mark_dirty(where, 4)
    return True


def write_clock_pairing(GuestMemory memory not None, gpa: int, real_ns: int, guest_tsc: int) -> bool:
    """Write UTC (ns since 1970) and the guest TSC of the same instant at `gpa`; False if that is not guest memory."""
    cdef pvclock_clock_pairing pairing
    cdef uint64_t where = as_u64(gpa, "gpa")
    memset(&pairing, 0, sizeof(pairing))
    sec, nsec = divmod(as_whole(real_ns, "real_ns"), NS_PER_S)
    if not -1 << 63 <= sec < 1 << 63:
        raise RangeError("UTC does not fit 64 bits of seconds")
    pairing.sec, pairing.nsec, pairing.tsc = sec, nsec, as_u64(guest_tsc, "guest_tsc")
    cdef uint8_t *record = memory.find(where, sizeof(pairing))
    if record is NULL:
        return False
    memcpy(record, &pairing, sizeof(pairing))
    memory.mark_dirty(where, sizeof(pairing))
    return True


def post_message(GuestMemory memory not None, gpa: int, message: bytes, waits: bool) -> bool:
    """Post a Hyper-V message, header and payload, in the slot at `gpa`; False if that is taken or not in guest memory.

    waits: tell the guest in a slot that is taken to write EOM, for the caller will try again then.
    message: 16 to 256 bytes, a multiple of 4.  One of type 0 leaves the slot free.
    """
    cdef uint64_t where = as_u64(gpa, "gpa")
    cdef size_t length = len(message)
    if length % 4 or not sizeof(hyperv_message_header) <= length <= HYPERV_MESSAGE_BYTES:
        raise RangeError(f"a message of {length} bytes; it must have 16 to {MESSAGE_BYTES}, a multiple of 4")
    cdef uint8_t *slot = memory.find(where, HYPERV_MESSAGE_BYTES)
    if slot is NULL:
        return False
    cdef bint is_posted = hyperv_message_post(slot, <const char *>message, length, waits)
    if is_posted or waits:
        memory.mark_dirty(where, HYPERV_MESSAGE_BYTES)
    return is_posted
