"""The parts of the probe for Linux on machines that this one is not: CPUs, pages and kernel lines of a test's own."""

from __future__ import annotations

import json
import re

import pytest

from pvclock.meter.inside.kernel import COMPLAINTS
from tests.unit.probe_parts import PROBE, Compiled

pytestmark = pytest.mark.row("E18")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Programs of this file, in a folder of their own."""
    return Compiled(tmp_path_factory.mktemp("compiled"))


JSON = r"""
#include <stdio.h>
#include "report.h"

static void put(struct json_out *out, char character)
{
    (void)out;
    putchar(character);
}

int main(void)
{
    struct json_out out = {.put = put};
    char bytes[257] = {0};

    for (int i = 0; i < 256; i++)
        bytes[i] = (char)(i + 1);
    json_open(&out, NULL, '{');
    json_string(&out, bytes, bytes);
    json_string(&out, "none", NULL);
    json_open(&out, "numbers", '[');
    json_integer(&out, NULL, INT64_MIN);
    json_integer(&out, NULL, INT64_MAX);
    json_integer(&out, NULL, -1);
    json_unsigned(&out, NULL, UINT64_MAX);
    json_unsigned(&out, NULL, 0);
    json_close(&out, ']');
    json_open(&out, "empty", '[');
    json_close(&out, ']');
    json_open(&out, "objects", '[');
    for (int i = 0; i < 2; i++) {
        json_open(&out, NULL, '{');
        json_close(&out, '}');
    }
    json_close(&out, ']');
    json_close(&out, '}');
    return 0;
}
"""


def test_any_byte_and_any_number_is_json(compiled: Compiled) -> None:
    """Each byte of a string is the character of its number, in plain ASCII; numbers are whole up to 64 bits."""
    (line,) = compiled.prints(JSON, ("report.c",))
    assert line.isascii()
    assert line.isprintable()
    every = "".join(map(chr, range(1, 256)))
    assert json.loads(line) == {
        every: every,
        "none": None,
        "numbers": [-(2**63), 2**63 - 1, -1, 2**64 - 1, 0],
        "empty": [],
        "objects": [{}, {}],
    }


RESULT = r"""
#include <stdio.h>
#include "report.h"

static struct probe_clock_result result;

static void put(struct json_out *out, char character)
{
    (void)out;
    putchar(character);
}

int main(void)
{
    struct json_out out = {.put = put};
    struct probe_team team = {.cpus = 3, .added_ns = {0, -5}};
    int64_t numbers[] = {4, 5, 9}, apic_ids[] = {8, 10, 300};
    struct probe_plan plan = {.tsc_hz = 1000, .milliseconds = 7};
    struct probe_leaf leaf = {1, 2, 3, 4, 5, 0xffffffff};
    struct probe_page page = {
        .cpu = 4, .version = 2, .mul = 3, .shift = -1, .flags = 3, .looks = 9, .stopped_looks = 8};
    struct probe_clock clock = {.name = "tsc", .hz = 1000};
    struct probe_report report = {
        "bare", "0", &team, 5, numbers, apic_ids, &plan, "pit", &leaf, 1, &page, 1, &clock, &result, 1, NULL};

    result.pairs = 1;
    result.pair[0].a = 2;
    result.pair[0].b = 1;
    result.pair[0].at_tsc[0] = 70;
    for (int slice = 1; slice < PROBE_SLICES; slice++) {
        result.pair[0].at_tsc[slice] = 71;
        result.pair[0].slices[slice] = (struct offset_window){.low = -3, .high = 4, .rounds = 10};
    }
    result.warp[2][0] = (struct probe_warp){.count = 6, .largest = 11};
    result.cell_reads = 12;
    result.sample[8] = (struct probe_sample){1, -2, 3};
    result.steps = (struct step_search){.reads = 13, .floor = 14, .count = 15, .backward = {true, -20, -10, 99}};
    probe_print(&out, &report);
    return 0;
}
"""


def test_a_result_in_its_line(compiled: Compiled) -> None:
    """Every member stands where docs/probe.md says; a slice without a round has its time alone."""
    (line,) = compiled.prints(RESULT, ("report.c",))
    found = json.loads(line)
    (clock,) = found.pop("clocks")
    (pair,) = clock.pop("pairs")
    assert found == {
        "schema": "pvclock.probe-record/1",
        "version": "0",
        "form": "bare",
        "tsc_hz": 1000,
        "tsc_hz_from": "pit",
        "milliseconds": 7,
        "cpus_present": 5,
        "cpus": [{"cpu": 4, "apic_id": 8}, {"cpu": 5, "apic_id": 10}, {"cpu": 9, "apic_id": 300}],
        "added_ns": [0, -5, 0],
        "cpuid": [[1, 2, 3, 4, 5, 2**32 - 1]],
        "pages": [{"cpu": 4, "version": 2, "mul": 3, "shift": -1, "flags": 3, "looks": 9, "stopped_looks": 8}],
    }
    assert pair == {"cpus": [2, 1], "rounds": 70, "slices": [[70], *[[71, -3, 4]] * 7]}
    assert clock.pop("samples") == [*[[0, 0, 0]] * 8, [1, -2, 3]]
    steps = {"reads": 13, "floor": 14, "forward": None, "backward": [-20, -10, 99], "count": 15}
    warps = [{"from": 2, "to": 0, "count": 6, "largest": 11}]
    assert clock == {"name": "tsc", "hz": 1000, "warps": warps, "cell_reads": 12, "steps": steps}


SUMMARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "linux_summary.h"

static struct probe_clock_result results[2];

/* CPUs, then 16 windows, low and high: of the one pair and each slice, tsc's and then monotonic's; then a warp, and a
 * fault that was put in. */
int main(int count, char *argument[])
{
    struct probe_team team = {.cpus = (unsigned)atoi(argument[1])};
    int64_t numbers[] = {4, 7};
    struct probe_plan plan = {.tsc_hz = 2000000000, .milliseconds = 1250};
    struct probe_clock clocks[] = {{.name = "tsc", .hz = 2000000000}, {.name = "monotonic", .hz = 1000000000}};
    struct probe_report report = {.team = &team, .cpu_number = numbers, .plan = &plan, .clocks = clocks,
                                  .results = results, .clock_count = 2};

    for (int i = 2; i + 1 < count && i < 34; i += 2) {
        struct probe_clock_result *result = &results[(i - 2) / 16];

        result->pairs = 1;
        result->pair[0].b = 1;
        result->pair[0].slices[(i - 2) / 2 % 8] = (struct offset_window){atoll(argument[i]), atoll(argument[i + 1]), 9};
    }
    if (count > 34)
        results[1].warp[1][0] = (struct probe_warp){3, atoll(argument[34])};
    if (count > 35)
        team.added_ns[1] = atoll(argument[35]);
    dup2(1, 2);
    print_summary(&report);
    return 0;
}
"""
A_WARP = "monotonic goes back by up to 33 ns from CPU 7 to CPU 4"
NARROW, WIDE = ("-60", "40"), ("-900", "900")


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["1"], "1 CPU, 1.2 s: one CPU has no other to differ from."),
        (["2", *WIDE * 3, *NARROW, *WIDE * 3, *WIDE, *NARROW * 8], "60 ns"),
        (["2", *NARROW * 7, "200", "300", *NARROW * 8], "tsc of CPU 7 is ahead of CPU 4's by at least 100 ns."),
        (
            ["2", *NARROW * 12, "-300", "-200", *NARROW * 3],
            "monotonic of CPU 4 is ahead of CPU 7's by at least 200 ns.",
        ),
        (["2", *NARROW * 16, "33"], f"{A_WARP}."),
        (["2", "500", "700", *NARROW * 15, "33"], f"{A_WARP}; tsc of CPU 7 is ahead of CPU 4's by at least 250 ns."),
    ],
)
def test_the_summary_names_the_worst(compiled: Compiled, arguments: list[str], finding: str) -> None:
    """The largest warp and the largest proven offset, in ns, with their CPUs; else what none differs by more than."""
    first, second = compiled.prints(SUMMARY, ("linux_summary.c", "report.c"), *arguments)
    bound = "no clock is seen to differ between CPUs, and none does by more than {}."
    what = bound.format(finding) if finding == "60 ns" else finding
    assert first == f"pvclock probe: {'' if what.startswith('1 CPU') else '2 CPUs, 1.2 s: '}{what}"
    assert second.endswith("pvclock probe --judge FILE")


def test_the_summary_says_that_a_fault_was_put_in(compiled: Compiled) -> None:
    """What it finds then is not the machine's."""
    first, _ = compiled.prints(SUMMARY, ("linux_summary.c", "report.c"), "2", *NARROW * 16, "33", "-1")
    assert first == f"pvclock probe: 2 CPUs, 1.2 s (with --add): {A_WARP}."


OPTIONS = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "linux_fail.h"
#include "linux_options.h"

/* A machine of 100 CPUs, of which this process may run on those with an odd number below 200. */
int sched_getaffinity(pid_t process, size_t size, cpu_set_t *set)
{
    (void)process;
    memset(set, 0, size);
    for (size_t cpu = 1; cpu < 200; cpu += 2)
        CPU_SET_S(cpu, size, set);
    return 0;
}

_Noreturn void fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    exit(0);
}

int main(int count, char *arguments[])
{
    struct linux_options options = linux_options(count, arguments);

    printf("%u ms, %u CPUs:", (unsigned)options.milliseconds, options.cpus.count);
    for (unsigned i = 0; i < options.cpus.count; i++)
        printf(" %d", options.cpus.number[i]);
    for (unsigned i = 0; i < options.cpus.count; i++)
        if (options.added_ns[i])
            printf(" [%u] %lld ns", i, (long long)options.added_ns[i]);
    return 0;
}
"""
FIRST_64 = " ".join(str(number) for number in range(1, 128, 2))


@pytest.mark.parametrize(
    ("options", "printed_line"),
    [
        ([], f"10000 ms, 64 CPUs: {FIRST_64}"),
        (["--cpus=199,1", "--seconds=0.25"], "250 ms, 2 CPUs: 199 1"),
        (["--cpus=5,5,5-5,3"], "10000 ms, 2 CPUs: 5 3"),
        (["--add=3:-7", "--cpus=1,3", "--add=1:+9"], "10000 ms, 2 CPUs: 1 3 [0] 9 ns [1] -7 ns"),
        (["--add=5:1", "--cpus=1,3"], "--add 5:1: CPU 5 is not measured"),
        (["--cpus=1-3"], "--cpus: CPU 2 is offline, or this process may not run on it"),
        (["--cpus=" + ",".join(str(number) for number in range(1, 200, 2))], "--cpus: more than 64 CPUs"),
    ],
)
def test_which_cpus_of_a_large_machine(compiled: Compiled, options: list[str], printed_line: str) -> None:
    """The first 64 that it may run on, or those of --cpus in their order, each once; and whose a fault is."""
    assert compiled.prints(OPTIONS, ("linux_options.c", "linux_team.c"), *options) == [printed_line]


KERNEL = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "linux_kernel.h"

static const char *where;
static char **lines;
static int count;

/* A reader of /dev/kmsg gets one record a read, as from a socket of packets. */
static int kmsg(void)
{
    char record[1024];
    int ends[2];

    if (strcmp(where, "kmsg")) {
        errno = EPERM;
        return -1;
    }
    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends);
    for (int i = 0; i < count; i++) {
        int length = snprintf(record, sizeof(record), "4,%d,%d,-;%s\n OF=new unstable\n", i, 12000000 + i, lines[i]);
        if (write(ends[1], record, (size_t)length) != length)
            perror("a record");
    }
    return ends[0];
}

int open(const char *path, int flags, ...)
{
    return strcmp(path, "/dev/kmsg") ? (int)syscall(SYS_openat, AT_FDCWD, path, flags) : kmsg();
}

/* What an overwritten record is like. */
ssize_t read(int file, void *buffer, size_t size)
{
    static int reads;
    ssize_t length = syscall(SYS_read, file, buffer, size);

    if (length < 0 && errno == EAGAIN && !reads++)
        errno = EPIPE;
    return length;
}

int klogctl(int type, char *buffer, int size)
{
    int length = 0;

    if (strcmp(where, "syslog"))
        return -1;
    if (type == 10)
        return 1 << 20;
    for (int i = 0; i < count; i++)
        length += snprintf(buffer + length, (size_t)(size - length), "<4>[   12.%06d] %s\n", i, lines[i]);
    return length;
}

static void put(struct json_out *out, char character)
{
    (void)out;
    putchar(character);
}

int main(int arguments, char *argument[])
{
    struct json_out out = {.put = put};

    where = argument[1];
    lines = argument + 2;
    count = arguments - 2;
    json_open(&out, NULL, '{');
    print_kernel(&out);
    json_close(&out, '}');
    return 0;
}
"""
SAID = [
    "[Firmware Bug]: TSC ADJUST differs: CPU0 0 -> -1",
    "TSC ADJUST compensate: CPU1 observed 115 warp. Adjust: 115",
    "Measured 1234 cycles TSC warp between CPUs, turning off TSC clock.",
    "TSC warped randomly between CPUs",
    "tsc: Marking TSC unstable due to check_tsc_sync_source failed",
    "tsc: Marking TSC unstable due to TSCs unsynchronized",
    "tsc: Marking TSC unstable due to boot parameter",
    "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable because the skew is too large:",
    "clocksource:                       'hpet' wd_nsec: 499760653 wd_now: 1b8ad51 wd_last: 14b7d82 mask: ffffffff",
    "clocksource:                       'tsc' cs_nsec: 496003478 cs_now: 66814158c cs_last: 629a40ae8 mask: ffffffff",
    "clocksource:                       Clocksource 'tsc' skewed -3757175 ns (-3 ms) over watchdog 'hpet' interval",
    "clocksource: timekeeping watchdog on CPU8: hpet wd-wd read-back delay of 92539ns",
    "clocksource: Long readout interval, skipping watchdog check: cs_nsec: 3343956725 wd_nsec: 3343956627",
    "TSC found unstable after boot, most likely due to broken BIOS. Use 'tsc=unstable'.",
    "hrtimer: interrupt took 1234567 ns",
    "watchdog: BUG: soft lockup - CPU#1 stuck for 27s! [repro:2653]",
    "watchdog: Watchdog detected hard LOCKUP on cpu 3",
    "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... } 21 jiffies s: 1 root: 0x2/.",
    "tsc: Fast TSC calibration failed",
    "tsc: Unable to calibrate against PIT",
    "tsc: Marking TSC unstable due to could not calculate TSC khz",
    "sched_clock: Marking unstable (1, 2)<-(3, 4)",
]
"""What kernels say, word by word, where a clock is wrong."""
HARMLESS = [
    "tsc: Detected 2400.000 MHz processor",
    "clocksource: Switched to clocksource tsc",
    "Kernel command line: quiet tsc=unstable",
    "systemd[1]: Installed a package",
    "usb 1-1: new device",
]


def kernel(compiled: Compiled, lines: list[str], where: str) -> dict[str, object]:
    """What is printed of a kernel with these lines."""
    (line,) = compiled.prints(KERNEL, ("linux_kernel.c", "report.c"), where, *lines)
    found: dict[str, object] = json.loads(line)["kernel"]
    return found


@pytest.mark.parametrize("where", ["kmsg", "syslog"])
def test_what_the_kernel_complains_of(compiled: Compiled, where: str) -> None:
    """Its lines of a clock that is wrong, as dmesg prints them, without what is no complaint or stands behind them."""
    found = kernel(compiled, [*SAID, *HARMLESS], where)
    assert found["complaints"] == [f"[   12.{number:06}] {line}" for number, line in enumerate(SAID)]


def test_complaints_are_those_that_are_explained() -> None:
    """What the probe looks for and what the judge explains are in step: SAID has a line for each part of both."""
    source = (PROBE / "linux_kernel.c").read_text(encoding="utf-8")
    kept = re.findall(r'^    "(.+)",', source.partition("COMPLAINTS[] = {")[2].partition("};")[0], re.MULTILINE)
    explained = {part for each in COMPLAINTS for part in re.split(r"\|(?![^(]*\))", each.pattern.pattern)}
    assert len(kept) > 10
    assert [part for part in kept if not any(part in line for line in SAID)] == []
    assert [part for part in explained if not any(re.search(part, line) for line in SAID)] == []
    assert [line for line in SAID if not any(re.search(part, line) for part in explained)] == []


def test_a_kernel_that_tells_nothing(compiled: Compiled) -> None:
    """Null says that the lines may not be read; an empty list, that there is none."""
    assert kernel(compiled, SAID, "nowhere")["complaints"] is None
    assert kernel(compiled, HARMLESS, "kmsg")["complaints"] == []


def test_a_kernel_that_complains_without_end(compiled: Compiled) -> None:
    """The first 64 lines are kept, and no more than 511 bytes of one."""
    lines = [f"{number} unstable {'x' * 600}" for number in range(100)]
    found = kernel(compiled, lines, "syslog")["complaints"]
    assert isinstance(found, list)
    assert [line.split("] ")[1].split()[0] for line in found] == [str(number) for number in range(64)]
    assert {len(line) for line in found} == {511}


PAGES = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "linux_pages.h"

enum { PAGES = 4, PAGE = 4096 };
static char maps[512];

/* The process' maps as a test has them. */
FILE *fopen(const char *path, const char *mode)
{
    (void)path;
    (void)mode;
    return fmemopen(maps, strlen(maps), "r");
}

static uint32_t number(const char *text)
{
    return (uint32_t)strtol(text, NULL, 0);
}

/* The mapping's name, then a second CPU's version, pad0, mul, shift, flags and pad[1]. */
int main(int count, char *argument[])
{
    char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct pvclock_vcpu_time_info good = {
        .version = 2, .tsc_timestamp = 1, .system_time = 1, .tsc_to_system_mul = 0x80000000, .flags = 3};
    struct cpu_list cpus = {.count = 3, .number = {0, 2, 100}};
    struct visible_pages pages = {0};

    (void)count;
    memset(memory, 0x5a, PAGE);           /* the kernel's own */
    mprotect(memory + PAGE, PAGE, PROT_NONE);
    memcpy(memory + 2 * PAGE, &good, sizeof(good));
    good.version = number(argument[2]);
    good.pad0 = number(argument[3]);
    good.tsc_to_system_mul = number(argument[4]);
    good.tsc_shift = (int8_t)number(argument[5]);
    good.flags = (uint8_t)number(argument[6]);
    good.pad[1] = (uint8_t)number(argument[7]);
    memcpy(memory + 2 * PAGE + 2 * 64, &good, sizeof(good));
    snprintf(maps, sizeof(maps), "1000-2000 r--p 0 00:00 0 /it\n%lx-%lx r--p 0 00:00 0 [%s]\n", (long)memory,
             (long)memory + PAGES * PAGE, argument[1]);
    find_visible_pages(&pages, &cpus, 2000000000);
    look_at_visible_pages(&pages);
    for (unsigned i = 0; i < pages.count; i++) {
        const struct probe_page *page = &pages.page[i];
        printf("CPU %u %u %x %d %u %u/%u\n", page->cpu, page->version, page->mul, page->shift, page->flags,
               page->stopped_looks, page->looks);
    }
    return 0;
}
"""
OF_CPU_0 = "CPU 0 2 80000000 0 3 2/2"


@pytest.mark.parametrize(
    ("name", "second", "lines"),
    [
        ("vvar", "4 0 0x7fffffff 0 1 0", [OF_CPU_0, "CPU 2 4 7fffffff 0 1 0/2"]),
        ("vvar_vclock", "2 0 0x80000000 0 0 0", [OF_CPU_0, "CPU 2 2 80000000 0 0 0/2"]),
        ("heap", "2 0 0x80000000 0 0 0", []),
        ("vvar", "3 0 0x80000000 0 0 0", [OF_CPU_0]),  # being written for ever
        ("vvar", "0 0 0x80000000 0 0 0", [OF_CPU_0]),  # not yet written
        ("vvar", "2 1 0x80000000 0 0 0", [OF_CPU_0]),
        ("vvar", "2 0 0x80000000 0 0 1", [OF_CPU_0]),
        ("vvar", "2 0 0 0 0 0", [OF_CPU_0]),
        ("vvar", "2 0 0x80000000 2 0 0", [OF_CPU_0]),
        ("vvar", "2 0 0x80000000 -127 0 0", [OF_CPU_0]),
    ],
)
def test_which_pages_hold_pvclock_records(compiled: Compiled, name: str, second: str, lines: list[str]) -> None:
    """Those of the vDSO that can be read, with a record's padding and nearly the TSC's rate; each CPU has 64 bytes."""
    assert compiled.prints(PAGES, ("linux_pages.c", "linux_facts.c", "facts.c"), name, *second.split()) == lines


RECORD_HZ = r"""
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include "record_hz.h"

int main(int count, char *argument[])
{
    for (int i = 1; i + 1 < count; i += 2)
        printf("%" PRIu64 "\n", record_hz((uint32_t)strtoul(argument[i], NULL, 0), atoi(argument[i + 1])));
    return 0;
}
"""


def test_the_frequency_of_a_record(compiled: Compiled) -> None:
    """10^9 * 2^32 / (mul * 2^shift), rounded down, wherever that is a number of 64 bits; of no mul, none."""
    scales = [(mul, shift) for mul in (1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF) for shift in range(-40, 70, 3)]
    printed = compiled.prints(RECORD_HZ, (), "0", "0", *(str(number) for scale in scales for number in scale))
    exact = [(10**9 << 32 << max(-shift, 0)) // (mul << max(shift, 0)) for mul, shift in scales]
    is_near = [-31 <= shift < 64 for _, shift in scales]
    assert [int(line) for line in printed] == [
        0,
        *(hz if hz < 2**64 and near else 0 for hz, near in zip(exact, is_near, strict=True)),
    ]
