/* SPDX-License-Identifier: Apache-2.0
 *
 * Hyper-V's page kind, and copies of it with one defect each, to show that the stress test sees every one of them.
 */
#ifndef BROKEN_HYPERV_H
#define BROKEN_HYPERV_H

#include <stdbool.h>
#include <string.h>

#include "hyperv_publish.h"

static void leave_alone(struct pvclock_page_set *set)
{
	(void)set;
}

/* The page keeps its sequence while it changes: a reader takes a mixture of two lines for good. */
static void mark_counter_alone(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = set->pages;

	__atomic_store_n(&clock->line_version, clock->line_version | 1u, __ATOMIC_RELAXED);
}

/* 0, and then the same sequence again: who began to read before does not see that the page has changed. */
static void release_same_sequence(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = set->pages;

	clock->sequence = 0;
	hyperv_release(set);
}

/* As KVM does: the sequence comes from guest memory, where it is 0 by now.  So it is always 1. */
static void release_sequence_read_back(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = set->pages;

	clock->sequence = pvclock_load32(clock->page);
	hyperv_release(set);
}

/* The mark comes after A: a reader may trust the old page when its break point is over. */
static void mark_and_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	hyperv_mark_busy(set);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	hyperv_write(set, update);
}

/* The release comes before B: a reader trusts the new page before its break point. */
static void write_and_release(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	hyperv_write(set, update);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	hyperv_release(set);
}

/* The break point comes when it comes, and whole units are all there is: the fractions of all changes add up. */
static void write_whole_units(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	struct hyperv_clock *clock = set->pages;
	uint64_t break_tsc = update->break_tsc;
	pvclock_u128 least = pvclock_line_fixed(*update->timeline, break_tsc, HYPERV_UNIT_NS), lift;
	struct hyperv_line line = { .tsc = break_tsc };

	line.scale = (uint64_t)pvclock_fixed_rate(clock->num, clock->den, HYPERV_UNIT_NS);
	if (clock->line_den != 0 && least < hyperv_fixed(hyperv_line_read(&clock->line, break_tsc), 0))
		least = hyperv_fixed(hyperv_line_read(&clock->line, break_tsc), 0);
	line.units = (uint64_t)(least >> 64);
	line.fraction = (uint64_t)least;
	lift = -hyperv_line_offset(&line, clock->tsc_offset) & UINT64_MAX;
	line.units = (uint64_t)((least + lift) >> 64);
	line.fraction = (uint64_t)(least + lift);
	hyperv_clock_turn(clock, &line);
	hyperv_write(set, update);
}

/* The counter's line is another copy, taken over when the publish is over: a guest has the new page before that. */
static struct hyperv_line line_of_later;

static void mark_page_alone(struct pvclock_page_set *set)
{
	pvclock_store32(((struct hyperv_clock *)set->pages)->page, HYPERV_SEQUENCE_INVALID);
}

static void write_page_alone(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	struct hyperv_clock *clock = set->pages, next = *clock;
	struct pvclock_page_set next_set = { set->kind, &next, 1, 1 };

	hyperv_write(&next_set, update);
	line_of_later = next.line;
	next.line = clock->line;
	*clock = next;
}

static void release_and_take_over(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = set->pages;

	hyperv_release(set);
	hyperv_line_store(&clock->line, &line_of_later);
}

/* A read of the TSC that waits for nothing: the marks may still be in the store buffer, where no other CPU sees them. */
static inline uint64_t bare_rdtsc(void *context)
{
	(void)context;
	return __builtin_ia32_rdtsc();
}

static const struct hyperv_kind {
	const char *name;
	struct pvclock_page_kind kind;
	bool has_bare_rdtsc; /* and no margin: that hides it nearly always */
} hyperv_kinds[] = {
	{ "product",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, hyperv_write, hyperv_release },
	  false },
	{ "no_zero_phase",
	  { hyperv_is_due, hyperv_touch, mark_counter_alone, hyperv_delay_ticks, hyperv_write, hyperv_release },
	  false },
	{ "same_sequence",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, hyperv_write, release_same_sequence },
	  false },
	{ "sequence_read_back",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, hyperv_write, release_sequence_read_back },
	  false },
	{ "bare_rdtsc",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, hyperv_write, hyperv_release },
	  true },
	{ "busy_after_a",
	  { hyperv_is_due, hyperv_touch, leave_alone, hyperv_delay_ticks, mark_and_write, hyperv_release },
	  false },
	{ "released_before_b",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, write_and_release, leave_alone },
	  false },
	{ "counter_taken_over_late",
	  { hyperv_is_due, hyperv_touch, mark_page_alone, hyperv_delay_ticks, write_page_alone, release_and_take_over },
	  false },
	{ "no_extra_unit",
	  { hyperv_is_due, hyperv_touch, hyperv_mark_busy, NULL, write_whole_units, hyperv_release },
	  false },
};

/* NULL if there is none of that name. */
static inline const struct hyperv_kind *hyperv_kind_named(const char *name)
{
	for (size_t i = 0; i < sizeof hyperv_kinds / sizeof *hyperv_kinds; i++)
		if (strcmp(hyperv_kinds[i].name, name) == 0)
			return &hyperv_kinds[i];
	return NULL;
}

#endif
