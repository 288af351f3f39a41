/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The local APIC, in whichever of its two modes firmware left it: interrupts to all other processors, and taking them.
 */
#ifndef PVCLOCK_PROBE_BARE_LAPIC_H
#define PVCLOCK_PROBE_BARE_LAPIC_H

#include <stdbool.h>

/* False if this processor has none that works. */
bool lapic_is_there(void);

/* To all processors but this one. */
void lapic_send_init(void);
void lapic_send_start(void); /* at BARE_TRAMPOLINE */
void lapic_send_wake(void);

/* Let wake interrupts in, once; this is for processors fresh from INIT, to which nothing else is sent. */
void lapic_accept(void);

/* Halt until one has come since the last time. */
void lapic_sleep(void);

#endif
