/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Hyper-V's reference time: its TSC page as a kind of page of pvclock_publish_at(), and the counter MSR.
 *
 * The page's sequence is 0 while a publish writes it, and then one that it never had.  The count is the host's own:
 * read back from guest memory it would be 0 there, and its successor a sequence that a reader may still have.  Guests
 * read the counter MSR meanwhile, which follows the same line.
 *
 * A page has whole units of 100 ns for its offset, so its line begins a fraction of a unit ahead of the timeline, at
 * most one.  Where it would be more, since it may not show less than the old line (the fractions of 50,000 changes
 * would add up to some 100 units, a random walk):
 *
 *   - the break point comes later, within the unit that the old line shows, when the timeline has reached that, too;
 *   - where nobody can wait, and for what a whole tick leaves over, the scale's low bits carry the remainder: at most
 *     2^-31 of the rate, which takes half a unit in 107 s, and the next publish after that ends it;
 *   - where even that does not do, in a guest whose TSC has begun less than 215 s ago, the sequence stays 0 for
 *     some publishes.  The counter's line has fractions, and needs none of this.
 *
 * So a page is within 2 units of the timeline after any number of changes, and goes on by 0 or +1 unit at each, never
 * back.  A publish that changes neither rate nor offset leaves the page alone: its rate is off by 2^-65 units a tick.
 */
#ifndef HYPERV_PUBLISH_H
#define HYPERV_PUBLISH_H

#include "hyperv_abi.h"
#include "pvclock_publish.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- The line. ---- */

#define HYPERV_ONE_UNIT ((pvclock_u128)1 << 64)

/* Reference time in host ticks: at `tsc` it is units + fraction * 2^-64, and each tick adds scale_units +
 * scale * 2^-64.  Whole units are what page and counter show.
 */
struct hyperv_line {
	uint64_t tsc;
	uint64_t units;
	uint64_t fraction;
	uint64_t scale_units;
	uint64_t scale;
};

static inline pvclock_u128 hyperv_fixed(uint64_t units, uint64_t fraction)
{
	return (pvclock_u128)units << 64 | fraction;
}

/* The line at host TSC `tsc`, also shortly before its own, in 64.64. */
static inline pvclock_u128 hyperv_line_fixed(const struct hyperv_line *line, uint64_t tsc)
{
	pvclock_u128 ticks = (pvclock_u128)(int64_t)(tsc - line->tsc); /* sign-extended */

	return hyperv_fixed(line->units, line->fraction) + hyperv_fixed(line->scale_units, line->scale) * ticks;
}

static inline uint64_t hyperv_line_read(const struct hyperv_line *line, uint64_t tsc)
{
	return (uint64_t)(hyperv_line_fixed(line, tsc) >> 64);
}

/* What a page adds to the product of guest TSC and scale, in 64.64. */
static inline pvclock_u128 hyperv_line_offset(const struct hyperv_line *line, uint64_t tsc_offset)
{
	return hyperv_fixed(line->units, line->fraction) - (pvclock_u128)line->scale * (line->tsc + tsc_offset);
}

/* Can a page show it?  It has no units in its scale, no fraction in its offset, and a guest TSC that does not wrap. */
static inline int hyperv_line_fits_page(const struct hyperv_line *line, uint64_t tsc_offset)
{
	return line->scale_units == 0 && (uint64_t)hyperv_line_offset(line, tsc_offset) == 0 &&
	       (line->tsc + tsc_offset) >> 63 == 0;
}

/* ---- One VM's reference time. ---- */

/* The VMM sets the first part before each publish, under its lock; a new one is all 0.  All vCPUs' TSCs have the host's
 * rate.
 */
struct hyperv_clock {
	void *page;           /* HYPERV_PAGE_BYTES, which the caller has checked to lie in guest memory; or NULL */
	uint64_t num;         /* num/den ns a tick, from the next break point on */
	uint64_t den;
	uint64_t tsc_offset;  /* guest TSC = host TSC + tsc_offset */
	uint64_t least_units; /* of a first line, which must not go back behind what was shown before a restore */
	uint32_t sequence;    /* the page's last: saved and restored with the VM, never read from the page */
	uint8_t can_read_tsc; /* the TSC is trusted, and all vCPUs have tsc_offset; else the page's sequence stays 0 */
	uint8_t is_new;       /* the page has just been placed: write it.  The publish clears this */

	/* The publish's own. */
	uint8_t could_read_tsc;  /* when the line began */
	uint32_t line_version;   /* odd while the line changes; 0: there is none yet */
	struct hyperv_line line; /* published last */
	uint64_t line_num;       /* line_num/line_den ns a tick: its rate, exactly */
	uint64_t line_den;
	uint64_t line_tsc_offset;
	uint64_t carried;        /* by how much its scale is more than its rate, or less */
	uint8_t lags;            /* it began more than a unit behind the timeline, which it may not step to */
	uint8_t has_moved;       /* by a declared step since, or a pause has ended */
	uint64_t moved_ticks;
	uint64_t moved_ns;
};

/* The sequence that follows.  2^32 - 2 publishes pass before one comes again. */
static inline uint32_t hyperv_sequence_after(uint32_t sequence)
{
	return sequence >= HYPERV_SEQUENCE_RESERVED - 1 ? 1 : sequence + 1;
}

/* Put the line published last `ticks` later and `ns` ahead, for a declared step, as pvclock_anchor_move() does with
 * pvclock's.  vCPUs that run read the old page until the next publish begins, so that it may only go ahead then.  From
 * here to the end of that publish the counter has no answer.
 */
static inline void hyperv_clock_move(struct hyperv_clock *clock, uint64_t ticks, uint64_t ns)
{
	__atomic_store_n(&clock->line_version, clock->line_version | 1u, __ATOMIC_SEQ_CST);
	clock->has_moved = 1;
	clock->moved_ticks += ticks;
	clock->moved_ns += ns;
}

/* The line published last, moved, at host TSC `tsc`. */
static inline pvclock_u128 hyperv_moved_line_fixed(const struct hyperv_clock *clock, uint64_t tsc)
{
	return hyperv_line_fixed(&clock->line, tsc - clock->moved_ticks) +
	       hyperv_fixed(clock->moved_ns, 0) / HYPERV_UNIT_NS;
}

/* By words, for the counter's readers may meet it. */
static inline void hyperv_line_store(struct hyperv_line *to, const struct hyperv_line *line)
{
	__atomic_store_n(&to->tsc, line->tsc, __ATOMIC_RELAXED);
	__atomic_store_n(&to->units, line->units, __ATOMIC_RELAXED);
	__atomic_store_n(&to->fraction, line->fraction, __ATOMIC_RELAXED);
	__atomic_store_n(&to->scale_units, line->scale_units, __ATOMIC_RELAXED);
	__atomic_store_n(&to->scale, line->scale, __ATOMIC_RELAXED);
}

/* Time stood still from host TSC `stopped` on, where the line published last showed what it will show `ticks` later,
 * `ns` ahead; from there to the break point it runs at num/den ns a tick, whatever it did before.  As
 * hyperv_clock_move() otherwise.
 */
static inline void hyperv_clock_resume(struct hyperv_clock *clock, uint64_t stopped, uint64_t ticks, uint64_t ns,
				       uint64_t num, uint64_t den)
{
	pvclock_u128 stood = hyperv_moved_line_fixed(clock, stopped);
	pvclock_u128 rate = pvclock_fixed_rate(num, den, HYPERV_UNIT_NS);
	struct hyperv_line line = {
		stopped, (uint64_t)(stood >> 64), (uint64_t)stood, (uint64_t)(rate >> 64), (uint64_t)rate,
	};

	if (clock->line_den == 0)
		return;
	clock->moved_ticks = 0;
	clock->moved_ns = 0;
	hyperv_clock_move(clock, ticks, ns);
	hyperv_line_store(&clock->line, &line);
	clock->line_num = num;
	clock->line_den = den;
}

/* Has the guest's TSC begun anew, or has what the scale carries moved the line by half a unit? */
static inline int hyperv_line_is_spent(const struct hyperv_clock *clock, uint64_t tsc)
{
	uint64_t ticks = tsc - clock->line.tsc;

	if ((int64_t)ticks <= 0)
		return 0;
	return clock->line.tsc + clock->tsc_offset > tsc + clock->tsc_offset ||
	       (pvclock_u128)clock->carried * ticks > HYPERV_ONE_UNIT / 2;
}

/* Does a publish at `tsc` change the line? */
static inline int hyperv_line_changes(const struct hyperv_clock *clock, uint64_t tsc)
{
	if (clock->line_den == 0 || clock->has_moved || clock->lags ||
	    (pvclock_u128)clock->num * clock->line_den != (pvclock_u128)clock->line_num * clock->den)
		return 1;
	if (!clock->can_read_tsc)
		return clock->could_read_tsc;
	return !clock->could_read_tsc || clock->tsc_offset != clock->line_tsc_offset ||
	       !hyperv_line_fits_page(&clock->line, clock->tsc_offset) || hyperv_line_is_spent(clock, tsc);
}

/* ---- The line to come. ---- */

#define HYPERV_CARRY_SHIFT 31 /* a scale carries 2^-31 of itself at most */

/* A page can show a line that is lower by `remainder`, or (is_above) higher.  Take that one, and have its scale carry
 * the remainder up to `tsc`, so that it begins where it was, or above that by less than 2^-64 units a guest's tick.
 * *carried becomes the change of the scale.  Returns 0, or -1 if that is too much.
 */
static inline int hyperv_carry(struct hyperv_line *line, uint64_t guest_tsc, pvclock_u128 remainder, int is_above,
			       uint64_t *carried)
{
	pvclock_u128 value = hyperv_fixed(line->units, line->fraction);

	if (remainder > (pvclock_u128)guest_tsc * (line->scale >> HYPERV_CARRY_SHIFT))
		return -1;
	if (is_above) {
		*carried = guest_tsc ? (uint64_t)(remainder / guest_tsc) : 0;
		value += remainder - (pvclock_u128)*carried * guest_tsc;
		line->scale -= *carried;
	} else {
		*carried = (uint64_t)((remainder + guest_tsc - 1) / guest_tsc);
		if (*carried > UINT64_MAX - line->scale)
			return -1;
		value += (pvclock_u128)*carried * guest_tsc - remainder;
		line->scale += *carried;
	}
	line->units = (uint64_t)(value >> 64);
	line->fraction = (uint64_t)value;
	return 0;
}

/* Change the line, which may not begin lower, to one that a page can show: the next above it, if that is less than a
 * unit ahead of `now`, else one from where it is, with a remainder.  One that gets further ahead (its scale is greater)
 * is for a line that is less than a unit ahead so far; one that is 2 units ahead or more, after a long time without a
 * publish, comes back as fast as a scale may be changed.  Returns 0, or -1 with the line as it was.
 */
static inline int hyperv_line_fit(struct hyperv_line *line, uint64_t tsc_offset, pvclock_u128 now, uint64_t *carried)
{
	pvclock_u128 least = hyperv_fixed(line->units, line->fraction);
	pvclock_u128 lift = -hyperv_line_offset(line, tsc_offset) & UINT64_MAX;
	uint64_t guest_tsc = line->tsc + tsc_offset;
	pvclock_u128 most = (pvclock_u128)guest_tsc * (line->scale >> HYPERV_CARRY_SHIFT);

	*carried = 0;
	if (least + lift < now + HYPERV_ONE_UNIT) {
		line->units = (uint64_t)((least + lift) >> 64);
		line->fraction = (uint64_t)(least + lift);
		return 0;
	}
	if (least < now + HYPERV_ONE_UNIT && HYPERV_ONE_UNIT - lift <= lift)
		return hyperv_carry(line, guest_tsc, HYPERV_ONE_UNIT - lift, 0, carried);
	if (least >= now + 2 * HYPERV_ONE_UNIT && most > lift)
		lift += (most - lift) >> 64 << 64;
	return hyperv_carry(line, guest_tsc, lift, 1, carried);
}

/* The clock's new line from `tsc` on: it shows the timeline there, but neither less than the old line nor over 1 unit
 * more.
 */
static inline struct hyperv_line hyperv_line_from(struct hyperv_clock *clock, uint64_t tsc, pvclock_u128 now)
{
	pvclock_u128 rate = pvclock_fixed_rate(clock->num, clock->den, HYPERV_UNIT_NS);
	struct hyperv_line line = { tsc, (uint64_t)(now >> 64), (uint64_t)now, (uint64_t)(rate >> 64), (uint64_t)rate };
	uint64_t least = line.units;

	if (clock->line_den != 0)
		least = (uint64_t)(hyperv_moved_line_fixed(clock, tsc) >> 64);
	else if (least < clock->least_units)
		least = clock->least_units;
	if (line.units < least) {
		line.units = least;
		line.fraction = 0;
	}
	clock->lags = line.units - least > 1;
	if (clock->lags) {
		line.units = least + 1;
		line.fraction = UINT64_MAX;
	}
	clock->carried = 0;
	if (!clock->can_read_tsc || line.scale_units != 0)
		return line;
	if (hyperv_line_fit(&line, clock->tsc_offset, now, &clock->carried) == 0 && line.units - least > 1)
		line.units--; /* lifted into the unit after the next */
	return line;
}

/* How long the old line still shows its unit, if the timeline has not reached that.  At its end it has: the new line
 * then need not be more than a unit ahead of it.
 */
static inline uint64_t hyperv_ticks_to_meet(const struct hyperv_clock *clock, const struct pvclock_line *timeline,
					    uint64_t tsc)
{
	pvclock_u128 shown = hyperv_moved_line_fixed(clock, tsc);
	pvclock_u128 now = pvclock_line_fixed(*timeline, tsc, HYPERV_UNIT_NS);
	pvclock_u128 lacking, left;

	if (now >= shown >> 64 << 64 || clock->line.scale_units != 0 || clock->line.scale == 0)
		return 0;
	lacking = ((shown >> 64 << 64) - now + clock->line.scale - 1) / clock->line.scale;
	left = (UINT64_MAX - (uint64_t)shown) / clock->line.scale;
	return (uint64_t)(lacking < left ? lacking : left);
}

/* ---- The kind: a set has one struct hyperv_clock. ---- */

static inline struct hyperv_clock *hyperv_clock_of(const struct pvclock_page_set *set)
{
	return (struct hyperv_clock *)set->pages;
}

static inline int hyperv_is_due(const struct pvclock_page_set *set, const struct pvclock_update *update)
{
	const struct hyperv_clock *clock = hyperv_clock_of(set);

	/* An odd version is that of a publish that this process has not seen the end of: it is the child of a fork(). */
	return clock->is_new || clock->line_version & 1 ||
	       hyperv_line_changes(clock, pvclock_counter_read(update->counter));
}

static inline void hyperv_touch(struct pvclock_page_set *set)
{
	if (hyperv_clock_of(set)->page)
		pvclock_touch(hyperv_clock_of(set)->page);
}

static inline void hyperv_mark_busy(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = hyperv_clock_of(set);

	__atomic_store_n(&clock->line_version, clock->line_version | 1u, __ATOMIC_RELAXED);
	if (clock->page)
		pvclock_store32(clock->page, HYPERV_SEQUENCE_INVALID);
}

/* Guests wait in the window, so it is not made longer by more than this (6 us at 2.6 GHz; a unit takes as long at a
 * sixtieth of the TSC's own rate).
 */
#define HYPERV_DELAY_TICKS_MAX (UINT64_C(1) << 14)

static inline uint64_t hyperv_delay_ticks(const struct pvclock_page_set *set, const struct pvclock_update *update,
					  uint64_t earliest_tsc)
{
	const struct hyperv_clock *clock = hyperv_clock_of(set);
	uint64_t ticks;

	if (update->counter->margin_ticks == 0 || !clock->can_read_tsc || clock->line_den == 0 ||
	    !hyperv_line_changes(clock, earliest_tsc))
		return 0;
	ticks = hyperv_ticks_to_meet(clock, update->timeline, earliest_tsc);
	return ticks <= HYPERV_DELAY_TICKS_MAX ? ticks : 0;
}

/* By words, as hyperv_line_store(). */
static inline struct hyperv_line hyperv_line_load(const struct hyperv_line *from)
{
	struct hyperv_line line = {
		__atomic_load_n(&from->tsc, __ATOMIC_RELAXED),
		__atomic_load_n(&from->units, __ATOMIC_RELAXED),
		__atomic_load_n(&from->fraction, __ATOMIC_RELAXED),
		__atomic_load_n(&from->scale_units, __ATOMIC_RELAXED),
		__atomic_load_n(&from->scale, __ATOMIC_RELAXED),
	};

	return line;
}

/* Take over `line` as the one published last. */
static inline void hyperv_clock_turn(struct hyperv_clock *clock, const struct hyperv_line *line)
{
	hyperv_line_store(&clock->line, line);
	clock->line_num = clock->num;
	clock->line_den = clock->den;
	clock->line_tsc_offset = clock->tsc_offset;
	clock->could_read_tsc = clock->can_read_tsc;
	clock->has_moved = 0;
	clock->moved_ticks = 0;
	clock->moved_ns = 0;
}

#define HYPERV_FIELD(page, field) ((uint8_t *)(page) + offsetof(struct hyperv_tsc_page, field))

static inline void hyperv_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	struct hyperv_clock *clock = hyperv_clock_of(set);
	uint64_t offset;

	/* A line that began anew at the last break point could show less than the present one has shown since. */
	int stays = update->again && clock->line_den != 0 && !clock->has_moved;

	if (!stays && hyperv_line_changes(clock, update->break_tsc)) {
		pvclock_u128 now = pvclock_line_fixed(*update->timeline, update->break_tsc, HYPERV_UNIT_NS);
		struct hyperv_line line = hyperv_line_from(clock, update->break_tsc, now);

		hyperv_clock_turn(clock, &line);
	}
	if (clock->page == NULL)
		return;
	offset = (uint64_t)(hyperv_line_offset(&clock->line, clock->tsc_offset) >> 64);
	pvclock_store32(HYPERV_FIELD(clock->page, reserved), 0);
	pvclock_store64(HYPERV_FIELD(clock->page, scale), clock->line.scale);
	pvclock_store64(HYPERV_FIELD(clock->page, offset), offset);
}

static inline void hyperv_release(struct pvclock_page_set *set)
{
	struct hyperv_clock *clock = hyperv_clock_of(set);
	uint32_t even_version = (clock->line_version | 1u) + 1u;

	__atomic_store_n(&clock->line_version, even_version ? even_version : 2u, __ATOMIC_RELAXED);
	if (clock->page && clock->can_read_tsc && hyperv_line_fits_page(&clock->line, clock->tsc_offset)) {
		clock->sequence = hyperv_sequence_after(clock->sequence);
		pvclock_store32(clock->page, clock->sequence);
	}
	clock->is_new = 0;
}

/* A VM has one reference TSC page at most, and its counter even without one: the set's count is 1. */
static const struct pvclock_page_kind pvclock_page_kind_hyperv = {
	hyperv_is_due, hyperv_touch, hyperv_mark_busy, hyperv_delay_ticks, hyperv_write, hyperv_release,
};

/* ---- Reading. ---- */

/* The counter MSR: reference time now, in units; never less than any reading of counter or page that had ended before.
 *
 * Takes no lock, from any thread.  Returns 0, or -1 while the line changes (or there is none yet): sleep for some
 * microseconds, and ask again.  The first look at the version comes after the last break point, and rdtsc after that.
 */
static inline int hyperv_counter_read(const struct hyperv_clock *clock, const struct pvclock_counter *counter,
				      uint64_t *ret)
{
	uint32_t version = __atomic_load_n(&clock->line_version, __ATOMIC_ACQUIRE);
	uint64_t tsc = pvclock_counter_read(counter);
	struct hyperv_line line = hyperv_line_load(&clock->line);

	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	if (version == 0 || version & 1 || __atomic_load_n(&clock->line_version, __ATOMIC_RELAXED) != version)
		return -1;
	/* On a CPU whose TSC is a little late. */
	if ((int64_t)(tsc - line.tsc) < 0)
		tsc = line.tsc;
	*ret = hyperv_line_read(&line, tsc);
	return 0;
}

/* What a guest finds at one instant. */
struct hyperv_reading {
	uint64_t tsc; /* guest TSC */
	uint64_t units;
	uint32_t sequence;
};

/* Read the page as Linux does (hv_read_tsc_page_tsc()).
 *
 * tsc_offset is that of the vCPU.  Returns 0, or -1 where the guest reads the counter MSR instead: the page is not
 * valid, or changed in each of `tries`.
 */
static inline int hyperv_read(const void *page, uint64_t tsc_offset, const struct pvclock_counter *counter,
			      unsigned int tries, struct hyperv_reading *ret)
{
	while (tries-- > 0) {
		uint64_t scale, offset;

		ret->sequence = pvclock_load32(page);
		if (ret->sequence == HYPERV_SEQUENCE_INVALID || ret->sequence == HYPERV_SEQUENCE_RESERVED)
			return -1;
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		scale = pvclock_load64((const uint8_t *)page + offsetof(struct hyperv_tsc_page, scale));
		offset = pvclock_load64((const uint8_t *)page + offsetof(struct hyperv_tsc_page, offset));
		ret->tsc = pvclock_counter_read(counter) + tsc_offset;
		ret->units = pvclock_mul_shr(ret->tsc, scale, 64) + offset;
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (pvclock_load32(page) == ret->sequence)
			return 0;
		__builtin_ia32_pause();
	}
	return -1;
}

#ifdef __cplusplus
}
#endif

#endif
