/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Finds where a clock left the line that it was on against the TSC, from readings between two readings of the TSC.
 *
 * Between two readings the clock advances by its rate times the ticks.  The rate is learned first, as bounds: the
 * medians of those of a few short spans, so steps in fewer than half of them do no harm.  From then on it may be any
 * that NTP can make of it, at any moment; of a clock that NTP leaves alone, it stays, and longer spans tell it ever
 * better, which matters where the CPU that reads is preempted for long.  What an advance has beyond these
 * bounds is a step; or a faster slew (an adjtimex tick, chrony), which lasts: so a step counts only when neither the
 * span before, nor the one after, was like that, each long enough to tell.
 */
#ifndef PVCLOCK_PROBE_STEP_SEARCH_H
#define PVCLOCK_PROBE_STEP_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

/* The clock of one instant: read between two readings of the TSC. */
struct probe_sample {
    uint64_t tsc_before;
    int64_t clock;
    uint64_t tsc_after;
};

/* A step of `low` to `high` units of the clock, both of the step's sign, seen at `at_tsc`. */
struct clock_step {
    bool found;
    int64_t low, high;
    uint64_t at_tsc;
};

enum {
    STEP_SEARCH_SPANS = 15,          /* from which the rate is learned */
    STEP_SEARCH_SPANS_HZ = 100,      /* each lasts 10 ms or more, */
    STEP_SEARCH_SPANS_GROW = 4,      /* and then so many times as long, of a clock whose rate stays */
    STEP_SEARCH_GRAIN_HZ = 10000000, /* any clock may advance by 100 ns at once, as Hyper-V's does */
    STEP_SEARCH_SLEW_PPM = 1001,     /* from one end of NTP's +-500 ppm to the other: 1.0005 / 0.9995 */
    STEP_SEARCH_UNSLEWED_PPM = 1,    /* a kernel that scales by 32 bits changes the last of them now and then */
    STEP_SEARCH_RATE_BITS = 56,      /* of a rate's fraction */
    STEP_SEARCH_PASTS = 16           /* readings that are kept of those judged */
};

/* Advances are cut to this, so that sums of a few fit. */
#define STEP_SEARCH_FAR (INT64_MAX / 8)

/* What may have been added to the clock from one reading to the next: between `low` and `high`. */
struct step_excess {
    int64_t low, high;
    uint64_t ticks_least, ticks_most; /* that passed */
};

struct step_search {
    uint64_t tsc_hz, slew_ppm;
    int64_t grain; /* a reading is that of its instant, or up to so many units less */
    uint64_t reads;
    int64_t floor;  /* units: a step within it cannot be told from the readings' width and the rate's freedom */
    uint64_t count; /* of steps beyond the floor */
    struct clock_step forward, backward; /* the largest each way */

    struct probe_sample last;            /* the reading from which the next one's advance is taken */
    uint64_t narrowest;                  /* ticks between the two TSCs of a reading */
    struct probe_sample span_begin;      /* of the span that is learned from next */
    uint64_t span_ticks;
    unsigned spans;                      /* learned from */
    struct probe_sample learned[STEP_SEARCH_SPANS + 1]; /* the ends of the first ones: they are judged afterwards */
    uint64_t slowest[STEP_SEARCH_SPANS], fastest[STEP_SEARCH_SPANS]; /* sorted bounds of their rates */
    bool knows_rate;                     /* since it had all of them once */
    uint64_t rate_low, rate_high;
    bool has_lost_line;                  /* the TSC went back: what the clock did there is not known */
    struct step_excess candidate;        /* a step unless the next span goes on like that; low == high == 0: none */
    uint64_t candidate_tsc;
    struct probe_sample past[STEP_SEARCH_PASTS]; /* since the last step, evenly apart: `past_ticks` or more */
    unsigned pasts;
    uint64_t past_ticks;
};

__extension__ typedef unsigned __int128 step_search_u128;

/* grain: of clocks that stand still for more than 100 ns between two counts; 0: this one does not. */
static inline void step_search_begin(struct step_search *search, uint64_t tsc_hz, uint64_t clock_hz, bool unslewed,
                                     int64_t grain)
{
    int64_t least_grain = (int64_t)(clock_hz / STEP_SEARCH_GRAIN_HZ + 1);
    struct clock_step none = {false, 0, 0, 0};

    search->tsc_hz = tsc_hz;
    search->slew_ppm = unslewed ? STEP_SEARCH_UNSLEWED_PPM : STEP_SEARCH_SLEW_PPM;
    search->grain = grain > least_grain ? grain : least_grain;
    search->reads = 0;
    search->floor = INT64_MAX; /* nothing can be told before the rate is known */
    search->count = 0;
    search->forward = search->backward = none;
    search->narrowest = UINT64_MAX;
    search->knows_rate = false;
    search->has_lost_line = false;
    search->candidate.low = search->candidate.high = 0;
    search->pasts = 0;
}

/* ---- Rates: bounds of the clock's units in a tick, as a binary fraction. ---- */

/* numerator << STEP_SEARCH_RATE_BITS divided by ticks, rounded down; the largest number where that is too large.
 * The instruction, since C's division of 128 bits is a function that a bare image has not got.
 */
static inline uint64_t step_search_rate(int64_t units, uint64_t ticks)
{
    uint64_t high, quotient, remainder;

    if (units <= 0)
        return 0;
    high = (uint64_t)units >> (64 - STEP_SEARCH_RATE_BITS);
    if (high >= ticks)
        return UINT64_MAX;
    __asm__("divq %4"
            : "=a"(quotient), "=d"(remainder)
            : "0"((uint64_t)units << STEP_SEARCH_RATE_BITS), "1"(high), "r"(ticks)
            : "cc");
    return quotient;
}

static inline int64_t step_search_cut(int64_t units)
{
    return units > STEP_SEARCH_FAR ? STEP_SEARCH_FAR : units < -STEP_SEARCH_FAR ? -STEP_SEARCH_FAR : units;
}

/* The units in so many ticks at a rate, rounded down. */
static inline int64_t step_search_units(uint64_t rate, uint64_t ticks)
{
    step_search_u128 units = (step_search_u128)rate * ticks >> STEP_SEARCH_RATE_BITS;

    return units > (step_search_u128)STEP_SEARCH_FAR ? STEP_SEARCH_FAR : (int64_t)units;
}

/* Put a rate into `count` sorted ones. */
static inline void step_search_insert(uint64_t *sorted, unsigned count, uint64_t rate)
{
    for (; count > 0 && sorted[count - 1] > rate; count--)
        sorted[count] = sorted[count - 1];
    sorted[count] = rate;
}

/* How far the rate may be from what it was. */
static inline uint64_t step_search_slew(const struct step_search *search, uint64_t rate)
{
    return (rate / 1000000 + 1) * search->slew_ppm;
}

static inline bool step_search_knows_rate(const struct step_search *search)
{
    return search->knows_rate;
}

/* More than half of the spans had no step, so one of them at least is on either side of each median.  Bounds that
 * contradict those of shorter spans had steps in most of their own.
 */
static inline void step_search_take_medians(struct step_search *search)
{
    uint64_t low = search->slowest[STEP_SEARCH_SPANS / 2], high = search->fastest[STEP_SEARCH_SPANS / 2];
    uint64_t less = step_search_slew(search, low), more = step_search_slew(search, high);

    low = low > less ? low - less : 0;
    high = high < UINT64_MAX - more ? high + more : UINT64_MAX;
    if (search->knows_rate) {
        low = low > search->rate_low ? low : search->rate_low;
        high = high < search->rate_high ? high : search->rate_high;
        if (low > high)
            return;
    }
    search->rate_low = low;
    search->rate_high = high;
    search->knows_rate = true;
    if (search->floor == INT64_MAX)
        search->floor = 0;
}

/* ---- Spans: from one reading to a later one. ---- */

static inline uint64_t step_search_width(const struct probe_sample *reading)
{
    return reading->tsc_after - reading->tsc_before;
}

static inline int64_t step_search_advance(const struct probe_sample *from, const struct probe_sample *to)
{
    return step_search_cut((int64_t)((uint64_t)to->clock - (uint64_t)from->clock));
}

/* Was this thread preempted between the TSCs?  Then the next reading says more, unless it is long in coming: the rate
 * may have been anything that it can be meanwhile, and when that comes to more, a wide reading is better than none.
 */
static inline bool step_search_is_wide(const struct step_search *search, const struct probe_sample *reading)
{
    uint64_t width = step_search_width(reading), ticks = reading->tsc_before - search->last.tsc_after;

    if (width / 2 <= search->narrowest)
        return false;
    if (!search->knows_rate)
        return ticks < 2 * search->tsc_hz / STEP_SEARCH_SPANS_HZ;
    return step_search_units(search->rate_high, width) >
           step_search_units(search->rate_high - search->rate_low, ticks);
}

static inline void step_search_begin_learning(struct step_search *search, const struct probe_sample *reading)
{
    search->span_ticks = search->tsc_hz / STEP_SEARCH_SPANS_HZ;
    search->spans = 0;
    search->span_begin = search->learned[0] = *reading;
}

/* Learn from the span that ends with this reading, if it is long enough; true: it was. */
static inline bool step_search_learn(struct step_search *search, const struct probe_sample *reading)
{
    uint64_t ticks_least = reading->tsc_before - search->span_begin.tsc_after;
    uint64_t ticks_most = reading->tsc_after - search->span_begin.tsc_before;
    int64_t advance = step_search_advance(&search->span_begin, reading);
    uint64_t fastest;

    if (ticks_least < search->span_ticks)
        return false;
    fastest = step_search_rate(advance + search->grain, ticks_least);
    step_search_insert(search->slowest, search->spans, step_search_rate(advance - search->grain, ticks_most));
    step_search_insert(search->fastest, search->spans, fastest == UINT64_MAX ? fastest : fastest + 1);
    search->span_begin = *reading;
    search->spans++;
    if (!search->knows_rate)
        search->learned[search->spans] = *reading;
    if (search->spans == STEP_SEARCH_SPANS) {
        step_search_take_medians(search);
        search->spans = 0;
        if (search->span_ticks < search->tsc_hz) /* a second */
            search->span_ticks *= STEP_SEARCH_SPANS_GROW;
    }
    return true;
}

static inline struct step_excess step_search_excess(const struct step_search *search, const struct probe_sample *from,
                                                    const struct probe_sample *to)
{
    int64_t advance = step_search_advance(from, to);
    struct step_excess excess;

    excess.ticks_least = to->tsc_before - from->tsc_after;
    excess.ticks_most = to->tsc_after - from->tsc_before;
    excess.low = advance - search->grain - step_search_units(search->rate_high, excess.ticks_most) - 1;
    excess.high = advance + search->grain - step_search_units(search->rate_low, excess.ticks_least);
    return excess;
}

/* Keep a reading of the past, if it is time to; when there is no room, every second one goes. */
static inline void step_search_keep(struct step_search *search, const struct probe_sample *reading)
{
    if (search->pasts == 0)
        search->past_ticks = search->tsc_hz / 1000;
    else if (reading->tsc_before - search->past[search->pasts - 1].tsc_before < search->past_ticks)
        return;
    if (search->pasts == STEP_SEARCH_PASTS) {
        search->pasts /= 2;
        search->past_ticks *= 2;
        for (unsigned i = 1; i < search->pasts; i++)
            search->past[i] = search->past[2 * i];
    }
    search->past[search->pasts++] = *reading;
}

/* ---- Steps. ---- */

static inline void step_search_count(struct step_search *search, const struct step_excess *excess, uint64_t at_tsc)
{
    struct clock_step *largest = excess->low > 0 ? &search->forward : &search->backward;
    bool larger = excess->low > 0 ? excess->low > largest->low : excess->high < largest->high;

    search->count++;
    if (largest->found && !larger)
        return;
    largest->found = true;
    largest->low = excess->low;
    largest->high = excess->high;
    largest->at_tsc = at_tsc;
}

/* The least of its size, either way; 0: it may be none. */
static inline int64_t step_search_least(const struct step_excess *excess)
{
    return excess->low > 0 ? excess->low : excess->high < 0 ? -excess->high : 0;
}

/* No slew makes a quarter of the rate. */
static inline bool step_search_is_no_slew(const struct step_search *search, const struct step_excess *excess)
{
    return step_search_least(excess) > step_search_units(search->rate_high, excess->ticks_most) / 4;
}

/* Does a span say as much of the rate, for its length, as the candidate's did? */
static inline bool step_search_is_as_sharp(const struct step_excess *next, const struct step_excess *candidate)
{
    return (step_search_u128)(uint64_t)(next->high - next->low) * candidate->ticks_most <=
           (step_search_u128)(uint64_t)(candidate->high - candidate->low) * next->ticks_least;
}

/* May the clock have gone as fast, or as slow, in the next span as in the candidate's? */
static inline bool step_search_goes_on(const struct step_excess *next, const struct step_excess *candidate)
{
    int64_t most = candidate->low > 0 ? next->high : -next->low;

    return most > 0 && (step_search_u128)(uint64_t)most * candidate->ticks_most >=
                           (step_search_u128)(uint64_t)step_search_least(candidate) * next->ticks_least;
}

/* Was the clock as fast, or as slow, before the candidate's span?  Where that is not known, it may have been. */
static inline bool step_search_was_so_before(const struct step_search *search, const struct step_excess *candidate)
{
    for (unsigned i = search->pasts; i-- > 0;) {
        struct step_excess before = step_search_excess(search, &search->past[i], &search->last);

        if ((int64_t)before.ticks_least > 0 && step_search_is_as_sharp(&before, candidate))
            return step_search_goes_on(&before, candidate);
    }
    return true;
}

/* It was a change of rate: learn the new one, and say that a step as large would not have been told from it. */
static inline void step_search_forget_rate(struct step_search *search, const struct step_excess *candidate)
{
    int64_t largest = candidate->low > 0 ? candidate->high : -candidate->low;

    if (largest > search->floor)
        search->floor = largest;
    search->knows_rate = false;
    search->pasts = 0;
}

/* Decide on the candidate by the span after it; false: that one is too short yet. */
static inline bool step_search_decide(struct step_search *search, const struct step_excess *next)
{
    if (step_search_least(&search->candidate) == 0)
        return true;
    if (!step_search_is_as_sharp(next, &search->candidate))
        return false;
    if (step_search_goes_on(next, &search->candidate))
        step_search_forget_rate(search, &search->candidate);
    else
        step_search_count(search, &search->candidate, search->candidate_tsc);
    search->candidate.low = search->candidate.high = 0;
    return true;
}

/* Take the span from the last reading to this one for what it is. */
static inline void step_search_sort(struct step_search *search, const struct step_excess *excess,
                                    const struct probe_sample *reading)
{
    /* What is left of a step beyond twice the width is beyond the width, and so beyond what spans as sharp may have. */
    if (2 * (excess->high - excess->low) > search->floor)
        search->floor = 2 * (excess->high - excess->low);
    if (step_search_least(excess) == 0) {
        step_search_keep(search, reading);
    } else if (step_search_is_no_slew(search, excess)) {
        step_search_count(search, excess, reading->tsc_before);
        search->pasts = 0;
    } else if (step_search_was_so_before(search, excess)) {
        step_search_forget_rate(search, excess);
    } else {
        search->candidate = *excess;
        search->candidate_tsc = reading->tsc_before;
        search->pasts = 0;
    }
}

static inline void step_search_judge(struct step_search *search, const struct probe_sample *reading)
{
    struct step_excess excess = step_search_excess(search, &search->last, reading);

    if (!step_search_decide(search, &excess))
        return;
    if (search->knows_rate)
        step_search_sort(search, &excess, reading);
    search->last = *reading;
    if (!search->knows_rate)
        step_search_begin_learning(search, reading);
}

/* The rate is known: were there steps while it was learned? */
static inline void step_search_judge_learned(struct step_search *search)
{
    search->last = search->learned[0];
    for (unsigned i = 1; i <= STEP_SEARCH_SPANS && search->knows_rate; i++)
        step_search_judge(search, &search->learned[i]);
}

static inline void step_search_begin_line(struct step_search *search, const struct probe_sample *reading)
{
    search->last = search->span_begin = *reading;
    search->candidate.low = search->candidate.high = 0;
    search->pasts = 0;
    if (!search->knows_rate)
        step_search_begin_learning(search, reading);
}

static inline void step_search_add(struct step_search *search, uint64_t tsc_before, int64_t clock, uint64_t tsc_after)
{
    struct probe_sample reading;
    bool first = search->reads++ == 0;

    reading.tsc_before = tsc_before;
    reading.clock = clock;
    reading.tsc_after = tsc_after;
    if (step_search_width(&reading) < search->narrowest)
        search->narrowest = step_search_width(&reading);
    if (first) {
        step_search_begin_line(search, &reading);
    } else if ((int64_t)(tsc_before - search->last.tsc_after) < 0) { /* it tells nothing of other clocks */
        search->has_lost_line = true;
        step_search_begin_line(search, &reading);
    } else if (step_search_is_wide(search, &reading)) {
        return;
    } else if (!search->knows_rate) {
        if (!step_search_learn(search, &reading))
            return;
        search->last = reading;
        if (search->knows_rate)
            step_search_judge_learned(search);
    } else {
        step_search_judge(search, &reading);
        if (search->knows_rate && search->slew_ppm == STEP_SEARCH_UNSLEWED_PPM)
            step_search_learn(search, &reading);
    }
}

/* After the last reading: what has not been decided may have been a step, and what was not seen may have been any. */
static inline void step_search_end(struct step_search *search)
{
    int64_t largest = search->candidate.low > 0 ? search->candidate.high : -search->candidate.low;

    if (step_search_least(&search->candidate) > 0 && largest > search->floor)
        search->floor = largest;
    if (!search->knows_rate || search->has_lost_line)
        search->floor = INT64_MAX;
}

/* The TSC itself, in its own ticks.  All that can be told of it without another clock is that it went back. */
static inline void step_search_add_tsc(struct step_search *search, uint64_t tsc)
{
    struct step_excess back;

    if (search->reads++ > 0 && (int64_t)(tsc - search->last.tsc_after) < 0) {
        back.low = back.high = (int64_t)(tsc - search->last.tsc_after);
        step_search_count(search, &back, tsc);
    }
    search->last.tsc_after = tsc;
    search->floor = 0;
}

#endif
