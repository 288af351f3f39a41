/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Sources: Multiboot Specification 0.6.96, 3.3; Xen public/arch-x86/hvm/start_info.h; Linux
 * Documentation/arch/x86/boot.rst and zero-page.rst.
 */
#include "bare_boot_information.h"

#include "bare_gate.h"
#include "bare_physical.h"

extern const uint32_t boot_protocol; /* of bare_boot.S: BOOT_*, and the pointer that goes with it */
extern const uint64_t boot_information;

enum { MULTIBOOT_HAS_COMMAND_LINE = 1 << 2, MULTIBOOT_COMMAND_LINE = 16 };
enum { PVH_COMMAND_LINE = 24, PVH_RSDP = 32 };
enum { LINUX_RSDP = 0x70, LINUX_COMMAND_LINE_HIGH = 0xc8, LINUX_COMMAND_LINE = 0x228 };

static void copy_command_line(struct boot_facts *facts, uint64_t address)
{
    unsigned length = 0;

    while (address && length < BARE_COMMAND_LINE_MAX - 1 && is_mapped(address + length, 1)) {
        char character = (char)load8(address + length);

        if (!character)
            break;
        facts->command_line[length++] = character;
    }
    facts->command_line[length] = '\0';
}

void read_boot_information(struct boot_facts *facts)
{
    uint64_t at = boot_information;

    facts->command_line[0] = '\0';
    facts->rsdp = 0;
    if (!is_mapped(at, 0x1000))
        return;
    if (boot_protocol == BOOT_MULTIBOOT) {
        if (load32(at) & MULTIBOOT_HAS_COMMAND_LINE)
            copy_command_line(facts, load32(at + MULTIBOOT_COMMAND_LINE));
    } else if (boot_protocol == BOOT_PVH) {
        copy_command_line(facts, load64(at + PVH_COMMAND_LINE));
        facts->rsdp = load64(at + PVH_RSDP);
    } else {
        copy_command_line(facts, load32(at + LINUX_COMMAND_LINE) |
                                     (uint64_t)load32(at + LINUX_COMMAND_LINE_HIGH) << 32);
        facts->rsdp = load64(at + LINUX_RSDP);
    }
}
