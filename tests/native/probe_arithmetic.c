/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The probe's arithmetic as functions of a shared library, for tests that compare it with unbounded integers.
 */
#include <stddef.h>

#include "offset_window.h"
#include "step_search.h"
#include "warp_cell.h"

/* The window of `count` rounds, each before, remote and after: low, high. */
void window_of(const int64_t *rounds, size_t count, int64_t found[2])
{
	struct offset_window window;

	offset_window_begin(&window);
	for (size_t i = 0; i < count; i++)
		offset_window_add(&window, rounds[3 * i], rounds[3 * i + 1], rounds[3 * i + 2]);
	found[0] = window.low;
	found[1] = window.high;
}

/* CPU `from` tells a reading, and then `to` another: by how much it is less, and whose the one in the cell is then. */
void warp_of(int64_t base, unsigned from, int64_t earlier, unsigned to, int64_t later, int64_t found[2])
{
	struct warp_cell cell;

	warp_cell_begin(&cell, base);
	warp_cell_tell(&cell, warp_cell_look(&cell), from, earlier);
	found[0] = warp_cell_tell(&cell, warp_cell_look(&cell), to, later);
	found[1] = warp_cell_reader(warp_cell_look(&cell));
}

static void put_step(const struct clock_step *step, int64_t found[4])
{
	found[0] = step->found;
	found[1] = step->found ? step->low : 0;
	found[2] = step->found ? step->high : 0;
	found[3] = step->found ? (int64_t)step->at_tsc : 0;
}

/* The search over `count` readings, each tsc_before, clock and tsc_after: reads, floor, count, and the two steps. */
void steps_of(uint64_t tsc_hz, uint64_t clock_hz, bool unslewed, int64_t grain, const int64_t *readings, size_t count, int64_t found[11])
{
	struct step_search search;

	step_search_begin(&search, tsc_hz, clock_hz, unslewed, grain);
	for (size_t i = 0; i < count; i++)
		step_search_add(&search, (uint64_t)readings[3 * i], readings[3 * i + 1],
				(uint64_t)readings[3 * i + 2]);
	step_search_end(&search);
	found[0] = (int64_t)search.reads;
	found[1] = search.floor;
	found[2] = (int64_t)search.count;
	put_step(&search.forward, found + 3);
	put_step(&search.backward, found + 7);
}

/* Readings of the TSC itself: reads, floor, count, and the largest step back and when. */
void tsc_steps_of(const uint64_t *readings, size_t count, int64_t found[7])
{
	struct step_search search;

	step_search_begin(&search, 1000000000, 1000000000, true, 0);
	for (size_t i = 0; i < count; i++)
		step_search_add_tsc(&search, readings[i]);
	found[0] = (int64_t)search.reads;
	found[1] = search.floor;
	found[2] = (int64_t)search.count;
	put_step(&search.backward, found + 3);
}
