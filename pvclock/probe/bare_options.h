/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the command line asks for.
 */
#ifndef PVCLOCK_PROBE_BARE_OPTIONS_H
#define PVCLOCK_PROBE_BARE_OPTIONS_H

#include <stdint.h>

#include "measure.h"

enum { MILLISECONDS_DEFAULT = 10000, MILLISECONDS_LEAST = 100, MILLISECONDS_MOST = 24 * 3600 * 1000 };

struct bare_options {
    uint64_t milliseconds;
    unsigned cpus; /* at most */
    int64_t added_ns[PROBE_CPUS_MAX];
};

/* Words `seconds=N` (N may have decimals), `cpus=N` and `add=CPU:NS`; all others, and these if they make no sense, are
 * passed over: loaders add words of their own. */
void parse_options(const char *command_line, struct bare_options *options);

#endif
