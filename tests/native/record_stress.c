/* SPDX-License-Identifier: Apache-2.0
 *
 * One thread is the host, which feeds a small record as fast as it can; the other is the guest, which uses it as Linux
 * does, and both count what they saw.  Prints one JSON object.
 *
 *   record_stress --record steal|flush|eoi [--broken] [--seconds S]
 *
 * --broken: a host with one defect.  steal: no odd version while it writes, half by half; flush, eoi: load and store where an atomic
 * exchange is due.  The guest shares no code with the headers.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pvclock_records.h"

/* Each update adds this: the two halves of the sum are equal, but in a torn reading. */
#define STEP ((UINT64_C(1) << 32) + 1)

struct counts {
	uint64_t turns;  /* of the host */
	uint64_t given;  /* by the guest: flushes asked for, interrupts ended without an exit */
	uint64_t taken;  /* by the host */
	uint64_t reads;  /* of steal time, consistent by its version */
	uint64_t torn;   /* of these */
	uint64_t backward;
};

static _Alignas(64) struct pvclock_steal_time record;
static _Alignas(64) uint32_t eoi_word; /* the host's flag is its first byte */
static uint8_t *const eoi_flag = (uint8_t *)&eoi_word;
static _Atomic bool stop;
static bool broken;
static struct counts host, guest;

/* ---- The host's side. ---- */

static void broken_steal_time(void)
{
	volatile uint32_t *halves = (volatile uint32_t *)&record.steal;
	uint32_t version = pvclock_load32(&record.version);
	uint64_t steal = pvclock_load64(&record.steal) + STEP;

	halves[0] = (uint32_t)steal;
	for (int i = 0; i < 16; i++)
		__builtin_ia32_pause();
	halves[1] = (uint32_t)(steal >> 32);
	pvclock_store32(&record.version, version + 2);
}

static void *feed_steal(void *unused)
{
	for (; !atomic_load(&stop); host.turns++) {
		if (broken)
			broken_steal_time();
		else
			pvclock_publish_steal_time(&record, STEP);
	}
	return unused;
}

/* Not preempted any more: what was asked for meanwhile?  The broken host loses what comes between load and store. */
static uint8_t run_again(void)
{
	uint8_t preempted;

	if (!broken)
		return pvclock_publish_steal_time(&record, 0);
	preempted = __atomic_load_n(&record.preempted, __ATOMIC_SEQ_CST);
	__builtin_ia32_pause();
	__atomic_store_n(&record.preempted, 0, __ATOMIC_SEQ_CST);
	return preempted;
}

/* Give the guest a chance: the host's two accesses alone keep the cache line from it. */
static void let_guest_run(void)
{
	for (uint64_t i = 0; i < host.turns % 64; i++)
		__builtin_ia32_pause();
}

static void *feed_flush(void *unused)
{
	for (; !atomic_load(&stop); host.turns++) {
		pvclock_set_preempted(&record);
		let_guest_run();
		host.taken += (run_again() & PVCLOCK_VCPU_FLUSH_TLB) != 0;
	}
	return unused;
}

static bool take_eoi(void)
{
	uint8_t flag;

	if (!broken)
		return pvclock_eoi_take(eoi_flag);
	flag = __atomic_load_n(eoi_flag, __ATOMIC_SEQ_CST);
	__builtin_ia32_pause();
	__atomic_store_n(eoi_flag, 0, __ATOMIC_SEQ_CST);
	return !(flag & 1);
}

static void *feed_eoi(void *unused)
{
	for (; !atomic_load(&stop); host.turns++) {
		pvclock_eoi_offer(eoi_flag);
		let_guest_run();
		host.taken += take_eoi();
	}
	return unused;
}

/* ---- The guest's side. ---- */

/* kvm_steal_clock() of Linux, with what is wrong with its result. */
static void read_steal(uint64_t *last)
{
	const volatile uint32_t *halves = (const volatile uint32_t *)&record.steal;
	const volatile uint32_t *version_at = &record.version;
	uint32_t version, low, high;
	uint64_t steal;

	do {
		version = *version_at;
		__asm__ volatile("" : : : "memory");
		low = halves[0];
		high = halves[1];
		__asm__ volatile("" : : : "memory");
	} while ((version & 1) || version != *version_at);
	steal = (uint64_t)high << 32 | low;
	guest.reads++;
	guest.torn += low != high;
	guest.backward += steal < *last;
	*last = steal;
}

/* kvm_flush_tlb_multi() of Linux: ask for a flush, but only of a vCPU that is preempted. */
static void ask_for_flush(void)
{
	uint8_t preempted = 1;

	guest.given += __atomic_compare_exchange_n(&record.preempted, &preempted, 3, false, __ATOMIC_SEQ_CST,
						   __ATOMIC_SEQ_CST);
}

/* kvm_guest_apic_eoi_write() of Linux: btr. */
static void end_interrupt(void)
{
	bool had;

	__asm__ volatile("lock btrl $0, %0" : "+m"(eoi_word), "=@ccc"(had) : : "memory");
	guest.given += had;
}

static void be_the_guest(const char *name, uint64_t ns)
{
	struct timespec begin, now;
	uint64_t last = 0;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		for (int i = 0; i < 1000; i++) {
			if (strcmp(name, "steal") == 0)
				read_steal(&last);
			else if (strcmp(name, "flush") == 0)
				ask_for_flush();
			else
				end_interrupt();
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((uint64_t)((now.tv_sec - begin.tv_sec) * 1000000000 + now.tv_nsec - begin.tv_nsec) < ns);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "record", required_argument, NULL, 'r' },
		{ "seconds", required_argument, NULL, 's' },
		{ "broken", no_argument, NULL, 'b' },
		{ NULL, 0, NULL, 0 },
	};
	const char *name = "steal";
	double seconds = 0.5;
	void *(*feed)(void *);
	pthread_t thread;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'r')
			name = optarg;
		else if (option == 's')
			seconds = atof(optarg);
		else if (option == 'b')
			broken = true;
		else
			return 2;
	}
	feed = strcmp(name, "steal") == 0 ? feed_steal : strcmp(name, "flush") == 0 ? feed_flush : feed_eoi;
	if (pthread_create(&thread, NULL, feed, NULL) != 0)
		return 1;
	be_the_guest(name, (uint64_t)(seconds * 1e9));
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	printf("{\"turns\": %llu, \"given\": %llu, \"taken\": %llu, \"reads\": %llu, \"torn\": %llu, \"backward\": %llu}\n",
	       (unsigned long long)host.turns, (unsigned long long)guest.given, (unsigned long long)host.taken,
	       (unsigned long long)guest.reads, (unsigned long long)guest.torn, (unsigned long long)guest.backward);
	return 0;
}
