/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * KVM's pvclock as a guest without operating system reads it: each CPU its own record.
 */
#ifndef PVCLOCK_PROBE_BARE_PVCLOCK_H
#define PVCLOCK_PROBE_BARE_PVCLOCK_H

#include <stdbool.h>
#include <stdint.h>

#include "facts.h"
#include "measure.h"

/* Have the first CPU, which this is, get its record: the MSR for it, or 0 if CPUID offers none. */
uint32_t pvclock_find(void);

/* Have `cpu`, which this is, get its record. */
void pvclock_enable(unsigned cpu);

/* Whether that failed: it has no record then, and the team no such clock. */
bool pvclock_is_refused(unsigned cpu);

/* By the first CPU's record; 0 without one. */
uint64_t pvclock_tsc_hz(void);

int64_t pvclock_read(const struct probe_clock *clock, unsigned cpu);

/* The records that `cpus` CPUs have; how many. */
unsigned pvclock_pages(struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus);

#endif
