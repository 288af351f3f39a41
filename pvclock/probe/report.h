/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The probe's result as one line of JSON, `pvclock.probe-record/1` (docs/probe.md): whole numbers and escaped strings only.
 */
#ifndef PVCLOCK_PROBE_REPORT_H
#define PVCLOCK_PROBE_REPORT_H

#include <stdbool.h>
#include <stdint.h>

#include "facts.h"
#include "measure.h"

/* Where the characters go. */
struct json_out {
    void (*put)(struct json_out *out, char character);
    bool after_value; /* the next value or key needs a comma; false at the beginning */
};

void json_open(struct json_out *out, const char *key, char bracket);  /* key: NULL in an array; '{' or '[' */
void json_close(struct json_out *out, char bracket);                  /* '}' or ']' */
void json_integer(struct json_out *out, const char *key, int64_t value);
void json_unsigned(struct json_out *out, const char *key, uint64_t value);
void json_string(struct json_out *out, const char *key, const char *text); /* NULL is null; any bytes are escaped */

struct probe_report {
    const char *form;                  /* "linux" or "bare" */
    const char *version;               /* pvclock's */
    const struct probe_team *team;
    const int64_t *cpu_number;         /* [team->cpus]: the operating system's, or 0, 1, ... (bare) */
    const int64_t *apic_id;            /* [team->cpus] */
    const struct probe_plan *plan;
    const char *tsc_hz_from;           /* where plan->tsc_hz is from: "pvclock", "pit" and so on */
    const struct probe_leaf *leaves;
    unsigned leaf_count;
    const struct probe_page *pages;
    unsigned page_count;
    const struct probe_clock *clocks;
    const struct probe_clock_result *results;
    unsigned clock_count;
    void (*more)(struct json_out *out, const struct probe_report *report); /* the form's own keys, or NULL */
};

/* Whether any CPU's readings had a fault put in. */
bool probe_fault_was_added(const struct probe_team *team);

/* Print the whole object, without a newline. */
void probe_print(struct json_out *out, const struct probe_report *report);

#endif
