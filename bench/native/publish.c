/* SPDX-License-Identifier: Apache-2.0
 *
 * The twin of republish_in_turn() and refresh(): pvclock_publish() in a loop, and nothing else.
 */
#include "published.h"

int publish_loop(const struct layout *layout, const struct rate_of_time *time, uint64_t publishes)
{
	struct published published;

	if (!published_make(layout, time, &published))
		return -1;
	for (uint64_t i = 0; i < publishes; i++)
		published_publish(&published);
	free(published.targets);
	return 0;
}
