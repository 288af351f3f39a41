/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The TSC's frequency that a pvclock record stands for.
 */
#ifndef PVCLOCK_PROBE_RECORD_HZ_H
#define PVCLOCK_PROBE_RECORD_HZ_H

#include <stdint.h>

/* 10^9 * 2^32 / (mul * 2^shift), rounded down; 0 if mul is 0, or the shift is beyond any TSC's.  Nothing overflows: the
 * product is below 2^62, the rest below 2^32. */
static inline uint64_t record_hz(uint32_t mul, int shift)
{
    const uint64_t product = UINT64_C(1000000000) << 32;
    uint64_t ticks, rest;

    if (!mul || shift >= 64 || shift < -31)
        return 0;
    ticks = product / mul;
    rest = product % mul;
    if (shift >= 0)
        return ticks >> shift;
    if (ticks >> (64 + shift))
        return 0;
    return (ticks << -shift) + (rest << -shift) / mul;
}

#endif
