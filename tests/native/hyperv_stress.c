/* SPDX-License-Identifier: Apache-2.0
 *
 * One thread publishes a clock as fast as it can into a page of each kind, at another rate each time; others read
 * Hyper-V's page, its counter and pvclock's page in turn, and count what no guest may ever see.  Prints one JSON object.
 *
 *   hyperv_stress [--kind NAME] [--reader linux|windows|unfenced|preempted] [--readers N] [--seconds S]
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "broken_hyperv.h"
#include "hyperv_reader.h"
#include "stress_run.h"

#define CACHE_LINE 64
#define MAX_READERS 64
#define TSC_HZ UINT64_C(2596132000)
#define START_NS (5 * PVCLOCK_NS_PER_SEC)

/* Readings of the two kinds are of one timeline: Hyper-V's within 2 units of it, pvclock's within 2 ns and the ticks that
 * its shift cuts.
 */
#define KINDS_APART_NS (2 * HYPERV_UNIT_NS + 8)

struct stress {
	const struct hyperv_kind *kind;
	hyperv_attempt_fn *attempt;
	size_t readers;
	double seconds;
	struct pvclock_counter counter;
	struct hyperv_clock clock;
	struct break_log log; /* a generation is a sequence: the first is 1 */
	_Alignas(4096) struct hyperv_tsc_page hyperv_page;
	_Alignas(4096) struct pvclock_vcpu_time_info pvclock_page;
	_Alignas(CACHE_LINE) _Atomic bool stop;
	_Alignas(CACHE_LINE) _Atomic uint64_t last_units; /* the greatest that any finished read returned */
	_Alignas(CACHE_LINE) _Atomic uint64_t last_ns;
};

/* ---- Readers. ---- */

struct counts {
	uint64_t page_reads;
	uint64_t counter_reads;
	uint64_t pvclock_reads;
	uint64_t backward_own;   /* less than the thread's own last, of Hyper-V's page or counter */
	uint64_t backward_cross; /* less than the greatest that any of those returned before this one began */
	uint64_t backward_kinds; /* less than another kind's, by more than the two are apart */
	uint64_t torn;           /* two payloads under one sequence */
	uint64_t late_old;       /* generations read at a moment after their successor's break point */
	uint64_t early_new;      /* generations read at a moment before their own break point */
	uint64_t generations;    /* checked for the latter two */
};

struct span {
	uint64_t generation; /* 0: none */
	uint64_t first_tsc;
	uint64_t last_tsc;
};

struct reader {
	_Alignas(CACHE_LINE) struct stress *stress;
	pthread_t thread;
	uint64_t last_units;
	struct span now;
	struct span before;
	struct counts counts;
};

static void check_span(struct reader *me, const struct span *span)
{
	uint64_t own, next;

	if (span->generation == 0 || !find_breaks(&me->stress->log, span->generation, &own, &next))
		return;
	me->counts.generations++;
	me->counts.late_old += (int64_t)(next - span->last_tsc) < 0;
	me->counts.early_new += (int64_t)(span->first_tsc - own) < 0;
}

/* A generation is checked when the reader has seen two later ones: its successor's break point is logged by then. */
static void follow_generation(struct reader *me, const struct page_reading *reading)
{
	if (reading->sequence != me->now.generation) {
		check_span(me, &me->before);
		me->before = me->now;
		me->now.generation = reading->sequence;
		me->now.first_tsc = reading->tsc;
	}
	me->now.last_tsc = reading->tsc;
}

/* Look again: if the sequence is still that of the reading, both payloads are of one publish. */
static void check_torn(struct reader *me, const struct page_reading *reading)
{
	const volatile struct hyperv_tsc_page *page = &me->stress->hyperv_page;
	uint64_t scale = page->scale;
	int64_t offset = page->offset;

	compiler_barrier();
	if (page->sequence == reading->sequence && (scale != reading->scale || offset != reading->offset))
		me->counts.torn++;
}

static void raise_greatest(_Atomic uint64_t *greatest, uint64_t value)
{
	uint64_t seen = atomic_load(greatest);

	while (seen < value && !atomic_compare_exchange_weak(greatest, &seen, value))
		continue;
}

/* least_units, least_ns: what the shared greatest were before the read began. */
static void check_units(struct reader *me, uint64_t least_units, uint64_t least_ns, uint64_t units)
{
	me->counts.backward_own += units < me->last_units;
	me->counts.backward_cross += units < least_units;
	me->counts.backward_kinds += units * HYPERV_UNIT_NS + KINDS_APART_NS < least_ns;
	me->last_units = units;
	raise_greatest(&me->stress->last_units, units);
}

/* The counter MSR's exit: asleep until the window is over. */
static void read_counter(struct reader *me, uint64_t least_units, uint64_t least_ns)
{
	struct stress *stress = me->stress;
	uint64_t units;

	while (hyperv_counter_read(&stress->clock, &stress->counter, &units) != 0)
		sched_yield();
	me->counts.counter_reads++;
	check_units(me, least_units, least_ns, units);
}

static void read_page(struct reader *me, uint64_t least_units, uint64_t least_ns)
{
	struct page_reading reading;
	enum attempt attempt;

	do {
		attempt = me->stress->attempt(&me->stress->hyperv_page, &reading);
	} while (attempt == CHANGED && !atomic_load_explicit(&me->stress->stop, memory_order_relaxed));
	if (attempt == INVALID)
		read_counter(me, least_units, least_ns);
	if (attempt != VALID)
		return;
	me->counts.page_reads++;
	check_units(me, least_units, least_ns, page_reading_units(&reading));
	check_torn(me, &reading);
	follow_generation(me, &reading);
}

static void read_pvclock(struct reader *me, uint64_t least_units)
{
	struct stress *stress = me->stress;
	struct pvclock_counter counter = pvclock_host_counter();
	struct pvclock_reading reading;

	if (pvclock_read(&stress->pvclock_page, 0, &counter, 1000, &reading) != 0)
		return;
	me->counts.pvclock_reads++;
	me->counts.backward_kinds += reading.ns + KINDS_APART_NS < least_units * HYPERV_UNIT_NS;
	raise_greatest(&stress->last_ns, reading.ns);
}

static void *run_reader(void *context)
{
	struct reader *me = context;
	struct stress *stress = me->stress;

	for (unsigned int turn = 0; !atomic_load_explicit(&stress->stop, memory_order_relaxed); turn++) {
		uint64_t least_units = atomic_load(&stress->last_units), least_ns = atomic_load(&stress->last_ns);

		if (turn % 8 == 0)
			read_pvclock(me, least_units);
		else if (turn % 8 == 4)
			read_counter(me, least_units, least_ns);
		else
			read_page(me, least_units, least_ns);
	}
	return NULL;
}

static void start_reader(struct reader *reader, struct stress *stress, size_t index)
{
	*reader = (struct reader){ .stress = stress };
	if (pthread_create(&reader->thread, NULL, run_reader, reader) != 0) {
		perror("pthread_create");
		exit(1);
	}
	pin_thread(reader->thread, 1 + index);
}

static void add_counts(struct counts *sum, const struct counts *counts)
{
	sum->page_reads += counts->page_reads;
	sum->counter_reads += counts->counter_reads;
	sum->pvclock_reads += counts->pvclock_reads;
	sum->backward_own += counts->backward_own;
	sum->backward_cross += counts->backward_cross;
	sum->backward_kinds += counts->backward_kinds;
	sum->torn += counts->torn;
	sum->late_old += counts->late_old;
	sum->early_new += counts->early_new;
	sum->generations += counts->generations;
}

/* ---- The writer. ---- */

#define MAX_DILATION 10

struct writer {
	struct stress *stress;
	struct pvclock_target target;
	struct pvclock_line timeline;
	struct pvclock_anchor anchor;
	uint64_t random;
	uint64_t dilation; /* the present rate's number */

	uint64_t publishes;
	int64_t least_step_units;
	int64_t most_step_units;
	double most_off_units; /* page against timeline, at a break point */
};

static uint64_t publish(struct writer *me, uint64_t num, uint64_t den)
{
	struct stress *stress = me->stress;
	struct pvclock_page_set sets[] = {
		{ &pvclock_page_kind_pvclock, &me->target, 1, 0 },
		{ &stress->kind->kind, &stress->clock, 1, 0 },
	};
	struct pvclock_anchor_params params;
	struct pvclock_scale scale;
	uint64_t break_tsc = 0;

	stress->clock.num = num;
	stress->clock.den = den;
	if (pvclock_time_scale_of_rate(num, den, 0, &scale) != 0)
		exit(1);
	params = pvclock_anchor_params_of(scale);
	if (pvclock_publish_at(sets, 2, &me->timeline, &params, &stress->counter, &me->anchor, &break_tsc, 0) != 0) {
		fprintf(stderr, "the TSC went back or stood still during a publish\n");
		exit(1);
	}
	me->publishes++;
	log_break(&stress->log, stress->clock.sequence, break_tsc);
	return break_tsc;
}

static void account_off(struct writer *me, uint64_t units)
{
	double off = (double)(int64_t)(units - me->timeline.ns / HYPERV_UNIT_NS) -
		     (double)(me->timeline.ns % HYPERV_UNIT_NS) / HYPERV_UNIT_NS;

	if (off < 0)
		off = -off;
	if (off > me->most_off_units)
		me->most_off_units = off;
}

static void publish_next(struct writer *me)
{
	uint64_t dilation = (me->dilation + 1 + next_random(&me->random) % (2 * MAX_DILATION - 2)) % (2 * MAX_DILATION - 1);
	uint64_t faster = dilation < MAX_DILATION ? dilation + 1 : 1;
	uint64_t slower = dilation < MAX_DILATION ? 1 : dilation - MAX_DILATION + 2;
	struct hyperv_line old = me->stress->clock.line;
	uint64_t num = PVCLOCK_NS_PER_SEC * faster, den = TSC_HZ * slower;
	uint64_t break_tsc = publish(me, num, den);
	uint64_t old_units = hyperv_line_read(&old, break_tsc);
	uint64_t new_units = hyperv_line_read(&me->stress->clock.line, break_tsc);
	int64_t step_units = (int64_t)(new_units - old_units);

	me->timeline = pvclock_line_at(me->timeline, break_tsc);
	account_off(me, old_units);
	account_off(me, new_units);
	if (step_units < me->least_step_units)
		me->least_step_units = step_units;
	if (step_units > me->most_step_units)
		me->most_step_units = step_units;
	me->timeline = pvclock_line_turn(me->timeline, num, den);
	me->dilation = dilation;
}

static void start_writer(struct writer *me, struct stress *stress)
{
	*me = (struct writer){ .stress = stress, .random = 0x9e3779b97f4a7c15, .least_step_units = INT64_MAX,
			       .most_step_units = INT64_MIN };
	me->target = (struct pvclock_target){ .page = &stress->pvclock_page, .flags = PVCLOCK_TSC_STABLE_BIT };
	me->timeline = (struct pvclock_line){ pvclock_rdtsc_ordered(), START_NS, 0, PVCLOCK_NS_PER_SEC, TSC_HZ };
	stress->counter = pvclock_host_counter();
	if (stress->kind->has_bare_rdtsc)
		stress->counter = (struct pvclock_counter){ bare_rdtsc, NULL, 0 };
	stress->clock = (struct hyperv_clock){ .page = &stress->hyperv_page, .can_read_tsc = 1, .is_new = 1 };
	me->timeline = pvclock_line_at(me->timeline, publish(me, PVCLOCK_NS_PER_SEC, TSC_HZ));
}

/* ---- The run. ---- */

static void report(const struct stress *stress, const struct writer *writer, const struct counts *counts)
{
#define FIELD(name, format, value) printf(",\n \"" name "\": " format, (value))
#define COUNT(name, value) FIELD(name, "%llu", (unsigned long long)(value))
	printf("{\"kind\": \"%s\"", stress->kind->name);
	COUNT("page_reads", counts->page_reads);
	COUNT("counter_reads", counts->counter_reads);
	COUNT("pvclock_reads", counts->pvclock_reads);
	COUNT("backward_own", counts->backward_own);
	COUNT("backward_cross", counts->backward_cross);
	COUNT("backward_kinds", counts->backward_kinds);
	COUNT("torn", counts->torn);
	COUNT("late_old", counts->late_old);
	COUNT("early_new", counts->early_new);
	COUNT("generations", counts->generations);
	COUNT("publishes", writer->publishes);
	FIELD("least_step_units", "%lld", (long long)writer->least_step_units);
	FIELD("most_step_units", "%lld", (long long)writer->most_step_units);
	FIELD("most_off_units", "%.3f}\n", writer->most_off_units);
}

static void run(struct stress *stress)
{
	static struct reader readers[MAX_READERS];
	struct counts sum = { 0 };
	struct writer writer;
	uint64_t end_tsc = pvclock_rdtsc_ordered() + (uint64_t)(stress->seconds * (double)TSC_HZ);

	start_writer(&writer, stress);
	for (size_t i = 0; i < stress->readers; i++)
		start_reader(&readers[i], stress, i);
	pin_thread(pthread_self(), 0); /* last: the readers' CPUs are taken from this thread's */
	while ((int64_t)(pvclock_rdtsc_ordered() - end_tsc) < 0)
		publish_next(&writer);
	atomic_store(&stress->stop, true);
	for (size_t i = 0; i < stress->readers; i++) {
		pthread_join(readers[i].thread, NULL);
		add_counts(&sum, &readers[i].counts);
	}
	report(stress, &writer, &sum);
}

static _Noreturn void refuse(const char *message)
{
	fprintf(stderr, "hyperv_stress: %s; see the top of its source\n", message);
	exit(2);
}

static void parse_options(struct stress *stress, int argc, char **argv)
{
	static const struct option names[] = {
		{ "kind", required_argument, NULL, 'k' },    { "reader", required_argument, NULL, 'r' },
		{ "readers", required_argument, NULL, 'R' }, { "seconds", required_argument, NULL, 's' },
		{ NULL, 0, NULL, 0 },
	};
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (option) {
		case 'k': stress->kind = hyperv_kind_named(optarg); break;
		case 'r': stress->attempt = hyperv_attempt_named(optarg); break;
		case 'R': stress->readers = strtoull(optarg, NULL, 0); break;
		case 's': stress->seconds = strtod(optarg, NULL); break;
		default: refuse("unknown option");
		}
	}
	if (stress->kind == NULL)
		refuse("no such --kind");
	if (stress->attempt == NULL)
		refuse("no such --reader");
	if (stress->readers < 1 || stress->readers > MAX_READERS)
		refuse("--readers is 1 to 64");
}

int main(int argc, char **argv)
{
	static struct stress stress = { .attempt = attempt_linux, .readers = 2, .seconds = 0.5 };

	stress.kind = hyperv_kind_named("product");
	parse_options(&stress, argc, argv);
	run(&stress);
	return 0;
}
