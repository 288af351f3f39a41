/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_end.h"

#include <stddef.h>

#include "bare_gate.h"

enum {
    DEBUG_EXIT = 0xf4, /* QEMU's isa-debug-exit, which makes its own exit status 2 * status + 1; our runner's */
    PM1_SLEEP_TYPE = 10,
    PM1_SLEEP_ENABLE = 1 << 13,
    SLEEP_CONTROL_TYPE = 2,
    SLEEP_CONTROL_ENABLE = 1 << 5,
    QEMU_PM1A_CONTROL = 0x604,
    BOCHS_PM1A_CONTROL = 0xb004, /* QEMU's, too, before 2.0 */
    RESET_CONTROL = 0xcf9,
    RESET_CONTROL_HARD = 0x02,
    RESET_CONTROL_NOW = 0x06,
    KEYBOARD_COMMAND = 0x64,
    KEYBOARD_PULSE_RESET = 0xfe
};

static void power_off(const struct acpi_facts *acpi)
{
    uint32_t pm1 = PM1_SLEEP_ENABLE | (uint32_t)acpi->sleep_type << PM1_SLEEP_TYPE;

    acpi_write(&acpi->sleep_control, 1, SLEEP_CONTROL_ENABLE | (uint32_t)acpi->sleep_type << SLEEP_CONTROL_TYPE);
    acpi_write(&acpi->pm1a_control, 2, pm1);
}

static void reset(void)
{
    write_port(RESET_CONTROL, 1, RESET_CONTROL_HARD);
    write_port(RESET_CONTROL, 1, RESET_CONTROL_NOW);
    write_port(KEYBOARD_COMMAND, 1, KEYBOARD_PULSE_RESET);
    bare_gate(GATE_TRIPLE_FAULT, 0, 0, 0);
}

void end_machine(uint8_t status, const struct acpi_facts *acpi)
{
    write_port(DEBUG_EXIT, 1, status);
    if (acpi) {
        power_off(acpi);
        acpi_write(&acpi->reset, 1, acpi->reset_value);
    }
    write_port(QEMU_PM1A_CONTROL, 2, PM1_SLEEP_ENABLE);
    write_port(BOCHS_PM1A_CONTROL, 2, PM1_SLEEP_ENABLE);
    reset();
    halt();
}
