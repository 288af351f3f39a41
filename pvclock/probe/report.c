/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The JSON line, character by character: no memory, no library, for the bare image has neither.
 */
#include "report.h"

#include <stddef.h>

static void put_text(struct json_out *out, const char *text)
{
    while (*text)
        out->put(out, *text++);
}

static void put_decimal(struct json_out *out, uint64_t value)
{
    char digits[20];
    unsigned count = 0;

    do {
        digits[count++] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    while (count)
        out->put(out, digits[--count]);
}

/* What JSON or a serial line could take amiss is written as the character of the byte's number. */
static void put_escaped(struct json_out *out, unsigned char byte)
{
    static const char hex[] = "0123456789abcdef";

    if (byte >= 0x20 && byte < 0x7f && byte != '"' && byte != '\\') {
        out->put(out, (char)byte);
        return;
    }
    put_text(out, "\\u00");
    out->put(out, hex[byte >> 4]);
    out->put(out, hex[byte & 15]);
}

static void put_quoted(struct json_out *out, const char *text)
{
    out->put(out, '"');
    while (*text)
        put_escaped(out, (unsigned char)*text++);
    out->put(out, '"');
}

/* The comma before a value that is not the first, and its key. */
static void begin_value(struct json_out *out, const char *key)
{
    if (out->after_value)
        out->put(out, ',');
    out->after_value = true;
    if (key) {
        put_quoted(out, key);
        out->put(out, ':');
    }
}

void json_open(struct json_out *out, const char *key, char bracket)
{
    begin_value(out, key);
    out->put(out, bracket);
    out->after_value = false;
}

void json_close(struct json_out *out, char bracket)
{
    out->put(out, bracket);
    out->after_value = true;
}

void json_unsigned(struct json_out *out, const char *key, uint64_t value)
{
    begin_value(out, key);
    put_decimal(out, value);
}

void json_integer(struct json_out *out, const char *key, int64_t value)
{
    begin_value(out, key);
    if (value < 0)
        out->put(out, '-');
    put_decimal(out, value < 0 ? 0 - (uint64_t)value : (uint64_t)value);
}

void json_string(struct json_out *out, const char *key, const char *text)
{
    begin_value(out, key);
    if (text)
        put_quoted(out, text);
    else
        put_text(out, "null");
}

static void print_cpus(struct json_out *out, const struct probe_report *report)
{
    json_open(out, "cpus", '[');
    for (unsigned cpu = 0; cpu < report->team->cpus; cpu++) {
        json_open(out, NULL, '{');
        json_integer(out, "cpu", report->cpu_number[cpu]);
        json_integer(out, "apic_id", report->apic_id[cpu]);
        json_close(out, '}');
    }
    json_close(out, ']');
}

bool probe_fault_was_added(const struct probe_team *team)
{
    for (unsigned cpu = 0; cpu < team->cpus; cpu++)
        if (team->added_ns[cpu])
            return true;
    return false;
}

static void print_added(struct json_out *out, const struct probe_team *team)
{
    if (!probe_fault_was_added(team))
        return;
    json_open(out, "added_ns", '[');
    for (unsigned cpu = 0; cpu < team->cpus; cpu++)
        json_integer(out, NULL, team->added_ns[cpu]);
    json_close(out, ']');
}

static void print_cpuid(struct json_out *out, const struct probe_report *report)
{
    json_open(out, "cpuid", '[');
    for (unsigned i = 0; i < report->leaf_count; i++) {
        const struct probe_leaf *leaf = &report->leaves[i];

        json_open(out, NULL, '[');
        json_unsigned(out, NULL, leaf->leaf);
        json_unsigned(out, NULL, leaf->subleaf);
        json_unsigned(out, NULL, leaf->eax);
        json_unsigned(out, NULL, leaf->ebx);
        json_unsigned(out, NULL, leaf->ecx);
        json_unsigned(out, NULL, leaf->edx);
        json_close(out, ']');
    }
    json_close(out, ']');
}

static void print_pages(struct json_out *out, const struct probe_report *report)
{
    json_open(out, "pages", '[');
    for (unsigned i = 0; i < report->page_count; i++) {
        const struct probe_page *page = &report->pages[i];

        json_open(out, NULL, '{');
        json_unsigned(out, "cpu", page->cpu);
        json_unsigned(out, "version", page->version);
        json_unsigned(out, "mul", page->mul);
        json_integer(out, "shift", page->shift);
        json_unsigned(out, "flags", page->flags);
        json_unsigned(out, "looks", page->looks);
        json_unsigned(out, "stopped_looks", page->stopped_looks);
        json_close(out, '}');
    }
    json_close(out, ']');
}

static void print_samples(struct json_out *out, const struct probe_clock_result *result)
{
    json_open(out, "samples", '[');
    for (unsigned i = 0; i <= PROBE_SLICES; i++) {
        const struct probe_sample *sample = &result->sample[i];

        json_open(out, NULL, '[');
        json_unsigned(out, NULL, sample->tsc_before);
        json_integer(out, NULL, sample->clock);
        json_unsigned(out, NULL, sample->tsc_after);
        json_close(out, ']');
    }
    json_close(out, ']');
}

static void print_slices(struct json_out *out, const struct probe_pair *pair)
{
    json_open(out, "slices", '[');
    for (unsigned slice = 0; slice < PROBE_SLICES; slice++) {
        json_open(out, NULL, '[');
        json_unsigned(out, NULL, pair->at_tsc[slice]);
        if (pair->slices[slice].rounds) {
            json_integer(out, NULL, pair->slices[slice].low);
            json_integer(out, NULL, pair->slices[slice].high);
        }
        json_close(out, ']');
    }
    json_close(out, ']');
}

static uint64_t rounds_of(const struct probe_pair *pair)
{
    uint64_t rounds = 0;

    for (unsigned slice = 0; slice < PROBE_SLICES; slice++)
        rounds += pair->slices[slice].rounds;
    return rounds;
}

static void print_pairs(struct json_out *out, const struct probe_clock_result *result)
{
    json_open(out, "pairs", '[');
    for (unsigned i = 0; i < result->pairs; i++) {
        const struct probe_pair *pair = &result->pair[i];

        json_open(out, NULL, '{');
        json_open(out, "cpus", '[');
        json_unsigned(out, NULL, pair->a);
        json_unsigned(out, NULL, pair->b);
        json_close(out, ']');
        json_unsigned(out, "rounds", rounds_of(pair));
        print_slices(out, pair);
        json_close(out, '}');
    }
    json_close(out, ']');
}

static void print_warp(struct json_out *out, unsigned from, unsigned to, const struct probe_warp *warp)
{
    json_open(out, NULL, '{');
    json_unsigned(out, "from", from);
    json_unsigned(out, "to", to);
    json_unsigned(out, "count", warp->count);
    json_integer(out, "largest", warp->largest);
    json_close(out, '}');
}

static void print_warps(struct json_out *out, const struct probe_clock_result *result, unsigned cpus)
{
    json_open(out, "warps", '[');
    for (unsigned from = 0; from < cpus; from++)
        for (unsigned to = 0; to < cpus; to++)
            if (result->warp[from][to].count)
                print_warp(out, from, to, &result->warp[from][to]);
    json_close(out, ']');
}

static void print_step(struct json_out *out, const char *key, const struct clock_step *step)
{
    if (!step->found) {
        json_string(out, key, NULL);
        return;
    }
    json_open(out, key, '[');
    json_integer(out, NULL, step->low);
    json_integer(out, NULL, step->high);
    json_unsigned(out, NULL, step->at_tsc);
    json_close(out, ']');
}

static void print_steps(struct json_out *out, const struct step_search *steps)
{
    json_open(out, "steps", '{');
    json_unsigned(out, "reads", steps->reads);
    json_integer(out, "floor", steps->floor);
    print_step(out, "forward", &steps->forward);
    print_step(out, "backward", &steps->backward);
    json_unsigned(out, "count", steps->count);
    json_close(out, '}');
}

static void print_clocks(struct json_out *out, const struct probe_report *report)
{
    json_open(out, "clocks", '[');
    for (unsigned i = 0; i < report->clock_count; i++) {
        const struct probe_clock_result *result = &report->results[i];

        json_open(out, NULL, '{');
        json_string(out, "name", report->clocks[i].name);
        json_unsigned(out, "hz", report->clocks[i].hz);
        print_samples(out, result);
        print_pairs(out, result);
        print_warps(out, result, report->team->cpus);
        json_unsigned(out, "cell_reads", result->cell_reads);
        print_steps(out, &result->steps);
        json_close(out, '}');
    }
    json_close(out, ']');
}

void probe_print(struct json_out *out, const struct probe_report *report)
{
    json_open(out, NULL, '{');
    json_string(out, "schema", "pvclock.probe-record/1");
    json_string(out, "version", report->version);
    json_string(out, "form", report->form);
    json_unsigned(out, "tsc_hz", report->plan->tsc_hz);
    json_string(out, "tsc_hz_from", report->tsc_hz_from);
    json_unsigned(out, "milliseconds", report->plan->milliseconds);
    print_cpus(out, report);
    print_added(out, report->team);
    print_cpuid(out, report);
    print_pages(out, report);
    print_clocks(out, report);
    if (report->more)
        report->more(out, report);
    json_close(out, '}');
}
