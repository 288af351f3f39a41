/* SPDX-License-Identifier: Apache-2.0
 *
 * How a host writes the small records of a guest, and copies of it with one defect each, to show that the test which
 * looks after every instruction sees each of them.
 */
#ifndef BROKEN_RECORDS_H
#define BROKEN_RECORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "pvclock_own_line.h"
#include "pvclock_publish.h"
#include "pvclock_records.h"

#define BARRIER() __asm__ volatile("" : : : "memory")

struct record_host {
	const char *record;
	const char *defect; /* "" for the product's own */
	void (*update)(uint8_t *record);
	bool (*take)(uint8_t *record); /* of a bit that the guest may have taken; NULL for a record under a version */
	bool guest_is_eoi;
};

/* ---- Wall clock. ---- */

static void wall(uint8_t *record)
{
	pvclock_publish_wall_clock(record, 0x11111111, 0x22222222);
}

static void wall_write(uint8_t *record, uint32_t during, uint32_t after, bool early)
{
	uint32_t version = pvclock_load32(record);

	pvclock_store32(record, version + during);
	BARRIER();
	pvclock_store32(record + 4, 0x11111111);
	BARRIER();
	if (early)
		pvclock_store32(record, version + after);
	BARRIER();
	pvclock_store32(record + 8, 0x22222222);
	BARRIER();
	pvclock_store32(record, version + after);
}

/* The version is even before the record is whole. */
static void wall_even_early(uint8_t *record)
{
	wall_write(record, 1, 2, true);
}

/* The version is even all the time. */
static void wall_never_odd(uint8_t *record)
{
	wall_write(record, 0, 2, false);
}

/* ---- Steal time. ---- */

static void steal(uint8_t *record)
{
	pvclock_publish_steal_time(record, 1000);
}

static void steal_never_odd(uint8_t *record)
{
	uint64_t sum = pvclock_load64(record) + 1000;
	uint8_t *version = record + offsetof(struct pvclock_steal_time, version);

	pvclock_store64(record, sum);
	BARRIER();
	pvclock_store32(version, pvclock_load32(version) + 2);
}

/* ---- Time page. ---- */

static uint64_t standing_tsc(void *unused)
{
	(void)unused;
	return 1000000;
}

static void page(uint8_t *record)
{
	struct pvclock_counter counter = { .read = standing_tsc };
	struct pvclock_line line = { .tsc = 900000, .ns = 5000000, .num = PVCLOCK_NS_PER_SEC, .den = 2596132000 };
	struct pvclock_target target = { .page = record };
	struct pvclock_anchor anchor = { 0 };
	uint64_t break_tsc;
	struct pvclock_scale scale;
	struct pvclock_anchor_params params;

	pvclock_time_scale(PVCLOCK_NS_PER_SEC, line.den, &scale);
	params = pvclock_anchor_params_of(scale);
	pvclock_publish(&target, 1, &line, &params, &counter, &anchor, &break_tsc);
}

static void page_never_odd(uint8_t *record)
{
	struct pvclock_anchor anchor = { .tsc_timestamp = 77, .system_time = 88 };
	struct pvclock_target target = { .page = record };

	pvclock_write_payload(&target, &anchor);
	BARRIER();
	pvclock_store32(record, pvclock_load32(record) + 2);
}

/* ---- Time page with a line of its own. ---- */

static struct pvclock_own_page own_page_at(uint8_t *record)
{
	struct pvclock_anchor line = { .tsc_timestamp = 0x1122334455667788, .system_time = 0x99AABBCCDDEEFF00 };
	struct pvclock_own_page own = { .page = record, .version = 8, .flags = 3, .is_due = 1 };

	pvclock_time_scale(PVCLOCK_NS_PER_SEC, 2596132000, &line.scale);
	own.line = line;
	return own;
}

/* While the VM runs. */
static void own(uint8_t *record)
{
	struct pvclock_counter counter = { .read = standing_tsc };
	struct pvclock_line line = { .tsc = 900000, .ns = 5000000, .num = PVCLOCK_NS_PER_SEC, .den = 2596132000 };
	struct pvclock_own_page page = own_page_at(record);
	struct pvclock_page_set set = { &pvclock_page_kind_own_line, &page, 1, 0 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(page.line.scale);
	struct pvclock_anchor anchor = { 0 };
	uint64_t break_tsc = 0;

	pvclock_publish_at(&set, 1, &line, &params, &counter, &anchor, &break_tsc, 0);
}

/* While it stands still. */
static void own_at_rest(uint8_t *record)
{
	struct pvclock_own_page page = own_page_at(record);

	pvclock_own_pages_write_now(&page, 1);
}

static void own_never_odd(uint8_t *record)
{
	struct pvclock_own_page page = own_page_at(record);

	pvclock_own_page_write(&page);
	BARRIER();
	pvclock_store32(record, page.version);
}

/* ---- Flush requests and ends of interrupts. ---- */

static void say_preempted(uint8_t *record)
{
	pvclock_set_preempted(record);
}

static bool flush(uint8_t *record)
{
	return (pvclock_clear_preempted(record) & PVCLOCK_VCPU_FLUSH_TLB) != 0;
}

static bool flush_load_and_store(uint8_t *record)
{
	uint8_t *preempted = record + offsetof(struct pvclock_steal_time, preempted);
	uint8_t old = __atomic_load_n(preempted, __ATOMIC_SEQ_CST);

	__atomic_store_n(preempted, 0, __ATOMIC_SEQ_CST);
	return (old & PVCLOCK_VCPU_FLUSH_TLB) != 0;
}

static void offer(uint8_t *record)
{
	pvclock_eoi_offer(record);
}

static bool eoi(uint8_t *record)
{
	return pvclock_eoi_take(record);
}

static bool eoi_load_and_store(uint8_t *record)
{
	uint8_t flag = __atomic_load_n(record, __ATOMIC_SEQ_CST);

	__atomic_store_n(record, flag & (uint8_t)~1, __ATOMIC_SEQ_CST);
	return !(flag & 1);
}

static const struct record_host record_hosts[] = {
	{ "wall", "", wall, NULL, false },
	{ "wall", "even_early", wall_even_early, NULL, false },
	{ "wall", "never_odd", wall_never_odd, NULL, false },
	{ "steal", "", steal, NULL, false },
	{ "steal", "never_odd", steal_never_odd, NULL, false },
	{ "page", "", page, NULL, false },
	{ "page", "never_odd", page_never_odd, NULL, false },
	{ "own", "", own, NULL, false },
	{ "own", "never_odd", own_never_odd, NULL, false },
	{ "own_at_rest", "", own_at_rest, NULL, false },
	{ "flush", "", say_preempted, flush, false },
	{ "flush", "load_and_store", say_preempted, flush_load_and_store, false },
	{ "eoi", "", offer, eoi, true },
	{ "eoi", "load_and_store", offer, eoi_load_and_store, true },
};

/* NULL if there is none of that name. */
static inline const struct record_host *record_host_named(const char *record, const char *defect)
{
	for (size_t i = 0; i < sizeof record_hosts / sizeof *record_hosts; i++)
		if (strcmp(record_hosts[i].record, record) == 0 && strcmp(record_hosts[i].defect, defect) == 0)
			return &record_hosts[i];
	return NULL;
}

#endif
