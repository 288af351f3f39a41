/* SPDX-License-Identifier: Apache-2.0
 *
 * One reading of a clock of a Linux guest, by the vDSO where that can read it, between two readings of the guest's TSC.
 */
#include <stdint.h>
#include <time.h>

#define NS_PER_S UINT64_C(1000000000)

struct triple {
	uint64_t before, ns, after;
};

static uint64_t read_tsc(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high)::"memory");
	return (uint64_t)high << 32 | low;
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static struct triple take(clockid_t clock)
{
	struct triple it;

	it.before = read_tsc();
	it.ns = clock_ns(clock);
	it.after = read_tsc();
	return it;
}
