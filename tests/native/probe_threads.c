/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Runs pvclock/probe/measure.c on a team of pinned threads, with the TSC and the kernel's clocks, of which the raw one is
 * not exchanged, and prints what it found, one JSON object a run.
 *
 *   probe_threads [--milliseconds N] [--runs N] [--threads N] [--add THREAD:NS] [--step NS] [--absent THREAD]
 *
 * Threads are pinned to the CPUs that this process may use, in turn.  An absent one never does its work.  A step is put
 * into what the first thread reads of the kernel's clocks, in the middle of the slices.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fenced_tsc.h"
#include "measure.h"

#define NS_PER_SECOND INT64_C(1000000000)

enum { TSC, MONOTONIC, RAW, CLOCKS };

/* ---- The clocks. ---- */

static int64_t step_ns;
static bool has_stepped;

static void step_in_the_middle(unsigned percent)
{
	has_stepped = percent >= 50;
}

static int64_t read_tsc(const struct probe_clock *clock, unsigned cpu)
{
	(void)clock;
	(void)cpu;
	return (int64_t)fenced_tsc();
}

static int64_t now_ns(clockid_t id)
{
	struct timespec now;

	clock_gettime(id, &now);
	return now.tv_sec * NS_PER_SECOND + now.tv_nsec;
}

static int64_t read_kernels(const struct probe_clock *clock, unsigned cpu)
{
	int64_t ns;

	__asm__ volatile("lfence" : : : "memory");
	ns = now_ns(clock->unslewed ? CLOCK_MONOTONIC_RAW : CLOCK_MONOTONIC);
	__asm__ volatile("lfence" : : : "memory");
	return ns + (cpu == 0 && has_stepped ? step_ns : 0);
}

static uint64_t measured_tsc_hz(void)
{
	const int64_t ns = NS_PER_SECOND / 50;
	int64_t begin_ns = now_ns(CLOCK_MONOTONIC_RAW), end_ns;
	uint64_t begin = fenced_tsc(), end;

	do {
		end_ns = now_ns(CLOCK_MONOTONIC_RAW);
		end = fenced_tsc();
	} while (end_ns - begin_ns < ns);
	return (end - begin) * (uint64_t)NS_PER_SECOND / (uint64_t)(end_ns - begin_ns);
}

/* ---- The team: a thread a CPU, which waits for work. ---- */

struct threads {
	pthread_mutex_t lock;
	pthread_cond_t given, done;
	uint64_t waiting; /* the bits of those that have not ended */
	uint64_t given_to[PROBE_CPUS_MAX];
	uint64_t absent;
	void (*work)(void *argument, unsigned cpu);
	void *argument;
};

static struct threads threads = { .lock = PTHREAD_MUTEX_INITIALIZER,
				  .given = PTHREAD_COND_INITIALIZER,
				  .done = PTHREAD_COND_INITIALIZER };

static void pin(unsigned number)
{
	cpu_set_t usable, one;
	int nth;

	sched_getaffinity(0, sizeof usable, &usable);
	nth = (int)number % CPU_COUNT(&usable);
	CPU_ZERO(&one);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (CPU_ISSET(cpu, &usable) && nth-- == 0)
			CPU_SET(cpu, &one);
	}
	pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

static void *work_when_told(void *argument)
{
	unsigned cpu = (unsigned)(uintptr_t)argument;
	uint64_t bit = UINT64_C(1) << cpu;

	pin(cpu);
	pthread_mutex_lock(&threads.lock);
	for (;;) {
		while (!threads.given_to[cpu])
			pthread_cond_wait(&threads.given, &threads.lock);
		threads.given_to[cpu] = 0;
		pthread_mutex_unlock(&threads.lock);
		if (!(threads.absent & bit))
			threads.work(threads.argument, cpu);
		pthread_mutex_lock(&threads.lock);
		threads.waiting &= ~bit;
		pthread_cond_signal(&threads.done);
	}
	return NULL;
}

static void run_on_threads(struct probe_team *team, uint64_t members, void (*work)(void *argument, unsigned cpu),
			   void *argument)
{
	pthread_mutex_lock(&threads.lock);
	threads.work = work;
	threads.argument = argument;
	threads.waiting = members;
	for (unsigned cpu = 0; cpu < team->cpus; cpu++)
		threads.given_to[cpu] = members >> cpu & 1;
	pthread_cond_broadcast(&threads.given);
	while (threads.waiting)
		pthread_cond_wait(&threads.done, &threads.lock);
	pthread_mutex_unlock(&threads.lock);
}

/* ---- What was found. ---- */

static void print_pairs(const struct probe_clock_result *result)
{
	printf("\"pairs\": [");
	for (unsigned p = 0; p < result->pairs; p++) {
		const struct probe_pair *pair = &result->pair[p];

		printf("%s{\"cpus\": [%u, %u], \"slices\": [", p ? ", " : "", pair->a, pair->b);
		for (unsigned s = 0; s < PROBE_SLICES; s++)
			printf("%s[%" PRIu64 ", %" PRId64 ", %" PRId64 ", %" PRIu64 "]", s ? ", " : "", pair->at_tsc[s],
			       pair->slices[s].low, pair->slices[s].high, pair->slices[s].rounds);
		printf("]}");
	}
	printf("], ");
}

static void print_warps(const struct probe_clock_result *result, unsigned cpus)
{
	const char *comma = "";

	printf("\"warps\": [");
	for (unsigned from = 0; from < cpus; from++) {
		for (unsigned to = 0; to < cpus; to++) {
			const struct probe_warp *warp = &result->warp[from][to];

			if (!warp->count)
				continue;
			printf("%s{\"from\": %u, \"to\": %u, \"count\": %" PRIu64 ", \"largest\": %" PRId64 "}", comma,
			       from, to, warp->count, warp->largest);
			comma = ", ";
		}
	}
	printf("], \"cell_reads\": %" PRIu64 ", ", result->cell_reads);
}

static void print_step(const char *name, const struct clock_step *step)
{
	if (step->found)
		printf(", \"%s\": [%" PRId64 ", %" PRId64 ", %" PRIu64 "]", name, step->low, step->high, step->at_tsc);
	else
		printf(", \"%s\": null", name);
}

static void print_clock(const struct probe_clock *clock, const struct probe_clock_result *result, unsigned cpus)
{
	printf("\"%s\": {\"hz\": %" PRIu64 ", ", clock->name, clock->hz);
	print_pairs(result);
	print_warps(result, cpus);
	printf("\"samples\": [");
	for (unsigned s = 0; s <= PROBE_SLICES; s++)
		printf("%s[%" PRIu64 ", %" PRId64 ", %" PRIu64 "]", s ? ", " : "", result->sample[s].tsc_before,
		       result->sample[s].clock, result->sample[s].tsc_after);
	printf("], \"steps\": {\"reads\": %" PRIu64 ", \"floor\": %" PRId64 ", \"count\": %" PRIu64, result->steps.reads,
	       result->steps.floor, result->steps.count);
	print_step("forward", &result->steps.forward);
	print_step("backward", &result->steps.backward);
	printf("}}");
}

/* ---- The run. ---- */

static unsigned runs = 1;
static struct probe_team team = { .cpus = 2, .run = run_on_threads };
static struct probe_plan plan = { .milliseconds = 200, .progress = step_in_the_middle };

static int take_option(const char *option, const char *value)
{
	char *rest = NULL;
	long long number = strtoll(value, &rest, 10);

	if (strcmp(option, "--milliseconds") == 0)
		plan.milliseconds = (uint64_t)number;
	else if (strcmp(option, "--runs") == 0)
		runs = (unsigned)number;
	else if (strcmp(option, "--threads") == 0 && number >= 1 && number <= PROBE_CPUS_MAX)
		team.cpus = (unsigned)number;
	else if (strcmp(option, "--add") == 0 && *rest == ':' && number >= 0 && number < PROBE_CPUS_MAX)
		team.added_ns[number] = strtoll(rest + 1, NULL, 10);
	else if (strcmp(option, "--step") == 0)
		step_ns = number;
	else if (strcmp(option, "--absent") == 0 && number >= 0 && number < PROBE_CPUS_MAX)
		threads.absent |= UINT64_C(1) << number;
	else
		return -1;
	return 0;
}

static void measure_once(const struct probe_clock *clocks, struct probe_clock_result *results)
{
	memset(results, 0, CLOCKS * sizeof *results);
	has_stepped = false;
	measure(&team, &plan, clocks, CLOCKS, results);
	printf("{\"tsc_hz\": %" PRIu64 ", ", plan.tsc_hz);
	for (unsigned clock = 0; clock < CLOCKS; clock++) {
		printf("%s", clock ? ", " : "");
		print_clock(&clocks[clock], &results[clock], team.cpus);
	}
	printf("}\n");
	fflush(stdout);
}

int main(int count, char **arguments)
{
	static struct probe_clock_result results[CLOCKS];
	struct probe_clock clocks[CLOCKS] = {
		{ .name = "tsc", .exchanged = true, .unslewed = true, .read = read_tsc },
		{ .name = "monotonic", .hz = NS_PER_SECOND, .exchanged = true, .read = read_kernels },
		{ .name = "monotonic_raw", .hz = NS_PER_SECOND, .unslewed = true, .read = read_kernels },
	};

	for (int i = 1; i < count; i += 2) {
		if (i + 1 == count || take_option(arguments[i], arguments[i + 1]) != 0) {
			fprintf(stderr, "unknown option, or no value: %s\n", arguments[i]);
			return 2;
		}
	}
	plan.tsc_hz = clocks[TSC].hz = measured_tsc_hz();
	for (uintptr_t cpu = 0; cpu < team.cpus; cpu++) {
		pthread_t thread;

		pthread_create(&thread, NULL, work_when_told, (void *)cpu);
	}
	while (runs--)
		measure_once(clocks, results);
	return 0;
}
