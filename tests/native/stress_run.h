/* SPDX-License-Identifier: Apache-2.0
 *
 * What the stress programs share: break points to hold readings against, threads on CPUs of their own, and a source of
 * rates.  _GNU_SOURCE before anything else.
 */
#ifndef STRESS_RUN_H
#define STRESS_RUN_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- Break points: generation n is the n-th publish; its page version is 2n. ---- */

#define LOG_SIZE (UINT64_C(1) << 20)

struct break_log {
	_Atomic uint64_t logged; /* the last generation with an entry */
	_Atomic uint64_t break_tsc[LOG_SIZE];
};

static void log_break(struct break_log *log, uint64_t generation, uint64_t break_tsc)
{
	atomic_store_explicit(&log->break_tsc[generation % LOG_SIZE], break_tsc, memory_order_relaxed);
	atomic_store_explicit(&log->logged, generation, memory_order_release);
}

/* The generation's own break point and its successor's.  False if one is not there yet, or may be overwritten. */
static bool find_breaks(const struct break_log *log, uint64_t generation, uint64_t *own, uint64_t *next)
{
	uint64_t logged;

	*own = atomic_load_explicit(&log->break_tsc[generation % LOG_SIZE], memory_order_acquire);
	*next = atomic_load_explicit(&log->break_tsc[(generation + 1) % LOG_SIZE], memory_order_acquire);
	logged = atomic_load_explicit(&log->logged, memory_order_acquire);
	return logged > generation && logged - generation < LOG_SIZE / 2;
}

/* ---- Threads and rates. ---- */

/* The writer is number 0.  Threads go round the CPUs, so that on two of them the first reader runs beside the writer,
 * and the second one takes the writer's CPU from it, in mid-publish too.  Left alone they may all run on one.
 */
static void pin_thread(pthread_t thread, size_t number)
{
	cpu_set_t allowed, own;
	size_t skip;

	CPU_ZERO(&own);
	if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
		return;
	skip = number % (size_t)CPU_COUNT(&allowed);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && skip-- == 0)
			CPU_SET(cpu, &own);
	pthread_setaffinity_np(thread, sizeof own, &own);
}

/* xorshift64, by Marsaglia: the order of the rates need not be good, only long. */
static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#endif
