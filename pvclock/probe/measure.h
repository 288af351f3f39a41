/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the probe measures, whatever it runs on: linux.c has threads and the vDSO, bare.c has vCPUs and nothing else.
 *
 * Every clock is compared with itself on two CPUs (an exchange bounds the offset, a shared cell shows warps), and with
 * the TSC of the first CPU over the whole run (its steps and its rate).  All numbers are whole units of the clock.
 * Judging them is not done here: pvclock.meter.inside does, in Python, wherever the printed line is taken.
 */
#ifndef PVCLOCK_PROBE_MEASURE_H
#define PVCLOCK_PROBE_MEASURE_H

#include <stdbool.h>
#include <stdint.h>

#include "offset_window.h"
#include "step_search.h"

enum {
    PROBE_CPUS_MAX = 64,
    PROBE_CLOCKS_MAX = 6,
    PROBE_PAIRS_MAX = 120, /* all pairs of 16 CPUs; of more, each with the first: 63 */
    PROBE_SLICES = 8       /* the run, cut: an offset that moves shows between the first and the last */
};

/* A clock that every CPU of the team can read, or, without exchange, the first CPU only. */
struct probe_clock {
    const char *name;                                              /* as the JSON has it */
    uint64_t hz;                                                   /* its units a second */
    bool exchanged;                                                /* compared between CPUs, too */
    bool unslewed;                                                 /* NTP, a host's either, leaves its rate alone */
    int64_t grain;                                                 /* units that it stands still for; 0: 100 ns at most */
    int64_t (*read)(const struct probe_clock *clock, unsigned cpu); /* neither earlier nor later code moves across */
    void *state;
};

/* The CPUs, and the one way to have them work. */
struct probe_team {
    unsigned cpus;
    int64_t added_ns[PROBE_CPUS_MAX]; /* a fault put in: added to what this CPU reads of every exchanged clock */
    /* Run `work(argument, cpu)` at once on every CPU whose bit is set, each pinned; return when all have ended. */
    void (*run)(struct probe_team *team, uint64_t members, void (*work)(void *argument, unsigned cpu), void *argument);
    void *state;
};

struct probe_pair {
    unsigned a, b;                             /* the window is of b's reading minus a's */
    struct offset_window slices[PROBE_SLICES];
    uint64_t at_tsc[PROBE_SLICES];             /* the first CPU's TSC in the middle of that slice's exchange */
};

struct probe_warp {
    uint64_t count;
    int64_t largest;
};

struct probe_clock_result {
    unsigned pairs;
    struct probe_pair pair[PROBE_PAIRS_MAX];
    struct probe_warp warp[PROBE_CPUS_MAX][PROBE_CPUS_MAX]; /* [who had read more][who read less afterwards] */
    uint64_t cell_reads;                                    /* readings that the shared cell saw */
    struct probe_sample sample[PROBE_SLICES + 1];           /* the tightest at each slice's beginning, and at the end */
    struct step_search steps;
};

struct probe_plan {
    uint64_t tsc_hz;
    uint64_t milliseconds;
    void (*progress)(unsigned percent); /* or NULL */
};

/* Measure `clocks` on `team` for the plan's time.  `results` has one zeroed element a clock.  clocks[0] is the TSC. */
void measure(struct probe_team *team, const struct probe_plan *plan, const struct probe_clock *clocks, unsigned count,
             struct probe_clock_result *results);

#endif
