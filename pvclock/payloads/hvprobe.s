# SPDX-License-Identifier: Apache-2.0
#
# hvprobe: a guest that does nothing but read its Hyper-V reference time, by the page and by the counter, and complain.
#
# The boot processor enables the reference TSC page, then every vCPU reads it from ring 3, in Linux's order and in the
# TLFS's, which is Windows', checking each value against its own last one and against the newest one any vCPU has
# seen. In between it reads page, counter, page: those three values may not decrease. The counter is an MSR, so that
# reading is a trap to ring 0 and back. With expiries= the vCPUs take interrupts of their synthetic timers instead, in
# ring 0, and write down when. What is found lies in guest memory, at fixed addresses, for the host to read at any
# time: section 1 is that ABI, with that of probe_layout.s, and hyperv_probe.py is its other half.
#
# The bytes between hvprobe_image and hvprobe_image_end are a file, as clockprobe.s says of its own; it boots with
# qemu -kernel hvprobe.elf -cpu host,hv-time,hv-vpindex -append "cpus=2 rounds=100000".
#
# Command line, all decimal:  cpus=N      vCPUs to use, 1 to 16 (default 1)
#                             rounds=N    rounds per vCPU, 0 = until the host sets the stop word (default 0)
#                             batch=N     readings of the page in a round, beside page, counter, page (default 31: odd,
#                                         so that the two readings beside the counter take turns in their order)
#                             order=N     bit n: the TLFS's order for readings whose number is n modulo 2 (default 2)
#                             call=N      not 0: enable the hypercall page and make one hypercall (default 0)
#                             expiries=N  take so many timer interrupts on each vCPU, and read no clock (default 0)
#                             period=N    between two of them, in units of 100 ns (default 100000)
#                             timer=N     bit 0: one-shot, set again each time; bit 1: direct, no message (default 0)
#
# Sources: Hypervisor Top Level Functional Specification, "Timers", "Inter-partition communication"; for Linux's order
# include/clocksource/hyperv_timer.h.
#
# Contents: 1 shared memory  2 constants  3 what all probes have  4 registration  5 rounds  6 readings  7 findings
#           8 the counter  9 timers  10 tables

        .att_syntax prefix

        .include "probe_layout.s"

# ---- 1. Shared memory: the ABI with the host ---------------------------------------------------------------------

        .equ PROBE_BATCH,       PROBE_BASE + 32         # u64
        .equ PROBE_ORDER,       PROBE_BASE + 128        # u64
        .equ PROBE_CALL,        PROBE_BASE + 136        # u64
        .equ PROBE_EXPIRIES,    PROBE_BASE + 144        # u64
        .equ PROBE_PERIOD,      PROBE_BASE + 152        # u64
        .equ PROBE_TIMER,       PROBE_BASE + 160        # u64
        .equ PROBE_GUEST_OS_ID, PROBE_BASE + 168        # u64 these three as read back after writing them
        .equ PROBE_HYPERCALL,   PROBE_BASE + 176        # u64
        .equ PROBE_REFERENCE_TSC, PROBE_BASE + 184      # u64
        .equ PROBE_CALL_RESULT, PROBE_BASE + 192        # u64 RAX after the hypercall; NO_RESULT if that has not set it

        .equ RECORD_SHIFT,      9
        .equ REFERENCE_PAGE,    0x210000                # struct hyperv_tsc_page
        .equ HYPERCALL_PAGE,    0x211000
        .equ MESSAGE_PAGES,     0x220000                # SIM page, one per vCPU
        .equ MESSAGE_PAGE_SHIFT, 12
        .equ EXPIRIES,          0x240000                # each vCPU's log
        .equ EXPIRIES_SHIFT,    15
        .equ PROBE_END,         0x2c0000

        .equ MAGIC_VALUE,       0x45424f5250565048      # "HPVPROBE"
        .equ ABI_VERSION,       1
        .equ NO_RESULT,         -1

# One record per vCPU, all fields u64. Times are in units of 100 ns.
        .equ REC_MAX_LEAF,      16                      # EAX of leaf 0x40000000, 0 = no Hyper-V interface
        .equ REC_PRIVILEGES,    24                      # EAX and EBX of leaf 0x40000003
        .equ REC_FEATURES,      32                      # its EDX
        .equ REC_VP_INDEX,      40                      # these three of MSRs, 0 = not offered
        .equ REC_TSC_HZ,        48
        .equ REC_APIC_HZ,       56
        .equ REC_ROUNDS,        64
        .equ REC_READS,         72                      # of the page, or of the counter in place of it; once a round
        .equ REC_TRIPLES,       80                      # rounds in which page, counter and page could be compared
        .equ REC_FALLBACKS,     88                      # page not valid, counter read in place of it
        .equ REC_RETRIES,       96                      # sequence changed while reading
        .equ REC_BACKWARD_OWN,  104                     # below this vCPU's own last value
        .equ REC_BACKWARD_CROSS, 112                    # below a value some vCPU had before this reading began
        .equ REC_PAGE_ABOVE,    120                     # triples whose first page reading is above the counter
        .equ REC_COUNTER_ABOVE, 128                     # triples whose counter is above the second page reading
        .equ REC_TORN,          136                     # scale, offset not those of the last reading, sequence is
        .equ REC_SEQUENCES,     144                     # times that the sequence was another one than before
        .equ REC_SEQUENCE_BACK, 152                     # ... and one before that one, modulo 2^32
        .equ REC_SEQUENCE_RESERVED, 160                 # readings that found the sequence 0xffffffff
        .equ REC_LARGEST_STEP,  168                     # between two successive readings
        .equ REC_FIRST_UNITS,   176                     # of all
        .equ REC_LAST_UNITS,    184
        .equ REC_PAGE_TSC,      192                     # the last reading of the page: its TSC, ...
        .equ REC_PAGE_UNITS,    200                     # its value, and what the page held
        .equ REC_SEQUENCE,      208
        .equ REC_SCALE,         216
        .equ REC_OFFSET,        224
        .equ REC_FIRST_SEQUENCE, 232
        .equ REC_WORST_BACK,    240                     # own or cross
        .equ REC_BACK_FROM,     248                     # the first step back: from
        .equ REC_BACK_TO,       256                     #                      to
        .equ REC_EXPIRIES,      264                     # entries in its log
        .equ REC_FAULT_VECTOR,  272
        .equ REC_FAULT_ERROR,   280
        .equ REC_FAULT_RIP,     288
        .equ REC_FAULT_CR2,     296
        .equ REC_USES_RDTSCP,   304

# An entry of a log.
        .equ LOG_EXPIRATION,    0                       # u64 from the message; direct: what was set, 0 = periodic
        .equ LOG_DELIVERY,      8                       # u64 from the message; direct: 0
        .equ LOG_SEEN,          16                      # u64 the counter, first thing in the handler
        .equ LOG_TYPE,          24                      # u32 of the message; direct: 0
        .equ LOG_FLAGS,         28                      # u32 of the message; direct: 0
        .equ LOG_SIZE,          32

# ---- 2. Constants ------------------------------------------------------------------------------------------------

        .equ DEFAULT_BATCH,     31
        .equ DEFAULT_ORDER,     2
        .equ DEFAULT_PERIOD,    100000                  # 10 ms
        .equ EXPIRIES_MAX,      (1 << EXPIRIES_SHIFT) / LOG_SIZE
        .equ VECTOR_UD,         6

        .equ LEAF_MAX,          0x40000000
        .equ LEAF_INTERFACE,    0x40000001
        .equ LEAF_PRIVILEGES,   0x40000003
        .equ LEAF_LAST_NEEDED,  0x40000005
        .equ INTERFACE,         0x31237648              # "Hv#1"
        .equ PRIVILEGE_COUNTER,   1                     # bits of EAX
        .equ PRIVILEGE_SYNIC,     2
        .equ PRIVILEGE_TIMERS,    3
        .equ PRIVILEGE_HYPERCALL, 5
        .equ PRIVILEGE_VP_INDEX,  6
        .equ PRIVILEGE_PAGE,      9
        .equ PRIVILEGE_FREQUENCY, 11
        .equ FEATURE_DIRECT,      19                    # of EDX

        .equ MSR_GUEST_OS_ID,   0x40000000
        .equ MSR_HYPERCALL,     0x40000001
        .equ MSR_VP_INDEX,      0x40000002
        .equ MSR_COUNTER,       0x40000020
        .equ MSR_REFERENCE_TSC, 0x40000021
        .equ MSR_TSC_HZ,        0x40000022
        .equ MSR_APIC_HZ,       0x40000023
        .equ MSR_SCONTROL,      0x40000080
        .equ MSR_SIMP,          0x40000083
        .equ MSR_EOM,           0x40000084
        .equ MSR_SINT2,         0x40000092
        .equ MSR_STIMER_CONFIG, 0x400000b0              # of timer 0; its count follows
        .equ ENABLE,            1                       # bit 0 of the pages' MSRs, of SCONTROL and of a timer

        .equ OUR_OS_ID,         1 << 63 | 1             # open source, of no known kind, build 1
        .equ LONG_SPIN_WAIT,    1 << 16 | 8             # HvCallNotifyLongSpinWait, fast: it changes nothing
        .equ SPINS,             1

        .equ TSC_SEQUENCE,      0                       # struct hyperv_tsc_page
        .equ TSC_SCALE,         8
        .equ TSC_OFFSET,        16
        .equ SEQUENCE_RESERVED, -1

        .equ SINT,              2
        .equ TIMER_ONE_SHOT,    1 << 0                  # bits of timer=
        .equ TIMER_DIRECT,      1 << 1
        .equ STIMER_PERIODIC,   1 << 1                  # bits of a timer's configuration
        .equ STIMER_VECTOR,     INTERRUPT_VECTOR << 4
        .equ STIMER_DIRECT,     1 << 12
        .equ STIMER_SINT,       SINT << 16
        .equ MESSAGE_SLOT,      SINT << 8               # in the SIM page
        .equ MESSAGE_TYPE,      0                       # u32, in the slot
        .equ MESSAGE_FLAGS,     5                       # u8
        .equ MESSAGE_PENDING,   1
        .equ MESSAGE_EXPIRATION, 24                     # u64
        .equ MESSAGE_DELIVERY,  32                      # u64

        .equ PORT_PIC1,         0x21                    # the interrupt masks
        .equ PORT_PIC2,         0xa1
        .equ LAPIC_EOI,         0xfee000b0
        .equ LAPIC_SPURIOUS,    0xfee000f0
        .equ SPURIOUS_ENABLE,   0x1ff                   # software enable, vector 255

# ---- 3. What all probes have -------------------------------------------------------------------------------------

.macro set_defaults
        movq    $DEFAULT_BATCH, PROBE_BATCH
        movq    $DEFAULT_ORDER, PROBE_ORDER
        movq    $DEFAULT_PERIOD, PROBE_PERIOD
        movq    $NO_RESULT, PROBE_CALL_RESULT
        set_gate VECTOR_UD, .Lcounter_gate
        set_gate INTERRUPT_VECTOR, .Ltimer_interrupt
.endm

# RDMSR to memory, WRMSR of a 64-bit operand; %rax, %rcx and %rdx are lost.
.macro read_msr index, where
        mov     $\index, %ecx
        rdmsr
        mov     %eax, \where
        mov     %edx, 4 + \where
.endm

.macro write_msr index, value
        mov     \value, %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        mov     $\index, %ecx
        wrmsr
.endm

        .balign 64                                      # so that alignment in here holds in guest memory, too
        .globl  hvprobe_image, hvprobe_image_end
        .hidden hvprobe_image, hvprobe_image_end
hvprobe_image:
        .include "probe_boot.s"

# ---- 4. Registration: ring 0, every vCPU, %r13d = its index ------------------------------------------------------
#
# From here to the end:  %rbx  this vCPU's record        %r14  readings of the page, or expiries

.Lregister:
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
        mov     $LEAF_MAX, %eax
        cpuid
        cmp     $LEAF_LAST_NEEDED, %eax
        jb      .Lno_clock
        mov     %eax, %edi
        mov     $LEAF_INTERFACE, %eax
        cpuid
        cmp     $INTERFACE, %eax
        jne     .Lno_clock
        mov     %rdi, REC_MAX_LEAF(%rbp)
        mov     $LEAF_PRIVILEGES, %eax
        cpuid
        mov     %eax, REC_PRIVILEGES(%rbp)
        mov     %ebx, REC_PRIVILEGES + 4(%rbp)
        mov     %edx, REC_FEATURES(%rbp)
        mov     %eax, %edi
        bt      $PRIVILEGE_COUNTER, %edi
        jnc     .Lno_clock
        mov     %rbp, %rbx

        test    %r13d, %r13d                            # what is the partition's: once is enough
        jnz     1f
        call    .Lset_up_partition
1:      bt      $PRIVILEGE_VP_INDEX, %edi
        jnc     2f
        read_msr MSR_VP_INDEX, REC_VP_INDEX(%rbx)
2:      bt      $PRIVILEGE_FREQUENCY, %edi
        jnc     3f
        read_msr MSR_TSC_HZ, REC_TSC_HZ(%rbx)
        read_msr MSR_APIC_HZ, REC_APIC_HZ(%rbx)
3:      movq    $STATE_REGISTERED, REC_STATE(%rbx)
        cmpq    $0, PROBE_EXPIRIES
        jne     .Ltake_expiries
        enter_ring3 .Lread_clock

.Lno_clock:
        mov     %rbp, %rbx
.Lno_timers:
        movq    $STATE_NO_CLOCK, REC_STATE(%rbx)
        enter_ring3 .Lgive_up

.Lset_up_partition:                                     # %edi: privileges
        bt      $PRIVILEGE_HYPERCALL, %edi
        jnc     1f
        write_msr MSR_GUEST_OS_ID, $OUR_OS_ID
        read_msr MSR_GUEST_OS_ID, PROBE_GUEST_OS_ID
        cmpq    $0, PROBE_CALL
        je      1f
        write_msr MSR_HYPERCALL, $(HYPERCALL_PAGE + ENABLE)
        read_msr MSR_HYPERCALL, PROBE_HYPERCALL
        mov     $LONG_SPIN_WAIT, %ecx
        mov     $SPINS, %edx
        xor     %r8d, %r8d
        mov     $NO_RESULT, %rax
        mov     $HYPERCALL_PAGE, %r9d
        call    *%r9
        mov     %rax, PROBE_CALL_RESULT
1:      bt      $PRIVILEGE_PAGE, %edi
        jnc     2f
        write_msr MSR_REFERENCE_TSC, $(REFERENCE_PAGE + ENABLE)
        read_msr MSR_REFERENCE_TSC, PROBE_REFERENCE_TSC
2:      ret

# ---- 5. Rounds: ring 3 -------------------------------------------------------------------------------------------
#
# Registers:  %rax  a reading: the TSC, then units       %r8d  its sequence, 0 if it is the counter's
#             %rsi  this vCPU's previous reading         %r9   scale
#             %rdi  shared_last, from before             %r10  offset
#             %rcx, %rdx  scratch                        %r11  its TSC
#             %rbp  how a round's triple begins          %r12  readings left of a batch; that one's sequence
#             %r13  the page                             %r15  a triple's counter

.Lread_clock:
        call    .Lenroll
        mov     $REFERENCE_PAGE, %r13d
        xor     %esi, %esi
1:      pause                                           # start together: overlap is what finds disagreement
        cmpl    $PHASE_READING, PROBE_PHASE
        jne     1b
        movq    $STATE_READING, REC_STATE(%rbx)

.Lround:
        mov     PROBE_BATCH, %r12
1:      sub     $1, %r12
        jb      2f
        call    .Lread_page
        jmp     1b
2:      call    .Lread_page
        mov     %rax, %rbp
        mov     %r8d, %r12d
        call    .Lread_counter
        mov     %rax, %r15
        call    .Lread_page
        test    %r12d, %r12d
        jz      .Lround_done
        test    %r8d, %r8d
        jz      .Lround_done
        incq    REC_TRIPLES(%rbx)
        cmp     %rbp, %r15
        jae     3f
        incq    REC_PAGE_ABOVE(%rbx)
3:      cmp     %r15, %rax
        jae     .Lround_done
        incq    REC_COUNTER_ABOVE(%rbx)

.Lround_done:
        mov     %r14, REC_READS(%rbx)
        mov     %rsi, REC_LAST_UNITS(%rbx)
        mov     REC_ROUNDS(%rbx), %rax
        inc     %rax
        mov     %rax, REC_ROUNDS(%rbx)
        cmp     PROBE_TARGET, %rax                      # never equal to the 0 that stands for no limit
        je      .Ldone
        cmpl    $0, PROBE_STOP
        je      .Lround
.Ldone:
        movq    $STATE_DONE, REC_STATE(%rbx)
        jmp     .Lfinish

# ---- 6. Readings: ring 3 -----------------------------------------------------------------------------------------
#
# Each returns its value in %rax after it has checked it.

.Lread_page:
        mov     PROBE_SHARED_LAST, %rdi                 # before the TSC: our time must not be less
        mov     %r14d, %ecx
        and     $1, %ecx
        inc     %r14
        mov     PROBE_ORDER, %eax
        bt      %ecx, %eax
        jc      .Lread_as_tlfs

.Lread_as_linux:                                        # 0 is the only sequence without a reading
        mov     TSC_SEQUENCE(%r13), %r8d
        test    %r8d, %r8d
        jz      .Lfall_back
        mov     TSC_SCALE(%r13), %r9
        mov     TSC_OFFSET(%r13), %r10
        call    .Lread_tsc
        cmp     TSC_SEQUENCE(%r13), %r8d
        je      .Lpage_read
        call    .Lcount_retry
        jmp     .Lread_as_linux

.Lread_as_tlfs:
        mov     TSC_SEQUENCE(%r13), %r8d
        lea     1(%r8), %ecx                            # 0xffffffff, then 0
        cmp     $1, %ecx
        jbe     .Lfall_back
        call    .Lread_tsc
        mov     TSC_SCALE(%r13), %r9
        mov     TSC_OFFSET(%r13), %r10
        cmp     TSC_SEQUENCE(%r13), %r8d
        je      .Lpage_read
        call    .Lcount_retry
        jmp     .Lread_as_tlfs

.Lread_tsc:
.Lordered_rdtsc:
        lfence                                          # patched by .Lchoose_rdtsc
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        ret

.Lcount_retry:
        incq    REC_RETRIES(%rbx)
        cmpl    $0, PROBE_STOP                          # a page that never stands still must not hold us for ever
        jne     .Ldone
        ret

.Lpage_read:
        mov     %rax, %r11
        mul     %r9
        lea     (%rdx, %r10), %rax
        mov     %r11, REC_PAGE_TSC(%rbx)
        mov     %rax, REC_PAGE_UNITS(%rbx)
        call    .Lcheck_page
        jmp     .Lcheck

.Lfall_back:
        incq    REC_FALLBACKS(%rbx)
        cmp     $SEQUENCE_RESERVED, %r8d
        jne     .Lread_counter
        incq    REC_SEQUENCE_RESERVED(%rbx)

.Lread_counter:
        mov     PROBE_SHARED_LAST, %rdi
        xor     %r8d, %r8d
.Lcounter_call:
        ud2                                             # .Lcounter_gate knows this address

# ---- 7. Findings: ring 3 -----------------------------------------------------------------------------------------

# A reading against this vCPU's last one and against any vCPU's that was there before. It is the previous one then,
# and shared_last = max(shared_last, it).
.Lcheck:
        mov     %rax, %rdx
        test    %rsi, %rsi
        jz      .Lfirst_reading
        sub     %rsi, %rdx
        jb      .Lbackward_own
        cmp     REC_LARGEST_STEP(%rbx), %rdx
        jbe     .Lcheck_cross
        mov     %rdx, REC_LARGEST_STEP(%rbx)
.Lcheck_cross:
        mov     %rax, %rsi
        mov     %rax, %rdx
        sub     %rdi, %rdx
        jb      .Lbackward_cross
.Lpublish:
        mov     PROBE_SHARED_LAST, %rax
1:      cmp     %rax, %rsi
        jbe     2f
        lock cmpxchg %rsi, PROBE_SHARED_LAST
        jnz     1b
2:      mov     %rsi, %rax
        ret

.Lfirst_reading:
        mov     %rax, REC_FIRST_UNITS(%rbx)
        jmp     .Lcheck_cross

.Lbackward_own:
        incq    REC_BACKWARD_OWN(%rbx)
        mov     %rsi, %rcx
        call    .Lnote_backward
        jmp     .Lcheck_cross

.Lbackward_cross:
        incq    REC_BACKWARD_CROSS(%rbx)
        mov     %rdi, %rcx
        call    .Lnote_backward
        jmp     .Lpublish

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

# The page as it was read, %r8d to %r10, against what it was last time: one sequence, one line; and no sequence again.
.Lcheck_page:
        cmp     $SEQUENCE_RESERVED, %r8d
        jne     1f
        incq    REC_SEQUENCE_RESERVED(%rbx)
1:      mov     REC_SEQUENCE(%rbx), %ecx
        cmp     %ecx, %r8d
        jne     .Lnew_sequence
        cmp     REC_SCALE(%rbx), %r9
        jne     2f
        cmp     REC_OFFSET(%rbx), %r10
        jne     2f
        ret
2:      incq    REC_TORN(%rbx)
        jmp     .Lkeep_page

.Lnew_sequence:
        test    %ecx, %ecx                              # none yet: 0 is never read
        jnz     1f
        mov     %r8, REC_FIRST_SEQUENCE(%rbx)
        jmp     .Lkeep_page
1:      incq    REC_SEQUENCES(%rbx)
        mov     %r8d, %edx
        sub     %ecx, %edx                              # may wrap: 1 comes after 0xfffffffe
        jns     .Lkeep_page
        incq    REC_SEQUENCE_BACK(%rbx)
.Lkeep_page:
        mov     %r8, REC_SEQUENCE(%rbx)
        mov     %r9, REC_SCALE(%rbx)
        mov     %r10, REC_OFFSET(%rbx)
        ret

# ---- 8. The counter: ring 0 --------------------------------------------------------------------------------------

# #UD. At .Lcounter_call it reads the counter to %rax and goes on behind it, see .Lfault for why by this instruction;
# anywhere else it is a fault.
.Lcounter_gate:
        lea     .Lcounter_call(%rip), %rcx              # %al may be an exit code
        cmp     %rcx, (%rsp)
        jne     1f
        mov     $MSR_COUNTER, %ecx
        rdmsr
        shl     $32, %rdx
        or      %rdx, %rax
        addq    $2, (%rsp)                              # the length of UD2
        iretq
1:      pushq   $0
        pushq   $VECTOR_UD
        jmp     .Lfault

# ---- 9. Timers: ring 0 -------------------------------------------------------------------------------------------
#
# Registers:  %rbp  the message slot                     %r12  the log's next entry
#             %rsi  when it was set to expire, or 0      %r15  the timer's configuration

.Ltake_expiries:
        bt      $PRIVILEGE_TIMERS, %edi
        jnc     .Lno_timers
        mov     $EXPIRIES_MAX, %eax
        cmp     %rax, PROBE_EXPIRIES
        jbe     1f
        mov     %rax, PROBE_EXPIRIES
1:      mov     %r13d, %r12d
        shl     $EXPIRIES_SHIFT, %r12d
        add     $EXPIRIES, %r12d
        mov     $(STIMER_VECTOR | STIMER_DIRECT | ENABLE), %r15d
        btl     $FEATURE_DIRECT, REC_FEATURES(%rbx)
        sbb     %ecx, %ecx                              # all ones if direct mode is offered
        testb   $TIMER_DIRECT, PROBE_TIMER
        jnz     2f
        bt      $PRIVILEGE_SYNIC, %edi
        sbb     %ecx, %ecx
        mov     $(STIMER_SINT | ENABLE), %r15d
2:      test    %ecx, %ecx
        jz      .Lno_timers
        testb   $TIMER_ONE_SHOT, PROBE_TIMER
        jnz     3f
        or      $STIMER_PERIODIC, %r15d
3:      call    .Lenroll
4:      pause
        cmpl    $PHASE_READING, PROBE_PHASE
        jne     4b
        movq    $STATE_READING, REC_STATE(%rbx)

        mov     $0xff, %al                              # a BIOS has let the PICs interrupt
        out     %al, $PORT_PIC1
        out     %al, $PORT_PIC2
        mov     $LAPIC_SPURIOUS, %ecx
        movl    $SPURIOUS_ENABLE, (%rcx)
        testb   $TIMER_DIRECT, PROBE_TIMER
        jnz     .Lset_timer
        mov     %r13d, %ebp
        shl     $MESSAGE_PAGE_SHIFT, %ebp
        add     $MESSAGE_PAGES, %ebp
        lea     ENABLE(%rbp), %rsi
        write_msr MSR_SIMP, %rsi
        write_msr MSR_SINT2, $INTERRUPT_VECTOR
        write_msr MSR_SCONTROL, $ENABLE
        add     $MESSAGE_SLOT, %ebp

.Lset_timer:
        xor     %esi, %esi
        mov     PROBE_PERIOD, %rdi
        testb   $TIMER_ONE_SHOT, PROBE_TIMER
        jz      1f
        mov     $MSR_COUNTER, %ecx
        rdmsr
        shl     $32, %rdx
        or      %rdx, %rax
        add     %rax, %rdi
        mov     %rdi, %rsi
1:      write_msr MSR_STIMER_CONFIG + 1, %rdi
        write_msr MSR_STIMER_CONFIG, %r15

.Lawait_expiry:
        mov     %r14, %rdi
        sti                                             # takes effect after the next instruction
        hlt
        cli
        cmp     PROBE_EXPIRIES, %r14
        jae     1f
        cmpl    $0, PROBE_STOP
        jne     1f
        cmp     %rdi, %r14
        je      .Lawait_expiry
        testb   $TIMER_ONE_SHOT, PROBE_TIMER
        jnz     .Lset_timer
        jmp     .Lawait_expiry
1:      write_msr MSR_STIMER_CONFIG, $0
        xor     %r14d, %r14d                            # nothing was read
        enter_ring3 .Ldone

.Ltimer_interrupt:                                      # from .Lawait_expiry only: %rax, %rcx and %rdx are free
        cmp     PROBE_EXPIRIES, %r14
        jae     2f
        mov     $MSR_COUNTER, %ecx
        rdmsr
        mov     %eax, LOG_SEEN(%r12)
        mov     %edx, LOG_SEEN + 4(%r12)
        mov     %rsi, LOG_EXPIRATION(%r12)
        testb   $TIMER_DIRECT, PROBE_TIMER
        jnz     1f
        call    .Ltake_message
1:      add     $LOG_SIZE, %r12
        inc     %r14
        mov     %r14, REC_EXPIRIES(%rbx)
2:      mov     $LAPIC_EOI, %ecx
        movl    $0, (%rcx)
        iretq

# Free the slot, and only then see whether another message waits for it: who has not seen it free has set the flag.
.Ltake_message:
        mov     MESSAGE_EXPIRATION(%rbp), %rax
        mov     %rax, LOG_EXPIRATION(%r12)
        mov     MESSAGE_DELIVERY(%rbp), %rax
        mov     %rax, LOG_DELIVERY(%r12)
        xor     %eax, %eax
        xchg    %eax, MESSAGE_TYPE(%rbp)
        mov     %eax, LOG_TYPE(%r12)
        movzbl  MESSAGE_FLAGS(%rbp), %eax
        mov     %eax, LOG_FLAGS(%r12)
        test    $MESSAGE_PENDING, %al
        jz      1f
        write_msr MSR_EOM, $0
1:      ret

# ---- 10. Tables --------------------------------------------------------------------------------------------------

        .balign 16
.Loptions:                                              # key, right-aligned; where its number goes
        .ascii  "\0\0\0\0cpus"
        .quad   VAR_CPUS
        .ascii  "\0\0rounds"
        .quad   PROBE_TARGET
        .ascii  "\0\0\0batch"
        .quad   PROBE_BATCH
        .ascii  "\0\0\0order"
        .quad   PROBE_ORDER
        .ascii  "\0\0\0\0call"
        .quad   PROBE_CALL
        .ascii  "expiries"
        .quad   PROBE_EXPIRIES
        .ascii  "\0\0period"
        .quad   PROBE_PERIOD
        .ascii  "\0\0\0timer"
        .quad   PROBE_TIMER
.Loptions_end:

.Ltext_name:    .asciz "hvprobe: "

        .balign 16
.Limage_end:
hvprobe_image_end:

        .code64
