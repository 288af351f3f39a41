/* SPDX-License-Identifier: Apache-2.0
 *
 * How a guest reads its clock, from a pvclock page as Linux does by the letter, and from a page of the sequence kind.
 * Shares no code with pvclock_read().
 */
#ifndef GUEST_READER_H
#define GUEST_READER_H

#include <stdbool.h>

#include "sequence_page.h"

struct reading {
	uint64_t tsc; /* the true one, without the skew */
	uint64_t ns;
	uint32_t version;
	struct pvclock_vcpu_time_info payload;
};

/* One attempt, of which a guest makes as many as it takes.  False: try again. */
typedef bool attempt_fn(const volatile void *page, uint64_t skew_ticks, struct reading *ret);

static uint64_t guest_rdtsc_ordered(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static void compiler_barrier(void)
{
	__asm__ volatile("" : : : "memory");
}

/* pvclock_scale_delta() of Linux: a shift, and the upper 64 of a 96-bit product. */
static uint64_t guest_scale_delta(uint64_t delta, uint32_t mul, int8_t shift)
{
	uint64_t low_product;

	if (shift < 0)
		delta >>= -shift;
	else
		delta <<= shift;
	low_product = (delta & UINT32_MAX) * mul;
	return (delta >> 32) * mul + (low_product >> 32);
}

static void copy_payload(const volatile struct pvclock_vcpu_time_info *page, struct pvclock_vcpu_time_info *ret)
{
	ret->tsc_timestamp = page->tsc_timestamp;
	ret->system_time = page->system_time;
	ret->tsc_to_system_mul = page->tsc_to_system_mul;
	ret->tsc_shift = page->tsc_shift;
	ret->flags = page->flags;
}

static bool same_payload(const struct pvclock_vcpu_time_info *one, const struct pvclock_vcpu_time_info *other)
{
	return one->tsc_timestamp == other->tsc_timestamp && one->system_time == other->system_time &&
	       one->tsc_to_system_mul == other->tsc_to_system_mul && one->tsc_shift == other->tsc_shift &&
	       one->flags == other->flags;
}

static uint64_t payload_ns(const struct pvclock_vcpu_time_info *payload, uint64_t tsc)
{
	return payload->system_time + guest_scale_delta(tsc - payload->tsc_timestamp, payload->tsc_to_system_mul,
							payload->tsc_shift);
}

/* As Linux: nothing holds the last load of the version back until rdtsc is done. */
static bool attempt_linux(const volatile void *at, uint64_t skew_ticks, struct reading *ret)
{
	const volatile struct pvclock_vcpu_time_info *page = at;
	ret->version = page->version & ~1u;
	compiler_barrier();
	ret->tsc = guest_rdtsc_ordered();
	copy_payload(page, &ret->payload);
	ret->ns = payload_ns(&ret->payload, ret->tsc - skew_ticks);
	compiler_barrier();
	return page->version == ret->version;
}

/* How long before its rdtsc the unfenced reader's last load is done.  At least: as if something had missed the
 * cache.  At most: less than the publisher's margin, for no CPU holds a load in flight for longer; where an interrupt
 * came between, a real one would have done the load again, and we begin again.
 */
#define OVERTAKE_MIN_TICKS 256
#define OVERTAKE_MAX_TICKS 768

/* The reader of Linux on the CPU that it permits: all loads after rdtsc are done before it. */
static bool attempt_unfenced(const volatile void *at, uint64_t skew_ticks, struct reading *ret)
{
	const volatile struct pvclock_vcpu_time_info *page = at;
	uint64_t began_tsc = guest_rdtsc_ordered();
	bool valid;

	__builtin_ia32_lfence();
	ret->version = page->version & ~1u;
	compiler_barrier();
	copy_payload(page, &ret->payload);
	compiler_barrier();
	valid = page->version == ret->version;
	do {
		ret->tsc = guest_rdtsc_ordered();
	} while (ret->tsc - began_tsc < OVERTAKE_MIN_TICKS);
	ret->ns = payload_ns(&ret->payload, ret->tsc - skew_ticks);
	return valid && ret->tsc - began_tsc <= OVERTAKE_MAX_TICKS;
}

/* A page of the sequence kind: what is under its sequence is read between two looks at that, which is 0 while busy. */
static bool attempt_sequence(const volatile void *at, uint64_t skew_ticks, struct reading *ret)
{
	const volatile struct sequence_page *page = at;
	uint32_t sequence = page->sequence;

	compiler_barrier();
	ret->version = 2 * sequence;
	ret->tsc = guest_rdtsc_ordered();
	copy_payload(&page->line, &ret->payload);
	ret->ns = payload_ns(&ret->payload, ret->tsc - skew_ticks);
	compiler_barrier();
	return sequence != 0 && page->sequence == sequence;
}

#endif
