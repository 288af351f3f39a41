/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_console.h"

#include "bare_gate.h"
#include "fenced_tsc.h"

enum {
    COM1 = 0x3f8,
    INTERRUPT_ENABLE = 1,
    FIFO_CONTROL = 2, /* written; read: interrupt identification */
    LINE_CONTROL = 3,
    MODEM_CONTROL = 4,
    LINE_STATUS = 5,
    FIFO_ENABLE_AND_CLEAR = 7,
    FIFO_WORKS = 0xc0,
    FIFO_BYTES = 16,
    EIGHT_BITS_NO_PARITY = 3,
    DTR_AND_RTS = 3,
    FIFO_EMPTY = 0x20,
    LINE_EMPTY = 0x40, /* that, and the last character is out */
    NOBODY = 0xff,
    DEBUG_PORT = 0xe9
};

/* 10 s at 6.8 GHz, and longer at what TSCs have: a VMM waits for its console's reader with the line that is full.  After
 * that time the UART is given up. */
static const uint64_t STUCK_TICKS = UINT64_C(1) << 36;

static void put(struct json_out *out, char character)
{
    struct bare_console *console = (struct bare_console *)out;

    console->text[console->length++] = character;
    if (console->length == sizeof console->text)
        console_flush(console);
}

static void open_com1(struct bare_console *console)
{
    console->com1 = read_port(COM1 + LINE_STATUS, 1) != NOBODY;
    console->com1_is_stuck = false;
    if (!console->com1)
        return;
    write_port(COM1 + INTERRUPT_ENABLE, 1, 0);
    write_port(COM1 + LINE_CONTROL, 1, EIGHT_BITS_NO_PARITY); /* the speed stays what firmware or reset made it */
    write_port(COM1 + FIFO_CONTROL, 1, FIFO_ENABLE_AND_CLEAR);
    write_port(COM1 + MODEM_CONTROL, 1, DTR_AND_RTS);
    console->burst = (read_port(COM1 + FIFO_CONTROL, 1) & FIFO_WORKS) == FIFO_WORKS ? FIFO_BYTES : 1;
}

void console_open(struct bare_console *console)
{
    console->out.put = put;
    console->out.after_value = false;
    console->length = 0;
    console->debug_port = read_port(DEBUG_PORT, 1) == DEBUG_PORT;
    open_com1(console);
    if (console->com1)
        write_port(COM1, 1, '\n'); /* firmware may have left a line open */
}

static bool com1_is(unsigned state)
{
    return read_port(COM1 + LINE_STATUS, 1) & state;
}

/* Once more after the time: this vCPU may have had no CPU for the most of it. */
static bool com1_becomes(unsigned state)
{
    struct stopwatch patience;

    stopwatch_start(&patience, STUCK_TICKS);
    while (!com1_is(state))
        if (!stopwatch_runs(&patience))
            return com1_is(state);
    return true;
}

static void send_to_com1(struct bare_console *console)
{
    if (!console->com1)
        return;
    for (unsigned at = 0; at < console->length && !console->com1_is_stuck; at += console->burst) {
        unsigned left = console->length - at;

        console->com1_is_stuck = !com1_becomes(FIFO_EMPTY);
        if (!console->com1_is_stuck)
            write_port_string(COM1, console->text + at, left < console->burst ? left : console->burst);
    }
}

void console_flush(struct bare_console *console)
{
    /* Without asking whether the port is there: not every debug console can be read, and a write harms nobody. */
    write_port_string(DEBUG_PORT, console->text, console->length);
    send_to_com1(console);
    console->length = 0;
}

bool console_end(struct bare_console *console)
{
    console_flush(console);
    if (console->com1 && !console->com1_is_stuck)
        console->com1_is_stuck = !com1_becomes(LINE_EMPTY);
    return console->debug_port || !console->com1_is_stuck;
}
