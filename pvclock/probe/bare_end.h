/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The end of the machine, by whatever it has for that.
 */
#ifndef PVCLOCK_PROBE_BARE_END_H
#define PVCLOCK_PROBE_BARE_END_H

#include <stdint.h>

#include "bare_acpi.h"

enum { BARE_DONE = 0, BARE_FAILED = 1 };

/* status: for the debug exit.  acpi: of zeroes if that was not looked for. */
_Noreturn void end_machine(uint8_t status, const struct acpi_facts *acpi);

#endif
