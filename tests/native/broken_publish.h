/* SPDX-License-Identifier: Apache-2.0
 *
 * pvclock_publish() and copies of it with one defect each, to show that the stress test sees every one of them.
 */
#ifndef BROKEN_PUBLISH_H
#define BROKEN_PUBLISH_H

#include <string.h>

#include "pvclock_publish.h"

#define MAX_PAGES 4096

/* The signature of pvclock_publish(). */
typedef int publish_fn(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
		       const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
		       struct pvclock_anchor *anchor, uint64_t *break_tsc);

static inline void make_odd(struct pvclock_target *targets, size_t count)
{
	for (size_t i = 0; i < count; i++)
		pvclock_touch(targets[i].page);
	for (size_t i = 0; i < count; i++) {
		targets[i].odd_version = pvclock_version_odd(pvclock_load32(targets[i].page));
		pvclock_store32(targets[i].page, targets[i].odd_version);
	}
}

static inline void write_payloads(struct pvclock_target *targets, size_t count, const struct pvclock_anchor *anchor)
{
	for (size_t i = 0; i < count; i++)
		pvclock_write_payload(&targets[i], anchor);
}

/* Begins where pvclock_publish() has the new line; `odd_tsc` is what it read with the odd versions in place. */
static inline int finish(struct pvclock_target *targets, size_t count, const struct pvclock_counter *counter,
			 const struct pvclock_anchor *anchor, uint64_t odd_tsc)
{
	int status;

	write_payloads(targets, count, anchor);
	status = pvclock_counter_wait(counter, odd_tsc, counter->margin_ticks);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	for (size_t i = 0; i < count; i++)
		pvclock_store32(targets[i].page, targets[i].odd_version + 1u);
	return status;
}

static inline struct pvclock_counter without_margin(const struct pvclock_counter *counter)
{
	struct pvclock_counter no_margin = *counter;

	no_margin.margin_ticks = 0;
	return no_margin;
}

/* The versions stay even while the payloads change: a reader takes a mixture of two lines for good. */
static int publish_no_odd_phase(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
				struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	uint64_t odd_tsc;
	int status;

	for (size_t i = 0; i < count; i++)
		pvclock_touch(targets[i].page);
	odd_tsc = pvclock_counter_read_after_stores(counter);
	*break_tsc = odd_tsc + counter->margin_ticks;
	*anchor = pvclock_reanchor(timeline, anchor, params, *break_tsc);
	write_payloads(targets, count, anchor);
	status = pvclock_counter_wait(counter, odd_tsc, counter->margin_ticks);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	for (size_t i = 0; i < count; i++)
		pvclock_store32(targets[i].page, pvclock_load32(targets[i].page) + 2u);
	return status;
}

/* The TSC is read while the odd versions are still in the store buffer, where no other CPU sees them, and readers go
 * on trusting the old pages after A.  The margin is left out: it hides that nearly always (a few readings in a million
 * are later than it).  publish_no_margin(), which has the fences and no margin, is the control.
 */
static int publish_bare_rdtsc(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
			      const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
			      struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	struct pvclock_counter no_margin = without_margin(counter);

	make_odd(targets, count);
	*break_tsc = __builtin_ia32_rdtsc();
	*anchor = pvclock_reanchor(timeline, anchor, params, *break_tsc);
	return finish(targets, count, &no_margin, anchor, *break_tsc);
}

/* The break point is A itself, no margin: a guest whose last load overtook its rdtsc has an old reading from later. */
static int publish_no_margin(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
			     const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
			     struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	struct pvclock_counter no_margin = without_margin(counter);

	return pvclock_publish(targets, count, timeline, params, &no_margin, anchor, break_tsc);
}

/* tsc_timestamp is the break point: a guest whose TSC is behind computes with a negative difference. */
static int publish_timestamp_now(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				 const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
				 struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	uint64_t odd_tsc;

	make_odd(targets, count);
	odd_tsc = pvclock_counter_read_after_stores(counter);
	*break_tsc = odd_tsc + counter->margin_ticks;
	*anchor = pvclock_reanchor(timeline, anchor, params, *break_tsc);
	anchor->system_time = pvclock_anchor_read(anchor, *break_tsc);
	anchor->tsc_timestamp = *break_tsc;
	return finish(targets, count, counter, anchor, odd_tsc);
}

/* Every page has a break point of its own, and from one to the next the two rates run apart. */
static int publish_one_page_at_a_time(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				      const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
				      struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	static struct pvclock_anchor page_anchors[MAX_PAGES];
	int status = 0;

	for (size_t i = 0; i < count; i++)
		status |= pvclock_publish(&targets[i], 1, timeline, params, counter, &page_anchors[i], break_tsc);
	*anchor = page_anchors[count - 1];
	return status;
}

static const struct publisher {
	const char *name;
	publish_fn *publish;
} publishers[] = {
	{ "two_phase", pvclock_publish },
	{ "no_odd_phase", publish_no_odd_phase },
	{ "bare_rdtsc", publish_bare_rdtsc },
	{ "no_margin", publish_no_margin },
	{ "timestamp_now", publish_timestamp_now },
	{ "one_page_at_a_time", publish_one_page_at_a_time },
};

/* NULL if there is none of that name. */
static inline publish_fn *publisher_named(const char *name)
{
	for (size_t i = 0; i < sizeof publishers / sizeof *publishers; i++)
		if (strcmp(publishers[i].name, name) == 0)
			return publishers[i].publish;
	return NULL;
}

#endif
