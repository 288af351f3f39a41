"""The headers at their limits, as a VMM in C uses them: a young clock, one that lacks time, a page not in yet."""

from __future__ import annotations

import pytest

from tests.unit.c_program import printed_by, told

PROGRAM = r"""
#define _GNU_SOURCE
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include "pvclock_own_line.h"

#define BREAK_TSC (UINT64_C(1) << 62)
#define PAGE_BYTES 4096

/* ---- Arithmetic and anchors. ---- */

static void rounded_up(void)
{
	struct pvclock_scale scale = { 7, 7 };
	int status = pvclock_time_scale_of_rate((UINT64_C(1) << 33) - 1, UINT64_C(1) << 32, 1, &scale);

	printf("rounded %d %#" PRIx32 " %d\n", status, scale.mul, scale.shift);
}

/* A granule is a tick here, of half a nanosecond and 2^-32 ns. */
static void young(uint32_t fraction, uint64_t least_ns)
{
	struct pvclock_scale scale = { 0x80000001, 0 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_moment moment = { 17, fraction };
	struct pvclock_anchor anchor = pvclock_anchor_through(moment, BREAK_TSC, &params, least_ns);
	uint64_t ticks = BREAK_TSC - anchor.tsc_timestamp;
	uint64_t time = (anchor.system_time << 32) + ticks * scale.mul;

	printf("young %" PRIu64 " %" PRIu64 " %#" PRIx32 "\n", ticks, time >> 32, (uint32_t)time);
}

/* 32 ticks a nanosecond, of which a guest cuts the low 4 bits; the timeline is at a quarter of a nanosecond. */
static void lacking(uint64_t ns)
{
	struct pvclock_scale scale = { 1u << 31, -4 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_line timeline = { BREAK_TSC, 5000000000, 1, 1, 4 };
	struct pvclock_anchor old = { BREAK_TSC, timeline.ns - ns, scale };
	struct pvclock_anchor anchor = pvclock_reanchor(&timeline, &old, &params, BREAK_TSC);

	printf("lacking %" PRIu64 " ", pvclock_anchor_read(&anchor, BREAK_TSC) - old.system_time);
	printf("%" PRIu64 "\n", (BREAK_TSC - anchor.tsc_timestamp) & 15);
}

/* ---- Words and counters. ---- */

static void bytes(void)
{
	_Alignas(8) uint8_t memory[8] = { 0 };

	pvclock_store32(memory + 1, 0x44332211);
	printf("bytes");
	for (int i = 0; i < 6; i++)
		printf(" %02x", memory[i]);
	printf(" %#" PRIx32 "\n", pvclock_load32(memory + 1));
}

static uint64_t ticking(void *context)
{
	return (*(uint64_t *)context)++;
}

static void late(uint64_t now)
{
	struct pvclock_counter counter = { ticking, &now, 10 };

	printf("late %d\n", pvclock_counter_wait(&counter, 100, 5));
}

static void host_tsc(void)
{
	int64_t ordered = (int64_t)(pvclock_rdtsc_ordered() - __builtin_ia32_rdtsc());
	int64_t after_stores = (int64_t)(pvclock_rdtsc_after_stores() - __builtin_ia32_rdtsc());
	int64_t near = INT64_C(1) << 31;

	printf("host %d %d\n", ordered < near && ordered > -near, after_stores < near && after_stores > -near);
}

/* ---- Pages. ---- */

static void publish_one_of_two(void)
{
	_Alignas(8) uint8_t memory[2][32] = { { 0 }, { 0 } };
	struct pvclock_target targets[2] = { { memory[0], 0, 0, 1, 0 }, { memory[1], 0, 0, 1, 0 } };
	uint64_t now = 1000, break_tsc = 7;
	struct pvclock_counter counter = { ticking, &now, 8 };
	struct pvclock_line timeline = { 0, 0, 0, 1, 1 };
	struct pvclock_scale scale = { 1u << 31, 1 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_anchor anchor = { 0, 0, { 0, 0 } };
	int status = pvclock_publish(targets, 1, &timeline, &params, &counter, &anchor, &break_tsc), other = 0;

	for (int i = 0; i < 32; i++)
		other |= memory[1][i];
	printf("publish %d %" PRIu64 " %" PRIu64, status, break_tsc, pvclock_anchor_read(&anchor, break_tsc));
	printf(" %" PRIu32 " %d\n", pvclock_load32(memory[0]), other);
}

static uint8_t *new_pages(size_t count)
{
	void *pages = mmap(NULL, count * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return (uint8_t *)pages;
}

static void touched(void)
{
	uint8_t *pages = new_pages(3);
	struct pvclock_target targets[2] = { { pages, 0, 0, 0, 0 }, { pages + PAGE_BYTES, 0, 0, 0, 0 } };
	struct pvclock_page_set set = { &pvclock_page_kind_pvclock, targets, 2, 1 };
	unsigned char in[3] = { 0, 0, 0 };

	set.kind->touch(&set);
	mincore(pages, (size_t)3 * PAGE_BYTES, in);
	printf("touched %d %d %d\n", in[0] & 1, in[1] & 1, in[2] & 1);
}

static uint8_t *own_memory;
static volatile uint32_t seen;

/* The store that faults is of the second half, which lies on the next page. */
static void look(int signal)
{
	(void)signal;
	seen = *(volatile uint32_t *)own_memory;
	mprotect(own_memory + 16, PAGE_BYTES, PROT_READ | PROT_WRITE);
}

static void own_page_halfway(void)
{
	own_memory = new_pages(2) + PAGE_BYTES - 16;
	struct pvclock_own_page page = { own_memory, { 0, 0, { 9, 0 } }, 4, 1, 1 };

	signal(SIGSEGV, look);
	mprotect(own_memory + 16, PAGE_BYTES, PROT_READ);
	pvclock_own_pages_write_now(&page, 1);
	printf("own %" PRIu32 " %" PRIu32 " %d\n", seen, pvclock_load32(own_memory), page.is_due);
}

int main(void)
{
	rounded_up();
	young(20, 17);
	young(20, 16);
	young(17, 16);
	lacking(2);
	lacking(3);
	lacking(UINT64_C(1) << 31);
	bytes();
	late(90);
	late(89);
	host_tsc();
	publish_one_of_two();
	touched();
	own_page_halfway();
	return 0;
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("limits"))


@pytest.mark.row("K-15")
def test_a_rate_rounded_up_to_a_power_of_2(printed: list[str]) -> None:
    """2 - 2^-32 ns a tick is nearest to 2: mul goes back to 2^31, and the shift on by 1."""
    assert told(printed, "rounded") == ["0 0x80000000 2"]


@pytest.mark.row("E11")
def test_a_young_clock_takes_the_best_fraction_of_its_later_half(printed: list[str]) -> None:
    """At 17 ns it has 33 ticks: 18 to 33 come up. 20 ticks end with 20 * 2^-32 ns; all even ones with more than 17.

    The odd ones end with 2^31 and more, so the nearest behind 17 is 33 ticks' in the ns before.
    """
    assert told(printed, "young") == ["20 17 0x14", "20 17 0x14", "33 16 0x80000021"]


@pytest.mark.row("E11")
def test_what_a_line_lacks_comes_back_in_ticks_that_do_not_show(printed: list[str]) -> None:
    """Just short of 2 ns are made up at the break: a quarter of a ns is left, 8 ticks; of more, the 15 there are."""
    assert told(printed, "lacking") == ["1 8", "1 15", "1 15"]


@pytest.mark.row("K-08")
def test_a_word_at_an_odd_address_is_stored_byte_by_byte(printed: list[str]) -> None:
    """Lowest first, with nothing before and nothing after."""
    assert told(printed, "bytes") == ["00 11 22 33 44 00 0x44332211"]


@pytest.mark.row("E9")
def test_a_wait_bears_a_counter_as_late_as_the_margin(printed: list[str]) -> None:
    """10 ticks behind are another CPU's TSC; 11 are a counter that went back."""
    assert told(printed, "late") == ["0", "-1"]


@pytest.mark.row("E9")
def test_the_host_tsc_is_read_with_both_halves(printed: list[str]) -> None:
    """Both ways of reading give what rdtsc alone gives at that moment."""
    assert told(printed, "host") == ["1 1"]


@pytest.mark.row("K-08", "E9")
def test_a_publish_has_its_own_break_point_and_leaves_a_neighbour_alone(printed: list[str]) -> None:
    """A and the margin, where the line shows the timeline; the version is 2, and the other page stays as it was."""
    assert told(printed, "publish") == ["0 1008 1008 2 0"]


@pytest.mark.row("E9")
def test_a_publish_brings_in_each_page_that_it_was_given(printed: list[str]) -> None:
    """Two new pages are in memory after the touch, and the one behind them is not."""
    assert told(printed, "touched") == ["1 1 0"]


@pytest.mark.row("V-20")
def test_an_own_page_is_busy_while_it_is_written(printed: list[str]) -> None:
    """Halfway, where the second half faults, the version is odd; then it is the even one asked for."""
    assert told(printed, "own") == ["3 4 0"]
