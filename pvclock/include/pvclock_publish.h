/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Publishing a VM's clock into its pvclock pages, and reading it back as a guest does.
 *
 * One function publishes: pvclock_publish().  All pages of a VM change together, while its vCPUs read them:
 *
 *   1. touch every page, so that nothing faults later;
 *   2. make every version odd;
 *   3. wait until all CPUs see that, then read the TSC: A.  Guests that still trust an old page read their TSC
 *      before the break point B = A + margin; the margin is there because a guest's last load may overtake its rdtsc;
 *   4. write the new line, which meets the old one at B;
 *   5. wait for B, then make every version even.
 *
 * Where the counter goes back or stands still during step 5, B may never come.  The wait has a bound, the update ends
 * all the same, and the caller is told: readers must not spin for as long as the counter went back.
 *
 * So every old reading is of a moment up to B and every new one of a moment from B on, and a reading that begins
 * after another has ended is never smaller, whichever vCPUs they are on.  That needs TSCs in step, and fewer than
 * 2^31 publishes during one reading.
 *
 * Linux is the reference for versions (kvm_setup_guest_pvclock()); the common break point is ours.
 *
 * A VMM keeps, for each VM and under one lock: the exact timeline (struct pvclock_line), the rate that pages show of it
 * (struct pvclock_rate), the line published last (struct pvclock_anchor), a counter, and a target for each page.
 *
 *   begin    line = { host TSC now, ns to begin with, 0, ns, ticks }; rate = pvclock_rate_of() the scale that
 *            pvclock_time_scale_of_rate() gives, rounded down; anchor = { 0 }; counter = pvclock_host_counter()
 *   refresh  pvclock_publish(), at least every 2 s of guest time: mul is up to 0.47 ppb slow
 *   rate     pvclock_publish() the old line at the new rate; then line = pvclock_line_turn(pvclock_line_at(line,
 *            break_tsc), ns, ticks).  Not the other way round: up to the break point, which nobody knows before, guests
 *            read the old line
 *   step     move line and anchor by the same, pvclock_anchor_move(), then pvclock_publish()
 */
#ifndef PVCLOCK_PUBLISH_H
#define PVCLOCK_PUBLISH_H

#include "pvclock_abi.h"
#include "pvclock_math.h"
#include "pvclock_tsc.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A published line in host ticks: what a guest computes, before its own TSC offset.  mul 0 is "none yet". */
struct pvclock_anchor {
	uint64_t tsc_timestamp;
	uint64_t system_time;
	struct pvclock_scale scale;
};

/* What a guest reads from the line at host TSC `tsc`.  Before the timestamp, where a guest would underflow and read
 * centuries, it is the value at the timestamp.
 */
static inline uint64_t pvclock_anchor_read(const struct pvclock_anchor *anchor, uint64_t tsc)
{
	uint64_t delta = tsc - anchor->tsc_timestamp;

	if ((int64_t)delta < 0)
		return anchor->system_time;
	return anchor->system_time + pvclock_scale_delta(delta, anchor->scale);
}

/* Put the line published last `ticks` later and `ns` ahead, for a declared step: the next publish goes on from there.
 * A pause that is left out moves it by the ticks that it took, a jump by its ns.
 */
static inline void pvclock_anchor_move(struct pvclock_anchor *anchor, uint64_t ticks, uint64_t ns)
{
	anchor->tsc_timestamp += ticks;
	anchor->system_time += ns;
}

/* A scale, and how to find a timestamp before the break point from which its line passes through a given fraction of
 * a nanosecond there; made once per rate.
 *
 * The ABI has whole ns at a whole tick.  But the fraction that a guest cuts from k steps is k * mul mod 2^32 (in 2^-32
 * ns), and every multiple of 2^zeros comes up among 2^(32 - zeros) steps: mul's odd part has an inverse modulo 2^32.
 * So the timeline's fraction goes into the choice of the timestamp, up to some 4 s back, and is not lost.
 */
struct pvclock_rate {
	struct pvclock_scale scale;
	unsigned int step_bits; /* a step is 2^step_bits ticks, the least that a guest's right shift does not cut */
	unsigned int zeros;     /* trailing zero bits of the ns in a step, in 2^-32 ns; at most 32 */
	uint32_t inverse;       /* of their odd part, modulo 2^32 */
	uint64_t least_steps;   /* of a lead: never "now", where a guest whose rdtsc runs early would underflow */
};

#define PVCLOCK_LEAST_LEAD_TICKS (UINT64_C(1) << 14)
/* Far enough below 2^63 that a timestamp is never taken for one ahead: a step of a very slow clock has many ticks. */
#define PVCLOCK_MOST_LEAD_TICKS (UINT64_C(1) << 61)
#define PVCLOCK_EARLY_CANDIDATES 64
#define PVCLOCK_GOLDEN_RATIO UINT64_C(0x9e3779b97f4a7c15)

/* The rate of a scale, for pvclock_publish().  It may not be faster than the timeline, for a page that is ahead cannot
 * be put back: pvclock_time_scale_of_rate(), rounded down, gives such a scale.
 * Precondition: mul > 0, -64 < shift < 32.
 */
static inline struct pvclock_rate pvclock_rate_of(struct pvclock_scale scale)
{
	struct pvclock_rate rate = { scale, scale.shift < 0 ? (unsigned int)-scale.shift : 0, 32, 0, 1 };
	uint32_t step_ns = scale.shift > 0 ? scale.mul << scale.shift : scale.mul;

	if (rate.step_bits < 14)
		rate.least_steps = PVCLOCK_LEAST_LEAD_TICKS >> rate.step_bits;
	if (step_ns != 0) {
		uint32_t odd;

		rate.zeros = (unsigned int)__builtin_ctz(step_ns);
		odd = step_ns >> rate.zeros;
		rate.inverse = odd; /* right to 3 bits; each turn doubles them */
		for (int bits = 3; bits < 32; bits *= 2)
			rate.inverse *= 2u - odd * rate.inverse;
	}
	return rate;
}

/* A moment of guest time: ns + fraction * 2^-32. */
struct pvclock_moment {
	uint64_t ns;
	uint32_t fraction;
};

/* What a guest makes of `steps` from a whole ns. */
static inline struct pvclock_moment pvclock_lead_moment(uint64_t steps, const struct pvclock_rate *rate)
{
	uint64_t ticks = steps << rate->step_bits;
	uint64_t shifted = rate->scale.shift < 0 ? steps : ticks << rate->scale.shift;
	struct pvclock_moment moment = { pvclock_mul_shr(shifted, rate->scale.mul, 32),
					 (uint32_t)(shifted * rate->scale.mul) };

	return moment;
}

/* The lead that ends with `fraction`, rounded down to what there is: at least least_steps, less than one period more. */
static inline uint64_t pvclock_exact_lead(uint32_t fraction, const struct pvclock_rate *rate)
{
	uint64_t period = UINT64_C(1) << (32 - rate->zeros);
	uint64_t steps = (uint64_t)(fraction >> (rate->zeros & 31)) * rate->inverse;

	return rate->least_steps + ((steps - rate->least_steps) & (period - 1));
}

/* How far a line that ends with `fraction` is from `moment`, in 2^-32 ns: behind, if need be in the ns before, where
 * the clock may show that; else ahead.
 */
static inline uint32_t pvclock_lead_distance(uint32_t fraction, struct pvclock_moment moment, uint64_t least_ns)
{
	if (moment.ns == least_ns && fraction > moment.fraction)
		return fraction - moment.fraction;
	return moment.fraction - fraction;
}

/* For a clock too young for an exact lead: the best of leads scattered over the later half of its past.  Scattered,
 * for evenly spaced ones may all end with the same fraction.
 */
static inline uint64_t pvclock_early_lead(struct pvclock_moment moment, const struct pvclock_rate *rate,
					  uint64_t least_ns)
{
	uint64_t past, best;
	uint32_t best_distance = UINT32_MAX;

	if (pvclock_unscale_delta(moment.ns, rate->scale, &past) != 0 || past > PVCLOCK_MOST_LEAD_TICKS)
		past = PVCLOCK_MOST_LEAD_TICKS;
	past >>= rate->step_bits;
	/* A spare ns below: the line may have to be that of the ns before. */
	while (past != 0 && pvclock_lead_moment(past, rate).ns >= moment.ns)
		past--;
	best = past;
	for (uint64_t i = 0; i < PVCLOCK_EARLY_CANDIDATES; i++) {
		uint64_t steps = past - pvclock_mul_shr(past / 2, i * PVCLOCK_GOLDEN_RATIO, 64);
		uint32_t fraction = pvclock_lead_moment(steps, rate).fraction;
		uint32_t distance = pvclock_lead_distance(fraction, moment, least_ns);

		if (distance < best_distance) {
			best = steps;
			best_distance = distance;
		}
	}
	return best;
}

/* The line at `rate` that passes the break point as near to `moment` as can be; it shows least_ns or more there. */
static inline struct pvclock_anchor pvclock_anchor_through(struct pvclock_moment moment, uint64_t break_tsc,
							   const struct pvclock_rate *rate, uint64_t least_ns)
{
	uint64_t steps = pvclock_exact_lead(moment.fraction, rate);
	struct pvclock_moment lead = pvclock_lead_moment(steps, rate);
	struct pvclock_anchor anchor = { break_tsc, moment.ns, rate->scale };

	if (lead.ns > moment.ns || steps > PVCLOCK_MOST_LEAD_TICKS >> rate->step_bits) {
		steps = pvclock_early_lead(moment, rate, least_ns);
		lead = pvclock_lead_moment(steps, rate);
		if (lead.fraction > moment.fraction && moment.ns != least_ns)
			anchor.system_time--;
	}
	anchor.tsc_timestamp -= steps << rate->step_bits;
	anchor.system_time -= lead.ns;
	return anchor;
}

/* How many ticks further back a timestamp may go without showing at the break point: a guest's right shift cuts them
 * there.  As many as win back the time (ns and fraction) that the new line lacks, at most.
 */
static inline uint64_t pvclock_spare_ticks(struct pvclock_moment lacking, const struct pvclock_rate *rate)
{
	uint64_t most = (UINT64_C(1) << rate->step_bits) - 1;
	pvclock_u128 ticks;

	if (lacking.ns >> 30)
		return most;
	ticks = ((((pvclock_u128)lacking.ns << 32) | lacking.fraction) << rate->step_bits) / rate->scale.mul;
	return ticks < most ? (uint64_t)ticks : most;
}

/* The line that takes over from `old` at `break_tsc` at the new rate.
 *
 * At the break it shows what the timeline says, but neither less than the old line nor over 1 ns more: the clock does
 * not step, and what it lacks after a long time without a publish comes back 1 ns at a time.  With no old line
 * (mul 0: a first publish, or a declared step) it shows the timeline.
 */
static inline struct pvclock_anchor pvclock_reanchor(const struct pvclock_line *timeline,
						     const struct pvclock_anchor *old,
						     const struct pvclock_rate *rate, uint64_t break_tsc)
{
	struct pvclock_line now = pvclock_line_at(*timeline, break_tsc);
	struct pvclock_moment moment = { now.ns, (uint32_t)(((pvclock_u128)now.rem << 32) / now.den) };
	struct pvclock_anchor anchor;
	uint64_t least_ns;

	if (old->scale.mul == 0)
		return pvclock_anchor_through(moment, break_tsc, rate, moment.ns);

	least_ns = pvclock_anchor_read(old, break_tsc);
	if ((int64_t)(moment.ns - least_ns) < 0) {
		moment.ns = least_ns;
		moment.fraction = 0;
	} else if (moment.ns - least_ns > 1) {
		struct pvclock_moment lacking = { moment.ns - least_ns - 2, moment.fraction };

		moment.ns = least_ns + 1;
		moment.fraction = UINT32_MAX;
		anchor = pvclock_anchor_through(moment, break_tsc, rate, least_ns);
		anchor.tsc_timestamp -= pvclock_spare_ticks(lacking, rate);
		return anchor;
	}
	return pvclock_anchor_through(moment, break_tsc, rate, least_ns);
}

/* Guests align a page to 4 bytes at best, so it is accessed by 32-bit words, and bytewise where it is not even that:
 * Linux allows it, and such a page has the protocol but not its guarantee.
 */
typedef uint32_t __attribute__((__may_alias__)) pvclock_word;

static inline uint32_t pvclock_load32(const void *at)
{
	const uint8_t *byte = (const uint8_t *)at;
	uint32_t value = 0;

	if (((uintptr_t)at & 3) == 0)
		return __atomic_load_n((const pvclock_word *)at, __ATOMIC_RELAXED);
	for (int i = 3; i >= 0; i--)
		value = value << 8 | __atomic_load_n(byte + i, __ATOMIC_RELAXED);
	return value;
}

static inline void pvclock_store32(void *at, uint32_t value)
{
	uint8_t *byte = (uint8_t *)at;

	if (((uintptr_t)at & 3) == 0) {
		__atomic_store_n((pvclock_word *)at, value, __ATOMIC_RELAXED);
		return;
	}
	for (int i = 0; i < 4; i++)
		__atomic_store_n(byte + i, (uint8_t)(value >> 8 * i), __ATOMIC_RELAXED);
}

static inline uint64_t pvclock_load64(const void *at)
{
	return pvclock_load32(at) | (uint64_t)pvclock_load32((const uint8_t *)at + 4) << 32;
}

static inline void pvclock_store64(void *at, uint64_t value)
{
	pvclock_store32(at, (uint32_t)value);
	pvclock_store32((uint8_t *)at + 4, (uint32_t)(value >> 32));
}

/* The version of an update in progress, from whatever the guest's memory holds.  One more ends the update. */
static inline uint32_t pvclock_version_odd(uint32_t version)
{
	return (version + 1u) | 1u;
}

/* One vCPU's page, and what is the vCPU's own in it.  All vCPUs' TSCs have the host's rate. */
struct pvclock_target {
	void *page;              /* 32 writable bytes, which the caller has checked to lie in guest memory */
	uint64_t tsc_offset;     /* guest TSC = host TSC + tsc_offset */
	uint32_t odd_version;    /* pvclock_publish()'s own */
	uint8_t flags;           /* for a vCPU out of the guest: STABLE and GUEST_STOPPED as they shall be */
	uint8_t in_guest;        /* the vCPU may be running: leave flags and pads alone, the guest writes there too */
};

#define PVCLOCK_PAGE_SHIFT 12

#define PVCLOCK_FIELD(page, field) ((uint8_t *)(page) + offsetof(struct pvclock_vcpu_time_info, field))

/* Bring the page in, writable.  A locked add of 0 cannot lose a store that the guest makes meanwhile.  Guest memory
 * need not be page-aligned here, so the structure may end on another host page than it begins on.
 */
static inline void pvclock_touch(void *page)
{
	uint8_t *first = (uint8_t *)page;
	uint8_t *last = first + sizeof(struct pvclock_vcpu_time_info) - 1;

	__asm__ volatile("lock addb $0, %0" : "+m"(*first) : : "memory", "cc");
	if (((uintptr_t)first ^ (uintptr_t)last) >> PVCLOCK_PAGE_SHIFT)
		__asm__ volatile("lock addb $0, %0" : "+m"(*last) : : "memory", "cc");
}

/* GUEST_STOPPED stays until the guest clears it; no other flag is taken from the guest's memory. */
static inline void pvclock_write_flags(const struct pvclock_target *target)
{
	uint8_t *flags = PVCLOCK_FIELD(target->page, flags);
	uint8_t kept = __atomic_load_n(flags, __ATOMIC_RELAXED) & PVCLOCK_GUEST_STOPPED;

	__atomic_store_n(flags, target->flags | kept, __ATOMIC_RELAXED);
	__atomic_store_n(flags + 1, 0, __ATOMIC_RELAXED);
	__atomic_store_n(flags + 2, 0, __ATOMIC_RELAXED);
	pvclock_store32(PVCLOCK_FIELD(target->page, pad0), 0);
}

static inline void pvclock_write_payload(const struct pvclock_target *target, const struct pvclock_anchor *anchor)
{
	void *page = target->page;

	pvclock_store64(PVCLOCK_FIELD(page, tsc_timestamp), anchor->tsc_timestamp + target->tsc_offset);
	pvclock_store64(PVCLOCK_FIELD(page, system_time), anchor->system_time);
	pvclock_store32(PVCLOCK_FIELD(page, tsc_to_system_mul), anchor->scale.mul);
	__atomic_store_n(PVCLOCK_FIELD(page, tsc_shift), (uint8_t)anchor->scale.shift, __ATOMIC_RELAXED);
	if (!target->in_guest)
		pvclock_write_flags(target);
}

/* Publish `timeline` at `rate` into all pages at once; see the top of this file.
 *
 * *anchor is the line published last (mul 0 if the clock may step) and becomes the new one; *break_tsc becomes the
 * break point in host TSC, where the old line ends: a timeline that changes its rate turns there, after the publish.
 * Takes a few microseconds, at least the counter's margin.  One caller at a time for a VM.
 *
 * again: *break_tsc is that of the last publish and stays, for a CPU whose counter is behind that: the line, which must
 * be the one published last, stays where it is on all other CPUs.
 *
 * Returns 0, or -1 if the counter went back or stood still before the break point: the pages are even and show the new
 * line, but before the break point, where it need not meet the old one.
 */
static inline int pvclock_publish_at(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				     const struct pvclock_rate *rate, const struct pvclock_counter *counter,
				     struct pvclock_anchor *anchor, uint64_t *break_tsc, int again)
{
	uint64_t odd_tsc;
	int status;

	for (size_t i = 0; i < count; i++)
		pvclock_touch(targets[i].page);

	for (size_t i = 0; i < count; i++) {
		targets[i].odd_version = pvclock_version_odd(pvclock_load32(targets[i].page));
		pvclock_store32(targets[i].page, targets[i].odd_version);
	}

	/* For the compiler, and for a counter that is no rdtsc: the payload comes after the odd versions. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	odd_tsc = pvclock_counter_read_after_stores(counter);
	if (!again)
		*break_tsc = odd_tsc + counter->margin_ticks;
	*anchor = pvclock_reanchor(timeline, anchor, rate, *break_tsc);

	for (size_t i = 0; i < count; i++)
		pvclock_write_payload(&targets[i], anchor);

	status = pvclock_counter_wait(counter, odd_tsc);

	/* Release; pairs with the guest's second look at the version. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	for (size_t i = 0; i < count; i++)
		pvclock_store32(targets[i].page, targets[i].odd_version + 1u);
	return status;
}

/* pvclock_publish_at() a break point of its own. */
static inline int pvclock_publish(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				  const struct pvclock_rate *rate, const struct pvclock_counter *counter,
				  struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	return pvclock_publish_at(targets, count, timeline, rate, counter, anchor, break_tsc, 0);
}

/* Write the wall clock under its version, with Linux's rule for it (kvm_write_wall_clock()): the time of day, UTC, at
 * which guest time was 0.  Once, when the guest asks for it.
 * record: 12 writable bytes, of any alignment.
 */
static inline void pvclock_publish_wall_clock(void *record, uint32_t sec, uint32_t nsec)
{
	uint8_t *at = (uint8_t *)record;
	uint32_t odd_version = pvclock_version_odd(pvclock_load32(at));

	pvclock_store32(at, odd_version);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(at + offsetof(struct pvclock_wall_clock, sec), sec);
	pvclock_store32(at + offsetof(struct pvclock_wall_clock, nsec), nsec);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(at, odd_version + 1u);
}

/* Say in a vCPU's steal time that it was scheduled out.  A guest that then wants its TLB flushed says so beside it. */
static inline void pvclock_set_preempted(void *record)
{
	uint8_t *at = (uint8_t *)record + offsetof(struct pvclock_steal_time, preempted);

	__atomic_fetch_or(at, PVCLOCK_VCPU_PREEMPTED, __ATOMIC_SEQ_CST);
}

/* Say that it runs again; returns what was said before.  In one go: a guest asks for a flush by compare-and-exchange,
 * and so knows whether it was in time.
 */
static inline uint8_t pvclock_clear_preempted(void *record)
{
	uint8_t *at = (uint8_t *)record + offsetof(struct pvclock_steal_time, preempted);

	return __atomic_exchange_n(at, 0, __ATOMIC_SEQ_CST);
}

/* Add `ns` to a vCPU's steal time: what is there is the guest's to set, and the sum goes on from it.  `preempted` stays,
 * so this may come while the vCPU is scheduled out, and loses no flush that its guest asks for.
 * record: 64 writable bytes, of any alignment.
 */
static inline void pvclock_add_steal_time(void *record, uint64_t ns)
{
	uint8_t *at = (uint8_t *)record;
	uint8_t *version = at + offsetof(struct pvclock_steal_time, version);
	uint8_t *steal = at + offsetof(struct pvclock_steal_time, steal);
	uint32_t odd_version = pvclock_version_odd(pvclock_load32(version));

	pvclock_store32(version, odd_version);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store64(steal, pvclock_load64(steal) + ns);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(version, odd_version + 1u);
}

/* The same on the vCPU's way into the guest, as Linux does (record_steal_time()): it is no longer preempted.
 * Returns the old `preempted` byte.
 */
static inline uint8_t pvclock_publish_steal_time(void *record, uint64_t ns)
{
	uint8_t preempted = pvclock_clear_preempted(record);

	pvclock_add_steal_time(record, ns);
	return preempted;
}

/* Let the guest end its interrupt without an exit: it tests and clears the bit, and exits only if it was clear. */
static inline void pvclock_eoi_offer(uint8_t *flag)
{
	__atomic_fetch_or(flag, PVCLOCK_EOI_ENABLED, __ATOMIC_SEQ_CST);
}

/* Take the offer back.  Returns 1 if the guest has used it: its interrupt has ended.  Either side takes the bit in one
 * go, so just one of them gets it.
 */
static inline int pvclock_eoi_take(uint8_t *flag)
{
	return !(__atomic_fetch_and(flag, (uint8_t)~PVCLOCK_EOI_ENABLED, __ATOMIC_SEQ_CST) & PVCLOCK_EOI_ENABLED);
}

/* What a guest finds at one instant. */
struct pvclock_reading {
	uint64_t tsc; /* guest TSC */
	uint64_t ns;
	uint32_t version;
	uint8_t flags;
};

/* Read the clock as Linux does (__pvclock_clocksource_read(), without its clamp for pages that are not STABLE).
 *
 * tsc_offset is that of the vCPU whose page it is.  Returns 0, or -1 if no consistent reading came in `tries`: an
 * update that never ends, in a page that the guest itself may have spoilt.
 */
static inline int pvclock_read(const void *page, uint64_t tsc_offset, const struct pvclock_counter *counter,
			       unsigned int tries, struct pvclock_reading *ret)
{
	while (tries-- > 0) {
		uint32_t version = pvclock_load32(page) & ~1u;
		struct pvclock_scale scale;
		uint64_t delta;

		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		ret->tsc = pvclock_counter_read(counter) + tsc_offset;
		delta = ret->tsc - pvclock_load64(PVCLOCK_FIELD(page, tsc_timestamp));
		scale.mul = pvclock_load32(PVCLOCK_FIELD(page, tsc_to_system_mul));
		scale.shift = (int8_t)__atomic_load_n(PVCLOCK_FIELD(page, tsc_shift), __ATOMIC_RELAXED);
		ret->ns = pvclock_load64(PVCLOCK_FIELD(page, system_time)) + pvclock_scale_delta(delta, scale);
		ret->flags = __atomic_load_n(PVCLOCK_FIELD(page, flags), __ATOMIC_RELAXED);
		ret->version = version;
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (pvclock_load32(page) == version)
			return 0;
		__builtin_ia32_pause();
	}
	return -1;
}

#ifdef __cplusplus
}
#endif

#endif
