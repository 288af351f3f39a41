/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "linux_options.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "linux_fail.h"

static const double SECONDS_DEFAULT = 10, SECONDS_MIN = 0.1, SECONDS_MAX = 86400;
static const int64_t ADDED_NS_MAX = 1000000000000;

static const char HELP[] =
    "pvclock probe " PVCLOCK_VERSION ": measures the clocks of the Linux guest that it runs in.\n"
    "\n"
    "It prints one line of JSON on standard output; `pvclock probe --judge FILE` says what that comes to.\n"
    "It needs no privilege, changes nothing, and keeps its CPUs busy while it measures.\n"
    "\n"
    "  --seconds N    how long to measure, such as 0.5 (default 10)\n"
    "  --cpus LIST    on which CPUs, such as 0,2-3 (default: all that it may run on, up to 64)\n"
    "  --add CPU:NS   put a fault in, to see it found: what that CPU reads is so many ns ahead\n"
    "  --progress     say on standard error how many percent are done\n"
    "  --parent PID   end when this process, which has started it, does\n"
    "  --help         this text\n"
    "\n"
    "The exit status is 0 after a measurement, whatever it found, and 2 where there was none.\n";

/* A whole number at *text, and *text set behind it; false where there is none, or one beyond `largest`. */
static bool take_number(const char **text, long long largest, long long *number)
{
    const char *digits = *text + (**text == '-' || **text == '+');
    char *end;

    if (!isdigit((unsigned char)*digits))
        return false;
    errno = 0;
    *number = strtoll(*text, &end, 10);
    *text = end;
    return !errno && *number <= largest && *number >= -largest;
}

static uint64_t milliseconds_of(const char *text)
{
    char *end;
    double seconds = strtod(text, &end);

    if (end == text || *end || !(seconds >= SECONDS_MIN && seconds <= SECONDS_MAX))
        fail("--seconds %s: a number from 0.1 to 86400", text);
    return (uint64_t)(seconds * 1000 + 0.5);
}

static void add_cpu(struct cpu_list *cpus, int cpu)
{
    if (!may_run_on(cpu))
        fail("--cpus: CPU %d is offline, or this process may not run on it", cpu);
    if (cpu_place(cpus, cpu) >= 0)
        return;
    if (cpus->count == PROBE_CPUS_MAX)
        fail("--cpus: more than %d CPUs", PROBE_CPUS_MAX);
    cpus->number[cpus->count++] = cpu;
}

/* "3" or "0-2" at *text, and *text set behind it. */
static bool take_range(const char **text, long long *first, long long *last)
{
    if (!isdigit((unsigned char)**text) || !take_number(text, CPU_NUMBER_MAX, first))
        return false;
    *last = *first;
    if (**text != '-')
        return true;
    ++*text;
    return isdigit((unsigned char)**text) && take_number(text, CPU_NUMBER_MAX, last) && *last >= *first;
}

static struct cpu_list cpus_of(const char *text)
{
    struct cpu_list cpus = {.count = 0};
    const char *at = text;
    long long first, last;

    do {
        if (!take_range(&at, &first, &last) || (*at && *at != ','))
            fail("--cpus %s: a list such as 0,2-3", text);
        for (long long cpu = first; cpu <= last; cpu++)
            add_cpu(&cpus, (int)cpu);
    } while (*at++);
    return cpus;
}

/* One --add, whose CPU is known to be measured only when all options are read. */
static void add_fault(struct linux_options *options, const char *text)
{
    const char *at = text;
    long long cpu, nanoseconds;
    int place;

    if (!take_number(&at, CPU_NUMBER_MAX, &cpu) || *at++ != ':' || !take_number(&at, ADDED_NS_MAX, &nanoseconds) || *at)
        fail("--add %s: CPU:NS, such as 1:250, and no more than %lld ns", text, (long long)ADDED_NS_MAX);
    place = cpu_place(&options->cpus, (int)cpu);
    if (place < 0)
        fail("--add %s: CPU %lld is not measured", text, cpu);
    options->added_ns[place] = nanoseconds;
}

static pid_t parent_of(const char *text)
{
    const char *at = text;
    long long process;

    if (!take_number(&at, INT_MAX, &process) || *at || process < 1)
        fail("--parent %s: the number of a process", text);
    return (pid_t)process;
}

struct linux_options linux_options(int count, char *const arguments[])
{
    static const struct option known[] = {
        {"seconds", required_argument, NULL, 's'}, {"cpus", required_argument, NULL, 'c'},
        {"add", required_argument, NULL, 'a'},     {"progress", no_argument, NULL, 'p'},
        {"parent", required_argument, NULL, 'P'},  {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    struct linux_options options = {.milliseconds = (uint64_t)(SECONDS_DEFAULT * 1000), .cpus = allowed_cpus()};
    const char *faults[PROBE_CPUS_MAX];
    unsigned fault_count = 0;
    int option;

    opterr = 0; /* one line of ours says it */
    while ((option = getopt_long(count, arguments, "", known, NULL)) != -1) {
        if (option == 's')
            options.milliseconds = milliseconds_of(optarg);
        else if (option == 'c')
            options.cpus = cpus_of(optarg);
        else if (option == 'a' && fault_count < PROBE_CPUS_MAX)
            faults[fault_count++] = optarg;
        else if (option == 'p')
            options.progress = true;
        else if (option == 'P')
            options.parent = parent_of(optarg);
        else if (option == 'h')
            exit(fputs(HELP, stdout) < 0 || fflush(stdout) ? EXIT_CANNOT : EXIT_SUCCESS);
        else
            fail("%s: no option, or one without its value; --help says which there are", arguments[optind - 1]);
    }
    if (!options.cpus.count)
        fail("the kernel names no CPU that this process may run on");
    if (optind < count)
        fail("%s: there are options only; --help says which", arguments[optind]);
    for (unsigned i = 0; i < fault_count; i++)
        add_fault(&options, faults[i]);
    return options;
}
