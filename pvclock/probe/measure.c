/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The schedule of a measurement: first the rates of all clocks; then in each slice the tightest sample of each clock,
 * every pair's exchange, and all CPUs at once on the shared cell.  The first CPU reads the lines of all clocks all the
 * while.
 *
 * A CPU may be preempted at any point and for any time, and a vCPU may be gone: nobody waits for another but by a
 * stopwatch of its own TSC.  One CPU leads, and tells the others by a shared word when it has ended.
 */
#include "measure.h"

#include "fenced_tsc.h"
#include "pair_exchange.h"
#include "warp_cell.h"

enum {
    TIGHTEST_TRIES = 32,
    LATE_MS = 100,             /* how late another CPU may come at most, or by a slice, before it is given up */
    LINES_HZ = 20000,          /* the lines are read so often, */
    LINES_LEAST_HZ = 200,      /* but clocks that take long to read only so often that */
    LINES_SHARE = 8,           /* it takes an eighth of the time */
    TURNS_BETWEEN_TIMES = 16   /* rounds, or looks at the shared cell: where RDTSC exits to the host, it takes long */
};

static const unsigned FIRST = 0; /* the CPU that reads the lines */
static const unsigned TSC = 0;   /* the clock that all others are read against */

struct measurement {
    struct probe_team *team;
    const struct probe_plan *plan;
    const struct probe_clock *clocks;
    unsigned count;
    struct probe_clock_result *results;
    int64_t added[PROBE_CLOCKS_MAX][PROBE_CPUS_MAX]; /* in units of the clock */
    unsigned exchanged;                              /* clocks */

    unsigned slice, pair, clock; /* which are at work */
    uint64_t share_ticks;        /* for one clock of it */
    uint64_t late_ticks;         /* how late another CPU may come to it */
    struct stopwatch until_lines;
    uint64_t began_tsc, ended_tsc; /* the first CPU's, of the latest piece of work */

    struct pair_exchange exchange;
    struct warp_cell cell;
    bool has_ended __attribute__((aligned(64))); /* the CPU that leads has */
};

/* ---- Times. ---- */

static uint64_t ticks_of_ms(const struct measurement *it, uint64_t milliseconds)
{
    return it->plan->tsc_hz / 1000 * milliseconds;
}

static void end_for_all(struct measurement *it)
{
    __atomic_store_n(&it->has_ended, true, __ATOMIC_RELEASE);
}

static bool has_ended(const struct measurement *it)
{
    return __atomic_load_n(&it->has_ended, __ATOMIC_ACQUIRE);
}

/* For those who do not lead: so long after its share the leader is given up. */
static void start_patience(const struct measurement *it, struct stopwatch *patience)
{
    stopwatch_start(patience, it->exchanged * it->share_ticks + 2 * it->late_ticks);
}

/* Run work on some CPUs, the first always among them: it says when. */
static void run(struct measurement *it, uint64_t members, void (*work)(void *argument, unsigned cpu))
{
    it->has_ended = false;
    it->team->run(it->team, members | UINT64_C(1) << FIRST, work, it);
}

static uint64_t all_cpus(const struct probe_team *team)
{
    return UINT64_MAX >> (PROBE_CPUS_MAX - team->cpus);
}

/* ---- Readings. ---- */

static int64_t units_of_ns(int64_t ns, uint64_t hz)
{
    const int64_t second_ns = 1000000000;

    return (int64_t)((uint64_t)(ns / second_ns) * hz) + ns % second_ns * (int64_t)hz / second_ns;
}

static int64_t reading(const struct measurement *it, unsigned clock, unsigned cpu)
{
    const struct probe_clock *read = &it->clocks[clock];

    return (int64_t)((uint64_t)read->read(read, cpu) + (uint64_t)it->added[clock][cpu]);
}

/* A sample of the first CPU, which the search for steps sees, too. */
static struct probe_sample sample(struct measurement *it, unsigned clock)
{
    struct probe_sample taken;

    taken.tsc_before = fenced_tsc();
    taken.clock = reading(it, clock, FIRST);
    taken.tsc_after = fenced_tsc();
    if (clock == TSC) {
        step_search_add_tsc(&it->results[TSC].steps, taken.tsc_before);
        step_search_add_tsc(&it->results[TSC].steps, taken.tsc_after);
    } else {
        step_search_add(&it->results[clock].steps, taken.tsc_before, taken.clock, taken.tsc_after);
    }
    return taken;
}

static void sample_tightest(struct measurement *it, unsigned clock, struct probe_sample *tightest)
{
    *tightest = sample(it, clock);
    for (unsigned try = 1; try < TIGHTEST_TRIES; try++) {
        struct probe_sample next = sample(it, clock);

        if (next.tsc_after - next.tsc_before < tightest->tsc_after - tightest->tsc_before)
            *tightest = next;
    }
}

/* Read the lines of all clocks, if it is time to. */
static void read_lines(struct measurement *it)
{
    uint64_t ticks_most = it->plan->tsc_hz / LINES_LEAST_HZ, ticks = it->plan->tsc_hz / LINES_HZ, begin, took;

    if (stopwatch_runs(&it->until_lines))
        return;
    begin = fenced_tsc();
    for (unsigned clock = 0; clock < it->count; clock++)
        sample(it, clock);
    took = fenced_tsc() - begin;
    if (took > ticks / LINES_SHARE)
        ticks = took < ticks_most / LINES_SHARE ? took * LINES_SHARE : ticks_most;
    stopwatch_start(&it->until_lines, ticks);
}

/* ---- What the first CPU does alone. ---- */

static void begin_slice(void *argument, unsigned cpu)
{
    struct measurement *it = argument;

    (void)cpu;
    it->began_tsc = fenced_tsc();
    it->ended_tsc = it->began_tsc;
    for (unsigned clock = 0; clock < it->count; clock++)
        sample_tightest(it, clock, &it->results[clock].sample[it->slice]);
}

static bool knows_all_rates(const struct measurement *it)
{
    for (unsigned clock = TSC + 1; clock < it->count; clock++) {
        if (!step_search_knows_rate(&it->results[clock].steps))
            return false;
    }
    return true;
}

/* Before the slices: some 150 ms, and at most as long as they. */
static void learn_rates(void *argument, unsigned cpu)
{
    struct measurement *it = argument;
    struct stopwatch learning;

    (void)cpu;
    stopwatch_start(&it->until_lines, 0);
    stopwatch_start(&learning, ticks_of_ms(it, it->plan->milliseconds));
    while (!knows_all_rates(it) && stopwatch_runs(&learning))
        read_lines(it);
}

/* ---- A pair's exchange. ---- */

static struct probe_pair *pair_of(const struct measurement *it, unsigned clock)
{
    return &it->results[clock].pair[it->pair];
}

static bool is_answered_in_time(struct measurement *it, unsigned cpu, struct stopwatch *time)
{
    while (!pair_exchange_is_answered(&it->exchange)) {
        if (!stopwatch_runs(time))
            return false;
        if (cpu == FIRST)
            read_lines(it);
    }
    return true;
}

/* Exchange readings of one clock for its share of the time; false: the other CPU has not answered. */
static bool lead_clock(struct measurement *it, unsigned clock, unsigned cpu)
{
    struct pair_exchange *exchange = &it->exchange;
    struct offset_window *window = &pair_of(it, clock)->slices[it->slice];
    struct stopwatch share, late;
    int64_t before = reading(it, clock, cpu), remote, after;

    pair_exchange_ask(exchange, clock);
    stopwatch_start(&late, it->late_ticks);
    if (!is_answered_in_time(it, cpu, &late))
        return false;
    stopwatch_start(&share, it->share_ticks);
    do {
        remote = exchange->reading;
        after = reading(it, clock, cpu);
        pair_exchange_ask(exchange, clock); /* at once: one reading ends this round and begins the next */
        if (after >= before) /* else time went back meanwhile, which says nothing of the other CPU */
            offset_window_add(window, before, remote, after);
        before = after;
        if (cpu == FIRST && window->rounds % TURNS_BETWEEN_TIMES == 0)
            read_lines(it);
    } while ((window->rounds % TURNS_BETWEEN_TIMES != 0 || stopwatch_runs(&share)) &&
             is_answered_in_time(it, cpu, &share));
    stopwatch_start(&late, it->late_ticks);
    return is_answered_in_time(it, cpu, &late);
}

static void lead(struct measurement *it, unsigned cpu)
{
    for (unsigned clock = 0; clock < it->count; clock++) {
        if (it->clocks[clock].exchanged && !lead_clock(it, clock, cpu))
            break;
    }
    pair_exchange_end(&it->exchange);
    end_for_all(it);
}

static void follow(struct measurement *it, unsigned cpu)
{
    struct pair_exchange *exchange = &it->exchange;
    struct stopwatch patience;

    start_patience(it, &patience);
    while (!has_ended(it) && stopwatch_runs(&patience)) {
        while (pair_exchange_is_asked(exchange))
            pair_exchange_answer(exchange, reading(it, (unsigned)exchange->clock, cpu));
    }
}

static void read_lines_meanwhile(struct measurement *it)
{
    struct stopwatch patience;

    start_patience(it, &patience);
    while (!has_ended(it) && stopwatch_runs(&patience))
        read_lines(it);
}

static void exchange(void *argument, unsigned cpu)
{
    struct measurement *it = argument;
    const struct probe_pair *pair = pair_of(it, 0);

    if (cpu == FIRST)
        it->began_tsc = fenced_tsc();
    if (cpu == pair->a)
        lead(it, cpu);
    else if (cpu == pair->b)
        follow(it, cpu);
    else
        read_lines_meanwhile(it);
    if (cpu == FIRST)
        it->ended_tsc = fenced_tsc();
}

static void exchange_pair(struct measurement *it)
{
    const struct probe_pair *pair = pair_of(it, 0);

    it->exchange.asked = it->exchange.answered = 0;
    run(it, UINT64_C(1) << pair->a | UINT64_C(1) << pair->b, exchange);
    for (unsigned clock = 0; clock < it->count; clock++)
        pair_of(it, clock)->at_tsc[it->slice] = it->began_tsc + (it->ended_tsc - it->began_tsc) / 2;
}

/* ---- All CPUs at once. ---- */

static void find_warps(void *argument, unsigned cpu)
{
    struct measurement *it = argument;
    struct probe_clock_result *result = &it->results[it->clock];
    struct stopwatch time;
    uint64_t reads = 0;

    start_patience(it, &time);
    if (cpu == FIRST)
        stopwatch_start(&time, it->share_ticks);
    while (!has_ended(it) && (reads % TURNS_BETWEEN_TIMES != 0 || stopwatch_runs(&time))) {
        int64_t seen = warp_cell_look(&it->cell);
        int64_t less = warp_cell_tell(&it->cell, seen, cpu, reading(it, it->clock, cpu));

        if (less > 0) {
            struct probe_warp *warp = &result->warp[warp_cell_reader(seen)][cpu];

            warp->count++;
            if (less > warp->largest)
                warp->largest = less;
        }
        if (reads++ % TURNS_BETWEEN_TIMES == 0 && cpu == FIRST)
            read_lines(it);
    }
    if (cpu == FIRST)
        end_for_all(it);
    __atomic_fetch_add(&result->cell_reads, reads, __ATOMIC_RELAXED);
}

/* ---- The schedule. ---- */

static void progress(const struct measurement *it, unsigned half_slices)
{
    if (it->plan->progress)
        it->plan->progress(half_slices * 100 / (2 * PROBE_SLICES));
}

/* Where more vCPUs than host CPUs take their time to answer, each slice goes on with the pairs where the last one ended. */
static void exchange_pairs(struct measurement *it, uint64_t slice_ticks)
{
    unsigned pairs = it->results[0].pairs;
    uint64_t begin_tsc = it->began_tsc;

    for (unsigned clock = 0; clock < it->count; clock++) {
        for (unsigned pair = 0; pair < pairs; pair++) {
            offset_window_begin(&it->results[clock].pair[pair].slices[it->slice]);
            it->results[clock].pair[pair].at_tsc[it->slice] = begin_tsc;
        }
    }
    it->share_ticks = pairs ? slice_ticks / 2 / pairs / it->exchanged : 0;
    for (unsigned done = 0; done < pairs && it->ended_tsc - begin_tsc < slice_ticks / 4 * 3; done++) {
        exchange_pair(it);
        it->pair = (it->pair + 1) % pairs;
    }
}

/* The pairs first, and then the shared cell for what they left of the slice, but a quarter at least. */
static void measure_slice(struct measurement *it)
{
    uint64_t slice_ticks = ticks_of_ms(it, it->plan->milliseconds) / PROBE_SLICES, begin_tsc, used_ticks;

    it->late_ticks = ticks_of_ms(it, LATE_MS) < slice_ticks ? ticks_of_ms(it, LATE_MS) : slice_ticks;
    run(it, 0, begin_slice);
    begin_tsc = it->began_tsc;
    exchange_pairs(it, slice_ticks);
    progress(it, 2 * it->slice + 1);

    used_ticks = it->ended_tsc - begin_tsc; /* of a TSC that went back: very many */
    used_ticks = used_ticks < slice_ticks / 4 * 3 ? used_ticks : slice_ticks / 4 * 3;
    it->share_ticks = (slice_ticks - used_ticks) / it->exchanged;
    for (it->clock = 0; it->clock < it->count; it->clock++) {
        if (!it->clocks[it->clock].exchanged)
            continue;
        warp_cell_begin(&it->cell, it->results[it->clock].sample[it->slice].clock);
        run(it, all_cpus(it->team), find_warps);
    }
    progress(it, 2 * it->slice + 2);
}

/* All pairs; of more than 16 CPUs, each with the first. */
static void choose_pairs(const struct probe_team *team, struct probe_clock_result *result)
{
    bool all = team->cpus * (team->cpus - 1) / 2 <= PROBE_PAIRS_MAX;

    result->pairs = 0;
    for (unsigned a = 0; a < (all ? team->cpus : 1); a++) {
        for (unsigned b = a + 1; b < team->cpus; b++) {
            result->pair[result->pairs].a = a;
            result->pair[result->pairs++].b = b;
        }
    }
}

void measure(struct probe_team *team, const struct probe_plan *plan, const struct probe_clock *clocks, unsigned count,
             struct probe_clock_result *results)
{
    struct measurement it;

    it.team = team;
    it.plan = plan;
    it.clocks = clocks;
    it.count = count;
    it.results = results;
    it.exchanged = it.pair = 0;
    it.began_tsc = it.ended_tsc = 0; /* should the first CPU never come */
    for (unsigned clock = 0; clock < count; clock++) {
        it.exchanged += clocks[clock].exchanged;
        step_search_begin(&results[clock].steps, plan->tsc_hz, clocks[clock].hz, clocks[clock].unslewed,
                          clocks[clock].grain);
        choose_pairs(team, &results[clock]);
        for (unsigned cpu = 0; cpu < team->cpus; cpu++)
            it.added[clock][cpu] = clocks[clock].exchanged ? units_of_ns(team->added_ns[cpu], clocks[clock].hz) : 0;
    }
    run(&it, 0, learn_rates);
    for (it.slice = 0; it.slice < PROBE_SLICES; it.slice++)
        measure_slice(&it);
    run(&it, 0, begin_slice); /* the sample at the end */
    for (unsigned clock = TSC + 1; clock < count; clock++)
        step_search_end(&results[clock].steps);
    for (unsigned clock = 0; clock < count; clock++)
        results[clock].pairs = clocks[clock].exchanged ? results[clock].pairs : 0;
}
