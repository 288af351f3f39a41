"""pvclock_search.h as a program in C calls it: at any address, and nothing is read beyond the memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.c_program import printed_by

PROGRAM = r"""
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "pvclock_search.h"

enum { MEMORY_PAGE = 4096, LENGTHS = 300 };

static uint64_t offsets[4];

/* A page at the last multiple of 4 that has room for it; the memory ends where nothing can be read. */
static uint64_t found_at_the_end(uint8_t *end, size_t length, const struct pvclock_search_terms *terms)
{
	const struct pvclock_vcpu_time_info page = { 2, 0, 1, 0, 1u << 31, 0, 1, { 0, 0 } };
	struct pvclock_search_result result = { 0, { offsets, 2, 0 }, { offsets + 2, 2, 0 } };
	uint8_t *memory = end - length;
	size_t at = (length - sizeof page) / 4 * 4;

	memset(memory, 0, length);
	if (length >= sizeof page)
		memcpy(memory + at, &page, sizeof page);
	pvclock_search(memory, length, terms, &result);
	return result.pages.count == 1 && offsets[2] == at && result.even == 1;
}

int main(void)
{
	uint8_t *memory = mmap(NULL, 2 * MEMORY_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct pvclock_search_terms terms;
	uint64_t found = 0;

	if (memory == MAP_FAILED || mprotect(memory + MEMORY_PAGE, MEMORY_PAGE, PROT_NONE) != 0)
		return 1;
	printf("%d ", pvclock_search_terms_of(0, 300, UINT64_MAX, &terms));
	printf("%d ", pvclock_search_terms_of(1, PVCLOCK_PPM, UINT64_MAX, &terms));
	printf("%d\n", pvclock_search_terms_of(2 * PVCLOCK_NS_PER_SEC, 0, UINT64_MAX, &terms));
	for (size_t length = 0; length < LENGTHS; length++)
		found += found_at_the_end(memory + MEMORY_PAGE, length, &terms);
	printf("%" PRIu64 "\n", found);
	return 0;
}
"""
TRAPS = ("-O2", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


@pytest.mark.row("E3", "E11")
def test_nothing_is_read_beyond_the_memory(tmp_path: Path) -> None:
    """From 32 bytes on a page at the end is found, shorter memory holds none, and no behaviour is undefined.

    A frequency of 0 and 10^6 ppm are refused.
    """
    assert printed_by(PROGRAM, tmp_path, *TRAPS) == ["-1 -1 0", str(300 - 32)]
