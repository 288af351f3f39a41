"""Memory searched for pvclock pages at C speed."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pvclock._memory cimport as_u64

from typing import NamedTuple

from pvclock.errors import ConfigError, RangeError, WrongType

cdef uint64_t PLACES_MOST = 1 << 20


class Places(NamedTuple):
    """What a search found in a buffer; offsets from its beginning, ascending.

    even_and_zero_pads: how many places have an even version, not 0, and zero pads.  legal: how many have legal flags,
    mul, shift and tsc_timestamp, too.  right_rate: how many of these have a rate within bounds.  pages, other_rate:
    the first places_max of the last kind, and of the legal ones whose rate is not.
    A page that was being written, its version odd, counts for all but the first.
    """

    even_and_zero_pads: int
    legal: int
    right_rate: int
    pages: list[int]
    other_rate: list[int]


def search_pages(
    buffer: object, tsc_hz: int, within_ppm: int, newest_tsc: int | None = None, places_max: int = 1024
) -> Places:
    """Search a readable, contiguous buffer for pvclock pages, at every multiple of 4 bytes, without the GIL.

    A page: version not 0, zero pads, no flag but STABLE and GUEST_STOPPED, mul of 2^31 or more, a shift that Linux can
    choose (-34 to 30), a rate within `within_ppm` (0 to 999999) of that of a TSC of tsc_hz, tsc_timestamp not 0 and not
    beyond newest_tsc (None: any).  places_max: up to 2^20.  RangeError beyond these.
    """
    cdef pvclock_search_terms terms
    cdef uint64_t newest = UINT64_MAX if newest_tsc is None else as_u64(newest_tsc, "newest_tsc")
    cdef uint64_t hz = as_u64(tsc_hz, "tsc_hz"), ppm = as_u64(within_ppm, "within_ppm")
    cdef uint64_t room = as_u64(places_max, "places_max")
    if pvclock_search_terms_of(hz, <uint32_t>min(ppm, <uint64_t>UINT32_MAX), newest, &terms) != 0:
        raise RangeError(f"a TSC of {hz} Hz to {ppm} ppm; give at least 1 Hz, and 0 to {PVCLOCK_PPM - 1} ppm")
    if room > PLACES_MOST:
        raise RangeError(f"places_max is {room}; it can be up to {PLACES_MOST}")
    return _searched(buffer, &terms, room)


cdef object _searched(object buffer, const pvclock_search_terms *terms, uint64_t room):
    cdef Py_buffer view
    cdef pvclock_search_result result
    cdef uint64_t *offsets = <uint64_t *>malloc((2 * room + 1) * sizeof(uint64_t))
    if offsets is NULL:
        raise MemoryError
    try:
        _get_buffer(buffer, &view)
        result.even = 0
        result.pages = pvclock_places(offsets, room, 0)
        result.other_rate = pvclock_places(offsets + room, room, 0)
        with nogil:
            pvclock_search(view.buf, view.len, terms, &result)
        PyBuffer_Release(&view)
        return Places(result.even, result.pages.count + result.other_rate.count, result.pages.count,
                      _offsets(&result.pages), _offsets(&result.other_rate))
    finally:
        free(offsets)


cdef int _get_buffer(object buffer, Py_buffer *view) except -1:
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE)
    except TypeError:
        raise WrongType("buffer", buffer, "a bytes-like object") from None
    except (BufferError, ValueError) as error:  # NumPy and a closed mmap say ValueError
        raise ConfigError(f"a search needs a contiguous bytes-like object: {error}") from None
    return 0


cdef list _offsets(const pvclock_places *places):
    return [places.offsets[i] for i in range(min(places.count, places.room))]
