"""Operations on whole arrays at C speed; the only module with typed memoryviews."""

from libc.stdint cimport int8_t, uint32_t, uint64_t

from pvclock._math cimport pvclock_scale, pvclock_time_scale

from pvclock.errors import ConfigError

cdef uint64_t NS_PER_SEC = 1_000_000_000


def time_scales(base_hz: object, mul: object, shift: object) -> None:
    """time_scale(10**9, hz) for each element of `base_hz`.

    Buffers of equal length, else ConfigError: uint64 in; uint32 and int8 out.  A frequency of 0 gives mul 0, shift 0.
    """
    cdef const uint64_t[::1] hz_in = base_hz
    cdef uint32_t[::1] mul_out = mul
    cdef int8_t[::1] shift_out = shift
    cdef pvclock_scale scale
    cdef Py_ssize_t i
    if not hz_in.shape[0] == mul_out.shape[0] == shift_out.shape[0]:
        raise ConfigError("time_scales: the three buffers must be of equal length")
    with nogil:
        for i in range(hz_in.shape[0]):
            if pvclock_time_scale(NS_PER_SEC, hz_in[i], &scale) != 0:
                scale.mul, scale.shift = 0, 0
            mul_out[i], shift_out[i] = scale.mul, scale.shift
