/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Hyper-V's partition reference time: by its page, or by the counter where there is no page.
 */
#ifndef PVCLOCK_PROBE_BARE_HYPERV_H
#define PVCLOCK_PROBE_BARE_HYPERV_H

#include <stdint.h>

#include "measure.h"

enum { HYPERV_HZ = 10000000 };

/* Enable what is offered; the MSR that the time is read by: the page's, the counter's, or 0. */
uint32_t hyperv_enable(void);

/* By the frequency MSR; 0 without one. */
uint64_t hyperv_tsc_hz(void);

int64_t hyperv_read(const struct probe_clock *clock, unsigned cpu);

#endif
