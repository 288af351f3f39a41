/* SPDX-License-Identifier: Apache-2.0
 *
 * One publish on a counter that misbehaves while the publish waits for its break point.  Prints one JSON object.
 *
 *   publish_wait steady|back|stands|late
 *
 * steady: goes on.  back: reads less by far more than the margin.  stands: never moves again.  late: reads less, but
 * within the margin, as on another CPU, and goes on.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "pvclock_publish.h"

#define BEGIN_TSC UINT64_C(1000000)
#define MARGIN 1000
#define STEP 300 /* ticks from one read to the next */
#define BACK UINT64_C(500000)

struct script {
	const char *name;
	uint64_t reads;
};

static uint64_t read_script(void *context)
{
	struct script *script = context;
	uint64_t read = script->reads++;

	if (strcmp(script->name, "stands") == 0 || read == 0)
		return BEGIN_TSC;
	if (strcmp(script->name, "back") == 0)
		return BEGIN_TSC - BACK + read * STEP;
	if (strcmp(script->name, "late") == 0)
		return BEGIN_TSC - MARGIN + (read - 1) * STEP;
	return BEGIN_TSC + read * STEP;
}

int main(int argc, char **argv)
{
	_Alignas(32) uint8_t pages[2 * 32] = { 0 };
	struct pvclock_target targets[2] = { { .page = pages }, { .page = pages + 32 } };
	struct pvclock_line line = { .tsc = BEGIN_TSC, .ns = 5000000000, .num = 1, .den = 1 };
	struct pvclock_anchor anchor = { 0 };
	struct script script = { .name = argc > 1 ? argv[1] : "steady" };
	struct pvclock_counter counter = { read_script, &script, MARGIN };
	struct pvclock_scale scale;
	struct pvclock_anchor_params params;
	uint64_t break_tsc;
	int status;

	if (pvclock_time_scale(PVCLOCK_NS_PER_SEC, PVCLOCK_NS_PER_SEC, &scale) != 0)
		return 1;
	params = pvclock_anchor_params_of(scale);
	status = pvclock_publish(targets, 2, &line, &params, &counter, &anchor, &break_tsc);
	printf("{\"status\": %d, \"versions\": [%" PRIu32 ", %" PRIu32 "], \"ticks_to_break\": %" PRIu64
	       ", \"shown_at_break_ns\": %" PRIu64 ", \"reads\": %" PRIu64 "}\n",
	       status, pvclock_load32(pages), pvclock_load32(pages + 32), break_tsc - BEGIN_TSC,
	       pvclock_anchor_read(&anchor, break_tsc), script.reads);
	return 0;
}
