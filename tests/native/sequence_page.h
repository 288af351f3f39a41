/* SPDX-License-Identifier: Apache-2.0
 *
 * A second kind of page beside pvclock's, under another sequence protocol: a sequence that is 0 while the page is busy, as
 * Hyper-V's is, with the VM's line under it so that readings of both kinds can be compared to the ns.  And the same kind
 * with one defect each, to show that the stress test sees them.
 */
#ifndef SEQUENCE_PAGE_H
#define SEQUENCE_PAGE_H

#include <stdlib.h>
#include <string.h>

#include "pvclock_publish.h"

struct sequence_page {
	uint32_t sequence; /* counts publishes; 0: busy */
	struct pvclock_vcpu_time_info line;
};

/* The pages of a set, and the host's own count, which is never read back from them. */
struct sequence_pages {
	struct sequence_page *pages;
	size_t stride;
	uint32_t sequence;
};

static inline struct sequence_page *sequence_page_at(const struct sequence_pages *pages, size_t index)
{
	return (struct sequence_page *)((uint8_t *)pages->pages + index * pages->stride);
}

static void sequence_store(struct pvclock_page_set *set, uint32_t sequence)
{
	for (size_t i = 0; i < set->count; i++)
		pvclock_store32(&sequence_page_at(set->pages, i)->sequence, sequence);
}

static void sequence_touch(struct pvclock_page_set *set)
{
	for (size_t i = 0; i < set->count; i++)
		pvclock_touch(sequence_page_at(set->pages, i));
}

static void sequence_mark_busy(struct pvclock_page_set *set)
{
	sequence_store(set, 0);
}

static void sequence_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	for (size_t i = 0; i < set->count; i++) {
		struct pvclock_target target = { .page = &sequence_page_at(set->pages, i)->line, .in_guest = 1 };

		pvclock_write_payload(&target, update->anchor);
	}
}

static void sequence_release(struct pvclock_page_set *set)
{
	struct sequence_pages *pages = set->pages;

	sequence_store(set, ++pages->sequence);
}

/* ---- With a defect. ---- */

static void leave_alone(struct pvclock_page_set *set)
{
	(void)set;
}

/* The mark comes after A, with the line: a reader may trust the old page when its break point is over. */
static void sequence_mark_and_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	sequence_mark_busy(set);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	sequence_write(set, update);
}

/* The release comes with the line, before B: a reader trusts the new page before its break point. */
static void sequence_write_and_release(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	sequence_write(set, update);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	sequence_release(set);
}

static const struct sequence_kind {
	const char *name;
	struct pvclock_page_kind kind;
} sequence_kinds[] = {
	{ "sequence", { NULL, sequence_touch, sequence_mark_busy, NULL, sequence_write, sequence_release } },
	{ "busy_after_a", { NULL, sequence_touch, leave_alone, NULL, sequence_mark_and_write, sequence_release } },
	{ "released_before_b",
	  { NULL, sequence_touch, sequence_mark_busy, NULL, sequence_write_and_release, leave_alone } },
};

/* NULL if there is none of that name. */
static inline const struct pvclock_page_kind *sequence_kind_named(const char *name)
{
	for (size_t i = 0; i < sizeof sequence_kinds / sizeof *sequence_kinds; i++)
		if (strcmp(sequence_kinds[i].name, name) == 0)
			return &sequence_kinds[i].kind;
	return NULL;
}

#endif
