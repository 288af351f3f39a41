/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The TSC, read in order, and times told by it on one CPU: no CPU's TSC says anything about another's.
 */
#ifndef PVCLOCK_PROBE_FENCED_TSC_H
#define PVCLOCK_PROBE_FENCED_TSC_H

#include <stdbool.h>
#include <stdint.h>

/* Neither before any earlier load has its value, nor after any later instruction has begun. */
static inline uint64_t fenced_tsc(void)
{
    uint32_t low, high;

    __asm__ volatile("lfence\n\trdtsc\n\tlfence" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

/* A time that runs out.  Only what the TSC advances between two looks counts, so a TSC set back delays nothing. */
struct stopwatch {
    uint64_t last_tsc, left_ticks;
};

static inline void stopwatch_start(struct stopwatch *watch, uint64_t ticks)
{
    watch->last_tsc = fenced_tsc();
    watch->left_ticks = ticks;
}

static inline bool stopwatch_runs(struct stopwatch *watch)
{
    uint64_t now = fenced_tsc(), passed = now - watch->last_tsc;

    if ((int64_t)passed > 0)
        watch->left_ticks -= passed < watch->left_ticks ? passed : watch->left_ticks;
    watch->last_tsc = now;
    return watch->left_ticks > 0;
}

#endif
