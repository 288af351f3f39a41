/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads all clocks of a stock Linux guest, over and over, until a line is typed and its timers have expired, and for one
 * interval more; then it says what it saw.  A program of tests/kvm/stock_linux.py's guest:
 *
 *   clock_sampler INTERVAL_MS TIMER_MS [NAME]
 *
 * Numbers in decimal, TSC in ticks and clocks in ns; a TRIPLE is the TSC, the clock, and how many ticks later the TSC was
 * read again.  A byte of a serial console takes up to a millisecond, so points are few, and with NAME of that clock only.
 *
 *   sampling                                  the timers are set, and the first interval is over
 *   clock NAME READINGS BACKS TRIPLE TRIPLE   how often it went back; the successive readings furthest apart
 *   point NAME TRIPLE                         the narrowest reading in an interval
 *   timer NAME NS TRIPLE                      when one was due, and the first reading after it had expired
 */
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "../guest_triple.h"

#define NS_PER_MS UINT64_C(1000000)
#define CLOCKS 4
#define TIMERS 3 /* CLOCK_MONOTONIC_RAW has none */
#define POINTS_MAX 4096

struct sampled_clock {
	const char *name;
	clockid_t id;
	uint64_t readings, backs;
	struct triple last, older, newer; /* older and newer: around the largest gap */
	struct triple narrowest, points[POINTS_MAX];
	uint64_t due_ns;
	struct triple expired;
};

static struct sampled_clock clocks[CLOCKS] = {
	{ .name = "monotonic", .id = CLOCK_MONOTONIC },
	{ .name = "boottime", .id = CLOCK_BOOTTIME },
	{ .name = "realtime", .id = CLOCK_REALTIME },
	{ .name = "raw", .id = CLOCK_MONOTONIC_RAW },
};
static size_t points;
static struct pollfd waits[TIMERS + 1] = { [TIMERS] = { .fd = STDIN_FILENO, .events = POLLIN } };
static int waiting = TIMERS + 1; /* for so many of them */

static uint64_t width(const struct triple *it)
{
	return it->after - it->before;
}

static void sample(struct sampled_clock *clock)
{
	struct triple new = take(clock->id), old = clock->last;

	clock->last = new;
	if (clock->readings++ == 0) {
		clock->older = clock->newer = clock->narrowest = new;
		return;
	}
	clock->backs += new.ns < old.ns;
	if ((int64_t)(new.ns - old.ns) > (int64_t)(clock->newer.ns - clock->older.ns)) {
		clock->older = old;
		clock->newer = new;
	}
	if (width(&new) < width(&clock->narrowest))
		clock->narrowest = new;
}

/* The narrowest readings since the last time. */
static void keep_points(void)
{
	if (points == POINTS_MAX)
		return;
	for (size_t i = 0; i < CLOCKS; i++) {
		clocks[i].points[points] = clocks[i].narrowest;
		clocks[i].narrowest = take(clocks[i].id);
	}
	points++;
}

static int set_timer(struct sampled_clock *clock, uint64_t timer_ns)
{
	struct itimerspec when = { 0 };
	int timer = timerfd_create(clock->id, TFD_CLOEXEC);

	clock->due_ns = clock_ns(clock->id) + timer_ns;
	when.it_value.tv_sec = (time_t)(clock->due_ns / NS_PER_S);
	when.it_value.tv_nsec = (long)(clock->due_ns % NS_PER_S);
	if (timer < 0 || timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL))
		exit(1);
	return timer;
}

/* For a line that was typed, and timers that have expired. */
static void look(void)
{
	poll(waits, TIMERS + 1, 0);
	for (size_t i = 0; i < TIMERS + 1; i++) {
		if (!waits[i].revents)
			continue;
		if (i < TIMERS)
			clocks[i].expired = take(clocks[i].id);
		waits[i].fd = -1; /* poll() passes over it */
		waits[i].revents = 0;
		waiting--;
	}
}

static void print_triple(const struct triple *it)
{
	printf(" %" PRIu64 " %" PRIu64 " %" PRIu64, it->before, it->ns, width(it));
}

static void print_clock(const struct sampled_clock *clock, int with_points)
{
	printf("clock %s %" PRIu64 " %" PRIu64, clock->name, clock->readings, clock->backs);
	print_triple(&clock->older);
	print_triple(&clock->newer);
	for (size_t i = 0; with_points && i < points; i++) {
		printf("\npoint %s", clock->name);
		print_triple(&clock->points[i]);
	}
	if (clock->due_ns) {
		printf("\ntimer %s %" PRIu64, clock->name, clock->due_ns);
		print_triple(&clock->expired);
	}
	printf("\n");
}

/* All clocks for an interval. */
static void sample_all(uint64_t interval_ns)
{
	uint64_t begin_ns = clock_ns(CLOCK_MONOTONIC);

	do {
		for (size_t i = 0; i < CLOCKS; i++)
			sample(&clocks[i]);
		look();
	} while (clocks[0].last.ns - begin_ns < interval_ns);
	keep_points();
}

int main(int argc, char **argv)
{
	uint64_t interval_ns, timer_ns;

	if (argc < 3)
		return 1;
	interval_ns = strtoull(argv[1], NULL, 10) * NS_PER_MS;
	timer_ns = strtoull(argv[2], NULL, 10) * NS_PER_MS;
	for (size_t i = 0; i < TIMERS; i++)
		waits[i] = (struct pollfd){ .fd = set_timer(&clocks[i], timer_ns), .events = POLLIN };
	sample_all(interval_ns);
	printf("sampling\n");
	fflush(stdout);
	while (waiting)
		sample_all(interval_ns);
	sample_all(interval_ns);
	getchar();
	for (size_t i = 0; i < CLOCKS; i++)
		print_clock(&clocks[i], argc == 3 || strcmp(argv[3], clocks[i].name) == 0);
	return 0;
}
