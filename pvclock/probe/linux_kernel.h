/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the kernel of a Linux guest says about its clocks.
 */
#ifndef PVCLOCK_PROBE_LINUX_KERNEL_H
#define PVCLOCK_PROBE_LINUX_KERNEL_H

#include "report.h"

/* Whether the kernel reads the TSC itself for its clocks, and not one that a host steers. */
bool clocksource_is_tsc(void);

/* The key `kernel` of the JSON line. */
void print_kernel(struct json_out *out);

#endif
