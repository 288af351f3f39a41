/* SPDX-License-Identifier: Apache-2.0
 *
 * The host writes a record one instruction at a time (the CPU's trap flag); after each instruction a guest looks at it,
 * or takes its turn.  So every place where a guest can come between is tried once, in order.  Prints one JSON object.
 *
 *   single_step --record wall|steal|page|own|own_at_rest|flush|eoi [--broken NAME]
 *
 * wall, steal, page, own, own_at_rest: the guest takes an even version for a promise that what it covers is all old or all new; "torn"
 * counts instructions after which that is broken.  flush, eoi: in run n the guest takes its turn after instruction n;
 * "lost" counts runs in which the host heard of another number of turns than the guest had.
 * The guest shares no code with the headers.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "broken_records.h"

/* ---- One instruction at a time. ---- */

static void (*after_instruction)(void);
static unsigned long steps;

static void on_trap(int signal)
{
	(void)signal;
	steps++;
	after_instruction();
}

static void set_trap_flag(void)
{
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp"
			 : : : "memory", "cc");
}

static void clear_trap_flag(void)
{
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\tlea 128(%%rsp), %%rsp"
			 : : : "memory", "cc");
}

static void run_stepped(void (*host)(void), void (*guest)(void))
{
	after_instruction = guest;
	steps = 0;
	set_trap_flag();
	host();
	clear_trap_flag();
}

/* ---- Records under a version. ---- */

#define RECORD_BYTES 64

static _Alignas(64) uint8_t record[RECORD_BYTES];
static uint8_t old_record[RECORD_BYTES]; /* before the host's update */
static uint8_t new_record[RECORD_BYTES]; /* after it */
static size_t version_at, covered_at, covered_bytes;
static unsigned long looks, torn;
static bool written; /* has the host an even version more, and other content, or heard of a turn? */

static uint32_t version_in(const uint8_t *which)
{
	uint32_t version;

	memcpy(&version, which + version_at, sizeof version);
	return version;
}

static bool is_as_in(const uint8_t *which)
{
	return memcmp(record + covered_at, which + covered_at, covered_bytes) == 0;
}

/* An even version says which of the two contents is there, whole. */
static void look(void)
{
	uint32_t version = version_in(record);

	looks++;
	if (version & 1)
		return;
	if (version == version_in(old_record))
		torn += !is_as_in(old_record);
	else
		torn += version != version_in(new_record) || !is_as_in(new_record);
}

static const struct record_host *host_of;

static void update(void)
{
	host_of->update(record);
}

/* Once without steps, to have the new content; then from the old one again, step by step. */
static void check_versions(void)
{
	memcpy(old_record, record, sizeof record);
	update();
	memcpy(new_record, record, sizeof record);
	written = version_in(new_record) == version_in(old_record) + 2 &&
		  memcmp(old_record + covered_at, new_record + covered_at, covered_bytes) != 0;
	memcpy(record, old_record, sizeof record);
	run_stepped(update, look);
	written &= memcmp(record, new_record, sizeof record) == 0;
}

/* ---- Bits that both sides take. ---- */

static unsigned long turn, given, lost;
static bool heard;

/* kvm_guest_apic_eoi_write() of Linux. */
static void end_interrupt(void)
{
	bool had;

	__asm__ volatile("lock btrl $0, %0" : "+m"(*(uint32_t *)record), "=@ccc"(had) : : "memory");
	given += had;
}

/* kvm_flush_tlb_multi() of Linux: only of a vCPU that is preempted. */
static void ask_for_flush(void)
{
	uint8_t *preempted = record + offsetof(struct pvclock_steal_time, preempted);

	if (*preempted == 1) {
		*preempted = 3;
		given++;
	}
}

static void take_turn(void)
{
	if (steps == turn)
		host_of->guest_is_eoi ? end_interrupt() : ask_for_flush();
}

static void take(void)
{
	heard = host_of->take(record);
}

/* Run n: the guest's turn comes after instruction n; until it would come after the last one. */
static void check_turns(void)
{
	for (turn = 1; turn == 1 || turn <= steps; turn++) {
		memset(record, 0, sizeof record);
		host_of->update(record); /* offers the EOI, or says "preempted" */
		given = 0;
		run_stepped(take, take_turn);
		lost += heard != given;
		written |= heard;
		looks++;
	}
}

/* ---- The run. ---- */

static void prepare(const char *name)
{
	for (size_t i = 0; i < sizeof record; i++)
		record[i] = (uint8_t)(0x30 + i);
	version_at = strcmp(name, "steal") == 0 ? offsetof(struct pvclock_steal_time, version) : 0;
	memset(record + version_at, 0, sizeof(uint32_t));
	record[version_at] = 6;
	if (strcmp(name, "steal") == 0) {
		covered_at = 0, covered_bytes = sizeof(uint64_t);
	} else if (strcmp(name, "wall") == 0) {
		covered_at = 4, covered_bytes = 8;
	} else if (strncmp(name, "own", 3) == 0) {
		covered_at = 4, covered_bytes = sizeof(struct pvclock_vcpu_time_info) - 4;
	} else {
		covered_at = 8, covered_bytes = 21; /* the flags, byte 29, are the guest's, too */
	}
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "record", required_argument, NULL, 'r' },
		{ "broken", required_argument, NULL, 'b' },
		{ NULL, 0, NULL, 0 },
	};
	const char *name = "wall", *defect = "";
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'r')
			name = optarg;
		else if (option == 'b')
			defect = optarg;
		else
			return 2;
	}
	host_of = record_host_named(name, defect);
	if (host_of == NULL) {
		fprintf(stderr, "single_step: no such --record or --broken; see broken_records.h\n");
		return 2;
	}
	signal(SIGTRAP, on_trap);
	prepare(name);
	if (host_of->take != NULL)
		check_turns();
	else
		check_versions();
	printf("{\"looks\": %lu, \"written\": %d, \"torn\": %lu, \"lost\": %lu}\n", looks, written, torn, lost);
	return 0;
}
