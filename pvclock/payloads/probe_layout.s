# SPDX-License-Identifier: Apache-2.0
#
# What all probes have in common and can be named beforehand: the beginning of the block that they share with the host,
# constants, macros. Nothing is emitted here; probe_boot.s is the code that goes with it.
#
# Contents: 1 shared memory  2 constants  3 macros

# ---- 1. Shared memory: the ABI with the host ---------------------------------------------------------------------
#
# Little-endian. The loader zeroes it, for it is part of the program header's memory size.

        .equ PROBE_BASE,        0x200000
        .equ PROBE_MAGIC,       PROBE_BASE + 0          # u64, written last: the block is valid
        .equ PROBE_ABI,         PROBE_BASE + 8          # u32
        .equ PROBE_ARRIVED,     PROBE_BASE + 12         # u32 vCPUs taking part; 0 until that is settled
        .equ PROBE_STOP,        PROBE_BASE + 16         # u32 host to guest: not 0 ends the run
        .equ PROBE_PHASE,       PROBE_BASE + 20         # u32 PHASE_*
        .equ PROBE_TARGET,      PROBE_BASE + 24         # u64 reads or rounds per vCPU, 0 = no limit
        .equ PROBE_FINISHED,    PROBE_BASE + 40         # u32 vCPUs that are done
        .equ PROBE_SHARED_LAST, PROBE_BASE + 64         # u64 newest value any vCPU has seen, 0 = none yet
        .equ RECORDS,           0x202000                # one per vCPU, 1 << RECORD_SHIFT bytes; all fields u64

        .equ PHASE_REGISTERING, 1
        .equ PHASE_READING,     2
        .equ PHASE_DONE,        3

        .equ REC_STATE,         0                       # STATE_*
        .equ REC_APIC_ID,       8

        .equ STATE_ABSENT,      0
        .equ STATE_REGISTERED,  1
        .equ STATE_READING,     2
        .equ STATE_DONE,        3
        .equ STATE_NO_CLOCK,    4
        .equ STATE_FAULT,       5

        .equ PORT_CONSOLE,      0xe9
        .equ PORT_EXIT,         0xf4                    # takes one of:
        .equ EXIT_FINE,         0
        .equ EXIT_FAILED,       1                       # some vCPU had no clock or faulted

# ---- 2. Constants ------------------------------------------------------------------------------------------------

        .equ MAX_CPUS,          16
        .equ GATES,             33                      # the CPU's vectors, and one more for a probe's own interrupt
        .equ INTERRUPT_VECTOR,  32

# Guest-physical memory. The image stays below 64 KiB, which lets an IDT gate's halves be written as constants.
        .equ TRAMPOLINE,        0x8000                  # a SIPI vector is a page number below 1 MiB
        .equ LOAD_BASE,         0x100000
        .equ PML4,              0x110000
        .equ PDPT,              0x111000
        .equ PD_LOW,            0x112000                # 0 to 1 GiB
        .equ PD_LAPIC,          0x113000                # 3 to 4 GiB
        .equ TSS_AREA,          0x114000
        .equ TSS_SHIFT,         7
        .equ TSS_SIZE,          104
        .equ TSS_RSP0,          4
        .equ TSS_IO_BASE,       102
        .equ VARIABLES,         0x115000                # private words, below
        .equ STACKS,            0x120000                # ring 0 from the top of each, ring 3 from its middle
        .equ STACK_SHIFT,       12

        .equ VAR_CPUS,          VARIABLES + 0           # u64 cpus=
        .equ VAR_TICKETS,       VARIABLES + 64          # u32 index for the next vCPU to arrive
        .equ VAR_ENROLLED,      VARIABLES + 68          # u32 vCPUs registered, or known never to register
        .equ DOOR_CLOSED,       0x1000                  # added to the tickets: who comes later gets none

        .equ MULTIBOOT_HEADER,  0x1badb002
        .equ MULTIBOOT_FLAGS,   0x3                     # page-aligned modules, memory information
        .equ MULTIBOOT_LOADED,  0x2badb002              # what the loader leaves in EAX
        .equ MULTIBOOT_CMDLINE, 1 << 2                  # info flag: the command line at +16 is valid

        .equ PTE_TABLE,         0x67                    # present, writable, user; accessed and dirty are set
        .equ PTE_RAM,           0xe7                    # already, to spare the CPU the write. 2 MiB page.
        .equ PTE_LAPIC,         0xfb                    # the same without user, uncached

        .equ CR0_LONG_MODE,     0x80010033              # PG WP NE ET MP PE; INIT leaves caches off, this not
        .equ CR4_PAE,           1 << 5
        .equ MSR_EFER,          0xc0000080
        .equ EFER_LME,          1 << 8
        .equ RFLAGS_RING3,      0x2                     # interrupts off

        .equ LAPIC_ICR,         0xfee00300
        .equ ICR_INIT_OTHERS,   0xc4500
        .equ ICR_SIPI_OTHERS,   0xc4600 | (TRAMPOLINE >> 12)
        .equ SIPI_DELAY,        1 << 20                 # ticks, below 1 ms
        .equ ARRIVAL_TIMEOUT,   1 << 33                 # ticks, 2 to 4 s; no clock to ask yet, so no seconds

        .equ CPUID_1_ECX_HYPERVISOR, 31
        .equ CPUID_EXT_EDX_RDTSCP,   27

# Selectors into the GDT at the end of probe_boot.s.
        .equ SEL_CODE32,        0x08
        .equ SEL_DATA,          0x10
        .equ SEL_CODE64,        0x18
        .equ SEL_USER_DATA,     0x20 | 3
        .equ SEL_USER_CODE,     0x28 | 3
        .equ SEL_TSS,           0x30                    # 16 bytes per vCPU

# ---- 3. Macros ---------------------------------------------------------------------------------------------------

# Where a label will be in guest memory. A difference of two labels is a constant to the assembler; the label
# itself would be a relocation. 64-bit code has %rip-relative operands for the same end.
.macro load_address label, register
        mov     $(\label - .Limage + LOAD_BASE), \register
.endm

# Leave ring 0 for good: on at \label in ring 3, registers kept but for %rax. The ring 3 stack begins in the middle
# of the page that the present one fills from the top.
.macro enter_ring3 label
        lea     -1(%rsp), %rax
        and     $-(1 << STACK_SHIFT), %rax
        add     $(1 << (STACK_SHIFT - 1)), %rax
        pushq   $SEL_USER_DATA
        push    %rax
        pushq   $RFLAGS_RING3
        pushq   $SEL_USER_CODE
        lea     \label(%rip), %rax
        push    %rax
        iretq
.endm

.macro print label
        lea     \label(%rip), %rsi
        call    .Lprint_text
.endm

.macro print_number value, base
        mov     \value, %rax
        mov     $\base, %ecx
        call    .Lprint_number
.endm

# Vector \vector goes to \label, of ring 0, and not to .Lfault.
.macro set_gate vector, label
        movw    $(\label - .Limage), .Lidt + 16 * \vector(%rip)
.endm
