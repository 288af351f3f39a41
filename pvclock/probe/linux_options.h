/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The command line of the probe for Linux.
 */
#ifndef PVCLOCK_PROBE_LINUX_OPTIONS_H
#define PVCLOCK_PROBE_LINUX_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "linux_team.h"

struct linux_options {
    uint64_t milliseconds;
    struct cpu_list cpus;             /* to measure on */
    int64_t added_ns[PROBE_CPUS_MAX]; /* as `cpus` */
    bool progress;
    pid_t parent; /* that this process is not to outlive; 0: none was named */
};

/* Read the options.  Ends the program after --help, and with a message and status 2 where they cannot be followed. */
struct linux_options linux_options(int count, char *const arguments[]);

#endif
