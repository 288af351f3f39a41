/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_end.h"

#include "bare_gate.h"
#include "bare_wait.h"

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

/* A VMM may take a while to end the machine one way, and would take the next way for a reboot. */
static const uint64_t PATIENCE_TICKS = 1 << 29;

/* By the register that ACPI names; where there is no ACPI, by those that are known. */
static void power_off(const struct acpi_facts *acpi)
{
    uint32_t sleep = SLEEP_CONTROL_ENABLE | (uint32_t)acpi->sleep_type << SLEEP_CONTROL_TYPE;
    uint32_t pm1 = PM1_SLEEP_ENABLE | (uint32_t)acpi->sleep_type << PM1_SLEEP_TYPE;

    acpi_write(&acpi->sleep_control, 1, sleep);
    acpi_write(&acpi->pm1a_control, 2, pm1);
    if (!acpi->sleep_control.address && !acpi->pm1a_control.address) {
        write_port(QEMU_PM1A_CONTROL, 2, PM1_SLEEP_ENABLE);
        write_port(BOCHS_PM1A_CONTROL, 2, PM1_SLEEP_ENABLE);
    }
    wait_ticks(PATIENCE_TICKS);
}

static void reset(const struct acpi_facts *acpi)
{
    acpi_write(&acpi->reset, 1, acpi->reset_value);
    wait_ticks(PATIENCE_TICKS);
    write_port(RESET_CONTROL, 1, RESET_CONTROL_HARD);
    write_port(RESET_CONTROL, 1, RESET_CONTROL_NOW);
    write_port(KEYBOARD_COMMAND, 1, KEYBOARD_PULSE_RESET);
    wait_ticks(PATIENCE_TICKS);
    bare_gate(GATE_TRIPLE_FAULT, 0, 0, 0);
}

void end_machine(uint8_t status, const struct acpi_facts *acpi)
{
    write_port(DEBUG_EXIT, 1, status);
    power_off(acpi);
    reset(acpi);
    halt();
}
