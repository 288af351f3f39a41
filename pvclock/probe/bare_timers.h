/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The old timers: narrow counters that only the first CPU reads, extended to 64 bits.
 *
 * How often a counter went round between two readings is told by the TSC; so a step of the one against the other is
 * seen modulo the counter's period (PIT: 55 ms, PM timer: 4.7 s or 20 min).
 */
#ifndef PVCLOCK_PROBE_BARE_TIMERS_H
#define PVCLOCK_PROBE_BARE_TIMERS_H

#include <stdbool.h>
#include <stdint.h>

#include "bare_acpi.h"
#include "measure.h"

enum { PIT_HZ = 1193182, PM_TIMER_HZ = 3579545 };

struct narrow_counter {
    uint32_t (*raw)(const struct narrow_counter *counter);
    uint16_t port;
    unsigned bits;
    uint64_t hz, tsc_hz;
    int64_t total; /* of the last reading, ... */
    uint64_t tsc;  /* ... and when that was; 0: none yet */
};

/* False if there is none, or it does not count. */
bool pit_open(struct narrow_counter *counter, uint64_t tsc_hz);
bool pm_timer_open(struct narrow_counter *counter, uint64_t tsc_hz, const struct acpi_facts *acpi);

int64_t narrow_counter_read(const struct probe_clock *clock, unsigned cpu); /* clock->state: the counter */

/* The TSC's frequency by them; 0 if there is none. */
uint64_t pit_tsc_hz(void);
uint64_t pm_timer_tsc_hz(const struct acpi_facts *acpi);

#endif
