"""The headers as a VMM in C uses them: the order of stores, faults, and numbers that no clock in Python has."""

from __future__ import annotations

import pytest

from tests.unit.c_program import printed_by, told

PROGRAM = r"""
#define _GNU_SOURCE
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>

static void at_fence(int order);
#define __atomic_thread_fence(order) at_fence(order)
#include "pvclock_own_line.h"
#include "pvclock_records.h"
#undef __atomic_thread_fence

/* ---- What is in a record at each fence. ---- */

static const uint8_t *seen, *seen_version;

static void at_fence(int order)
{
	if (seen != NULL && order == __ATOMIC_RELEASE)
		printf(" %" PRIu32 ":%" PRIu64, pvclock_load32(seen_version), pvclock_load64(seen));
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void fences_of_steal_time(void)
{
	_Alignas(8) uint8_t record[64] = { 5 };

	seen = record;
	seen_version = record + offsetof(struct pvclock_steal_time, version);
	printf("steal");
	pvclock_add_steal_time(record, 1000);
	seen = NULL;
	printf(" then %" PRIu32 "\n", pvclock_load32(seen_version));
}

static void fences_of_own_pages(void)
{
	_Alignas(8) uint8_t memory[32] = { 6 };
	struct pvclock_own_page page = { memory, { 0, 77, { 9, 0 } }, 8, 1, 1 };

	seen = PVCLOCK_FIELD(memory, system_time);
	seen_version = memory;
	printf("own");
	pvclock_own_pages_write_now(&page, 1);
	seen = NULL;
	printf(" then %" PRIu32 "\n", pvclock_load32(memory));
}

static void busy_own_pages(void)
{
	_Alignas(8) uint8_t memory[2][32] = { { 6 }, { 6 } };
	struct pvclock_own_page pages[2] = {
		{ memory[0], { 0, 77, { 9, 0 } }, 8, 1, 1 },
		{ memory[1], { 0, 77, { 9, 0 } }, 8, 1, 0 },
	};
	struct pvclock_page_set set = { &pvclock_page_kind_own_line, pages, 2, 1 };

	set.kind->mark_busy(&set);
	printf("busy %" PRIu32 " %" PRIu32 "\n", pvclock_load32(memory[0]), pvclock_load32(memory[1]));
}

/* ---- Where a page faults. ---- */

#define PAGE_BYTES 4096

static uint8_t *pages;
static uint32_t first_version;

static void bring_in(int signal)
{
	(void)signal;
	first_version = pvclock_load32(pages);
	mprotect(pages + PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE);
}

static uint64_t standing(void *context)
{
	(void)context;
	return 1000;
}

static void faults(void)
{
	struct pvclock_counter counter = { standing, NULL, 0 };
	struct pvclock_line timeline = { 0, 0, 0, 1, 1 };
	struct pvclock_scale scale = { 1u << 31, 1 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_anchor anchor = { 0, 0, { 0, 0 } };
	struct pvclock_target targets[2] = { { NULL, 0, 0, 0, 0 }, { NULL, 0, 0, 0, 0 } };
	uint64_t break_tsc;

	pages = mmap(NULL, 2 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		return;
	mprotect(pages + PAGE_BYTES, PAGE_BYTES, PROT_READ);
	pvclock_store32(pages, 6);
	signal(SIGSEGV, bring_in);
	targets[0].page = pages;
	targets[1].page = pages + PAGE_BYTES;
	pvclock_publish(targets, 2, &timeline, &params, &counter, &anchor, &break_tsc);
	signal(SIGSEGV, SIG_DFL);
	printf("faults %" PRIu32 " %" PRIu32 "\n", first_version, pvclock_load32(pages));
}

/* ---- Arithmetic. ---- */

static void ticks_of(uint64_t ns, int8_t shift)
{
	struct pvclock_scale scale = { 1u << 31, shift };
	uint64_t ticks = 7;
	int status = pvclock_unscale_delta(ns, scale, &ticks);

	printf("ticks %d %" PRIu64 "\n", status, ticks);
}

static void rate(int nearest)
{
	struct pvclock_scale scale = { 7, 7 };
	int status = pvclock_time_scale_of_rate((UINT64_C(1) << 40) - 1, UINT64_C(1) << 40, nearest, &scale);

	printf("rate %d %" PRIu32 " %d\n", status, scale.mul, scale.shift);
}

static void fixed(void)
{
	struct pvclock_line line = { 10, 7, 1, 1, 3 };
	pvclock_u128 value = pvclock_line_fixed(line, 10, 5);

	printf("fixed %" PRIu64 " %" PRIu64 "\n", (uint64_t)(value >> 64), (uint64_t)value);
}

static void backdate_of_whole_ns(void)
{
	struct pvclock_scale one_ns = { 1u << 31, 1 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(one_ns);

	printf("whole %u %" PRIu64 "\n", params.zeros, pvclock_exact_backdate(0x89abcdef, &params));
}

static void spare(uint64_t ns, uint32_t fraction, int8_t shift)
{
	struct pvclock_scale scale = { 1u << 31, shift };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_moment lacking = { ns, fraction };

	printf("spare %" PRIu64 "\n", pvclock_spare_ticks(lacking, &params));
}

/* ---- A word at 4 bytes past a multiple of 8, looked at after each instruction. ---- */

static _Alignas(8) uint32_t words[2];
static unsigned long looks, torn;

static void look(int signal)
{
	uint32_t now = *(volatile uint32_t *)&words[1];

	(void)signal;
	looks++;
	torn += now != 0 && now != UINT32_MAX;
}

static void store_in_steps(void)
{
	signal(SIGTRAP, look);
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\t"
			"lea 128(%%rsp), %%rsp" : : : "memory", "cc");
	pvclock_store32(&words[1], UINT32_MAX);
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\t"
			"lea 128(%%rsp), %%rsp" : : : "memory", "cc");
	printf("word %d %d %lu\n", looks != 0, words[1] == UINT32_MAX, torn);
}

int main(void)
{
	fences_of_steal_time();
	fences_of_own_pages();
	busy_own_pages();
	faults();
	ticks_of(INT64_MAX - 7, 4);
	ticks_of(INT64_MAX, 4);
	ticks_of(UINT64_C(1) << 60, -4);
	rate(0);
	rate(1);
	fixed();
	backdate_of_whole_ns();
	spare(0, 1u << 30, -4);
	spare(UINT64_C(1) << 34, 0, -62);
	store_in_steps();
	return 0;
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("records"))


@pytest.mark.row("K-29")
def test_steal_time_has_a_fence_on_either_side(printed: list[str]) -> None:
    """At the first the version is odd and the sum old, at the second the sum is new; the even version comes after."""
    assert told(printed, "steal") == ["1:5 1:1005 then 2"]


@pytest.mark.row("V-20")
def test_an_own_page_at_rest_has_a_fence_on_either_side(printed: list[str]) -> None:
    """So the page that an onlooker finds under an even version is whole here too."""
    assert told(printed, "own") == ["7:0 7:77 then 8"]


@pytest.mark.row("V-20")
def test_an_own_page_is_busy_with_the_odd_version_before_its_next(printed: list[str]) -> None:
    """The one that is due, which goes on to 8; the other one keeps its 6."""
    assert told(printed, "busy") == ["7 6"]


@pytest.mark.row("E9")
def test_a_page_faults_before_any_is_busy(printed: list[str]) -> None:
    """The second page may not be written at first: when that shows, the first one still has its even version."""
    assert told(printed, "faults") == ["6 8"]


@pytest.mark.row("E11")
def test_ticks_that_no_shift_carries(printed: list[str]) -> None:
    """Shifted left by 4, 2^60 - 1 ticks are the most; shifted right by 4, 2^60 ns would take 2^65 ticks."""
    assert told(printed, "ticks") == [f"0 {2**60 - 1}", "-1 7", "-1 7"]


@pytest.mark.row("E11")
def test_a_rate_rounded_up_to_the_next_power_of_2(printed: list[str]) -> None:
    """1 - 2^-40 ns a tick: just below 2^32 rounded down, and 2^31 with one shift more to the nearest."""
    assert told(printed, "rate") == [f"0 {2**32 - 1} 0", f"0 {2**31} 1"]


@pytest.mark.row("E11")
def test_a_line_in_units_keeps_its_fraction(printed: list[str]) -> None:
    """7 ns and a third, in units of 5 ns, rounded down."""
    high, low = divmod((22 << 64) // 15, 1 << 64)
    assert told(printed, "fixed") == [f"{high} {low}"]


@pytest.mark.row("E11")
def test_a_granule_of_whole_ns_is_backdated_by_the_least(printed: list[str]) -> None:
    """No number of granules gives another fraction than 0, so the period is one granule."""
    assert told(printed, "whole") == [f"32 {2**14}"]


@pytest.mark.row("E11")
def test_spare_ticks_win_back_what_is_lacking(printed: list[str]) -> None:
    """A quarter of a ns is 8 of 16 ticks to half a ns; 2^34 ns take all that one granule has."""
    assert told(printed, "spare") == ["8", f"{2**62 - 1}"]


@pytest.mark.row("K-08")
def test_a_word_aligned_to_4_bytes_is_stored_at_once(printed: list[str]) -> None:
    """Looked at after each instruction."""
    assert told(printed, "word") == ["1 1 0"]
