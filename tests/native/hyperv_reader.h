/* SPDX-License-Identifier: Apache-2.0
 *
 * How guests read Hyper-V's reference TSC page, each in its own order.  Shares no code with hyperv_read().
 */
#ifndef HYPERV_READER_H
#define HYPERV_READER_H

#include <stdbool.h>
#include <string.h>

#include "hyperv_abi.h"

struct page_reading {
	uint64_t tsc;
	uint64_t scale;
	int64_t offset;
	uint32_t sequence;
};

enum attempt { VALID, CHANGED, INVALID };

/* CHANGED: try again.  INVALID: read the counter MSR. */
typedef enum attempt hyperv_attempt_fn(const volatile struct hyperv_tsc_page *page, struct page_reading *ret);

static uint64_t guest_rdtsc_ordered(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static void compiler_barrier(void)
{
	__asm__ volatile("" : : : "memory");
}

static uint64_t page_reading_units(const struct page_reading *reading)
{
	__extension__ unsigned __int128 product = (unsigned __int128)reading->tsc * reading->scale;

	return (uint64_t)(product >> 64) + (uint64_t)reading->offset;
}

/* hv_read_tsc_page_tsc() of Linux: the TSC comes last, and smp_rmb() is no instruction on x86. */
static enum attempt attempt_linux(const volatile struct hyperv_tsc_page *page, struct page_reading *ret)
{
	ret->sequence = page->sequence;
	if (ret->sequence == 0)
		return INVALID;
	compiler_barrier();
	ret->scale = page->scale;
	ret->offset = page->offset;
	ret->tsc = guest_rdtsc_ordered();
	compiler_barrier();
	return page->sequence == ret->sequence ? VALID : CHANGED;
}

/* As Windows, and the TLFS: the TSC comes first. */
static enum attempt attempt_windows(const volatile struct hyperv_tsc_page *page, struct page_reading *ret)
{
	ret->sequence = page->sequence;
	if (ret->sequence == 0 || ret->sequence == UINT32_MAX)
		return INVALID;
	compiler_barrier();
	ret->tsc = guest_rdtsc_ordered();
	ret->scale = page->scale;
	ret->offset = page->offset;
	compiler_barrier();
	return page->sequence == ret->sequence ? VALID : CHANGED;
}

/* How long before its rdtsc the last load of an unfenced reader is done: as if something had missed the cache, and less
 * than the margin.  Where an interrupt came between, a CPU would have done the load again.
 */
#define OVERTAKE_MIN_TICKS 256
#define OVERTAKE_MAX_TICKS 768

/* Linux' reader on the CPU that it permits: its last load is done before its rdtsc. */
static enum attempt attempt_unfenced(const volatile struct hyperv_tsc_page *page, struct page_reading *ret)
{
	uint64_t began_tsc = guest_rdtsc_ordered();
	enum attempt attempt;

	__builtin_ia32_lfence();
	ret->sequence = page->sequence;
	if (ret->sequence == 0)
		return INVALID;
	compiler_barrier();
	ret->scale = page->scale;
	ret->offset = page->offset;
	compiler_barrier();
	attempt = page->sequence == ret->sequence ? VALID : CHANGED;
	do {
		ret->tsc = guest_rdtsc_ordered();
	} while (ret->tsc - began_tsc < OVERTAKE_MIN_TICKS);
	return ret->tsc - began_tsc <= OVERTAKE_MAX_TICKS ? attempt : CHANGED;
}

/* Longer than a publish: as if the host had taken the CPU away between two loads. */
#define PREEMPTED_TICKS 4096

/* Linux' reader on a vCPU that is preempted in each read. */
static enum attempt attempt_preempted(const volatile struct hyperv_tsc_page *page, struct page_reading *ret)
{
	uint64_t began_tsc = guest_rdtsc_ordered();

	ret->sequence = page->sequence;
	if (ret->sequence == 0)
		return INVALID;
	compiler_barrier();
	ret->scale = page->scale;
	while (guest_rdtsc_ordered() - began_tsc < PREEMPTED_TICKS)
		__builtin_ia32_pause();
	ret->offset = page->offset;
	ret->tsc = guest_rdtsc_ordered();
	compiler_barrier();
	return page->sequence == ret->sequence ? VALID : CHANGED;
}

/* NULL if there is none of that name. */
static inline hyperv_attempt_fn *hyperv_attempt_named(const char *name)
{
	if (strcmp(name, "linux") == 0)
		return attempt_linux;
	if (strcmp(name, "windows") == 0)
		return attempt_windows;
	if (strcmp(name, "unfenced") == 0)
		return attempt_unfenced;
	return strcmp(name, "preempted") == 0 ? attempt_preempted : NULL;
}

#endif
