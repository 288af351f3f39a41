/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The probe without an operating system: an image that a VMM boots, which measures, prints one line and ends.
 */
#include "bare.h"

#include <stddef.h>

#include "bare_acpi.h"
#include "bare_boot_information.h"
#include "bare_clocks.h"
#include "bare_console.h"
#include "bare_cpus.h"
#include "bare_end.h"
#include "bare_options.h"
#include "bare_tsc.h"
#include "facts.h"
#include "measure.h"
#include "report.h"

static struct boot_facts boot;
static struct bare_options options;
static struct acpi_facts acpi;
static struct bare_console console;
static struct probe_team team;
static struct tsc_rate tsc_rate;
static struct bare_clocks clocks;
static struct probe_clock_result results[PROBE_CLOCKS_MAX];
static struct probe_leaf leaves[PROBE_LEAVES_MAX];
static struct probe_page pages[PROBE_CPUS_MAX];
static int64_t cpu_numbers[PROBE_CPUS_MAX];

/* The keys that only this form has. */
static void print_more(struct json_out *out, const struct probe_report *report)
{
    (void)report;
    json_open(out, "console", '{');
    json_unsigned(out, "com1", console.com1);
    json_unsigned(out, "debug_port", console.debug_port);
    json_unsigned(out, "pvclock_msr", clocks.pvclock_msr);
    json_unsigned(out, "hyperv_msr", clocks.hyperv_msr);
    json_close(out, '}');
    json_open(out, "ignored_options", '[');
    for (unsigned i = 0; i < options.ignored_count; i++)
        json_string(out, NULL, options.ignored[i]);
    json_close(out, ']');
}

static void print_result(const struct probe_plan *plan)
{
    struct probe_report report = {
        .form = "bare",
        .version = PVCLOCK_VERSION,
        .team = &team,
        .cpu_number = cpu_numbers,
        .apic_id = cpus_apic_ids(),
        .tsc_hz_from = tsc_rate.from,
        .plan = plan,
        .leaves = leaves,
        .leaf_count = probe_leaves(leaves),
        .pages = pages,
        .page_count = clocks_pages(&clocks, pages, team.cpus),
        .clocks = clocks.clock,
        .results = results,
        .clock_count = clocks.count,
        .more = print_more,
    };

    for (unsigned cpu = 0; cpu < team.cpus; cpu++)
        cpu_numbers[cpu] = cpu;
    probe_print(&console.out, &report);
    console.out.put(&console.out, '\n');
    console_flush(&console);
}

/* The line that stands in place of the result. */
_Noreturn static void end_with_error(const char *text)
{
    static struct bare_console own; /* what the other one has kept is lost */

    console_open(&own);
    json_open(&own.out, NULL, '{');
    json_string(&own.out, "schema", "pvclock.probe-record/1");
    json_string(&own.out, "version", PVCLOCK_VERSION);
    json_string(&own.out, "form", "bare");
    json_string(&own.out, "error", text);
    json_close(&own.out, '}');
    own.out.put(&own.out, '\n');
    console_flush(&own);
    end_machine(BARE_FAILED, &acpi);
}

_Noreturn void bare_main(void)
{
    struct probe_plan plan;

    read_boot_information(&boot);
    parse_options(boot.command_line, &options);
    console_open(&console);
    acpi_find(boot.rsdp, &acpi);
    clocks_enable(&clocks);
    tsc_rate = find_tsc_rate(&acpi);
    if (!tsc_rate.hz)
        end_with_error("nothing here tells the TSC's frequency");
    for (unsigned cpu = 0; cpu < PROBE_CPUS_MAX; cpu++)
        team.added_ns[cpu] = options.added_ns[cpu];
    cpus_start(&team, acpi.cpus, options.cpus, tsc_rate.hz);
    ignore_faults_beyond(&options, team.cpus);
    clocks_open(&clocks, &team, &acpi, tsc_rate.hz);
    plan = (struct probe_plan){ .tsc_hz = tsc_rate.hz, .milliseconds = options.milliseconds };
    measure(&team, &plan, clocks.clock, clocks.count, results);
    print_result(&plan);
    end_machine(BARE_DONE, &acpi);
}

/* Append `word` and `number` in hexadecimal; where that ends. */
static char *put_number(char *at, const char *word, uint64_t number)
{
    int shift = 60;

    while (*word)
        *at++ = *word++;
    while (shift && !(number >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        *at++ = "0123456789abcdef"[number >> shift & 15];
    *at = '\0';
    return at;
}

_Noreturn void bare_lost_vcpu(unsigned cpu)
{
    char text[64];

    put_number(text, "no answer from vCPU 0x", cpu);
    end_with_error(text);
}

_Noreturn void bare_fault(uint64_t vector, uint64_t error_code, uint64_t instruction, uint64_t address)
{
    char text[128], *at = text;

    at = put_number(at, "fault 0x", vector);
    at = put_number(at, ", error code 0x", error_code);
    at = put_number(at, ", at 0x", instruction);
    put_number(at, ", address 0x", address);
    end_with_error(text);
}
