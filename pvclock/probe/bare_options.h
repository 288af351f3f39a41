/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the command line asks for.
 */
#ifndef PVCLOCK_PROBE_BARE_OPTIONS_H
#define PVCLOCK_PROBE_BARE_OPTIONS_H

#include <stdint.h>

#include "measure.h"

enum { MILLISECONDS_DEFAULT = 10000, MILLISECONDS_LEAST = 100, MILLISECONDS_MOST = 24 * 3600 * 1000 };
enum { IGNORED_MAX = 32 };

struct bare_options {
    uint64_t milliseconds;
    unsigned cpus; /* at most */
    int64_t added_ns[PROBE_CPUS_MAX];
    const char *added_by[PROBE_CPUS_MAX]; /* the word; NULL: none */
    const char *ignored[IGNORED_MAX];     /* words that were not followed, the first of them */
    unsigned ignored_count;
};

/* Words `seconds=N` (N may have decimals), `cpus=N` and `add=CPU:NS`; all others, and these if they make no sense, are
 * passed over and kept in `ignored`: loaders add words of their own.  The command line is cut at its spaces, and must
 * outlive the options. */
void parse_options(char *command_line, struct bare_options *options);

/* Take the faults of CPUs that are not there for ignored, too. */
void ignore_faults_beyond(struct bare_options *options, unsigned cpus);

#endif
