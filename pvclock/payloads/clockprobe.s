# SPDX-License-Identifier: Apache-2.0
#
# clockprobe: a guest that does nothing but read its kvmclock and complain.
#
# Every vCPU registers a time page and then reads the clock from ring 3, the way Linux's clocksource and vDSO
# do, as fast as it can, checking each value against its own last one and against the newest one any vCPU has
# seen. What it finds lies in guest memory, at fixed addresses, for the host to read at any time: section 1 is
# that ABI, and probe.py is its other half.
#
# The bytes between clockprobe_image and clockprobe_image_end are a complete multiboot-1 ELF32 executable: the
# file headers are written out below, every absolute address is an assembly-time constant, and no relocation is
# left for a linker. So a C file can carry it:
#
#     __asm__(".pushsection .rodata\n.include \"clockprobe.s\"\n.popsection");
#     #pragma GCC visibility push(hidden)
#     extern const unsigned char clockprobe_image[], clockprobe_image_end[];
#     #pragma GCC visibility pop
#
# and the same bytes, written to a file, boot with  qemu -kernel clockprobe.elf -append "cpus=2 reads=1000000".
#
# Command line, all decimal:  cpus=N   vCPUs to use, 1 to 16 (default 1)
#                             reads=N  reads per vCPU, 0 = until the host sets the stop word (default 0)
#                             wild=N   ns between two reads of a vCPU that are too many (default 2^40)
#
# Ring 0 code here keeps to plain integer instructions and stays short: on some hosts (kvm-pvm) all of it runs
# in KVM's instruction emulator, a thousand times slower than ring 3.
#
# Contents: 1 shared memory  2 constants  3 macros  4 file headers  5 32-bit boot  6 AP trampoline
#           7 boot processor  8 registration  9 hot loop  10 finish  11 faults  12 console  13 tables

        .att_syntax prefix

# ---- 1. Shared memory: the ABI with the host ---------------------------------------------------------------------
#
# Little-endian. The loader zeroes it, for it is part of the program header's memory size.

        .equ PROBE_BASE,        0x200000
        .equ PROBE_MAGIC,       PROBE_BASE + 0          # u64, written last: the block is valid
        .equ PROBE_ABI,         PROBE_BASE + 8          # u32
        .equ PROBE_ARRIVED,     PROBE_BASE + 12         # u32 vCPUs taking part; 0 until that is settled
        .equ PROBE_STOP,        PROBE_BASE + 16         # u32 host to guest: not 0 ends the run
        .equ PROBE_PHASE,       PROBE_BASE + 20         # u32 PHASE_*
        .equ PROBE_TARGET,      PROBE_BASE + 24         # u64 reads per vCPU, 0 = no limit
        .equ PROBE_WILD_NS,     PROBE_BASE + 32         # u64
        .equ PROBE_FINISHED,    PROBE_BASE + 40         # u32 vCPUs that are done
        .equ PROBE_SHARED_LAST, PROBE_BASE + 64         # u64 newest value any vCPU has seen, 0 = none yet
        .equ PROBE_LAST_VALUE,  PROBE_BASE + 128        # u64 Linux's last_value, for clocks without STABLE
        .equ PROBE_WALL_CLOCK,  PROBE_BASE + 192        # struct pvclock_wall_clock, 12 bytes

        .equ TIME_PAGES,        0x201000                # struct pvclock_vcpu_time_info, as hv_clock in Linux:
        .equ TIME_PAGE_SHIFT,   6                       # one cache line per vCPU
        .equ RECORDS,           0x202000
        .equ RECORD_SHIFT,      8
        .equ PROBE_END,         0x204000

        .equ MAGIC_VALUE,       0x45424f5250435650      # "PVCPROBE"
        .equ ABI_VERSION,       1

        .equ PHASE_REGISTERING, 1
        .equ PHASE_READING,     2
        .equ PHASE_DONE,        3

# One record per vCPU, all fields u64.
        .equ REC_STATE,         0                       # STATE_*
        .equ REC_APIC_ID,       8
        .equ REC_SIGNATURE,     16                      # CPUID leaf of "KVMKVMKVM", 0 = not found
        .equ REC_FEATURES,      24                      # EAX of the leaf after it
        .equ REC_MSR,           32                      # number of the system time MSR in use
        .equ REC_MSR_VALUE,     40                      # as read back after writing it
        .equ REC_READS,         48                      # brought up to date every 2^14 reads and at the end
        .equ REC_RETRIES,       56                      # version odd or changed while reading
        .equ REC_BACKWARD_OWN,  64                      # below this vCPU's own last value
        .equ REC_BACKWARD_CROSS, 72                     # below a value some vCPU had before this read began
        .equ REC_WILD,          80                      # more than wild_ns ahead, or beyond 2^60 either way
        .equ REC_TORN,          88                      # payload not that of the page's last read, version is
        .equ REC_CLAMPED,       96                      # not above last_value, which was returned instead
        .equ REC_STOPPED,       104                     # times GUEST_STOPPED was seen and cleared
        .equ REC_LARGEST_GAP,   112                     # ns between two successive reads
        .equ REC_FIRST_TSC,     120
        .equ REC_FIRST_NS,      128
        .equ REC_LAST_TSC,      136                     # of the last reading that was validated
        .equ REC_LAST_NS,       144
        .equ REC_WORST_BACK,    152                     # ns, own or cross
        .equ REC_BACK_FROM,     160                     # ns, the first step back: from
        .equ REC_BACK_TO,       168                     #                          to
        .equ REC_FAULT_VECTOR,  176
        .equ REC_FAULT_ERROR,   184
        .equ REC_FAULT_RIP,     192
        .equ REC_FAULT_CR2,     200
        .equ REC_USES_RDTSCP,   208
        .equ REC_ATTEMPT_TSC,   216                     # of the reading under way: no finding, not read by the host

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
        .equ DEFAULT_WILD_NS,   1 << 40                 # 18 minutes: such a jump may be meant, and stay
        .equ ABSURD_NS,         1 << 60                 # 36 years: what a TSC behind tsc_timestamp reads as
        .equ FLUSH_MASK,        (1 << 14) - 1

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
        .equ KVM_LEAF_FIRST,    0x40000000
        .equ KVM_LEAF_STEP,     0x100
        .equ KVM_LEAF_END,      0x40010000
        .equ KVM_SIGNATURE_EBX, 0x4b4d564b              # "KVMK"
        .equ KVM_SIGNATURE_ECX, 0x564b4d56              # "VMKV"
        .equ KVM_SIGNATURE_EDX, 0x4d                    # "M\0\0\0"
        .equ KVM_FEATURE_CLOCKSOURCE,  0
        .equ KVM_FEATURE_CLOCKSOURCE2, 3
        .equ KVM_FEATURE_STABLE_BIT,   24
        .equ MSR_WALL_CLOCK_OLD, 0x11                   # MSR_KVM_SYSTEM_TIME follows the wall clock's number
        .equ MSR_WALL_CLOCK_NEW, 0x4b564d00             # in both pairs
        .equ SYSTEM_TIME_ENABLE, 1

# struct pvclock_vcpu_time_info.
        .equ PVTI_VERSION,      0
        .equ PVTI_TSC,          8
        .equ PVTI_SYSTEM_TIME,  16
        .equ PVTI_MUL,          24
        .equ PVTI_SHIFT,        28
        .equ PVTI_FLAGS,        29
        .equ SNAPSHOTS_SIZE,    MAX_CPUS << TIME_PAGE_SHIFT
        .equ PVTI_STABLE,       1 << 0
        .equ PVTI_STOPPED,      1 << 1

# Selectors into the GDT of section 13.
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

# ---- 4. File headers ---------------------------------------------------------------------------------------------

        .balign 64                                      # so that alignment in here holds in guest memory, too
        .globl  clockprobe_image, clockprobe_image_end
        .hidden clockprobe_image, clockprobe_image_end
clockprobe_image:
.Limage:
        .byte   0x7f                                    # Elf32_Ehdr
        .ascii  "ELF"
        .byte   1, 1, 1, 0                              # 32-bit, little-endian, version, System V
        .fill   8, 1, 0
        .short  2, 3                                    # ET_EXEC, EM_386
        .long   1
        .long   .Lboot32 - .Limage + LOAD_BASE          # entry
        .long   .Lprogram_header - .Limage, 0           # no section headers
        .long   0
        .short  .Lprogram_header - .Limage, 32, 1       # sizes of the headers, one program header
        .short  40, 0, 0
.Lprogram_header:
        .long   1, 0, LOAD_BASE, LOAD_BASE              # PT_LOAD, file offset, virtual, physical
        .long   .Limage_end - .Limage                   # in the file; the rest, to the end of the shared
        .long   PROBE_END - LOAD_BASE                   # block, is memory the loader zeroes
        .long   7, 0x1000                               # read, write, execute

        .balign 4
        .long   MULTIBOOT_HEADER
        .long   MULTIBOOT_FLAGS
        .long   -(MULTIBOOT_HEADER + MULTIBOOT_FLAGS)

# ---- 5. 32-bit boot ----------------------------------------------------------------------------------------------

        .code32
.Lboot32:
        cli
        cld
        mov     %eax, %edx                              # kept through the mode switch: %edx the loader's
                                                        # magic, %ebx its information block

# Identity mapping, open to ring 3 except for the LAPIC.
        movl    $(PDPT + PTE_TABLE), PML4
        movl    $(PD_LOW + PTE_TABLE), PDPT
        movl    $(PD_LAPIC + PTE_TABLE), PDPT + 8 * 3
        movl    $(0xfee00000 + PTE_LAPIC), PD_LAPIC + 8 * (0xfee00000 >> 21 & 511)
        mov     $PD_LOW, %edi
        mov     $PTE_RAM, %eax
1:      mov     %eax, (%edi)
        add     $0x200000, %eax
        add     $8, %edi
        cmp     $(PD_LOW + 0x1000), %edi
        jne     1b

        lgdt    .Lgdt_pointer - .Limage + LOAD_BASE
        load_address .Lbsp_main, %ebp
        ljmp    $SEL_CODE32, $(.Lprotected - .Limage + LOAD_BASE)

# Common to all: 32-bit protected mode on our GDT, %ebp = where to go on in long mode.
.Lprotected:
        mov     $SEL_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     %edx, %esi                              # RDMSR and WRMSR need %edx
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     $CR0_LONG_MODE, %eax
        mov     %eax, %cr0
        ljmp    $SEL_CODE64, $(.Llong_mode - .Limage + LOAD_BASE)

        .code64
.Llong_mode:
        mov     %ebp, %ebp                              # upper halves are undefined after the switch
        lidt    .Lidt_pointer(%rip)
        jmp     *%rbp

# ---- 6. AP trampoline: copied to TRAMPOLINE, entered in real mode by the SIPI ------------------------------------

        .code16
.Ltrampoline:
        cli
        cld
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   TRAMPOLINE + (.Ltrampoline_gdt - .Ltrampoline)
        load_address .Lap_main, %ebp
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $SEL_CODE32, $(.Lprotected - .Limage + LOAD_BASE)
.Ltrampoline_gdt:
        .short  .Lgdt_end - .Lgdt - 1
        .long   .Lgdt - .Limage + LOAD_BASE
.Ltrampoline_end:

# ---- 7. Boot processor: options, shared block, application processors --------------------------------------------

        .code64
.Lbsp_main:
        mov     $(STACKS + (1 << STACK_SHIFT)), %esp
        movq    $1, VAR_CPUS
        mov     $DEFAULT_WILD_NS, %rax
        mov     %rax, PROBE_WILD_NS
        cmp     $MULTIBOOT_LOADED, %esi
        jne     1f
        mov     %ebx, %ebx
        testl   $MULTIBOOT_CMDLINE, (%rbx)
        jz      1f
        mov     16(%rbx), %esi
        call    .Lparse_options
1:      mov     $MAX_CPUS, %eax                         # 1 <= cpus <= MAX_CPUS
        cmp     %rax, VAR_CPUS
        cmovb   VAR_CPUS, %rax
        cmp     $1, %rax
        adc     $0, %rax
        mov     %rax, VAR_CPUS

        call    .Lchoose_rdtsc
        print   .Ltext_cpus
        print_number VAR_CPUS, 10
        print   .Ltext_newline

        movl    $1, VAR_TICKETS                         # number 0 is ours
        movl    $ABI_VERSION, PROBE_ABI
        movl    $PHASE_REGISTERING, PROBE_PHASE
        mov     $MAGIC_VALUE, %rax
        mov     %rax, PROBE_MAGIC

        cmpl    $1, VAR_CPUS
        je      2f
        call    .Lstart_others
2:      mov     $DOOR_CLOSED, %eax
        lock xadd %eax, VAR_TICKETS
        cmp     VAR_CPUS, %eax                          # the machine may have more than we were to use
        cmova   VAR_CPUS, %eax
        mov     %eax, PROBE_ARRIVED
        xor     %r13d, %r13d
        jmp     .Lregister

# Send INIT, SIPI, SIPI to everyone else and wait until enough of them hold a ticket, but not for ever.
.Lstart_others:
        lea     .Ltrampoline(%rip), %rsi
        mov     $TRAMPOLINE, %edi
        mov     $(.Ltrampoline_end - .Ltrampoline), %ecx
        rep movsb
        mov     $LAPIC_ICR, %ebx                        # as an offset it would be sign-extended
        movl    $ICR_INIT_OTHERS, (%rbx)
        mov     $SIPI_DELAY, %edi
        call    .Lawait_others
        movl    $ICR_SIPI_OTHERS, (%rbx)
        call    .Lawait_others
        movl    $ICR_SIPI_OTHERS, (%rbx)                # one that already runs ignores it
        mov     $ARRIVAL_TIMEOUT, %rdi

# Wait until as many vCPUs as wanted have arrived, but no longer than %rdi ticks.
.Lawait_others:
        rdtsc
        shl     $32, %rdx
        lea     (%rax, %rdx), %rsi
1:      mov     VAR_TICKETS, %eax
        cmp     VAR_CPUS, %eax
        jae     2f
        pause
        rdtsc
        shl     $32, %rdx
        add     %rdx, %rax
        sub     %rsi, %rax
        cmp     %rdi, %rax
        jb      1b
2:      ret

# Command line at %rsi: words KEY=NUMBER; others are passed over. A key's characters enter %rdx from above, so that
# it ends up as .Loptions spells it.
.Lparse_options:
        xor     %edx, %edx
.Lkey:  lodsb
        cmp     $' ', %al
        je      .Lparse_options
        cmp     $'=', %al
        je      .Lvalue
        shrd    $8, %rax, %rdx
        test    %al, %al
        jnz     .Lkey
        ret
.Lvalue:
        xor     %ecx, %ecx
        xor     %eax, %eax
1:      imul    $10, %rcx, %rdi
        lodsb
        sub     $'0', %al
        cmp     $9, %al
        ja      2f
        lea     (%rdi, %rax), %rcx
        jmp     1b
2:      dec     %rsi                                    # what ended the number may end the line
        lea     .Loptions(%rip), %rdi
3:      cmp     (%rdi), %rdx
        jne     4f
        mov     8(%rdi), %eax
        mov     %rcx, (%rax)
4:      add     $16, %rdi
        lea     .Loptions_end(%rip), %rax
        cmp     %rax, %rdi
        jne     3b
        jmp     .Lparse_options

# Linux's rdtsc_ordered() is "lfence; rdtsc", made "rdtscp" at boot where the CPU has it. So is ours.
.Lchoose_rdtsc:
        mov     $0x80000001, %eax
        cpuid
        bt      $CPUID_EXT_EDX_RDTSCP, %edx
        jnc     1f
        mov     .Lrdtscp(%rip), %eax
        mov     %eax, .Lordered_rdtsc(%rip)
        mov     .Lrdtscp + 4(%rip), %al
        mov     %al, .Lordered_rdtsc + 4(%rip)
1:      ret
.Lrdtscp:
        rdtscp
        xchg    %ax, %ax                                # two bytes of nothing

.Lap_main:
        mov     $1, %r13d
        lock xadd %r13d, VAR_TICKETS
        cmp     VAR_CPUS, %r13d
        jb      .Lregister
1:      cli                                             # too many, or too late
        hlt
        jmp     1b

# ---- 8. Registration: ring 0, every vCPU, %r13d = its index ------------------------------------------------------
#
# From here to the end:  %rbx  this vCPU's record          %r13  the page the vDSO would read: vCPU 0's, or our
#                        %r12  this vCPU's time page             own one where STABLE cannot be relied on
#                        %r14  reads done

.Lregister:
        lea     1(%r13), %esp
        shl     $STACK_SHIFT, %esp
        add     $STACKS, %esp
        mov     %r13d, %eax
        shl     $TSS_SHIFT, %eax
        mov     %rsp, TSS_AREA + TSS_RSP0(%rax)
        movw    $TSS_SIZE, TSS_AREA + TSS_IO_BASE(%rax) # beyond the limit: no permission bitmap
        mov     %r13d, %eax
        shl     $4, %eax
        add     $SEL_TSS, %eax
        ltr     %ax

        mov     %r13d, %r12d
        shl     $TIME_PAGE_SHIFT, %r12d
        add     $TIME_PAGES, %r12d
        mov     %r13d, %ebp
        shl     $RECORD_SHIFT, %ebp
        add     $RECORDS, %ebp                          # in %rbp for now: CPUID takes %rbx
        xor     %r14d, %r14d
        cmpb    $0x01, .Lordered_rdtsc + 1(%rip)        # second byte of 0f 01 f9, rdtscp
        sete    REC_USES_RDTSCP(%rbp)

        mov     $1, %eax
        cpuid
        shr     $24, %ebx
        mov     %rbx, REC_APIC_ID(%rbp)
        bt      $CPUID_1_ECX_HYPERVISOR, %ecx
        jnc     .Lno_clock
        mov     $KVM_LEAF_FIRST, %edi
1:      mov     %edi, %eax
        cpuid
        cmp     $KVM_SIGNATURE_EBX, %ebx
        jne     2f
        cmp     $KVM_SIGNATURE_ECX, %ecx
        jne     2f
        cmp     $KVM_SIGNATURE_EDX, %edx
        je      3f
2:      add     $KVM_LEAF_STEP, %edi
        cmp     $KVM_LEAF_END, %edi
        jb      1b
        jmp     .Lno_clock
3:      mov     %rdi, REC_SIGNATURE(%rbp)
        lea     1(%rdi), %eax
        cpuid
        mov     %eax, %edi
        mov     %rdi, REC_FEATURES(%rbp)
        mov     %rbp, %rbx

        mov     $MSR_WALL_CLOCK_NEW, %ecx
        bt      $KVM_FEATURE_CLOCKSOURCE2, %edi
        jc      4f
        mov     $MSR_WALL_CLOCK_OLD, %ecx
        bt      $KVM_FEATURE_CLOCKSOURCE, %edi
        jnc     .Lno_clock
4:      test    %r13d, %r13d                            # the wall clock is the machine's: once is enough
        jnz     5f
        mov     $PROBE_WALL_CLOCK, %eax
        xor     %edx, %edx
        wrmsr
5:      inc     %ecx                                    # the system time MSR
        mov     %rcx, REC_MSR(%rbx)
        lea     SYSTEM_TIME_ENABLE(%r12), %eax
        xor     %edx, %edx
        wrmsr
        rdmsr
        mov     %eax, REC_MSR_VALUE(%rbx)
        mov     %edx, REC_MSR_VALUE + 4(%rbx)

        mov     %r12, %r13
        mov     $TIME_PAGES, %eax
        bt      $KVM_FEATURE_STABLE_BIT, %edi
        cmovc   %rax, %r13
        movq    $STATE_REGISTERED, REC_STATE(%rbx)
        enter_ring3 .Lread_clock

.Lno_clock:
        mov     %rbp, %rbx
        movq    $STATE_NO_CLOCK, REC_STATE(%rbx)
        enter_ring3 .Lgive_up

# ---- 9. Hot loop: ring 3 -----------------------------------------------------------------------------------------
#
# On the stack lie Linux's valid_flags and, below it, what was read last from each page: the snapshot of the page at
# TIME_PAGES + x is at %rsp + x.
#
# Registers:  %rax  the TSC, then the time in ns     %r8   version, with the busy bit cleared
#             %rsi  this vCPU's previous value       %r9   tsc_timestamp
#             %rdi  shared_last, from before         %r10  system_time
#             %rbp  the page being read              %r11  tsc_to_system_mul
#             %rdx  scratch, the snapshot            %rcx  tsc_shift
#                                                    %r15  flags, the valid ones
#
# Whatever is rare is kept out of line, below, and counts in the record itself.

.Lread_clock:
        call    .Lenroll
        movzbl  REC_FEATURES + (KVM_FEATURE_STABLE_BIT >> 3)(%rbx), %eax
        and     $PVTI_STABLE, %eax                      # bit 24 of the features: STABLE means something
        or      $PVTI_STOPPED, %eax
        push    %rax
        sub     $SNAPSHOTS_SIZE, %rsp
        movl    $-1, PVTI_VERSION - TIME_PAGES(%rsp, %r12) # nothing yet: no even version equals that
        movl    $-1, PVTI_VERSION - TIME_PAGES(%rsp, %r13)
1:      pause                                           # start together: overlap is what finds disagreement
        cmpl    $PHASE_READING, PROBE_PHASE
        jne     1b
        movq    $STATE_READING, REC_STATE(%rbx)

        .balign 64, 0x90                                # filled with NOPs even in a data section
.Lread:
        mov     PROBE_SHARED_LAST, %rdi                 # before the TSC: our time must not be less
        mov     %r12, %rbp                              # own page and the vDSO's take turns
        test    $1, %r14b
        cmovnz  %r13, %rbp

.Lread_page:
        mov     PVTI_VERSION(%rbp), %r8d
        and     $~1, %r8d                               # an odd version never compares equal below
.Lordered_rdtsc:
        lfence                                          # patched by .Lchoose_rdtsc. Nothing orders what
        rdtsc                                           # follows, as nothing does in Linux
        shl     $32, %rdx
        or      %rdx, %rax
        mov     %rax, REC_ATTEMPT_TSC(%rbx)
        mov     PVTI_TSC(%rbp), %r9
        sub     %r9, %rax                               # no guard against a TSC that is behind: nor has Linux
        mov     PVTI_MUL(%rbp), %r11d
        movsbl  PVTI_SHIFT(%rbp), %ecx
        test    %ecx, %ecx
        js      .Lshift_right
        shl     %cl, %rax
.Lshifted:
        mul     %r11
        shrd    $32, %rdx, %rax                         # bits 32 to 95 of the product
        mov     PVTI_SYSTEM_TIME(%rbp), %r10
        add     %r10, %rax
        movzbl  PVTI_FLAGS(%rbp), %r15d
        cmp     PVTI_VERSION(%rbp), %r8d
        jne     .Lretry

        lea     -TIME_PAGES(%rsp, %rbp), %rdx           # one version, one payload: compare with the last read
        cmp     PVTI_VERSION(%rdx), %r8d                # of this page. Two looks within one read would be too
        jne     .Lnew_version                           # close together to catch much
        cmp     PVTI_TSC(%rdx), %r9
        jne     .Ltorn
        cmp     PVTI_SYSTEM_TIME(%rdx), %r10
        jne     .Ltorn
        cmp     PVTI_MUL(%rdx), %r11d
        jne     .Ltorn
        cmp     PVTI_SHIFT(%rdx), %cl
        jne     .Ltorn
.Lsnapshot_kept:
        and     SNAPSHOTS_SIZE(%rsp), %r15d
        cmp     $PVTI_STABLE, %r15d
        jne     .Lnot_plainly_stable

.Lhave_time:
        test    %r14, %r14
        jz      .Lfirst_read
        mov     %rax, %rdx
        sub     %rsi, %rdx
        js      .Lbackward_own
        cmp     REC_LARGEST_GAP(%rbx), %rdx
        ja      .Lnew_largest_gap
.Lgap_kept:
        cmp     PROBE_WILD_NS, %rdx
        ja      .Lwild
.Lcheck_cross:
        mov     %rax, %rsi
        test    %rdi, %rdi
        jz      .Lpublish
        mov     %rax, %rdx
        sub     %rdi, %rdx
        js      .Lbackward_cross

.Lpublish:                                              # shared_last = max(shared_last, ns)
        mov     PROBE_SHARED_LAST, %rax
1:      test    %rax, %rax
        jz      2f
        mov     %rsi, %rdx
        sub     %rax, %rdx
        jle     .Lread_done
2:      lock cmpxchg %rsi, PROBE_SHARED_LAST
        jnz     1b

.Lread_done:
        mov     REC_ATTEMPT_TSC(%rbx), %rax
        mov     %rax, REC_LAST_TSC(%rbx)
        mov     %rsi, REC_LAST_NS(%rbx)
.Lread_counts:
        inc     %r14
        test    $FLUSH_MASK, %r14d
        jz      .Lflush
.Lflushed:
        cmp     PROBE_TARGET, %r14                      # never equal to the 0 that stands for no limit
        je      .Ldone
        cmpl    $0, PROBE_STOP
        je      .Lread
.Ldone:
        movq    $STATE_DONE, REC_STATE(%rbx)
        jmp     .Lfinish

# Out of line, in the order of the loop.

.Lshift_right:
        neg     %ecx
        shr     %cl, %rax
        neg     %ecx                                    # compared again later
        jmp     .Lshifted

.Lretry:
        incq    REC_RETRIES(%rbx)
        cmpl    $0, PROBE_STOP                          # a page left odd must not hold us for ever
        je      .Lread_page
        jmp     .Ldone

.Ltorn:
        incq    REC_TORN(%rbx)
.Lnew_version:
        mov     %r8d, PVTI_VERSION(%rdx)
        mov     %r9, PVTI_TSC(%rdx)
        mov     %r10, PVTI_SYSTEM_TIME(%rdx)
        mov     %r11d, PVTI_MUL(%rdx)
        mov     %cl, PVTI_SHIFT(%rdx)
        jmp     .Lsnapshot_kept

.Lnot_plainly_stable:
        test    $PVTI_STOPPED, %r15b
        jz      2f
        cmp     %r12, %rbp                              # the vDSO's page is read-only to the vDSO
        jne     2f
        incq    REC_STOPPED(%rbx)
        andb    $~PVTI_STOPPED, PVTI_FLAGS(%rbp)
2:      test    $PVTI_STABLE, %r15b
        jnz     .Lhave_time
        cmp     %r12, %rbp                              # no STABLE: the vDSO gives up, the system call
        mov     %r12, %rbp                              # reads the CPU's own page ...
        jne     .Lread_page
        mov     %rax, %rdx                              # ... and never returns less than anyone before
        mov     PROBE_LAST_VALUE, %rax
3:      cmp     %rax, %rdx
        jbe     4f
        lock cmpxchg %rdx, PROBE_LAST_VALUE
        jnz     3b
        mov     %rdx, %rax
        jmp     .Lhave_time
4:      incq    REC_CLAMPED(%rbx)
        jmp     .Lhave_time

.Lfirst_read:
        mov     %rax, REC_FIRST_NS(%rbx)
        mov     REC_ATTEMPT_TSC(%rbx), %rdx
        mov     %rdx, REC_FIRST_TSC(%rbx)
        jmp     .Lcheck_cross

.Lbackward_own:
        mov     $-ABSURD_NS, %rcx
        cmp     %rcx, %rdx
        jl      .Labsurd
        incq    REC_BACKWARD_OWN(%rbx)
        mov     %rsi, %rcx
        call    .Lnote_backward
        jmp     .Lcheck_cross

.Lnew_largest_gap:
        mov     %rdx, REC_LARGEST_GAP(%rbx)
        jmp     .Lgap_kept

# Neither is published: one value far ahead would make every later one, of every vCPU, a step back. But a jump is
# taken as the new base, for the clock may have been set; an absurd value never is.
.Lwild:
        mov     $ABSURD_NS, %rcx
        cmp     %rcx, %rdx
        jae     .Labsurd
        mov     %rax, %rsi
        incq    REC_WILD(%rbx)
        jmp     .Lread_done
.Labsurd:
        incq    REC_WILD(%rbx)
        jmp     .Lread_counts

.Lbackward_cross:
        incq    REC_BACKWARD_CROSS(%rbx)
        mov     %rdi, %rcx
        call    .Lnote_backward
        jmp     .Lpublish

.Lflush:
        mov     %r14, REC_READS(%rbx)
        jmp     .Lflushed

# A step from %rcx back to %rax = %rcx + %rdx.
.Lnote_backward:
        neg     %rdx
        cmp     REC_WORST_BACK(%rbx), %rdx
        jbe     1f
        mov     %rdx, REC_WORST_BACK(%rbx)
1:      cmpq    $0, REC_BACK_FROM(%rbx)
        jne     2f
        mov     %rcx, REC_BACK_FROM(%rbx)
        mov     %rax, REC_BACK_TO(%rbx)
2:      ret

# ---- 10. Finish: ring 3 ------------------------------------------------------------------------------------------

# Count this vCPU in; the last one starts the reading. The boot processor enrolls only after it has settled how
# many take part, so the two numbers cannot meet too early.
.Lenroll:
        mov     $1, %eax
        lock xadd %eax, VAR_ENROLLED
        inc     %eax
        cmp     PROBE_ARRIVED, %eax
        jne     1f
        movl    $PHASE_READING, PROBE_PHASE
1:      ret

.Lgive_up:                                              # nothing to read, but the others wait for us
        call    .Lenroll
.Lfinish:
        mov     %r14, REC_READS(%rbx)
        mov     $1, %eax
        lock xadd %eax, PROBE_FINISHED
        inc     %eax
        mov     PROBE_ARRIVED, %ecx
        cmp     %ecx, %eax
        jne     .Lspin
        movl    $PHASE_DONE, PROBE_PHASE
        mov     $RECORDS, %edx
1:      cmpq    $STATE_DONE, REC_STATE(%rdx)
        jne     2f
        add     $(1 << RECORD_SHIFT), %edx
        dec     %ecx
        jnz     1b
        mov     $EXIT_FINE, %al
        jmp     .Lexit_call
2:      mov     $EXIT_FAILED, %al
.Lexit_call:
        ud2                                             # .Lfault knows this address
.Lspin:
        pause
        jmp     .Lspin

# ---- 11. Faults: ring 0 ------------------------------------------------------------------------

# One 16-byte stub per vector, which the gates count on: leave vector and error code on the stack, a 0 where the CPU
# has no error code to push.
        .balign 64
.Lfault_stubs:
        .set    .Lvector, 0
        .rept   32
        .balign 16
        .if     (1 << .Lvector) & 0x60227d00            # vectors 8, 10 to 14, 17, 21, 29, 30 push one
        .else
        pushq   $0
        .endif
        pushq   $.Lvector
        jmp     .Lfault
        .set    .Lvector, .Lvector + 1
        .endr

# The stack holds vector, error code, %rip and the rest of the CPU's frame; and its address tells the vCPU. Nothing is
# returned to: note it, and let the vCPU finish in ring 3. %r14 still has the reads.
#
# One fault is no mistake: .Lexit_call ends the run, code in %al. With IOPL 3 ring 3 could use the port itself, and
# a software interrupt would be the usual call; but kvm-pvm answers the one with #GP and the other with #UD.
.Lfault:
        lea     .Lexit_call(%rip), %rdi
        cmp     %rdi, 16(%rsp)
        je      .Lexit

        lea     -STACKS(%rsp), %rdi
        shr     $STACK_SHIFT, %rdi
        mov     %rdi, %rbx
        shl     $RECORD_SHIFT, %rbx
        add     $RECORDS, %rbx
        mov     REC_STATE(%rbx), %rbp
        movq    $STATE_FAULT, REC_STATE(%rbx)
        pop     REC_FAULT_VECTOR(%rbx)
        pop     REC_FAULT_ERROR(%rbx)
        mov     (%rsp), %rax
        mov     %rax, REC_FAULT_RIP(%rbx)
        mov     %cr2, %rax
        mov     %rax, REC_FAULT_CR2(%rbx)

        print   .Ltext_vcpu
        print_number %rdi, 10
        print   .Ltext_fault
        print_number REC_FAULT_VECTOR(%rbx), 10
        print   .Ltext_at
        print_number REC_FAULT_RIP(%rbx), 16
        print   .Ltext_newline

        cmpl    $0, PROBE_ARRIVED                       # before there was a run to take part in ...
        je      .Lexit_failed
        cmp     $STATE_DONE, %rbp                       # ... or while finishing: do not try that again
        jae     .Lexit_failed
        cmp     $STATE_ABSENT, %rbp
        je      1f
        enter_ring3 .Lfinish
1:      enter_ring3 .Lgive_up

.Lexit_failed:
        mov     $EXIT_FAILED, %al
.Lexit:
        out     %al, $PORT_EXIT
1:      hlt                                             # QEMU without an exit device gets here
        jmp     1b

# ---- 12. Console: ring 0 -----------------------------------------------------------------------------------------

.Lprint_text:                                           # %rsi: text, ends with a 0; %rax is lost
        lodsb
        test    %al, %al
        jz      1f
        out     %al, $PORT_CONSOLE
        jmp     .Lprint_text
1:      ret

.Lprint_number:                                         # %rax: number, %rcx: base; both and %rdx are lost
        xor     %edx, %edx
        div     %rcx
        push    %rdx
        test    %rax, %rax
        jz      1f
        call    .Lprint_number                          # the digits before this one
1:      pop     %rax
        cmp     $10, %al
        jb      2f
        add     $('a' - '0' - 10), %al
2:      add     $'0', %al
        out     %al, $PORT_CONSOLE
        ret

# ---- 13. Tables --------------------------------------------------------------------------------------------------

        .balign 16
.Loptions:                                              # key, right-aligned; where its number goes
        .ascii  "\0\0\0\0cpus"
        .quad   VAR_CPUS
        .ascii  "\0\0\0reads"
        .quad   PROBE_TARGET
        .ascii  "\0\0\0\0wild"
        .quad   PROBE_WILD_NS
.Loptions_end:

.Lgdt:
        .quad   0
        .quad   0x00cf9b000000ffff                      # SEL_CODE32
        .quad   0x00cf93000000ffff                      # SEL_DATA
        .quad   0x00af9b000000ffff                      # SEL_CODE64
        .quad   0x00cff3000000ffff                      # SEL_USER_DATA
        .quad   0x00affb000000ffff                      # SEL_USER_CODE
        .set    .Ltss, TSS_AREA                         # SEL_TSS
        .rept   MAX_CPUS
        .short  TSS_SIZE - 1, .Ltss & 0xffff
        .byte   .Ltss >> 16, 0x89, 0, 0                 # available 64-bit TSS, below 16 MiB
        .quad   0
        .set    .Ltss, .Ltss + (1 << TSS_SHIFT)
        .endr
.Lgdt_end:

.Lidt:
        .set    .Lvector, 0
        .rept   32
        .short  .Lfault_stubs - .Limage + 16 * .Lvector, SEL_CODE64
        .byte   0, 0x8e                                 # interrupt gate, only the CPU may use it
        .short  LOAD_BASE >> 16
        .quad   0
        .set    .Lvector, .Lvector + 1
        .endr
.Lidt_end:

.Lgdt_pointer:
        .short  .Lgdt_end - .Lgdt - 1
        .quad   .Lgdt - .Limage + LOAD_BASE
.Lidt_pointer:
        .short  .Lidt_end - .Lidt - 1
        .quad   .Lidt - .Limage + LOAD_BASE

.Ltext_cpus:    .asciz "clockprobe: cpus="
.Ltext_vcpu:    .asciz "clockprobe: vcpu "
.Ltext_fault:   .asciz " fault "
.Ltext_at:      .asciz " at 0x"
.Ltext_newline: .asciz "\n"

        .balign 16
.Limage_end:
clockprobe_image_end:

        .code64
