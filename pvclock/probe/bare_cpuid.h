/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#ifndef PVCLOCK_PROBE_BARE_CPUID_H
#define PVCLOCK_PROBE_BARE_CPUID_H

#include <stdbool.h>
#include <stdint.h>

#include "bare_gate.h"

static inline bool has_hypervisor(void)
{
    return cpuid(1, 0).ecx >> 31;
}

/* Of the first hypervisor interface. */
static inline bool has_hypervisor_leaf(uint32_t leaf)
{
    uint32_t last = has_hypervisor() ? cpuid(0x40000000, 0).eax : 0;

    return last >= leaf && last < 0x40010000;
}

#endif
