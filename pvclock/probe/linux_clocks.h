/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The clocks of a Linux guest: the TSC, and what the kernel makes of it.
 */
#ifndef PVCLOCK_PROBE_LINUX_CLOCKS_H
#define PVCLOCK_PROBE_LINUX_CLOCKS_H

#include "measure.h"

enum { LINUX_CLOCKS = 3 };

/* How fast the first CPU's TSC runs by CLOCK_MONOTONIC_RAW, which nobody steers; 0 where it stands still. */
uint64_t tsc_hz_by_monotonic_raw(struct probe_team *team);

/* The TSC, monotonic as programs read it, and monotonic_raw for its rate. */
void linux_clocks(struct probe_clock clocks[LINUX_CLOCKS], uint64_t tsc_hz);

#endif
