/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The cell by which all CPUs tell each other the largest reading of a clock, and whose it was, in one word.
 *
 * Who reads less than it found there before has a clock that went back: that word was written after its reading.
 */
#ifndef PVCLOCK_PROBE_WARP_CELL_H
#define PVCLOCK_PROBE_WARP_CELL_H

#include <stdbool.h>
#include <stdint.h>

#include "offset_window.h"

/* The reader's number is in the low bits, the reading from `base` on in the others.  What is further from it than they
 * can say (a year and a half, at 3 GHz) is said to be that far: a warp is then larger than the cell says.
 */
enum { WARP_CELL_CPU_BITS = 6 };
#define WARP_CELL_FAR ((INT64_MAX >> WARP_CELL_CPU_BITS) - 1)

struct warp_cell {
    int64_t word;
    int64_t base;
} __attribute__((aligned(64)));

static inline void warp_cell_begin(struct warp_cell *cell, int64_t base)
{
    cell->word = INT64_MIN; /* less than any reading */
    cell->base = base;
}

static inline int64_t warp_cell_look(const struct warp_cell *cell)
{
    return __atomic_load_n(&cell->word, __ATOMIC_ACQUIRE);
}

static inline unsigned warp_cell_reader(int64_t seen)
{
    return (unsigned)seen & ((1u << WARP_CELL_CPU_BITS) - 1);
}

static inline int64_t warp_cell_clip(int64_t ahead)
{
    return ahead > WARP_CELL_FAR ? WARP_CELL_FAR : ahead < -WARP_CELL_FAR ? -WARP_CELL_FAR : ahead;
}

/* Tell the others what this CPU read after it had `seen` the cell; by how much that is less than it saw, or 0. */
static inline int64_t warp_cell_tell(struct warp_cell *cell, int64_t seen, unsigned cpu, int64_t reading)
{
    int64_t ahead = warp_cell_clip(reading_ahead(reading, cell->base));
    int64_t seen_ahead = seen >> WARP_CELL_CPU_BITS;

    if (ahead < seen_ahead)
        return seen_ahead - ahead;
    /* Who lost the race tells nothing: the cell has another's reading, and may have a larger one. */
    __atomic_compare_exchange_n(&cell->word, &seen, ahead * (1 << WARP_CELL_CPU_BITS) + (int64_t)cpu, false,
                                __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    return 0;
}

#endif
