/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Anchoring: the line, in a page's own integers, that takes over from the one published last at a break point.
 *
 * The clock goes on by 0 or +1 ns there, never back, and stays within 2 ns + 2^-shift ticks + 0.47 ppb of the page's age
 * of the exact timeline, after any number of anchors.  docs/clock-math.md derives it.
 */
#ifndef PVCLOCK_ANCHOR_H
#define PVCLOCK_ANCHOR_H

#include "pvclock_math.h"

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
 * A granule is the least number of ticks that a guest's right shift does not cut, a power of 2.  The ABI has whole ns at
 * a whole tick.  But the fraction that a guest cuts from k granules is k * mul mod 2^32 (in 2^-32 ns), and every multiple
 * of 2^zeros comes up among 2^(32 - zeros) granules: mul's odd part has an inverse modulo 2^32.  So the choice of the
 * timestamp, backdated by up to some 4 s, keeps the timeline's fraction.
 */
struct pvclock_anchor_params {
	struct pvclock_scale scale;
	unsigned int granule_bits; /* a granule is 2^granule_bits ticks */
	unsigned int zeros;        /* trailing zero bits of the ns in a granule, in 2^-32 ns; at most 32 */
	uint32_t inverse;          /* of their odd part, modulo 2^32 */
	uint64_t least_granules;   /* to backdate by: at "now" a guest whose rdtsc runs early would underflow */
};

#define PVCLOCK_BACKDATE_TICKS_MIN (UINT64_C(1) << 14)
/* Far enough below 2^63 that a timestamp is never taken for one ahead: a granule of a very slow clock has many ticks. */
#define PVCLOCK_BACKDATE_TICKS_MAX (UINT64_C(1) << 61)
#define PVCLOCK_EARLY_CANDIDATES 64
#define PVCLOCK_GOLDEN_RATIO UINT64_C(0x9e3779b97f4a7c15)

/* The parameters of a scale, for pvclock_publish().  The scale may not be faster than the timeline, for a page that is
 * ahead cannot be put back: pvclock_time_scale_of_rate(), rounded down, gives such a scale.
 * Precondition: mul > 0, -64 < shift < 32.
 */
static inline struct pvclock_anchor_params pvclock_anchor_params_of(struct pvclock_scale scale)
{
	struct pvclock_anchor_params params = { scale, scale.shift < 0 ? (unsigned int)-scale.shift : 0, 32, 0, 1 };
	uint32_t granule_ns = scale.shift > 0 ? scale.mul << scale.shift : scale.mul;

	if (params.granule_bits < 14)
		params.least_granules = PVCLOCK_BACKDATE_TICKS_MIN >> params.granule_bits;
	if (granule_ns != 0) {
		uint32_t odd;

		params.zeros = (unsigned int)__builtin_ctz(granule_ns);
		odd = granule_ns >> params.zeros;
		params.inverse = odd; /* right to 3 bits; each turn doubles them */
		for (int bits = 3; bits < 32; bits *= 2)
			params.inverse *= 2u - odd * params.inverse;
	}
	return params;
}

/* A moment of guest time: ns + fraction * 2^-32. */
struct pvclock_moment {
	uint64_t ns;
	uint32_t fraction;
};

/* The time that a guest computes for `granules` from a whole ns. */
static inline struct pvclock_moment pvclock_backdate_moment(uint64_t granules,
							    const struct pvclock_anchor_params *params)
{
	uint64_t ticks = granules << params->granule_bits;
	uint64_t shifted = params->scale.shift < 0 ? granules : ticks << params->scale.shift;
	struct pvclock_moment moment = { pvclock_mul_shr(shifted, params->scale.mul, 32),
					 (uint32_t)(shifted * params->scale.mul) };

	return moment;
}

/* How many granules to backdate a line by so that it ends with `fraction`, rounded down to a fraction that there is: at
 * least least_granules, and less than one period more.
 */
static inline uint64_t pvclock_exact_backdate(uint32_t fraction, const struct pvclock_anchor_params *params)
{
	uint64_t period = UINT64_C(1) << (32 - params->zeros);
	uint64_t granules = (uint64_t)(fraction >> (params->zeros & 31)) * params->inverse;

	return params->least_granules + ((granules - params->least_granules) & (period - 1));
}

/* How far a line that ends with `fraction` is from `moment`, in 2^-32 ns: behind, if need be in the ns before, where
 * the clock may show that; else ahead.
 */
static inline uint32_t pvclock_backdate_distance(uint32_t fraction, struct pvclock_moment moment, uint64_t least_ns)
{
	if (moment.ns == least_ns && fraction > moment.fraction)
		return fraction - moment.fraction;
	return moment.fraction - fraction;
}

/* For a clock that began too short ago to backdate exactly: the best of candidates scattered over the later half of its
 * past.  Scattered, for evenly spaced ones may all end with the same fraction.
 */
static inline uint64_t pvclock_early_backdate(struct pvclock_moment moment, const struct pvclock_anchor_params *params,
					      uint64_t least_ns)
{
	uint64_t past, best;
	uint32_t best_distance = UINT32_MAX;

	if (pvclock_unscale_delta(moment.ns, params->scale, &past) != 0 || past > PVCLOCK_BACKDATE_TICKS_MAX)
		past = PVCLOCK_BACKDATE_TICKS_MAX;
	past >>= params->granule_bits;
	/* A spare ns below: the line may have to be that of the ns before. */
	while (past != 0 && pvclock_backdate_moment(past, params).ns >= moment.ns)
		past--;
	best = past;
	for (uint64_t i = 0; i < PVCLOCK_EARLY_CANDIDATES; i++) {
		uint64_t granules = past - pvclock_mul_shr(past / 2, i * PVCLOCK_GOLDEN_RATIO, 64);
		uint32_t fraction = pvclock_backdate_moment(granules, params).fraction;
		uint32_t distance = pvclock_backdate_distance(fraction, moment, least_ns);

		if (distance < best_distance) {
			best = granules;
			best_distance = distance;
		}
	}
	return best;
}

/* The line at the scale of `params` that passes the break point as near to `moment` as can be; there it shows least_ns
 * or more.
 */
static inline struct pvclock_anchor pvclock_anchor_through(struct pvclock_moment moment, uint64_t break_tsc,
							   const struct pvclock_anchor_params *params,
							   uint64_t least_ns)
{
	uint64_t granules = pvclock_exact_backdate(moment.fraction, params);
	struct pvclock_moment backdate = pvclock_backdate_moment(granules, params);
	struct pvclock_anchor anchor = { break_tsc, moment.ns, params->scale };

	if (backdate.ns > moment.ns || granules > PVCLOCK_BACKDATE_TICKS_MAX >> params->granule_bits) {
		granules = pvclock_early_backdate(moment, params, least_ns);
		backdate = pvclock_backdate_moment(granules, params);
		if (backdate.fraction > moment.fraction && moment.ns != least_ns)
			anchor.system_time--;
	}
	anchor.tsc_timestamp -= granules << params->granule_bits;
	anchor.system_time -= backdate.ns;
	return anchor;
}

/* How many ticks further back a timestamp may go without showing at the break point: a guest's right shift cuts them
 * there.  As many as win back the time (ns and fraction) that the new line lacks, at most.
 */
static inline uint64_t pvclock_spare_ticks(struct pvclock_moment lacking, const struct pvclock_anchor_params *params)
{
	uint64_t most = (UINT64_C(1) << params->granule_bits) - 1;
	pvclock_u128 ticks;

	if (lacking.ns >> 30)
		return most;
	ticks = ((((pvclock_u128)lacking.ns << 32) | lacking.fraction) << params->granule_bits) / params->scale.mul;
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
						     const struct pvclock_anchor_params *params, uint64_t break_tsc)
{
	struct pvclock_line now = pvclock_line_at(*timeline, break_tsc);
	struct pvclock_moment moment = { now.ns, (uint32_t)(((pvclock_u128)now.rem << 32) / now.den) };
	struct pvclock_anchor anchor;
	uint64_t least_ns;

	if (old->scale.mul == 0)
		return pvclock_anchor_through(moment, break_tsc, params, moment.ns);

	least_ns = pvclock_anchor_read(old, break_tsc);
	if ((int64_t)(moment.ns - least_ns) < 0) {
		moment.ns = least_ns;
		moment.fraction = 0;
	} else if (moment.ns - least_ns > 1) {
		struct pvclock_moment lacking = { moment.ns - least_ns - 2, moment.fraction };

		moment.ns = least_ns + 1;
		moment.fraction = UINT32_MAX;
		anchor = pvclock_anchor_through(moment, break_tsc, params, least_ns);
		anchor.tsc_timestamp -= pvclock_spare_ticks(lacking, params);
		return anchor;
	}
	return pvclock_anchor_through(moment, break_tsc, params, least_ns);
}

#ifdef __cplusplus
}
#endif

#endif
