/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the kernel of a Linux guest says about its clocks.
 */
#ifndef PVCLOCK_PROBE_LINUX_KERNEL_H
#define PVCLOCK_PROBE_LINUX_KERNEL_H

#include "report.h"

/* Whether the kernel makes its clocks of that source. */
bool clocksource_is(const char *name);

/* The key `kernel` of the JSON line. */
void print_kernel(struct json_out *out);

#endif
