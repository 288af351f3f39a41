/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The vCPUs: started by a broadcast, numbered by their APIC ids behind the boot processor, given work by mailboxes.
 */
#ifndef PVCLOCK_PROBE_BARE_CPUS_H
#define PVCLOCK_PROBE_BARE_CPUS_H

#include "measure.h"

/* Start all others and make a team of the first `most`; the rest sleeps.  Where a member does not end its work within
 * a minute after the first one, the team's run() ends the machine with an error.
 *
 * expected: how many there are, by firmware's tables; 0: not told, and then nobody is awaited any more once none has
 * come for a fifth of a second. */
void cpus_start(struct probe_team *team, unsigned expected, unsigned most, uint64_t tsc_hz);

/* Of the team's members. */
const int64_t *cpus_apic_ids(void);

#endif
