/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* pvclock pages whose line is each vCPU's own and is written once, as VirtualBox does (GIMKvm): at a registration and at
 * a load.  No later publish changes them, so what their guest reads is a function of its TSC alone.  The host keeps a
 * page's version and flags itself, and takes neither from guest memory.
 */
#ifndef PVCLOCK_OWN_LINE_H
#define PVCLOCK_OWN_LINE_H

#include "pvclock_publish.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One vCPU's page, and what to write there.  That vCPU is out of the guest. */
struct pvclock_own_page {
	void *page;                 /* 32 writable bytes, which the caller has checked to lie in guest memory */
	struct pvclock_anchor line; /* in ticks of the guest's TSC */
	uint32_t version;           /* even */
	uint8_t flags;
	uint8_t is_due; /* the next publish writes the page, and clears this */
};

static inline void pvclock_own_page_write(const struct pvclock_own_page *own)
{
	struct pvclock_target target = { own->page, 0, 0, own->flags, 1 };

	pvclock_write_payload(&target, &own->line);
	__atomic_store_n(PVCLOCK_FIELD(own->page, flags), own->flags, __ATOMIC_RELAXED);
	__atomic_store_n(PVCLOCK_FIELD(own->page, pad), 0, __ATOMIC_RELAXED);
	__atomic_store_n(PVCLOCK_FIELD(own->page, pad) + 1, 0, __ATOMIC_RELAXED);
	pvclock_store32(PVCLOCK_FIELD(own->page, pad0), 0);
}

/* Write the pages that are due at once, for a VM that stands still: no vCPU reads, so there is no break point. */
static inline void pvclock_own_pages_write_now(struct pvclock_own_page *pages, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		if (!pages[i].is_due)
			continue;
		pvclock_store32(pages[i].page, pages[i].version - 1u);
		__atomic_thread_fence(__ATOMIC_RELEASE);
		pvclock_own_page_write(&pages[i]);
		__atomic_thread_fence(__ATOMIC_RELEASE);
		pvclock_store32(pages[i].page, pages[i].version);
		pages[i].is_due = 0;
	}
}

/* ---- The kind. ---- */

static inline int pvclock_own_pages_are_due(const struct pvclock_page_set *set, const struct pvclock_update *update)
{
	const struct pvclock_own_page *pages = (const struct pvclock_own_page *)set->pages;

	(void)update;
	for (size_t i = 0; i < set->count; i++)
		if (pages[i].is_due)
			return 1;
	return 0;
}

static inline void pvclock_own_pages_touch(struct pvclock_page_set *set)
{
	const struct pvclock_own_page *pages = (const struct pvclock_own_page *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		if (pages[i].is_due)
			pvclock_touch(pages[i].page);
}

static inline void pvclock_own_pages_mark_busy(struct pvclock_page_set *set)
{
	const struct pvclock_own_page *pages = (const struct pvclock_own_page *)set->pages;

	for (size_t i = 0; i < set->count; i++)
		if (pages[i].is_due)
			pvclock_store32(pages[i].page, pages[i].version - 1u);
}

static inline void pvclock_own_pages_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	const struct pvclock_own_page *pages = (const struct pvclock_own_page *)set->pages;

	(void)update;
	for (size_t i = 0; i < set->count; i++)
		if (pages[i].is_due)
			pvclock_own_page_write(&pages[i]);
}

static inline void pvclock_own_pages_release(struct pvclock_page_set *set)
{
	struct pvclock_own_page *pages = (struct pvclock_own_page *)set->pages;

	for (size_t i = 0; i < set->count; i++) {
		if (pages[i].is_due)
			pvclock_store32(pages[i].page, pages[i].version);
		pages[i].is_due = 0;
	}
}

static const struct pvclock_page_kind pvclock_page_kind_own_line = {
	pvclock_own_pages_are_due, pvclock_own_pages_touch, pvclock_own_pages_mark_busy,
	NULL,			   pvclock_own_pages_write, pvclock_own_pages_release,
};

#ifdef __cplusplus
}
#endif

#endif
