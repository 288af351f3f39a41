/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Where the line goes: a serial port (COM1) and a debug console (port 0xe9), each if it is there.
 */
#ifndef PVCLOCK_PROBE_BARE_CONSOLE_H
#define PVCLOCK_PROBE_BARE_CONSOLE_H

#include <stdbool.h>

#include "report.h"

struct bare_console {
    struct json_out out; /* the first field: put() finds the rest */
    bool com1, debug_port; /* there is one */
    bool com1_is_stuck;    /* it did not take all */
    unsigned burst; /* characters that COM1 takes at once */
    unsigned length;
    char text[256];
};

void console_open(struct bare_console *console);

/* Send what put() has kept. */
void console_flush(struct bare_console *console);

/* The same, and wait until it is out; false if COM1 did not take all that was put, and there is no debug console for
 * sure.  Where there is no COM1, a debug console that cannot be read may have it. */
bool console_end(struct bare_console *console);

#endif
