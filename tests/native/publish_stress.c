/* SPDX-License-Identifier: Apache-2.0
 *
 * One thread publishes a clock as fast as it can, at another rate each time; others read it as a guest does and count
 * what no guest may ever see.  Prints one JSON object.
 *
 *   publish_stress [--publisher NAME] [--reader linux|unfenced] [--pages N] [--stride BYTES] [--readers N]
 *                  [--seconds S] [--start-ns NS] [--skew-ticks N] [--tsc-hz HZ]
 *                  [--sequence-pages N] [--sequence-kind NAME]
 *
 * With sequence pages, pvclock_publish_at() publishes them beside the pvclock pages, and each reader goes round all.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "broken_publish.h"
#include "guest_reader.h"
#include "stress_run.h"

#define CACHE_LINE 64
#define MAX_READERS 64

/* ---- What a run is, and what its threads share. ---- */

struct options {
	const char *publisher_name;
	const char *reader_name;
	size_t pages;
	size_t stride;
	size_t readers;
	double seconds;
	uint64_t start_ns;
	uint64_t skew_ticks; /* by how much the first reader's TSC is behind */
	uint64_t tsc_hz;
	size_t sequence_pages;
	const char *sequence_kind_name;
};

struct stress {
	struct options options;
	publish_fn *publish;
	attempt_fn *attempt;
	uint8_t *memory;
	const struct pvclock_page_kind *sequence_kind;
	struct sequence_pages sequence;
	uint64_t start_tsc;
	struct break_log log;
	_Alignas(CACHE_LINE) _Atomic bool stop;
	_Alignas(CACHE_LINE) _Atomic uint64_t last_ns; /* the greatest that any finished read returned */
};

static struct pvclock_vcpu_time_info *page_at(const struct stress *stress, size_t index)
{
	return (struct pvclock_vcpu_time_info *)(stress->memory + index * stress->options.stride);
}

/* The index-th of all pages of both kinds, pvclock's first. */
static struct sequence_page *sequence_at(const struct stress *stress, size_t index)
{
	return index < stress->options.pages ? NULL :
					       sequence_page_at(&stress->sequence, index - stress->options.pages);
}

/* ---- Readers. ---- */

/* What one reader saw of one generation. */
struct span {
	uint64_t generation; /* 0: none */
	uint64_t first_tsc;
	uint64_t last_tsc;
};

struct counts {
	uint64_t reads;
	uint64_t retries;
	uint64_t backward_own;     /* less than the thread's own last */
	uint64_t backward_cross;   /* less than the greatest that any read returned before this one began */
	uint64_t wild;             /* centuries ahead, or far behind */
	uint64_t torn;             /* two payloads under one version */
	uint64_t late_old;         /* generations read at a moment after their successor's break point */
	uint64_t early_new;        /* generations read at a moment before their own break point */
	uint64_t generations;      /* checked for the latter two */
	uint64_t worst_backward_ns;
	int64_t least_old_ticks;   /* from an old reading on to the break point, the least */
	int64_t least_new_ticks;   /* from the break point on to a new reading, the least */
};

struct reader {
	_Alignas(CACHE_LINE) struct stress *stress;
	pthread_t thread;
	size_t page_index;
	uint64_t skew_ticks;
	uint64_t last_ns;
	uint64_t last_tsc;
	struct span now;
	struct span before;
	struct counts counts;
};

static void check_span(struct reader *me, const struct span *span)
{
	struct counts *counts = &me->counts;
	uint64_t own, next;

	if (span->generation == 0 || !find_breaks(&me->stress->log, span->generation, &own, &next))
		return;
	counts->generations++;
	counts->late_old += (int64_t)(next - span->last_tsc) < 0;
	counts->early_new += (int64_t)(span->first_tsc - own) < 0;
	if ((int64_t)(next - span->last_tsc) < counts->least_old_ticks)
		counts->least_old_ticks = (int64_t)(next - span->last_tsc);
	if ((int64_t)(span->first_tsc - own) < counts->least_new_ticks)
		counts->least_new_ticks = (int64_t)(span->first_tsc - own);
}

/* A generation is checked when the reader has seen two later ones: its successor's break point is logged by then. */
static void follow_generation(struct reader *me, const struct reading *reading)
{
	uint64_t generation = reading->version / 2;

	if (generation != me->now.generation) {
		check_span(me, &me->before);
		me->before = me->now;
		me->now.generation = generation;
		me->now.first_tsc = reading->tsc;
	}
	me->now.last_tsc = reading->tsc;
}

/* Copy all fields again: if the version is still that of the reading, both copies are of one publish. */
static void check_torn(struct reader *me, const volatile struct sequence_page *sequence_page,
		       const volatile struct pvclock_vcpu_time_info *page, const struct reading *reading)
{
	struct pvclock_vcpu_time_info again;
	uint32_t version;

	compiler_barrier();
	copy_payload(sequence_page ? &sequence_page->line : page, &again);
	compiler_barrier();
	version = sequence_page ? 2 * sequence_page->sequence : page->version;
	if (version == reading->version && !same_payload(&reading->payload, &again))
		me->counts.torn++;
}

/* Ten seconds, and what the fastest rate makes of the time since: 16 ns a tick is ten times 625 MHz. */
#define WILD_NS (10 * PVCLOCK_NS_PER_SEC)
#define FASTEST_NS_PER_TICK 16

static bool is_wild(const struct reader *me, const struct reading *reading)
{
	int64_t change_ns = (int64_t)(reading->ns - me->last_ns);
	uint64_t most_ns = WILD_NS + (reading->tsc - me->last_tsc) * FASTEST_NS_PER_TICK;

	return change_ns < -(int64_t)WILD_NS || change_ns > (int64_t)most_ns;
}

static void count_backward(struct reader *me, uint64_t *counter, uint64_t least_ns, uint64_t ns)
{
	++*counter;
	if (least_ns - ns > me->counts.worst_backward_ns)
		me->counts.worst_backward_ns = least_ns - ns;
}

/* least_ns: what the shared greatest was before the read began. */
static void check_order(struct reader *me, uint64_t least_ns, const struct reading *reading)
{
	uint64_t seen = least_ns;

	if (is_wild(me, reading)) {
		me->counts.wild++;
		return;
	}
	if (reading->ns < me->last_ns)
		count_backward(me, &me->counts.backward_own, me->last_ns, reading->ns);
	else if (reading->ns < least_ns)
		count_backward(me, &me->counts.backward_cross, least_ns, reading->ns);
	me->last_ns = reading->ns;
	me->last_tsc = reading->tsc;
	while (seen < reading->ns && !atomic_compare_exchange_weak(&me->stress->last_ns, &seen, reading->ns))
		continue;
}

static void *run_reader(void *context)
{
	struct reader *me = context;
	struct stress *stress = me->stress;

	while (!atomic_load_explicit(&stress->stop, memory_order_relaxed)) {
		const struct pvclock_vcpu_time_info *page = page_at(stress, me->page_index);
		const struct sequence_page *sequence_page = sequence_at(stress, me->page_index);
		uint64_t least_ns = atomic_load(&stress->last_ns);
		struct reading reading;

		if (!(sequence_page ? attempt_sequence(sequence_page, me->skew_ticks, &reading) :
				      stress->attempt(page, me->skew_ticks, &reading))) {
			me->counts.retries++;
			__builtin_ia32_pause();
			continue;
		}
		me->counts.reads++;
		check_order(me, least_ns, &reading);
		check_torn(me, sequence_page, page, &reading);
		follow_generation(me, &reading);
		me->page_index = (me->page_index + 1) % (stress->options.pages + stress->options.sequence_pages);
	}
	return NULL;
}

static void start_reader(struct reader *reader, struct stress *stress, size_t index)
{
	*reader = (struct reader){
		.stress = stress,
		.page_index = index % stress->options.pages,
		.skew_ticks = index == 0 ? stress->options.skew_ticks : 0,
		.last_ns = stress->options.start_ns,
		.last_tsc = stress->start_tsc,
		.counts = { .least_old_ticks = INT64_MAX, .least_new_ticks = INT64_MAX },
	};
	if (pthread_create(&reader->thread, NULL, run_reader, reader) != 0) {
		perror("pthread_create");
		exit(1);
	}
	pin_thread(reader->thread, 1 + index);
}

static int64_t min_ticks(int64_t one, int64_t other)
{
	return one < other ? one : other;
}

static void add_counts(struct counts *sum, const struct counts *counts)
{
	sum->reads += counts->reads;
	sum->retries += counts->retries;
	sum->backward_own += counts->backward_own;
	sum->backward_cross += counts->backward_cross;
	sum->wild += counts->wild;
	sum->torn += counts->torn;
	sum->late_old += counts->late_old;
	sum->early_new += counts->early_new;
	sum->generations += counts->generations;
	if (counts->worst_backward_ns > sum->worst_backward_ns)
		sum->worst_backward_ns = counts->worst_backward_ns;
	sum->least_old_ticks = min_ticks(sum->least_old_ticks, counts->least_old_ticks);
	sum->least_new_ticks = min_ticks(sum->least_new_ticks, counts->least_new_ticks);
}

/* ---- The writer. ---- */

#define MAX_DILATION 10
#define DILATIONS (2 * MAX_DILATION - 1) /* 10/1, 9/1 ... 1/1, 1/2 ... 1/10 */

/* One rate: guest time passes as if the TSC had this frequency. */
struct dilation {
	uint64_t hz;
	struct pvclock_anchor_params params;
};

static struct dilation dilation_of(uint64_t hz)
{
	struct dilation dilation = { .hz = hz };
	struct pvclock_scale scale;

	if (pvclock_time_scale(PVCLOCK_NS_PER_SEC, hz, &scale) != 0) {
		fprintf(stderr, "--tsc-hz: no scale for %llu Hz\n", (unsigned long long)hz);
		exit(2);
	}
	dilation.params = pvclock_anchor_params_of(scale);
	return dilation;
}

static void fill_dilations(struct dilation *dilations, uint64_t tsc_hz)
{
	for (uint64_t i = 0; i < MAX_DILATION; i++)
		dilations[i] = dilation_of(tsc_hz / (i + 1));
	for (uint64_t i = 1; i < MAX_DILATION; i++)
		dilations[MAX_DILATION - 1 + i] = dilation_of(tsc_hz * (i + 1));
}

struct writer {
	struct stress *stress;
	struct pvclock_target *targets;
	struct pvclock_counter counter;
	struct dilation dilations[DILATIONS];
	const struct dilation *dilation; /* of the line that is in the pages */
	struct pvclock_line timeline;    /* exact; its anchor is the last break point */
	struct pvclock_anchor anchor;
	uint64_t random;

	uint64_t publishes;
	int64_t least_step_ns;           /* of R(new, B) - R(old, B) */
	int64_t most_step_ns;
	double most_behind_ns;           /* page against timeline, both lines, at B */
	double most_ahead_ns;
	uint64_t beyond_bound;
	double worst_beyond_ns;
	uint64_t least_window_ticks;     /* versions odd */
	uint64_t window_ticks;           /* all together */
};

/* Guest and timeline: 2 ns for two roundings, the ticks that the right shift cuts, and mul's quantum over the age. */
static double bound_ns(const struct dilation *dilation, uint64_t age_ticks)
{
	double ns_per_tick = (double)PVCLOCK_NS_PER_SEC / (double)dilation->hz;
	int shift = dilation->params.scale.shift;
	double cut_ticks = shift < 0 ? (double)(UINT64_C(1) << -shift) : 1 / (double)(UINT64_C(1) << shift);

	return 2 + cut_ticks * ns_per_tick + 0.47e-9 * ns_per_tick * (double)age_ticks;
}

static void raise_to(double *greatest, double value)
{
	if (value > *greatest)
		*greatest = value;
}

/* Precondition: the timeline is anchored at the moment at which the page shows page_ns. */
static void account_error(struct writer *me, uint64_t page_ns, double most_ns)
{
	double error_ns = (double)(int64_t)(page_ns - me->timeline.ns) -
			  (double)me->timeline.rem / (double)me->timeline.den;

	raise_to(&me->most_ahead_ns, error_ns);
	raise_to(&me->most_behind_ns, -error_ns);
	raise_to(&me->worst_beyond_ns, error_ns - most_ns);
	raise_to(&me->worst_beyond_ns, -error_ns - most_ns);
	me->beyond_bound += error_ns > most_ns || -error_ns > most_ns;
}

static void account_break(struct writer *me, const struct pvclock_anchor *old, uint64_t break_tsc,
			  uint64_t age_ticks, const struct dilation *next)
{
	uint64_t old_ns = pvclock_anchor_read(old, break_tsc);
	uint64_t new_ns = pvclock_anchor_read(&me->anchor, break_tsc);
	int64_t step_ns = (int64_t)(new_ns - old_ns);

	if (step_ns < me->least_step_ns)
		me->least_step_ns = step_ns;
	if (step_ns > me->most_step_ns)
		me->most_step_ns = step_ns;
	account_error(me, old_ns, bound_ns(me->dilation, age_ticks));
	account_error(me, new_ns, bound_ns(next, 0));
}

/* The window ends when the publisher returns, and began a margin before the break point, after the odd stores. */
static void account_window(struct writer *me, uint64_t break_tsc)
{
	uint64_t ticks = pvclock_rdtsc_ordered() - break_tsc + me->counter.margin_ticks;

	me->window_ticks += ticks;
	if (ticks < me->least_window_ticks)
		me->least_window_ticks = ticks;
}

/* The pages of both kinds; pvclock's come first, so that their lines are written before the others'. */
static int publish_both_kinds(struct writer *me, const struct dilation *dilation, uint64_t *break_tsc)
{
	struct stress *stress = me->stress;
	struct pvclock_page_set sets[] = {
		{ &pvclock_page_kind_pvclock, me->targets, stress->options.pages, 0 },
		{ stress->sequence_kind, &stress->sequence, stress->options.sequence_pages, 0 },
	};

	*break_tsc = 0;
	return pvclock_publish_at(sets, 2, &me->timeline, &dilation->params, &me->counter, &me->anchor, break_tsc, 0);
}

static uint64_t publish_at(struct writer *me, const struct dilation *dilation)
{
	struct stress *stress = me->stress;
	uint64_t break_tsc;
	int status;

	if (stress->options.sequence_pages != 0)
		status = publish_both_kinds(me, dilation, &break_tsc);
	else
		status = stress->publish(me->targets, stress->options.pages, &me->timeline, &dilation->params,
					 &me->counter, &me->anchor, &break_tsc);
	if (status != 0) {
		fprintf(stderr, "the TSC went back or stood still during a publish\n");
		exit(1);
	}
	account_window(me, break_tsc);
	log_break(&stress->log, ++me->publishes, break_tsc);
	return break_tsc;
}

/* The clock's next line: another rate from the break point on, the exact remainder carried over. */
static void publish_next(struct writer *me)
{
	const struct dilation *dilation = &me->dilations[next_random(&me->random) % DILATIONS];
	struct pvclock_anchor old = me->anchor;
	uint64_t old_tsc = me->timeline.tsc;
	uint64_t break_tsc = publish_at(me, dilation);

	me->timeline = pvclock_line_at(me->timeline, break_tsc);
	account_break(me, &old, break_tsc, break_tsc - old_tsc, dilation);
	me->timeline = pvclock_line_turn(me->timeline, PVCLOCK_NS_PER_SEC, dilation->hz);
	me->dilation = dilation;
}

static void run_writer(struct writer *me)
{
	const struct options *options = &me->stress->options;
	uint64_t end_tsc = me->stress->start_tsc + (uint64_t)(options->seconds * (double)options->tsc_hz);

	while ((int64_t)(pvclock_rdtsc_ordered() - end_tsc) < 0)
		publish_next(me);
	atomic_store(&me->stress->stop, true);
}

static void *allocate(size_t alignment, size_t bytes)
{
	void *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);

	if (memory == NULL) {
		perror("aligned_alloc");
		exit(1);
	}
	return memset(memory, 0, bytes);
}

/* The first publish is the writer's own: the clock appears at start_ns, at the nominal rate. */
static struct writer *start_writer(struct stress *stress)
{
	struct writer *me = allocate(CACHE_LINE, sizeof *me);
	const struct options *options = &stress->options;

	me->stress = stress;
	me->counter = pvclock_host_counter();
	me->random = 0x9e3779b97f4a7c15; /* any but 0 */
	me->least_step_ns = INT64_MAX;
	me->most_step_ns = INT64_MIN;
	me->least_window_ticks = UINT64_MAX;
	me->targets = allocate(CACHE_LINE, options->pages * sizeof *me->targets);
	for (size_t i = 0; i < options->pages; i++)
		me->targets[i] = (struct pvclock_target){ .page = page_at(stress, i), .flags = PVCLOCK_TSC_STABLE_BIT };
	fill_dilations(me->dilations, options->tsc_hz);
	me->dilation = &me->dilations[0];
	stress->start_tsc = pvclock_rdtsc_ordered();
	me->timeline = (struct pvclock_line){ .tsc = stress->start_tsc, .ns = options->start_ns,
					      .num = PVCLOCK_NS_PER_SEC, .den = me->dilation->hz };
	me->timeline = pvclock_line_at(me->timeline, publish_at(me, me->dilation));
	return me;
}

/* ---- The run. ---- */

static void report(const struct stress *stress, const struct writer *writer, const struct counts *counts)
{
	const struct options *options = &stress->options;
	double tsc_hz = (double)options->tsc_hz;
	double run_ticks = (double)(pvclock_rdtsc_ordered() - stress->start_tsc);
	double seconds = run_ticks / tsc_hz;

#define FIELD(name, format, value) printf(",\n \"" name "\": " format, (value))
#define COUNT(name, value) FIELD(name, "%llu", (unsigned long long)(value))
#define TICKS(name, value) FIELD(name, "%lld", (long long)(value))
	printf("{\"publisher\": \"%s\"", options->publisher_name);
	FIELD("reader", "\"%s\"", options->reader_name);
	COUNT("reads", counts->reads);
	COUNT("retries", counts->retries);
	COUNT("backward_own", counts->backward_own);
	COUNT("backward_cross", counts->backward_cross);
	COUNT("wild", counts->wild);
	COUNT("torn", counts->torn);
	COUNT("late_old", counts->late_old);
	COUNT("early_new", counts->early_new);
	COUNT("generations", counts->generations);
	COUNT("worst_backward_ns", counts->worst_backward_ns);
	TICKS("least_old_ticks", counts->least_old_ticks);
	TICKS("least_new_ticks", counts->least_new_ticks);
	COUNT("publishes", writer->publishes);
	TICKS("least_step_ns", writer->least_step_ns);
	TICKS("most_step_ns", writer->most_step_ns);
	FIELD("most_behind_ns", "%.3f", writer->most_behind_ns);
	FIELD("most_ahead_ns", "%.3f", writer->most_ahead_ns);
	COUNT("beyond_bound", writer->beyond_bound);
	FIELD("worst_beyond_ns", "%.3f", writer->worst_beyond_ns);
	FIELD("least_window_us", "%.3f", (double)writer->least_window_ticks / tsc_hz * 1e6);
	FIELD("window_share", "%.3f", (double)writer->window_ticks / run_ticks);
	FIELD("reads_per_second", "%.0f", (double)counts->reads / seconds);
	FIELD("publishes_per_second", "%.0f}\n", (double)writer->publishes / seconds);
}

static int run(struct stress *stress)
{
	static struct reader readers[MAX_READERS];
	const struct options *options = &stress->options;
	struct counts sum = { .least_old_ticks = INT64_MAX, .least_new_ticks = INT64_MAX };
	struct writer *writer;

	stress->memory = allocate(4096, (options->pages + options->sequence_pages) * options->stride);
	stress->sequence.pages = (struct sequence_page *)(stress->memory + options->pages * options->stride);
	stress->sequence.stride = options->stride;
	stress->last_ns = options->start_ns;
	writer = start_writer(stress);
	for (size_t i = 0; i < options->readers; i++)
		start_reader(&readers[i], stress, i);
	pin_thread(pthread_self(), 0); /* last: the readers' CPUs are taken from this thread's */
	run_writer(writer);
	for (size_t i = 0; i < options->readers; i++) {
		pthread_join(readers[i].thread, NULL);
		add_counts(&sum, &readers[i].counts);
	}
	report(stress, writer, &sum);
	free(writer->targets);
	free(writer);
	free(stress->memory);
	return 0;
}

static _Noreturn void refuse(const char *message)
{
	fprintf(stderr, "publish_stress: %s; see the top of its source\n", message);
	exit(2);
}

static void parse_option(struct options *options, int option, const char *value)
{
	switch (option) {
	case 'p': options->publisher_name = value; break;
	case 'r': options->reader_name = value; break;
	case 'n': options->pages = strtoull(value, NULL, 0); break;
	case 'b': options->stride = strtoull(value, NULL, 0); break;
	case 'R': options->readers = strtoull(value, NULL, 0); break;
	case 's': options->seconds = strtod(value, NULL); break;
	case 'g': options->start_ns = strtoull(value, NULL, 0); break;
	case 'k': options->skew_ticks = strtoull(value, NULL, 0); break;
	case 'z': options->tsc_hz = strtoull(value, NULL, 0); break;
	case 'S': options->sequence_pages = strtoull(value, NULL, 0); break;
	case 'K': options->sequence_kind_name = value; break;
	default: refuse("unknown option");
	}
}

static void parse_options(struct options *options, int argc, char **argv)
{
	static const struct option names[] = {
		{ "publisher", required_argument, NULL, 'p' },	{ "reader", required_argument, NULL, 'r' },
		{ "pages", required_argument, NULL, 'n' },	{ "stride", required_argument, NULL, 'b' },
		{ "readers", required_argument, NULL, 'R' },	{ "seconds", required_argument, NULL, 's' },
		{ "start-ns", required_argument, NULL, 'g' },	{ "skew-ticks", required_argument, NULL, 'k' },
		{ "tsc-hz", required_argument, NULL, 'z' },	{ "sequence-pages", required_argument, NULL, 'S' },
		{ "sequence-kind", required_argument, NULL, 'K' }, { NULL, 0, NULL, 0 },
	};
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1)
		parse_option(options, option, optarg);
	if (options->pages < 1 || options->pages > MAX_PAGES)
		refuse("--pages is 1 to 4096");
	if (options->sequence_pages > MAX_PAGES)
		refuse("--sequence-pages is 0 to 4096");
	if (options->stride != 64 && options->stride != 4096)
		refuse("--stride is 64 or 4096");
	if (options->readers < 1 || options->readers > MAX_READERS)
		refuse("--readers is 1 to 64");
}

int main(int argc, char **argv)
{
	static struct stress stress = {
		.options = { .publisher_name = "two_phase", .reader_name = "linux", .pages = 8, .stride = 64, .readers = 2,
			     .seconds = 1, .start_ns = 5 * PVCLOCK_NS_PER_SEC, .tsc_hz = 2596132000, .sequence_kind_name = "sequence" },
	};

	parse_options(&stress.options, argc, argv);
	stress.publish = publisher_named(stress.options.publisher_name);
	if (stress.publish == NULL)
		refuse("no such --publisher");
	stress.sequence_kind = sequence_kind_named(stress.options.sequence_kind_name);
	if (stress.sequence_kind == NULL)
		refuse("no such --sequence-kind");
	if (strcmp(stress.options.reader_name, "linux") == 0)
		stress.attempt = attempt_linux;
	else if (strcmp(stress.options.reader_name, "unfenced") == 0)
		stress.attempt = attempt_unfenced;
	else
		refuse("no such --reader");
	return run(&stress);
}
