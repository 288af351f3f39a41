/* SPDX-License-Identifier: Apache-2.0
 *
 * A guest's way to read its clock, and two things to lay beside it: Linux's own by the vDSO, and the least there is.
 * Each loop returns what it read last, or 0 if it could not read.
 */
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#include "published.h"

#define TRIES (1u << 20)

uint64_t pvclock_read_loop(const void *page, uint64_t reads)
{
	struct pvclock_counter counter = pvclock_host_counter();
	struct pvclock_reading reading = { 0 };

	for (uint64_t i = 0; i < reads; i++)
		if (pvclock_read(page, 0, &counter, TRIES, &reading) != 0)
			return 0;
	return reading.ns;
}

uint64_t vdso_loop(uint64_t reads)
{
	struct timespec now = { 0 };

	for (uint64_t i = 0; i < reads; i++)
		if (clock_gettime(CLOCK_MONOTONIC, &now) != 0)
			return 0;
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

uint64_t fenced_rdtsc_loop(uint64_t reads)
{
	uint64_t tsc = 0;

	for (uint64_t i = 0; i < reads; i++)
		tsc = pvclock_rdtsc_ordered();
	return tsc;
}
