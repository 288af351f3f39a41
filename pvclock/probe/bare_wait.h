/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#ifndef PVCLOCK_PROBE_BARE_WAIT_H
#define PVCLOCK_PROBE_BARE_WAIT_H

#include <stdint.h>

#include "fenced_tsc.h"

static inline void wait_ticks(uint64_t ticks)
{
    uint64_t begin = fenced_tsc();

    while (fenced_tsc() - begin < ticks)
        __builtin_ia32_pause();
}

#endif
