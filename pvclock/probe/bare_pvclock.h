/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * KVM's pvclock as a guest without operating system reads it: each CPU its own record.
 */
#ifndef PVCLOCK_PROBE_BARE_PVCLOCK_H
#define PVCLOCK_PROBE_BARE_PVCLOCK_H

#include <stdint.h>

#include "facts.h"
#include "measure.h"

/* Have the first CPU, which this is, get its record: the MSR that does it, or 0 if CPUID offers none that works. */
uint32_t pvclock_find(void);

/* Have `cpu`, which this is, get its record. */
void pvclock_enable(unsigned cpu);

/* By the first CPU's record; 0 without one. */
uint64_t pvclock_tsc_hz(void);

int64_t pvclock_read(const struct probe_clock *clock, unsigned cpu);

/* The records of `cpus` CPUs; the count, which is 0 if there are none. */
unsigned pvclock_pages(struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus);

#endif
