/* SPDX-License-Identifier: Apache-2.0
 *
 * Hyper-V's page kind in batches, for tests/unit/test_hyperv_page.py to hold against tests/oracle.py: numbers in, one
 * line of standard input a case, and numbers out.
 *
 *   hyperv_page scale      num den                          units and scale of that rate
 *   hyperv_page sequence   sequence                         the next one
 *   hyperv_page read       scale offset tsc                 what a guest reads
 *   hyperv_page publish    tsc tsc_offset ns rem den, units fraction scale of the old line there, num den
 *                                                           the page's sequence, scale, offset, and what the counter reads
 *
 * Without input:
 *
 *   hyperv_page changes real|simulated TSC_OFFSET|young CHANGES
 *                                                           as many changes of the rate, each followed by a refresh;
 *                                                           young: the guest's TSC begins at 0
 *   hyperv_page order                                       what readers of both kinds find at each look at the counter
 *   hyperv_page carried                                     a line whose scale carries a remainder, left alone
 *   hyperv_page validity                                    a page that is placed, distrusted, trusted, moved, restored
 *   hyperv_page wrap                                        a guest TSC that begins anew at 2^64
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hyperv_publish.h"

#define U64 "%" SCNu64
#define HZ UINT64_C(2596132000)

static _Alignas(4096) uint8_t hyperv_page[HYPERV_PAGE_BYTES];
static _Alignas(32) uint8_t pvclock_page[32];

static uint64_t page_scale(void)
{
	return pvclock_load64(hyperv_page + 8);
}

static int64_t page_offset(void)
{
	return (int64_t)pvclock_load64(hyperv_page + 16);
}

/* ---- A counter that stands still while it is read. ---- */

static uint64_t read_value(void *context)
{
	return *(const uint64_t *)context;
}

static struct pvclock_counter simulated_counter(uint64_t *value)
{
	struct pvclock_counter counter = { read_value, value, 0 };

	return counter;
}

/* ---- One VM's clock, in a page of each kind. ---- */

struct vm {
	struct pvclock_counter counter;
	struct pvclock_line line;
	struct pvclock_anchor_params params;
	struct pvclock_anchor anchor;
	struct pvclock_target target;
	struct hyperv_clock clock;
	uint64_t break_tsc;
};

static void set_rate(struct vm *vm, uint64_t num, uint64_t den)
{
	struct pvclock_scale scale;

	if (pvclock_time_scale_of_rate(num, den, 0, &scale) != 0)
		exit(1);
	vm->params = pvclock_anchor_params_of(scale);
	vm->clock.num = num;
	vm->clock.den = den;
}

static void publish(struct vm *vm, int again)
{
	struct pvclock_page_set sets[] = {
		{ &pvclock_page_kind_pvclock, &vm->target, 1, 0 },
		{ &pvclock_page_kind_hyperv, &vm->clock, 1, 0 },
	};

	if (pvclock_publish_at(sets, 2, &vm->line, &vm->params, &vm->counter, &vm->anchor, &vm->break_tsc, again) != 0)
		exit(1);
}

static void begin(struct vm *vm, struct pvclock_counter counter, uint64_t tsc_offset)
{
	memset(vm, 0, sizeof *vm);
	vm->counter = counter;
	vm->target = (struct pvclock_target){ pvclock_page, tsc_offset, 0, PVCLOCK_TSC_STABLE_BIT, 0 };
	vm->clock.page = hyperv_page;
	vm->clock.tsc_offset = tsc_offset;
	vm->clock.can_read_tsc = 1;
	vm->clock.is_new = 1;
	vm->line = (struct pvclock_line){ pvclock_counter_read(&counter), 5000000042, 0, 1000000000, HZ };
	set_rate(vm, 1000000000, HZ);
}

static uint64_t counter_units(const struct vm *vm)
{
	uint64_t units;

	return hyperv_counter_read(&vm->clock, &vm->counter, &units) == 0 ? units : 0;
}

/* ---- Batches. ---- */

static void batch_scale(void)
{
	uint64_t num, den;

	while (scanf(U64 U64, &num, &den) == 2) {
		pvclock_u128 rate = pvclock_fixed_rate(num, den, HYPERV_UNIT_NS);

		printf("%" PRIu64 " %" PRIu64 "\n", (uint64_t)(rate >> 64), (uint64_t)rate);
	}
}

static void batch_sequence(void)
{
	uint32_t sequence;

	while (scanf("%" SCNu32, &sequence) == 1)
		printf("%" PRIu32 "\n", hyperv_sequence_after(sequence));
}

static void batch_read(void)
{
	uint64_t scale, offset, tsc = 0;
	struct pvclock_counter counter = simulated_counter(&tsc);
	struct hyperv_reading reading;

	pvclock_store32(hyperv_page, 7);
	while (scanf(U64 U64 U64, &scale, &offset, &tsc) == 3) {
		pvclock_store64(hyperv_page + 8, scale);
		pvclock_store64(hyperv_page + 16, offset);
		if (hyperv_read(hyperv_page, 0, &counter, 1, &reading) != 0 || reading.tsc != tsc)
			exit(1);
		printf("%" PRIu64 "\n", reading.units);
	}
}

/* One change of the rate, from a given old line. */
static void batch_publish(void)
{
	struct pvclock_line line = { 0 };
	struct hyperv_line old = { 0 };
	uint64_t tsc, tsc_offset, num, den;

	while (scanf(U64 U64 U64 U64 U64 U64 U64 U64 U64 U64, &tsc, &tsc_offset, &line.ns, &line.rem, &line.den, &old.units,
		     &old.fraction, &old.scale, &num, &den) == 10) {
		struct vm vm;

		begin(&vm, simulated_counter(&tsc), tsc_offset);
		line.tsc = old.tsc = tsc;
		line.num = line.den;
		vm.line = line;
		vm.clock.num = num;
		vm.clock.den = den;
		vm.clock.line = old;
		vm.clock.line_num = 1;
		vm.clock.line_den = UINT64_MAX; /* another rate than any new one */
		publish(&vm, 0);
		printf("%" PRIu32 " %" PRIu64 " %" PRId64 " %" PRIu64 "\n", pvclock_load32(hyperv_page), page_scale(),
		       page_offset(), counter_units(&vm));
	}
}

/* ---- Many changes. ---- */

static uint64_t next_random(void)
{
	static uint64_t state = 0x9e3779b97f4a7c15;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void print_pages(const struct vm *vm)
{
	const struct pvclock_vcpu_time_info *info = (const struct pvclock_vcpu_time_info *)pvclock_page;

	printf("%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu32 " %" PRIu64 " %" PRId64 " %" PRIu64 " %" PRIu64 " %" PRIu32
	       " %d %" PRIu64 "\n", vm->break_tsc, vm->clock.num, vm->clock.den, pvclock_load32(hyperv_page), page_scale(),
	       page_offset(), info->tsc_timestamp, info->system_time, info->tsc_to_system_mul, info->tsc_shift,
	       hyperv_line_read(&vm->clock.line, vm->break_tsc));
}

/* Rates from 1/10 to 10; the timeline turns at the break point. */
static void change_rate(struct vm *vm)
{
	uint64_t num = (1 + next_random() % 10) * 1000000000, den = (1 + next_random() % 10) * HZ;

	set_rate(vm, num, den);
	publish(vm, 0);
	vm->line = pvclock_line_turn(pvclock_line_at(vm->line, vm->break_tsc), num, den);
	print_pages(vm);
}

static void run_changes(const char *counter_name, const char *offset, unsigned long changes)
{
	uint64_t tsc = UINT64_C(1000000000000);
	int is_real = strcmp(counter_name, "real") == 0;
	struct pvclock_counter counter = is_real ? pvclock_host_counter() : simulated_counter(&tsc);
	int is_young = strcmp(offset, "young") == 0;
	uint64_t tsc_offset = is_young ? -pvclock_counter_read(&counter) : (uint64_t)strtoll(offset, NULL, 0);
	struct vm vm;

	begin(&vm, counter, tsc_offset);
	publish(&vm, 0);
	vm.line = pvclock_line_at(vm.line, vm.break_tsc);
	printf("%" PRIu64 " %" PRId64 "\n", vm.line.ns, (int64_t)tsc_offset);
	print_pages(&vm);
	for (unsigned long i = 0; i < changes; i++) {
		tsc += next_random() % 10000;
		change_rate(&vm);
		tsc += next_random() % 10000;
		publish(&vm, 0);
		print_pages(&vm);
	}
}

/* A line that carries half of what it may, or more, and 300 s of refreshes; after each: does it carry, the page's sequence,
 * how far its line is off the timeline, in 2^-64 units rounded down to 2^-32, and by how much the reading changed there.
 */
static void run_carried(void)
{
	uint64_t tsc = UINT64_C(1000000000000);
	struct vm vm;

	begin(&vm, simulated_counter(&tsc), -UINT64_C(690000000000)); /* 119 s old */
	publish(&vm, 0);
	for (int i = 0; vm.clock.carried <= vm.clock.line.scale >> (HYPERV_CARRY_SHIFT + 1); i++) {
		uint64_t num = 1000000000 + next_random() % 1000;

		if (i == 100000)
			exit(1);
		tsc += next_random() % 10000;
		set_rate(&vm, num, HZ);
		publish(&vm, 0);
		vm.line = pvclock_line_turn(pvclock_line_at(vm.line, vm.break_tsc), num, HZ);
	}
	for (int i = 0; i < 300; i++) {
		uint64_t shown = hyperv_line_read(&vm.clock.line, tsc);

		publish(&vm, 0);
		printf("%d %" PRIu32 " %" PRId64 " %" PRIu64 "\n", vm.clock.carried != 0, pvclock_load32(hyperv_page),
		       (int64_t)((hyperv_line_fixed(&vm.clock.line, tsc) -
				  pvclock_line_fixed(vm.line, tsc, HYPERV_UNIT_NS)) >> 32),
		       hyperv_line_read(&vm.clock.line, tsc) - shown);
		tsc += HZ;
	}
}

/* ---- The order of marks, looks at the counter, and releases. ---- */

struct looks {
	uint64_t tsc;
	const struct vm *vm;
	int is_publishing;
};

/* Is each page busy, and has the counter no answer?  Called by the publish itself, so it may not call the counter. */
static uint64_t look(void *context)
{
	struct looks *looks = context;

	looks->tsc += 100;
	if (looks->is_publishing)
		printf("%" PRIu64 " %d %d %d\n", looks->tsc, pvclock_load32(pvclock_page) % 2 == 1,
		       pvclock_load32(hyperv_page) == 0, looks->vm->clock.line_version % 2 == 1);
	return looks->tsc;
}

static void run_order(void)
{
	struct vm vm;
	struct looks looks = { UINT64_C(1000000000000), &vm, 0 };
	struct pvclock_counter counter = { look, &looks, 1000 };

	begin(&vm, counter, 0);
	publish(&vm, 0);
	set_rate(&vm, 3000000000, HZ);
	looks.is_publishing = 1;
	publish(&vm, 0);
	looks.is_publishing = 0;
	printf("%" PRIu64 " %d %d %d\n", vm.break_tsc, pvclock_load32(pvclock_page) % 2 == 1,
	       pvclock_load32(hyperv_page) == 0, vm.clock.line_version % 2 == 1);
}

/* ---- Where the page may be read. ---- */

static void tell(const char *what, const struct vm *vm)
{
	struct hyperv_reading reading = { 0 };
	int status = hyperv_read(hyperv_page, vm->clock.tsc_offset, &vm->counter, 1, &reading);

	printf("%s %" PRIu32 " %d %" PRIu64 " %" PRIu64 "\n", what, pvclock_load32(hyperv_page), status, reading.units,
	       counter_units(vm));
}

static void publish_and_tell(const char *what, struct vm *vm)
{
	publish(vm, 0);
	if (vm->clock.page && pvclock_load32(hyperv_page + 4) != 0)
		exit(1); /* reserved */
	tell(what, vm);
}

static void run_validity(void)
{
	uint64_t tsc = UINT64_C(1000000000000);
	struct vm vm;

	begin(&vm, simulated_counter(&tsc), 12345);
	tell("before", &vm);
	publish_and_tell("placed", &vm);
	tsc += HZ;
	publish_and_tell("refreshed", &vm);
	memset(hyperv_page, 0xa5, 24);
	vm.clock.is_new = 1;
	publish(&vm, 1);
	tell("placed_again", &vm);
	vm.clock.can_read_tsc = 0;
	publish_and_tell("distrusted", &vm);
	tsc += HZ;
	publish_and_tell("still_distrusted", &vm);
	vm.clock.can_read_tsc = 1;
	publish_and_tell("trusted", &vm);
	vm.clock.line_version |= 1; /* as in a child of a fork() within the window */
	publish_and_tell("forked", &vm);
	vm.clock.tsc_offset = 99999;
	publish_and_tell("offset", &vm);
	vm.line.ns += 1000000;
	hyperv_clock_move(&vm.clock, 0, 1000000);
	pvclock_anchor_move(&vm.anchor, 0, 1000000);
	tell("moving", &vm);
	publish_and_tell("moved", &vm);
	tsc += HZ;
	vm.line.tsc += HZ;
	hyperv_clock_move(&vm.clock, HZ, 0);
	publish_and_tell("frozen", &vm);
	set_rate(&vm, 1000, 1);
	publish_and_tell("too_fast", &vm);
	vm.clock = (struct hyperv_clock){ .page = hyperv_page, .num = 1000000000, .den = HZ, .can_read_tsc = 1,
					  .sequence = 0xfffffffe, .least_units = counter_units(&vm) + 1 };
	publish_and_tell("restored", &vm);
	vm.clock.page = NULL;
	vm.clock.tsc_offset = 0;
	publish_and_tell("no_page", &vm);

	/* A line that a page could show as it is: no fraction anywhere. */
	tsc = UINT64_C(1) << 40;
	begin(&vm, simulated_counter(&tsc), 0);
	vm.line = (struct pvclock_line){ tsc, 8000000000, 0, 100, 256 };
	set_rate(&vm, 100, 256);
	vm.clock.can_read_tsc = 0;
	publish_and_tell("whole_but_distrusted", &vm);
	vm.clock.can_read_tsc = 1;
	publish_and_tell("whole", &vm);
	vm.clock.tsc_offset = 256000;
	publish_and_tell("whole_offset", &vm);
	tsc -= 2560; /* another CPU's, which is a little late */
	tell("late", &vm);
}

static void run_wrap(void)
{
	uint64_t tsc = UINT64_C(1000000000000);
	struct vm vm;

	begin(&vm, simulated_counter(&tsc), -tsc - HZ);
	publish_and_tell("near_the_end", &vm);
	tsc += 2 * HZ;
	tell("beyond", &vm);
	publish_and_tell("again", &vm);
	tsc += HZ;
	publish_and_tell("later", &vm);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (strcmp(mode, "scale") == 0)
		batch_scale();
	else if (strcmp(mode, "sequence") == 0)
		batch_sequence();
	else if (strcmp(mode, "read") == 0)
		batch_read();
	else if (strcmp(mode, "publish") == 0)
		batch_publish();
	else if (strcmp(mode, "changes") == 0 && argc == 5)
		run_changes(argv[2], argv[3], strtoul(argv[4], NULL, 0));
	else if (strcmp(mode, "order") == 0)
		run_order();
	else if (strcmp(mode, "validity") == 0)
		run_validity();
	else if (strcmp(mode, "carried") == 0)
		run_carried();
	else if (strcmp(mode, "wrap") == 0)
		run_wrap();
	else
		return 2;
	return 0;
}
