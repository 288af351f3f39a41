/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The CPUs of a Linux guest as a team: threads, each pinned to its CPU before any begins.
 */
#ifndef PVCLOCK_PROBE_LINUX_TEAM_H
#define PVCLOCK_PROBE_LINUX_TEAM_H

#include <stdbool.h>

#include "measure.h"

enum { CPU_NUMBER_MAX = 65535 };

struct cpu_list {
    unsigned count;
    int number[PROBE_CPUS_MAX]; /* the kernel's */
};

/* Whether this process may run on a CPU: not if that is offline, or outside its cpuset. */
bool may_run_on(int number);

/* The first CPUs that it may run on. */
struct cpu_list allowed_cpus(void);

/* The place of a CPU's number in a list, or -1. */
int cpu_place(const struct cpu_list *cpus, int number);

/* Have `team` run threads on `cpus`; the process' own affinity is left alone.  Where a CPU cannot be had to the end of
 * what it is to do, the program ends with a message: the others would wait for it forever. */
void linux_team_begin(struct probe_team *team, const struct cpu_list *cpus);

#endif
