/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#include "linux_pages.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "record_hz.h"

enum {
    PAGE_BYTES = 4096,
    RECORD_BYTES = 64, /* Linux pads each CPU's to a cache line, in the order of their numbers */
    RECORDS_A_PAGE = PAGE_BYTES / RECORD_BYTES,
    PAGES_MAX = 16,
    MAPS_LINE_BYTES = 512
};

/* A page that nobody has filled raises SIGBUS in who reads it; the kernel itself, asked to read it, says EFAULT. */
static bool can_be_read(const void *page)
{
    int ends[2];
    bool can;

    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
        return false;
    can = write(ends[1], page, PAGE_BYTES) == PAGE_BYTES;
    close(ends[0]);
    close(ends[1]);
    return can;
}

/* The pages beside it are the kernel's own and Hyper-V's.  A record has zeros for padding, and the TSC's frequency
 * somehow: one that is off by less than half is the finding of who judges this. */
static bool is_record(const volatile struct pvclock_vcpu_time_info *record, uint64_t tsc_hz)
{
    struct probe_page page = {0};
    uint64_t hz;

    if (record->pad0 || record->pad[0] || record->pad[1] || !probe_look(&page, record) || !page.version)
        return false;
    hz = record_hz(page.mul, page.shift);
    return hz > tsc_hz / 2 && hz < tsc_hz * 2;
}

static void keep_records(struct visible_pages *pages, const char *page, const struct cpu_list *cpus, uint64_t tsc_hz)
{
    for (unsigned place = 0; place < cpus->count && pages->count < PROBE_CPUS_MAX; place++) {
        int number = cpus->number[place];
        const volatile struct pvclock_vcpu_time_info *record = (const void *)(page + number * RECORD_BYTES);

        if (number >= RECORDS_A_PAGE || !is_record(record, tsc_hz))
            continue;
        pages->page[pages->count].cpu = (unsigned)number;
        pages->record[pages->count++] = record;
    }
}

static bool is_of_the_vdso(const char *maps_line)
{
    return strstr(maps_line, "[vvar]") || strstr(maps_line, "[vvar_vclock]");
}

void find_visible_pages(struct visible_pages *pages, const struct cpu_list *cpus, uint64_t tsc_hz)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[MAPS_LINE_BYTES];
    uintptr_t begin, end;

    while (maps && fgets(line, sizeof(line), maps)) {
        if (!is_of_the_vdso(line) || sscanf(line, "%" SCNxPTR "-%" SCNxPTR, &begin, &end) != 2)
            continue;
        for (unsigned i = 0; begin < end && i < PAGES_MAX && !pages->count; begin += PAGE_BYTES, i++)
            if (can_be_read((const void *)begin))
                keep_records(pages, (const char *)begin, cpus, tsc_hz);
    }
    if (maps)
        fclose(maps);
    look_at_visible_pages(pages);
}

void look_at_visible_pages(struct visible_pages *pages)
{
    for (unsigned i = 0; i < pages->count; i++)
        probe_look(&pages->page[i], pages->record[i]);
}
