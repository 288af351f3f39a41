/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The vCPUs: started by a broadcast, numbered by their APIC ids behind the boot processor, given work by mailboxes.
 */
#ifndef PVCLOCK_PROBE_BARE_CPUS_H
#define PVCLOCK_PROBE_BARE_CPUS_H

#include "bare_acpi.h"
#include "measure.h"

/* Start all others and make a team of the first `most`; the rest sleeps.  Where a member does not end its work within
 * a minute after the first one, the team's run() ends the machine with an error.
 *
 * Those that firmware's tables tell of are awaited, until none has come for ten seconds.  Where there is no MADT others
 * may come behind them, until none has for a fifth of a second. */
void cpus_start(struct probe_team *team, const struct acpi_facts *told, unsigned most, uint64_t tsc_hz);

/* How many the machine has, in the team or not. */
unsigned cpus_present(const struct acpi_facts *told);

/* Of the team's members. */
const int64_t *cpus_apic_ids(void);

#endif
