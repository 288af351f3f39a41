/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#include "linux_kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/utsname.h>
#include <unistd.h>

#define CLOCKSOURCE "/sys/devices/system/clocksource/clocksource0/"

enum {
    SMALL_FILE_BYTES = 8192, /* a kernel's command line has up to 4096 */
    AVAILABLE_MAX = 64,
    COMPLAINTS_MAX = 64, /* the first: the others follow from them */
    COMPLAINT_BYTES = 512,
    RECORD_BYTES = 8192, /* of /dev/kmsg, no less than the kernel's largest */
    RECORDS_MAX = 1 << 17,
    KLOG_READ_ALL = 3,
    KLOG_SIZE = 10,
    KLOG_BYTES_MAX = 16 << 20
};

/* What the kernel says where a clock is wrong: what it gives up, repairs, or measured.  pvclock.meter.inside explains
 * each; a space keeps "tsc=unstable" out, of the command line that the kernel repeats. */
static const char *const COMPLAINTS[] = {
    " unstable",              /* a clocksource, the TSC, sched_clock */
    " wd_nsec:",              /* by the watchdog: what its own clock made of a span, ... */
    " cs_nsec:",              /* ... what the watched one made of it, ... */
    " skewed ",               /* ... and the difference */
    "Long readout interval",  /* the host took the watchdog's CPU away */
    "read-back delay of",     /* the same, in other versions */
    "TSC warp",               /* between CPUs, as they come up */
    "TSC ADJUST",             /* firmware, or a host, that set CPUs apart */
    "Unable to calibrate",    /* the TSC, by any timer */
    "TSC calibration failed", /* the same, quickly */
    "hrtimer: interrupt took",
    "soft lockup",
    "hard LOCKUP",
    "detected stall", /* by RCU */
    "detected expedited stall",
};

struct complaints {
    unsigned count;
    char line[COMPLAINTS_MAX][COMPLAINT_BYTES];
};

/* A small file's first line, "" where it cannot be read. */
static void read_line(const char *path, char line[SMALL_FILE_BYTES])
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? 0 : read(file, line, SMALL_FILE_BYTES - 1);

    if (file >= 0)
        close(file);
    line[length > 0 ? length : 0] = '\0';
    line[strcspn(line, "\n")] = '\0';
}

static bool is_complaint(const char *line)
{
    for (unsigned i = 0; i < sizeof(COMPLAINTS) / sizeof(*COMPLAINTS); i++)
        if (strstr(line, COMPLAINTS[i]))
            return true;
    return false;
}

static void keep_complaint(struct complaints *complaints, const char *before, const char *line)
{
    if (!is_complaint(line) || complaints->count == COMPLAINTS_MAX)
        return;
    snprintf(complaints->line[complaints->count], COMPLAINT_BYTES, "%s%s", before, line);
    complaints->count++;
}

/* Of "priority,number,microseconds,flags;text", in the form that dmesg prints. */
static void keep_record(struct complaints *complaints, const char *record)
{
    char seconds[32] = "";
    const char *text = strchr(record, ';');
    uint64_t us;

    if (!text)
        return;
    if (sscanf(record, "%*u,%*u,%" SCNu64, &us) == 1)
        snprintf(seconds, sizeof(seconds), "[%5" PRIu64 ".%06" PRIu64 "] ", us / 1000000, us % 1000000);
    keep_complaint(complaints, seconds, text + 1);
}

/* A record has more lines behind the first, of its device.  EPIPE: the next was overwritten before it was read.
 * EAGAIN: that was all. */
static bool complaints_of_kmsg(struct complaints *complaints)
{
    int file = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    static char record[RECORD_BYTES];
    ssize_t length;

    if (file < 0)
        return false;
    for (unsigned records = 0; records < RECORDS_MAX; records++) {
        length = read(file, record, sizeof(record) - 1);
        if (length < 0 && (errno == EPIPE || errno == EINTR))
            continue;
        if (length <= 0)
            break;
        record[length] = '\0';
        record[strcspn(record, "\n")] = '\0';
        keep_record(complaints, record);
    }
    length = length < 0 && errno != EAGAIN ? -1 : 0;
    close(file);
    return length == 0;
}

/* What follows "<priority>". */
static const char *without_priority(const char *line)
{
    const char *end = *line == '<' ? strchr(line, '>') : NULL;

    return end ? end + 1 : line;
}

/* The same by syslog(2), for a container has no /dev/kmsg: lines "<priority>[seconds] text". */
static bool complaints_of_syslog(struct complaints *complaints)
{
    int size = klogctl(KLOG_SIZE, NULL, 0);
    char *log = size > 0 && size <= KLOG_BYTES_MAX ? malloc((size_t)size + 1) : NULL;
    int length = log ? klogctl(KLOG_READ_ALL, log, size) : -1;
    char *rest = log;

    if (length >= 0) {
        log[length] = '\0';
        for (char *line = strsep(&rest, "\n"); line; line = strsep(&rest, "\n"))
            keep_complaint(complaints, "", without_priority(line));
    }
    free(log);
    return length >= 0;
}

static void print_complaints(struct json_out *out)
{
    static struct complaints complaints;

    if (!complaints_of_kmsg(&complaints) && !complaints_of_syslog(&complaints)) {
        json_string(out, "complaints", NULL);
        return;
    }
    json_open(out, "complaints", '[');
    for (unsigned i = 0; i < complaints.count; i++)
        json_string(out, NULL, complaints.line[i]);
    json_close(out, ']');
}

static void print_available(struct json_out *out)
{
    char names[SMALL_FILE_BYTES], *rest = NULL;
    unsigned count = 0;

    read_line(CLOCKSOURCE "available_clocksource", names);
    json_open(out, "available", '[');
    for (char *name = strtok_r(names, " ", &rest); name && count < AVAILABLE_MAX; name = strtok_r(NULL, " ", &rest)) {
        json_string(out, NULL, name);
        count++;
    }
    json_close(out, ']');
}

static void print_line_of(struct json_out *out, const char *key, const char *path)
{
    char line[SMALL_FILE_BYTES];

    read_line(path, line);
    json_string(out, key, line);
}

bool clocksource_is(const char *name)
{
    char current[SMALL_FILE_BYTES];

    read_line(CLOCKSOURCE "current_clocksource", current);
    return !strcmp(current, name);
}

void print_kernel(struct json_out *out)
{
    struct utsname name = {0};

    uname(&name);
    json_open(out, "kernel", '{');
    json_string(out, "release", name.release);
    print_line_of(out, "clocksource", CLOCKSOURCE "current_clocksource");
    print_available(out);
    print_line_of(out, "command_line", "/proc/cmdline");
    print_complaints(out);
    json_close(out, '}');
}
