/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The CPUs of a Linux guest as a team: threads, each pinned to its CPU before any begins.
 */
#ifndef PVCLOCK_PROBE_LINUX_TEAM_H
#define PVCLOCK_PROBE_LINUX_TEAM_H

#include <stdatomic.h>

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

/* What stands behind probe_team.state. */
struct linux_team {
    const struct cpu_list *cpus;
    atomic_int lost_cpu; /* see below */
};

/* Have `team` run threads on `cpus`; the process' own affinity is left alone. */
void linux_team_begin(struct probe_team *team, struct linux_team *state, const struct cpu_list *cpus);

/* The number of a CPU that went away or could not be had, or -1.  No work is done after that: what waits for another
 * CPU would wait forever. */
int lost_cpu(const struct probe_team *team);

#endif
