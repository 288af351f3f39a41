/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Two pinned threads at the probe's two cells, and at plain ones: what C would do that only measures.  Prints one JSON
 * object: windows in ticks, readings in ns of one CPU.
 *
 *   probe_cells CPU CPU MILLISECONDS ROUNDS
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "fenced_tsc.h"
#include "pair_exchange.h"
#include "warp_cell.h"

/* ---- The kinds of work, of which both threads do the same at once. ---- */

struct work {
	struct pair_exchange exchange;
	struct warp_cell cell;
	int64_t plain_cell __attribute__((aligned(64)));
	bool has_ended __attribute__((aligned(64)));
	struct offset_window window;
	uint64_t reads, warps;
};

static struct work work;

static bool has_ended(void)
{
	return __atomic_load_n(&work.has_ended, __ATOMIC_ACQUIRE);
}

static void lead_exchange(void)
{
	int64_t before = (int64_t)fenced_tsc(), remote, after;

	pair_exchange_ask(&work.exchange, 0);
	while (!has_ended()) {
		if (!pair_exchange_is_answered(&work.exchange))
			continue;
		remote = work.exchange.reading;
		after = (int64_t)fenced_tsc();
		pair_exchange_ask(&work.exchange, 0);
		offset_window_add(&work.window, before, remote, after);
		before = after;
	}
}

static void exchange(unsigned cpu)
{
	if (cpu == 0)
		lead_exchange();
	while (cpu == 1 && !has_ended()) {
		while (pair_exchange_is_asked(&work.exchange))
			pair_exchange_answer(&work.exchange, (int64_t)fenced_tsc());
	}
}

/* As many a program does it: a question with a reading, an answer with another. */
static void plain_exchange(unsigned cpu)
{
	uint64_t *asked = &work.exchange.asked, *answered = &work.exchange.answered;

	for (uint64_t round = 1; !has_ended(); round++) {
		int64_t before;

		if (cpu == 1) {
			while (__atomic_load_n(asked, __ATOMIC_ACQUIRE) != round && !has_ended())
				;
			work.exchange.reading = (int64_t)fenced_tsc();
			__atomic_store_n(answered, round, __ATOMIC_RELEASE);
			continue;
		}
		before = (int64_t)fenced_tsc();
		__atomic_store_n(asked, round, __ATOMIC_RELEASE);
		while (__atomic_load_n(answered, __ATOMIC_ACQUIRE) != round && !has_ended())
			;
		if (!has_ended())
			offset_window_add(&work.window, before, work.exchange.reading, (int64_t)fenced_tsc());
	}
}

static void count(uint64_t reads, uint64_t warps)
{
	__atomic_fetch_add(&work.reads, reads, __ATOMIC_RELAXED);
	__atomic_fetch_add(&work.warps, warps, __ATOMIC_RELAXED);
}

static void cell(unsigned cpu)
{
	uint64_t reads = 0, warps = 0;

	for (; !has_ended(); reads++) {
		int64_t seen = warp_cell_look(&work.cell);

		warps += warp_cell_tell(&work.cell, seen, cpu, (int64_t)fenced_tsc()) > 0;
	}
	count(reads, warps);
}

/* The largest reading, of which nobody knows whose it was. */
static void plain_cell(unsigned cpu)
{
	uint64_t reads = 0, warps = 0;

	(void)cpu;
	for (; !has_ended(); reads++) {
		int64_t seen = __atomic_load_n(&work.plain_cell, __ATOMIC_ACQUIRE), now = (int64_t)fenced_tsc();

		if (now < seen)
			warps++;
		else
			__atomic_compare_exchange_n(&work.plain_cell, &seen, now, false, __ATOMIC_RELEASE,
						    __ATOMIC_RELAXED);
	}
	count(reads, warps);
}

/* ---- The run. ---- */

static int pinned_to[2];
static void (*kind)(unsigned cpu);

static void *do_it(void *argument)
{
	unsigned cpu = (unsigned)(uintptr_t)argument;
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(pinned_to[cpu], &one);
	pthread_setaffinity_np(pthread_self(), sizeof one, &one);
	kind(cpu);
	return NULL;
}

static void run(void (*which)(unsigned cpu), long milliseconds)
{
	struct timespec time = { milliseconds / 1000, milliseconds % 1000 * 1000000 };
	pthread_t threads[2];

	work = (struct work){ .plain_cell = INT64_MIN };
	offset_window_begin(&work.window);
	warp_cell_begin(&work.cell, (int64_t)fenced_tsc());
	kind = which;
	for (uintptr_t cpu = 0; cpu < 2; cpu++)
		pthread_create(&threads[cpu], NULL, do_it, (void *)cpu);
	nanosleep(&time, NULL);
	__atomic_store_n(&work.has_ended, true, __ATOMIC_RELEASE);
	for (unsigned cpu = 0; cpu < 2; cpu++)
		pthread_join(threads[cpu], NULL);
}

static void print_exchange(const char *name, void (*which)(unsigned cpu), long milliseconds, const char *comma)
{
	run(which, milliseconds);
	printf("\"%s\": {\"low\": %" PRId64 ", \"high\": %" PRId64 ", \"rounds\": %" PRIu64 "}%s", name, work.window.low,
	       work.window.high, work.window.rounds, comma);
}

static void print_cell(const char *name, void (*which)(unsigned cpu), long milliseconds, const char *comma)
{
	run(which, milliseconds);
	printf("\"%s\": {\"reads\": %" PRIu64 ", \"warps\": %" PRIu64 "}%s", name, work.reads, work.warps, comma);
}

int main(int arguments, char **values)
{
	long milliseconds;

	if (arguments != 5)
		return 2;
	pinned_to[0] = atoi(values[1]);
	pinned_to[1] = atoi(values[2]);
	milliseconds = atol(values[3]);
	for (long round = 0; round < atol(values[4]); round++) {
		printf("{");
		print_exchange("plain_exchange", plain_exchange, milliseconds, ", ");
		print_exchange("exchange", exchange, milliseconds, ", ");
		print_cell("plain_cell", plain_cell, milliseconds, ", ");
		print_cell("cell", cell, milliseconds, "}\n");
	}
	return 0;
}
