/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Publishing a VM's clock into its pages, of one kind or several, and reading a pvclock page back as a guest does.
 *
 * One function publishes: pvclock_publish_at().  All pages of a VM change together, while its vCPUs read them:
 *
 *   1. touch every page, so that nothing faults later;
 *   2. mark every page busy: a pvclock page's version becomes odd;
 *   3. wait until all CPUs see that, then read the TSC: A.  Guests that still trust an old page read their TSC
 *      before the break point B = A + margin; the margin is there because a guest's last load may overtake its rdtsc;
 *   4. write the new line, which meets the old one at B;
 *   5. wait for B, then release every page: a pvclock page's version becomes even.
 *
 * Where the counter goes back or stands still during step 5, B may never come.  The wait has a bound, the update ends
 * all the same, and the caller is told: readers must not spin for as long as the counter went back.
 *
 * So every old reading is of a moment up to B and every new one of a moment from B on, and a reading that begins
 * after another has ended is never smaller, whichever vCPUs they are on and whichever kinds of page they read: all busy
 * marks come before A, and all releases after B.  That needs TSCs in step, and fewer than 2^31 publishes during one
 * reading.
 *
 * Linux is the reference for versions (kvm_setup_guest_pvclock()); the common break point is ours.
 *
 * A VMM keeps, for each VM and under one lock: the exact timeline (struct pvclock_line), how pages show its rate
 * (struct pvclock_anchor_params), the line published last (struct pvclock_anchor), a counter, and a target for each page.
 *
 *   begin    line = { host TSC now, ns to begin with, 0, ns, ticks }; params = pvclock_anchor_params_of() the scale that
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
#include "pvclock_anchor.h"
#include "pvclock_tsc.h"
#include "pvclock_words.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Kinds of pages. ---- */

/* One publish, as a kind of page sees it. */
struct pvclock_update {
	const struct pvclock_line *timeline;        /* up to the break point, exactly */
	const struct pvclock_anchor_params *params; /* how pvclock pages show its rate from there on */
	const struct pvclock_counter *counter;
	const struct pvclock_anchor *anchor;        /* the line published last; for write(), the new one */
	uint64_t break_tsc;                         /* for write(): host TSC */
	int again;                                  /* the break point is that of the last publish */
};

/* The pages of one kind of one VM. */
struct pvclock_page_set {
	const struct pvclock_page_kind *kind;
	void *pages;  /* the kind's own: pvclock's is an array of struct pvclock_target */
	size_t count;
	int is_due;   /* pvclock_publish_at()'s own */
};

/* How a kind of page changes.  The publish calls these in their order here, each for all sets that are due before the
 * next; from mark_busy() on none may fault or block.  The guest side of a kind must read its TSC between two looks
 * at the page, the second of which fails once mark_busy() is visible and until release() is.
 */
struct pvclock_page_kind {
	/* Do any of these pages change at this publish?  NULL: always.  Pages that do not are left alone. */
	int (*is_due)(const struct pvclock_page_set *set, const struct pvclock_update *update);
	/* Bring the pages in, writable. */
	void (*touch)(struct pvclock_page_set *set);
	/* Have readers refuse the pages; the publish makes that visible before it reads A. */
	void (*mark_busy)(struct pvclock_page_set *set);
	/* How many ticks the break point is to come after earliest_tsc, for a format that meets the old line at some ticks
	 * only.  NULL: none.  A VM has at most one kind with this;
	 * on a counter with no margin, which nobody can wait for, it returns 0.
	 */
	uint64_t (*delay_ticks)(const struct pvclock_page_set *set, const struct pvclock_update *update,
				uint64_t earliest_tsc);
	/* Write the line that holds from the break point on. */
	void (*write)(struct pvclock_page_set *set, const struct pvclock_update *update);
	/* Have readers accept the pages again: one store a page, which the publish orders after write(). */
	void (*release)(struct pvclock_page_set *set);
};

/* ---- pvclock pages. ---- */

/* One vCPU's page, and what is the vCPU's own in it.  All vCPUs' TSCs have the host's rate. */
struct pvclock_target {
	void *page;           /* 32 writable bytes, which the caller has checked to lie in guest memory */
	uint64_t tsc_offset;  /* guest TSC = host TSC + tsc_offset */
	uint32_t odd_version; /* pvclock_publish()'s own */
	uint8_t flags;        /* STABLE and GUEST_STOPPED, to write where the vCPU is out of the guest */
	uint8_t in_guest;     /* the vCPU may be running: leave flags and pads alone, the guest writes there too */
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

static inline void pvclock_mark_odd(struct pvclock_target *target)
{
	target->odd_version = pvclock_version_odd(pvclock_load32(target->page));
	pvclock_store32(target->page, target->odd_version);
}

static inline void pvclock_make_even(const struct pvclock_target *target)
{
	pvclock_store32(target->page, target->odd_version + 1u);
}

static inline void pvclock_pages_touch(struct pvclock_page_set *set)
{
	struct pvclock_target *targets = (struct pvclock_target *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		pvclock_touch(targets[i].page);
}

static inline void pvclock_pages_mark_busy(struct pvclock_page_set *set)
{
	struct pvclock_target *targets = (struct pvclock_target *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		pvclock_mark_odd(&targets[i]);
}

static inline void pvclock_pages_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	struct pvclock_target *targets = (struct pvclock_target *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		pvclock_write_payload(&targets[i], update->anchor);
}

static inline void pvclock_pages_release(struct pvclock_page_set *set)
{
	struct pvclock_target *targets = (struct pvclock_target *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		pvclock_make_even(&targets[i]);
}

/* Show the line published last by the vCPU's new TSC offset: its guest or its VMM has moved that TSC, not the time.  The
 * vCPU is out of the guest, and no other reads its page by a TSC of its own, for their TSCs are not in step with it.  Flags
 * and the other pages stay.  Under the lock that a publish has.
 */
static inline void pvclock_page_follow_tsc(struct pvclock_target *target, const struct pvclock_anchor *anchor)
{
	pvclock_touch(target->page);
	target->in_guest = 1; /* no flag changes */
	pvclock_mark_odd(target);
	__atomic_thread_fence(__ATOMIC_RELEASE); /* the payload comes after the busy mark */
	pvclock_write_payload(target, anchor);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_make_even(target);
}

/* Pages that show the VM's clock, each at its vCPU's TSC offset; busy while the version is odd.  A publish rewrites them
 * always, for a refresh is what keeps them near the timeline.
 */
static const struct pvclock_page_kind pvclock_page_kind_pvclock = {
	NULL, pvclock_pages_touch, pvclock_pages_mark_busy, NULL, pvclock_pages_write, pvclock_pages_release,
};

/* ---- The publish. ---- */

/* Decide which sets this publish changes, bring their pages in, and mark them busy. */
static inline void pvclock_sets_begin(struct pvclock_page_set *sets, size_t count,
				      const struct pvclock_update *update)
{
	for (size_t i = 0; i < count; i++)
		sets[i].is_due = sets[i].count != 0 &&
				 (sets[i].kind->is_due == NULL || sets[i].kind->is_due(&sets[i], update));
	for (size_t i = 0; i < count; i++)
		if (sets[i].is_due)
			sets[i].kind->touch(&sets[i]);
	for (size_t i = 0; i < count; i++)
		if (sets[i].is_due)
			sets[i].kind->mark_busy(&sets[i]);
}

/* How long after `earliest_tsc` the break point comes. */
static inline uint64_t pvclock_sets_delay_ticks(const struct pvclock_page_set *sets, size_t count,
						const struct pvclock_update *update, uint64_t earliest_tsc)
{
	for (size_t i = 0; i < count; i++)
		if (sets[i].is_due && sets[i].kind->delay_ticks != NULL)
			return sets[i].kind->delay_ticks(&sets[i], update, earliest_tsc);
	return 0;
}

/* Publish `timeline` at the scale of `params` into all pages of all sets at once; see the top of this file.
 *
 * *anchor is the line published last (mul 0 if the clock may step) and becomes the new one; *break_tsc becomes the
 * break point in host TSC, where the old line ends: a timeline that changes its rate turns there, after the publish.
 * Takes a few microseconds, at least the counter's margin.  One caller at a time for a VM.
 *
 * again: *break_tsc is that of the last publish and stays, for a CPU whose counter is behind that: the line, which must
 * be the one published last, stays where it is on all other CPUs.
 *
 * Returns 0, or -1 if the counter went back or stood still before the break point: the pages are released and show the
 * new line, but before the break point, where it need not meet the old one.
 */
static inline int pvclock_publish_at(struct pvclock_page_set *sets, size_t count, const struct pvclock_line *timeline,
				     const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
				     struct pvclock_anchor *anchor, uint64_t *break_tsc, int again)
{
	struct pvclock_update update = { timeline, params, counter, anchor, *break_tsc, again };
	uint64_t busy_tsc, wait_ticks = counter->margin_ticks;
	int status;

	pvclock_sets_begin(sets, count, &update);

	/* For the compiler, and for a counter that is no rdtsc: the payload comes after the busy marks. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	busy_tsc = pvclock_counter_read_after_stores(counter);
	if (!again) {
		wait_ticks += pvclock_sets_delay_ticks(sets, count, &update, busy_tsc + wait_ticks);
		update.break_tsc = busy_tsc + wait_ticks;
	}
	*anchor = pvclock_reanchor(timeline, anchor, params, update.break_tsc);

	for (size_t i = 0; i < count; i++)
		if (sets[i].is_due)
			sets[i].kind->write(&sets[i], &update);

	status = pvclock_counter_wait(counter, busy_tsc, wait_ticks);

	/* Release; pairs with the guest's second look at the version. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	for (size_t i = 0; i < count; i++)
		if (sets[i].is_due)
			sets[i].kind->release(&sets[i]);
	*break_tsc = update.break_tsc;
	return status;
}

/* pvclock_publish_at() a break point of its own, into pvclock pages alone. */
static inline int pvclock_publish(struct pvclock_target *targets, size_t count, const struct pvclock_line *timeline,
				  const struct pvclock_anchor_params *params, const struct pvclock_counter *counter,
				  struct pvclock_anchor *anchor, uint64_t *break_tsc)
{
	struct pvclock_page_set set = { &pvclock_page_kind_pvclock, targets, count, 0 };

	*break_tsc = 0;
	return pvclock_publish_at(&set, 1, timeline, params, counter, anchor, break_tsc, 0);
}

/* ---- Reading. ---- */

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
