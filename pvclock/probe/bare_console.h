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
    bool com1, debug_port;
    unsigned burst; /* characters that COM1 takes at once */
    unsigned length;
    char text[256];
};

void console_open(struct bare_console *console);

/* Send what put() has kept. */
void console_flush(struct bare_console *console);

#endif
