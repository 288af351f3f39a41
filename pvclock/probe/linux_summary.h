/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Two lines for who ran the probe by hand.
 */
#ifndef PVCLOCK_PROBE_LINUX_SUMMARY_H
#define PVCLOCK_PROBE_LINUX_SUMMARY_H

#include "report.h"

/* The largest warp or offset and its CPUs, whether a fault was put in, and how to have all of it judged; on standard
 * error. */
void print_summary(const struct probe_report *report);

#endif
