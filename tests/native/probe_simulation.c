/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Runs the probe's arithmetic on simulated CPUs, of which everything is known, and counts where it says what is not
 * true.  Reads take 10 to 200 ns and lines as long to travel, not the same both ways, and a CPU may be preempted at any
 * point.  Prints one JSON object.
 *
 *   probe_simulation [--cases N] [--seed N] [--broken wrong-end|early]
 *
 * Broken twins: "wrong-end" takes a round's bounds from the wrong readings, "early" reads a clock before what it must
 * come after, as rdtsc without a fence does.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "offset_window.h"
#include "step_search.h"
#include "warp_cell.h"

#define NS_PER_SECOND INT64_C(1000000000)

/* ---- Chance. ---- */

static uint64_t random_state;

static uint64_t random64(void)
{
	uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);

	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

/* One of low to high. */
static int64_t between(int64_t low, int64_t high)
{
	return low + (int64_t)(random64() % (uint64_t)(high - low + 1));
}

static bool once_in(int64_t times)
{
	return between(1, times) == 1;
}

/* From 1 to some 10^digits, each digit as often. */
static int64_t of_any_size(int digits)
{
	int64_t size = between(1, 9);

	for (int64_t more = between(0, digits - 1); more > 0; more--)
		size = size * 10 + between(0, 9);
	return size;
}

static int64_t of_either_sign(int64_t number)
{
	return once_in(2) ? number : -number;
}

/* ---- What is broken, and what was found. ---- */

static bool is_wrong_end, is_early;

struct counts {
	uint64_t cases, with_offset, excluded, alarms, found, warps, warps_beyond;
	uint64_t with_step, false_steps, floor_below_step, missed_steps, wrong_bounds, never_told;
};

static struct counts counts;

/* ---- Two CPUs. ---- */

struct cpu {
	int64_t offset_ns;
	int64_t read_least_ns, read_most_ns;
	int64_t travel_least_ns, travel_most_ns; /* of what it writes, to the other */
};

static struct cpu any_cpu(int64_t offset_ns)
{
	struct cpu cpu = { .offset_ns = offset_ns };

	cpu.read_least_ns = between(10, 200);
	cpu.read_most_ns = between(cpu.read_least_ns, 200);
	cpu.travel_least_ns = between(10, 200);
	cpu.travel_most_ns = between(cpu.travel_least_ns, 200);
	return cpu;
}

static int64_t preempted_ns(void)
{
	return once_in(50) ? of_any_size(7) : 0;
}

/* Read the clock from *now on, and let the time pass. */
static int64_t read_clock(const struct cpu *cpu, int64_t *now)
{
	int64_t ns = between(cpu->read_least_ns, cpu->read_most_ns), until = between(0, ns), instant;

	instant = *now + preempted_ns() + until;
	*now = instant + preempted_ns() + ns - until;
	return instant + cpu->offset_ns;
}

static int64_t read_after(const struct cpu *cpu, int64_t *now)
{
	int64_t clock = read_clock(cpu, now);

	return is_early ? clock - between(0, 300) : clock;
}

static void travel(const struct cpu *cpu, int64_t *now)
{
	*now += preempted_ns() + between(cpu->travel_least_ns, cpu->travel_most_ns);
}

static struct offset_window exchanged(const struct cpu *a, const struct cpu *b, unsigned rounds)
{
	struct offset_window window;
	int64_t now = between(0, NS_PER_SECOND), before = read_clock(a, &now), remote, after;

	offset_window_begin(&window);
	while (rounds--) {
		travel(a, &now);
		remote = read_after(b, &now);
		travel(b, &now);
		after = read_clock(a, &now);
		if (is_wrong_end)
			offset_window_add(&window, after, remote, before);
		else
			offset_window_add(&window, before, remote, after);
		before = after;
	}
	return window;
}

/* A CPU at the shared cell: it looks, reads, and tells. */
struct looker {
	int64_t at_ns, seen, reading;
	bool is_telling;
};

static int64_t next_of(struct looker *looker, const struct cpu *cpu, unsigned number, struct warp_cell *cell)
{
	int64_t less;

	looker->is_telling = !looker->is_telling;
	if (looker->is_telling) {
		looker->seen = warp_cell_look(cell);
		looker->reading = read_after(cpu, &looker->at_ns);
		return 0;
	}
	less = warp_cell_tell(cell, looker->seen, number, looker->reading);
	travel(cpu, &looker->at_ns);
	return less;
}

static void find_warps(const struct cpu cpus[2], int64_t offset_ns, unsigned events)
{
	struct looker lookers[2] = { { .at_ns = between(0, 1000) }, { .at_ns = between(0, 1000) } };
	struct warp_cell cell;

	warp_cell_begin(&cell, between(-1000, 1000));
	while (events--) {
		unsigned number = lookers[1].at_ns < lookers[0].at_ns;
		int64_t less = next_of(&lookers[number], &cpus[number], number, &cell);
		unsigned from = warp_cell_reader(lookers[number].seen);

		if (less <= 0)
			continue;
		counts.warps++;
		/* b is ahead by the offset: so b had read more, if that is positive, and no more than that. */
		if (less > (from == 1 && number == 0 ? offset_ns : from == 0 && number == 1 ? -offset_ns : 0))
			counts.warps_beyond++;
	}
}

static void try_pair(void)
{
	int64_t offset_ns = once_in(2) ? 0 : of_either_sign(of_any_size(7));
	struct cpu cpus[2] = { any_cpu(0), any_cpu(offset_ns) };
	struct offset_window window = exchanged(&cpus[0], &cpus[1], (unsigned)between(1, 200));
	bool has_0 = window.low <= 0 && 0 <= window.high;

	counts.with_offset += offset_ns != 0;
	counts.excluded += offset_ns < window.low || window.high < offset_ns;
	counts.alarms += offset_ns == 0 && !has_0;
	counts.found += offset_ns != 0 && !has_0;
	find_warps(cpus, offset_ns, 400);
}

/* ---- A clock and the TSC of one CPU. ---- */

enum { FRACTION_BITS = 40, READINGS = 3000 };

__extension__ typedef __int128 fixed;

struct line {
	uint64_t tsc, hz, true_tsc_hz;
	fixed clock, nominal_rate, rate; /* with FRACTION_BITS */
	int64_t grain;
	bool is_unslewed;
};

static void let_pass(struct line *line, int64_t ticks)
{
	line->tsc += (uint64_t)ticks;
	line->clock += line->rate * ticks;
}

static void change_rate(struct line *line, int64_t ppb)
{
	line->rate = line->nominal_rate + line->nominal_rate * ppb / NS_PER_SECOND;
}

static int64_t ticks_of_ns(const struct line *line, int64_t ns)
{
	return ns * (int64_t)(line->true_tsc_hz / 1000) / 1000000;
}

static int64_t any_slew_ppb(const struct line *line)
{
	return line->is_unslewed ? 0 : between(-500000, 500000);
}

/* A slew of a kind that the kernel makes by its ticks: up to a tenth, and it lasts. */
struct fast_slew {
	unsigned from, to;
	int64_t ppb;
};

static struct fast_slew any_fast_slew(void)
{
	struct fast_slew slew = { .from = (unsigned)between(0, READINGS), .ppb = of_either_sign(of_any_size(8)) };

	slew.to = slew.from + (unsigned)between(READINGS / 2, READINGS);
	return slew;
}

/* What happens in one go between two readings; NTP may change the rate at any point of it. */
static void pass_between_readings(struct line *line, const struct fast_slew *slew, unsigned reading, int64_t step)
{
	int64_t ns = once_in(100) ? of_any_size(8) / 10 : between(1000, 200000), until = between(0, ns);

	let_pass(line, ticks_of_ns(line, until));
	line->clock += (fixed)step * ((fixed)1 << FRACTION_BITS);
	if (slew->from <= reading && reading < slew->to)
		change_rate(line, slew->ppb);
	else if (reading == slew->to || once_in(50))
		change_rate(line, any_slew_ppb(line));
	let_pass(line, ticks_of_ns(line, ns - until));
}

static void add_reading(struct line *line, struct step_search *search)
{
	int64_t ns = between(10, 200), until = between(0, ns), clock;
	uint64_t before = line->tsc;

	let_pass(line, ticks_of_ns(line, until + preempted_ns()));
	clock = (int64_t)(line->clock >> FRACTION_BITS);
	clock -= clock % line->grain;
	let_pass(line, ticks_of_ns(line, ns - until + preempted_ns()));
	step_search_add(search, before, clock, line->tsc);
}

static struct line any_line(uint64_t *stated_tsc_hz)
{
	static const uint64_t hz[] = { 1000000000, 10000000, 3579545, 1193182 };
	struct line line = { .tsc = (uint64_t)between(0, INT64_MAX / 4), .hz = hz[between(0, 3)] };

	*stated_tsc_hz = (uint64_t)between(1000000000, 5000000000);
	line.true_tsc_hz = *stated_tsc_hz + *stated_tsc_hz / 10000 * (uint64_t)between(0, 200);
	line.grain = line.hz == 1000000000 && once_in(2) ? 100 : 1;
	line.is_unslewed = once_in(2);
	line.clock = (fixed)between(0, INT64_MAX / 4) << FRACTION_BITS;
	line.nominal_rate = ((fixed)line.hz << FRACTION_BITS) / (fixed)line.true_tsc_hz;
	change_rate(&line, any_slew_ppb(&line));
	return line;
}

/* A line that changed its rate near the end, or may have, is being learned anew: its floor is not known, and says so. */
static void judge_steps(const struct step_search *search, int64_t step, bool may_be_unknown)
{
	const struct clock_step *found = step > 0 ? &search->forward : &search->backward;
	bool is_told = found->found && found->low <= step && step <= found->high;
	uint64_t size = (uint64_t)(step < 0 ? -step : step);

	counts.never_told += search->floor == INT64_MAX && !may_be_unknown;
	counts.with_step += step != 0;
	counts.false_steps += search->count > (step != 0) || (step >= 0 && search->backward.found) ||
			      (step <= 0 && search->forward.found);
	counts.wrong_bounds += step != 0 && found->found && !is_told;
	counts.floor_below_step += size > (uint64_t)search->floor;
	counts.missed_steps += size > (uint64_t)search->floor && !is_told;
}

static void try_line(void)
{
	uint64_t stated_tsc_hz;
	struct line line = any_line(&stated_tsc_hz);
	struct fast_slew slew = once_in(3) ? any_fast_slew() : (struct fast_slew){ READINGS + 1, READINGS + 1, 0 };
	int64_t step = slew.from > READINGS && once_in(2) ? of_either_sign(of_any_size(8)) : 0;
	unsigned step_at = (unsigned)between(1, READINGS * 9 / 10);
	struct step_search search;

	step_search_begin(&search, stated_tsc_hz, line.hz, line.is_unslewed, 0);
	for (unsigned reading = 0; reading < READINGS; reading++) {
		pass_between_readings(&line, &slew, reading, reading == step_at ? step : 0);
		add_reading(&line, &search);
	}
	step_search_end(&search);
	judge_steps(&search, step, step != 0 || slew.from <= READINGS);
}

/* ---- The run. ---- */

static void print_counts(void)
{
	printf("{\"cases\": %" PRIu64 ", \"with_offset\": %" PRIu64 ", \"excluded\": %" PRIu64 ", \"alarms\": %" PRIu64
	       ", \"found\": %" PRIu64 ", \"warps\": %" PRIu64 ", \"warps_beyond\": %" PRIu64,
	       counts.cases, counts.with_offset, counts.excluded, counts.alarms, counts.found, counts.warps,
	       counts.warps_beyond);
	printf(", \"with_step\": %" PRIu64 ", \"false_steps\": %" PRIu64 ", \"floor_below_step\": %" PRIu64
	       ", \"missed_steps\": %" PRIu64 ", \"wrong_bounds\": %" PRIu64 ", \"never_told\": %" PRIu64 "}\n",
	       counts.with_step, counts.false_steps, counts.floor_below_step, counts.missed_steps, counts.wrong_bounds,
	       counts.never_told);
}

int main(int count, char **arguments)
{
	uint64_t cases = 100, seed = 1;

	for (int i = 1; i + 1 < count; i += 2) {
		if (strcmp(arguments[i], "--cases") == 0)
			cases = strtoull(arguments[i + 1], NULL, 10);
		else if (strcmp(arguments[i], "--seed") == 0)
			seed = strtoull(arguments[i + 1], NULL, 10);
		else if (strcmp(arguments[i], "--broken") == 0) {
			is_wrong_end = strcmp(arguments[i + 1], "wrong-end") == 0;
			is_early = strcmp(arguments[i + 1], "early") == 0;
		}
	}
	random_state = seed << 32;
	for (; counts.cases < cases; counts.cases++) {
		try_pair();
		try_line();
	}
	print_counts();
	return 0;
}
