/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Reading the time stamp counter, with the order that each use needs, and the counter as a parameter, so that the
 * same code runs on a simulated one.
 */
#ifndef PVCLOCK_TSC_H
#define PVCLOCK_TSC_H

#include <stddef.h>
#include <stdint.h>

#ifndef __x86_64__
#error "pvclock is about the x86-64 time stamp counter"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* As Linux's rdtsc_ordered(): not before any earlier load has its value.  Later loads may still overtake it. */
static inline uint64_t pvclock_rdtsc_ordered(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* Not before every earlier store is visible to all CPUs.  Only mfence waits for the store buffer, and only lfence
 * holds rdtsc back: rdtsc and rdtscp alone, and the locked instruction that a C11 fence compiles to, are overtaken.
 */
static inline uint64_t pvclock_rdtsc_after_stores(void)
{
	uint32_t low, high;

	__asm__ volatile("mfence\n\tlfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* By how many ticks a guest's last load of a read may overtake its rdtsc, generously: longer than any CPU's reorder
 * window lasts with every load in it missing the cache.
 */
#define PVCLOCK_MARGIN_TICKS 1024

/* Where host TSC comes from.  read == NULL is the CPU's own; a simulated counter stands still while it is read, so
 * nothing overtakes anything and its margin is 0.
 */
struct pvclock_counter {
	uint64_t (*read)(void *context);
	void *context;
	uint64_t margin_ticks;
};

static inline struct pvclock_counter pvclock_host_counter(void)
{
	struct pvclock_counter counter = { NULL, NULL, PVCLOCK_MARGIN_TICKS };

	return counter;
}

static inline uint64_t pvclock_counter_read(const struct pvclock_counter *counter)
{
	return counter->read ? counter->read(counter->context) : pvclock_rdtsc_ordered();
}

static inline uint64_t pvclock_counter_read_after_stores(const struct pvclock_counter *counter)
{
	return counter->read ? counter->read(counter->context) : pvclock_rdtsc_after_stores();
}

/* How often a wait reads the counter at most.  The margin takes some 50 reads of the TSC; this many take tens of
 * milliseconds, enough for a counter of far fewer ticks, and then the counter stands still.
 */
#define PVCLOCK_WAIT_POLLS_MAX (1u << 20)

/* Wait until the counter, which was `from`, has reached `from` plus `ticks`.
 *
 * Returns 0, or -1 if that does not come: the counter went back, or stands still.  It may be behind `from` by as much as
 * the margin: that is how a thread finds it that has moved to a CPU whose TSC is a little late.
 */
static inline int pvclock_counter_wait(const struct pvclock_counter *counter, uint64_t from, uint64_t ticks)
{
	for (unsigned int polls = 0; polls < PVCLOCK_WAIT_POLLS_MAX; polls++) {
		int64_t passed = (int64_t)(pvclock_counter_read(counter) - from);

		if (passed >= (int64_t)ticks)
			return 0;
		if (passed < -(int64_t)counter->margin_ticks)
			return -1;
		__builtin_ia32_pause();
	}
	return -1;
}

#ifdef __cplusplus
}
#endif

#endif
