/* SPDX-License-Identifier: Apache-2.0
 *
 * How long the pages are odd: from just before the first version becomes odd until the last one is seen to be even.
 *
 * The stamps have to be inside the publish, so this is a copy of pvclock_publish() with two of them.  That the copy
 * costs what the original does is shown by publishing with both in turn and timing both from end to end.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>

#include "published.h"

#define CACHE_LINE 64
#define MAX_READERS 2

/* In ticks. */
struct window_sample {
	uint64_t window;
	uint64_t stamps;          /* of the window, what its two stamps took: the same two with nothing between them */
	uint64_t stamped_publish; /* the copy, from end to end */
	uint64_t publish;         /* pvclock_publish(), from end to end */
	uint64_t lost_cpu;        /* times that the kernel ran something else on this CPU meanwhile */
};

/* What readers met with that spun on the pages meanwhile. */
struct stalls {
	uint64_t reads;
	uint64_t stalled;       /* reads that had to try again */
	uint64_t longest_ticks; /* from the beginning of such a read to its end, if the reader kept its CPU */
};

/* As often as the kernel took it from this thread for another; what a hypervisor takes is not seen. */
static uint64_t times_cpu_was_lost(void)
{
	struct rusage usage = { 0 };

	getrusage(RUSAGE_THREAD, &usage);
	return (uint64_t)usage.ru_nivcsw;
}

/* ---- The copy. ---- */

/* Returns the ticks during which not all pages were even. */
static uint64_t stamped_publish(struct published *published)
{
	struct pvclock_page_set set = { &pvclock_page_kind_pvclock, published->targets, published->pages, 1 };
	struct pvclock_update update = { &published->line, &published->params, &published->counter,
					 &published->anchor, 0, 0 };
	uint64_t begin, busy_tsc, wait_ticks = published->counter.margin_ticks;

	set.kind->touch(&set);

	begin = pvclock_rdtsc_ordered();
	set.kind->mark_busy(&set);

	__atomic_thread_fence(__ATOMIC_RELEASE);
	busy_tsc = pvclock_counter_read_after_stores(&published->counter);
	wait_ticks += pvclock_sets_delay_ticks(&set, 1, &update, busy_tsc + wait_ticks);
	update.break_tsc = busy_tsc + wait_ticks;
	published->anchor =
		pvclock_reanchor(&published->line, &published->anchor, &published->params, update.break_tsc);

	set.kind->write(&set, &update);

	pvclock_counter_wait(&published->counter, busy_tsc, wait_ticks);

	__atomic_thread_fence(__ATOMIC_RELEASE);
	set.kind->release(&set);
	return pvclock_rdtsc_after_stores() - begin;
}

static void pause_for(uint64_t ticks)
{
	uint64_t begin = pvclock_rdtsc_ordered();

	while (pvclock_rdtsc_ordered() - begin < ticks)
		__builtin_ia32_pause();
}

static void take_sample(struct published *published, uint64_t rest_ticks, struct window_sample *ret)
{
	uint64_t begin, lost_cpu;

	pause_for(rest_ticks);
	begin = pvclock_rdtsc_ordered();
	ret->stamps = pvclock_rdtsc_after_stores() - begin;

	lost_cpu = times_cpu_was_lost();
	begin = pvclock_rdtsc_after_stores();
	ret->window = stamped_publish(published);
	ret->stamped_publish = pvclock_rdtsc_after_stores() - begin;
	ret->lost_cpu = times_cpu_was_lost() - lost_cpu;

	pause_for(rest_ticks);
	begin = pvclock_rdtsc_after_stores();
	published_publish(published);
	ret->publish = pvclock_rdtsc_after_stores() - begin;
}

/* ---- Readers, each on a CPU of its own. ---- */

struct reader {
	_Alignas(CACHE_LINE) const struct published *published;
	const atomic_bool *stop;
	atomic_bool reads;
	struct stalls stalls;
	uint64_t lost_cpu; /* up to its last stall */
	pthread_t thread;
};

static void end_stall(struct reader *reader, uint64_t ticks)
{
	uint64_t lost_cpu = times_cpu_was_lost();

	reader->stalls.stalled++;
	if (lost_cpu == reader->lost_cpu && ticks > reader->stalls.longest_ticks)
		reader->stalls.longest_ticks = ticks;
	reader->lost_cpu = lost_cpu;
}

static void read_once(struct reader *reader, const struct pvclock_target *target)
{
	const struct pvclock_counter *counter = &reader->published->counter;
	uint64_t begin = pvclock_counter_read(counter);
	struct pvclock_reading reading;

	reader->stalls.reads++;
	if (pvclock_read(target->page, 0, counter, 1, &reading) == 0)
		return;
	while (pvclock_read(target->page, 0, counter, 1, &reading) != 0)
		;
	end_stall(reader, pvclock_counter_read(counter) - begin);
}

static void *read_until_stopped(void *argument)
{
	struct reader *reader = argument;
	size_t page = 0;

	while (!atomic_load_explicit(reader->stop, memory_order_relaxed)) {
		read_once(reader, &reader->published->targets[page]);
		page = page + 1 < reader->published->pages ? page + 1 : 0;
		atomic_store_explicit(&reader->reads, true, memory_order_relaxed);
	}
	return NULL;
}

/* The index-th CPU of those that this process may use, counted round. */
static cpu_set_t one_cpu(const cpu_set_t *allowed, size_t index)
{
	cpu_set_t one;
	size_t left = index % (size_t)CPU_COUNT(allowed);
	int cpu = 0;

	while (!CPU_ISSET(cpu, allowed) || left-- > 0)
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	return one;
}

static bool start_reader(struct reader *reader, const struct published *published, const atomic_bool *stop,
			 cpu_set_t cpu)
{
	reader->published = published;
	reader->stop = stop;
	if (pthread_create(&reader->thread, NULL, read_until_stopped, reader) != 0)
		return false;
	pthread_setaffinity_np(reader->thread, sizeof(cpu), &cpu);
	while (!atomic_load_explicit(&reader->reads, memory_order_relaxed))
		sched_yield();
	return true;
}

static void join_reader(struct reader *reader, struct stalls *ret)
{
	pthread_join(reader->thread, NULL);
	ret->reads += reader->stalls.reads;
	ret->stalled += reader->stalls.stalled;
	if (reader->stalls.longest_ticks > ret->longest_ticks)
		ret->longest_ticks = reader->stalls.longest_ticks;
}

/* ---- The measurement. ---- */

struct run {
	struct published published;
	uint64_t rest_ticks;
	size_t readers;
	struct window_sample *samples;
	size_t count;
};

static int measure(struct run *run, const cpu_set_t *allowed, struct stalls *stalls)
{
	struct reader readers[MAX_READERS] = { 0 };
	atomic_bool stop = false;
	cpu_set_t own = one_cpu(allowed, 0);
	size_t started = 0;

	pthread_setaffinity_np(pthread_self(), sizeof(own), &own);
	while (started < run->readers &&
	       start_reader(&readers[started], &run->published, &stop, one_cpu(allowed, started + 1)))
		started++;
	for (size_t i = 0; started == run->readers && i < run->count; i++)
		take_sample(&run->published, run->rest_ticks, &run->samples[i]);
	atomic_store(&stop, true);
	for (size_t i = 0; i < started; i++)
		join_reader(&readers[i], stalls);
	pthread_setaffinity_np(pthread_self(), sizeof(*allowed), allowed);
	return started == run->readers ? 0 : -1;
}

/* Take `count` samples, with a rest before each publish, while `readers` threads read.  -1 if that cannot be done. */
int measure_windows(const struct layout *layout, const struct rate_of_time *time, uint64_t rest_ticks, size_t readers,
		    struct window_sample *samples, size_t count, struct stalls *stalls)
{
	struct run run = { .rest_ticks = rest_ticks, .readers = readers, .samples = samples, .count = count };
	cpu_set_t allowed;
	int result = -1;

	memset(stalls, 0, sizeof(*stalls));
	if (readers > MAX_READERS || pthread_getaffinity_np(pthread_self(), sizeof(allowed), &allowed) != 0)
		return -1;
	if (published_make(layout, time, &run.published)) {
		published_publish(&run.published); /* a reader's first reading is of a clock */
		result = measure(&run, &allowed, stalls);
		free(run.published.targets);
	}
	return result;
}
