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
# Contents: 1 shared memory  2 constants  3 what all probes have  4 registration  5 hot loop  6 tables

        .att_syntax prefix

        .include "probe_layout.s"

# ---- 1. Shared memory: the ABI with the host ---------------------------------------------------------------------

        .equ PROBE_WILD_NS,     PROBE_BASE + 32         # u64
        .equ PROBE_LAST_VALUE,  PROBE_BASE + 128        # u64 Linux's last_value, for clocks without STABLE
        .equ PROBE_WALL_CLOCK,  PROBE_BASE + 192        # struct pvclock_wall_clock, 12 bytes

        .equ TIME_PAGES,        0x201000                # struct pvclock_vcpu_time_info, as hv_clock in Linux:
        .equ TIME_PAGE_SHIFT,   6                       # one cache line per vCPU
        .equ RECORD_SHIFT,      8
        .equ PROBE_END,         0x204000

        .equ MAGIC_VALUE,       0x45424f5250435650      # "PVCPROBE"
        .equ ABI_VERSION,       1

# One record per vCPU, all fields u64.
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

# ---- 2. Constants ------------------------------------------------------------------------------------------------

        .equ DEFAULT_WILD_NS,   1 << 40                 # 18 minutes: such a jump may be meant, and stay
        .equ ABSURD_NS,         1 << 60                 # 36 years: what a TSC behind tsc_timestamp reads as
        .equ FLUSH_MASK,        (1 << 14) - 1

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

# ---- 3. What all probes have -------------------------------------------------------------------------------------

.macro set_defaults
        mov     $DEFAULT_WILD_NS, %rax
        mov     %rax, PROBE_WILD_NS
.endm

        .balign 64                                      # so that alignment in here holds in guest memory, too
        .globl  clockprobe_image, clockprobe_image_end
        .hidden clockprobe_image, clockprobe_image_end
clockprobe_image:
        .include "probe_boot.s"

# ---- 4. Registration: ring 0, every vCPU, %r13d = its index ------------------------------------------------------
#
# From here to the end:  %rbx  this vCPU's record          %r13  the page the vDSO would read: vCPU 0's, or our
#                        %r12  this vCPU's time page             own one where STABLE cannot be relied on
#                        %r14  reads done

.Lregister:
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

# ---- 5. Hot loop: ring 3 -----------------------------------------------------------------------------------------
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

# ---- 6. Tables ---------------------------------------------------------------------------------------------------

        .balign 16
.Loptions:                                              # key, right-aligned; where its number goes
        .ascii  "\0\0\0\0cpus"
        .quad   VAR_CPUS
        .ascii  "\0\0\0reads"
        .quad   PROBE_TARGET
        .ascii  "\0\0\0\0wild"
        .quad   PROBE_WILD_NS
.Loptions_end:

.Ltext_name:    .asciz "clockprobe: "

        .balign 16
.Limage_end:
clockprobe_image_end:

        .code64
