/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What an exchange of two CPUs says about the offset of the one's clock from the other's: bounds, never an estimate.
 */
#ifndef PVCLOCK_PROBE_OFFSET_WINDOW_H
#define PVCLOCK_PROBE_OFFSET_WINDOW_H

#include <stdint.h>

/* low <= b - a <= high, if that offset stood still.  low > high: it did not, or a reading was not ordered. */
struct offset_window {
    int64_t low, high;
    uint64_t rounds;
};

static inline void offset_window_begin(struct offset_window *window)
{
    window->low = INT64_MIN;
    window->high = INT64_MAX;
    window->rounds = 0;
}

/* By how much one reading is ahead of another, of a clock that may wrap as the TSC does. */
static inline int64_t reading_ahead(int64_t reading, int64_t of)
{
    return (int64_t)((uint64_t)reading - (uint64_t)of);
}

/* One round: a read `before`, then b read `remote`, then a read `after`.  b's clock was ahead of a's by no more than
 * remote - before, for a's has only gone on since, and by no less than remote - after.
 */
static inline void offset_window_add(struct offset_window *window, int64_t before, int64_t remote, int64_t after)
{
    int64_t low = reading_ahead(remote, after), high = reading_ahead(remote, before);

    if (low > window->low)
        window->low = low;
    if (high < window->high)
        window->high = high;
    window->rounds++;
}

#endif
