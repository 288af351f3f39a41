/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages to publish to, and all that a publish needs besides: what TimePages holds in the product.
 */
#ifndef PUBLISHED_H
#define PUBLISHED_H

#include <stdbool.h>
#include <stdlib.h>

#include "pvclock_publish.h"

/* The memory that a benchmark lends: `pages` pages, `stride` bytes apart. */
struct layout {
	uint8_t *memory;
	size_t pages;
	size_t stride;
};

/* The line and scale that the product would publish. */
struct rate_of_time {
	struct pvclock_line line;
	struct pvclock_scale scale;
};

struct published {
	struct pvclock_target *targets;
	size_t pages;
	struct pvclock_line line;
	struct pvclock_anchor_params params;
	struct pvclock_counter counter;
	struct pvclock_anchor anchor;
};

/* False without memory; else give it back with free(ret->targets). */
static inline bool published_make(const struct layout *layout, const struct rate_of_time *time, struct published *ret)
{
	struct published made = {
		.targets = calloc(layout->pages, sizeof(struct pvclock_target)),
		.pages = layout->pages,
		.line = time->line,
		.params = pvclock_anchor_params_of(time->scale),
		.counter = pvclock_host_counter(),
	};

	*ret = made;
	if (!made.targets)
		return false;
	for (size_t i = 0; i < layout->pages; i++) {
		made.targets[i].page = layout->memory + i * layout->stride;
		made.targets[i].in_guest = 1;
	}
	return true;
}

static inline void published_publish(struct published *published)
{
	uint64_t break_tsc;

	pvclock_publish(published->targets, published->pages, &published->line, &published->params, &published->counter,
			&published->anchor, &break_tsc);
}

#endif
