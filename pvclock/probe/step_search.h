/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Finds where a clock left the line that it was on against the TSC, from readings between two readings of the TSC.
 *
 * The contract of the functions; the arithmetic is to come.
 */
#ifndef PVCLOCK_PROBE_STEP_SEARCH_H
#define PVCLOCK_PROBE_STEP_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

/* A step of `low` to `high` units of the clock, both of the step's sign, seen at `at_tsc`. */
struct clock_step {
    bool found;
    int64_t low, high;
    uint64_t at_tsc;
};

struct step_search {
    uint64_t tsc_hz, clock_hz;
    uint64_t reads;
    int64_t floor; /* units: a step within it cannot be told from the readings' width and the rate's freedom */
    uint64_t count; /* of steps beyond the floor */
    struct clock_step forward, backward; /* the largest each way */
};

void step_search_begin(struct step_search *search, uint64_t tsc_hz, uint64_t clock_hz);
void step_search_add(struct step_search *search, uint64_t tsc_before, int64_t clock, uint64_t tsc_after);

#endif
