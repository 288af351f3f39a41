# SPDX-License-Identifier: Apache-2.0
#
# What all probes have in common: a multiboot-1 file's headers, the way to long mode on every vCPU, the end of a run,
# faults, the console. probe_layout.s has its constants.
#
# A probe includes both. Beside its constants (MAGIC_VALUE, ABI_VERSION, PROBE_END, RECORD_SHIFT, REC_READS,
# REC_USES_RDTSCP, REC_FAULT_*) it has:
#
#     set_defaults     macro: values of its options that are not 0; %rax is free
#     .Loptions        its command line's keys, up to .Loptions_end: see .Lparse_options
#     .Ltext_name      what its lines on the console begin with
#     .Lordered_rdtsc  "lfence; rdtsc", which .Lchoose_rdtsc patches
#     .Lregister       where every vCPU goes on, in ring 0 and long mode, with a stack and %r13d = its index. When it
#                      comes back, to .Lenroll, .Lgive_up or .Lfinish, %rbx is its record and %r14 the reads it has done
#     .Limage_end      the end of the file
#
# Ring 0 code keeps to plain integer instructions and stays short: on some hosts (kvm-pvm) all of it runs in KVM's
# instruction emulator, a thousand times slower than ring 3.
#
# Contents: 1 file headers  2 32-bit boot  3 AP trampoline  4 boot processor  5 stack  6 finish  7 faults  8 console
#           9 tables

# ---- 1. File headers ---------------------------------------------------------------------------------------------

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

# ---- 2. 32-bit boot ----------------------------------------------------------------------------------------------

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

# ---- 3. AP trampoline: copied to TRAMPOLINE, entered in real mode by the SIPI ------------------------------------

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

# ---- 4. Boot processor: options, shared block, application processors --------------------------------------------

        .code64
.Lbsp_main:
        mov     $(STACKS + (1 << STACK_SHIFT)), %esp
        movq    $1, VAR_CPUS
        set_defaults
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
        print   .Ltext_name
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
        jmp     .Ltake_stack

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
        jb      .Ltake_stack
1:      cli                                             # too many, or too late
        hlt
        jmp     1b

# ---- 5. Stack: ring 0, every vCPU, %r13d = its index -------------------------------------------------------------

.Ltake_stack:
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
        jmp     .Lregister

# ---- 6. Finish: ring 3 ------------------------------------------------------------------------------------------

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

# ---- 7. Faults: ring 0 ------------------------------------------------------------------------

# One 16-byte stub per vector, which the gates count on: leave vector and error code on the stack, a 0 where the CPU
# has no error code to push.
        .balign 64
.Lfault_stubs:
        .set    .Lvector, 0
        .rept   GATES
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

        print   .Ltext_name
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

# ---- 8. Console: ring 0 -----------------------------------------------------------------------------------------

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

# ---- 9. Tables --------------------------------------------------------------------------------------------------

        .balign 16
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
        .rept   GATES
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

.Ltext_cpus:    .asciz "cpus="
.Ltext_vcpu:    .asciz "vcpu "
.Ltext_fault:   .asciz " fault "
.Ltext_at:      .asciz " at 0x"
.Ltext_newline: .asciz "\n"
