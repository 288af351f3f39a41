/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The cell by which two CPUs take turns at reading a clock: one line, which each hands to the other.
 *
 * Each word has one writer, so neither CPU's word is lost, at whatever point the other is preempted.
 */
#ifndef PVCLOCK_PROBE_PAIR_EXCHANGE_H
#define PVCLOCK_PROBE_PAIR_EXCHANGE_H

#include <stdbool.h>
#include <stdint.h>

#define PAIR_EXCHANGE_ENDED UINT64_MAX

struct pair_exchange {
    uint64_t asked;    /* the leader's: how many answers it wants, or ENDED */
    uint64_t clock;    /* the leader's: whose reading, written before it asks */
    uint64_t answered; /* the follower's: how many it gave */
    int64_t reading;   /* the follower's: the last one, written before it answers */
} __attribute__((aligned(64)));

/* How often a word is looked at before it is time to look at the time. */
enum { PAIR_EXCHANGE_POLLS = 256 };

static inline bool pair_exchange_differs(const uint64_t *word, uint64_t old)
{
    for (unsigned polls = 0; polls < PAIR_EXCHANGE_POLLS; polls++) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old)
            return true;
    }
    return false;
}

/* The leader has read its clock.  Its reading came first, for fenced reads let no later store begin. */
static inline void pair_exchange_ask(struct pair_exchange *exchange, uint64_t clock)
{
    exchange->clock = clock;
    __atomic_store_n(&exchange->asked, exchange->asked + 1, __ATOMIC_RELEASE);
}

/* Spins for a moment; false: not yet. */
static inline bool pair_exchange_is_answered(const struct pair_exchange *exchange)
{
    return pair_exchange_differs(&exchange->answered, exchange->asked - 1);
}

/* The leader will ask no more, be it that the follower has not answered. */
static inline void pair_exchange_end(struct pair_exchange *exchange)
{
    __atomic_store_n(&exchange->asked, PAIR_EXCHANGE_ENDED, __ATOMIC_RELEASE);
}

/* Spins for a moment; false: the follower is not asked, or not yet. */
static inline bool pair_exchange_is_asked(const struct pair_exchange *exchange)
{
    return pair_exchange_differs(&exchange->asked, exchange->answered) &&
           __atomic_load_n(&exchange->asked, __ATOMIC_ACQUIRE) != PAIR_EXCHANGE_ENDED;
}

/* The follower answers with what it read after it was asked. */
static inline void pair_exchange_answer(struct pair_exchange *exchange, int64_t reading)
{
    exchange->reading = reading;
    __atomic_store_n(&exchange->answered, exchange->answered + 1, __ATOMIC_RELEASE);
}

#endif
