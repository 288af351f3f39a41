/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The bare image's way from three boot protocols to C in ring 3 on every vCPU, and back into ring 0 for what needs it.
 *
 * Ring 0 code keeps to plain integer instructions and stays short: on some hosts all of it runs in an emulator.
 *
 * Contents: 1 headers  2 boot processor  3 other processors  4 to ring 3  5 the gate  6 faults  7 tables
 */
#include "bare_gate.h"

#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_HAS_ADDRESSES (1 << 16) /* without them loaders refuse a 64-bit ELF file */
#define XEN_ELFNOTE_PHYS32_ENTRY 18

#define SEL_CODE32 0x08
#define SEL_DATA 0x10
#define SEL_CODE64 0x18
#define SEL_USER_DATA (0x20 | 3)
#define SEL_USER_CODE (0x28 | 3)
#define SEL_TSS 0x30 /* 16 bytes a vCPU */

#define PTE_TABLE 0x67 /* present, writable, user, accessed */
#define PTE_RAM 0xe7   /* the same, dirty, 2 MiB */
#define PTE_LAPIC 0xfb /* the same without user, uncached */
#define LAPIC 0xfee00000
#define PAGES 2048 /* of 2 MiB: 4 GiB */

#define CR0_LONG_MODE 0x80010033 /* PG WP NE ET MP PE; INIT leaves caches off, this does not */
#define CR4_PAE (1 << 5)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)
#define RFLAGS_RING3 2 /* interrupts off */

#define TSS_BYTES 104
#define TSS_STRIDE 128
#define TSS_RSP0 4
#define TSS_IO_BASE 102
#define TSS_AVAILABLE 0x89

#define VECTORS (BARE_WAKE_VECTOR + 1)
#define VECTORS_WITH_ERROR_CODE 0x60227d00 /* 8, 10 to 14, 17, 21, 29, 30 */

/* What the CPU and the stubs leave on ring 0's stack. */
#define FRAME_VECTOR 0
#define FRAME_ERROR 8
#define FRAME_RIP 16
#define FRAME_RSP 40

/* ---- 1. Headers ---- */

        .section .headers, "a"
        .balign 4
multiboot_header:
        .long   MULTIBOOT_MAGIC
        .long   MULTIBOOT_HAS_ADDRESSES
        .long   -(MULTIBOOT_MAGIC + MULTIBOOT_HAS_ADDRESSES)
        .long   multiboot_header, image_begin, image_load_end, image_end, multiboot_entry

        .section .note.Xen, "a", @note
        .balign 4
        .long   4, 8, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .quad   pvh_entry

/* ---- 2. Boot processor: where loaders enter ---- */

        .text
        .code32
multiboot_entry:                        /* %ebx: multiboot information */
        movl    $BOOT_MULTIBOOT, boot_protocol
        jmp     1f
pvh_entry:                              /* %ebx: struct hvm_start_info */
        movl    $BOOT_PVH, boot_protocol
1:      cli
        cld
        mov     %ebx, boot_information
        lgdt    gdt_pointer
        mov     $boot_processor, %ebp
        ljmp    $SEL_CODE32, $to_long_mode

        .code64
        .globl  linux_entry
linux_entry:                            /* %rsi: struct boot_params.  The loader's page tables map low memory. */
        cli
        cld
        movl    $BOOT_LINUX, boot_protocol
        mov     %rsi, boot_information
        mov     $pml4, %eax
        mov     %rax, %cr3
        mov     $CR4_PAE, %eax
        mov     %rax, %cr4
        mov     $CR0_LONG_MODE, %eax
        mov     %rax, %cr0
        lgdt    gdt_pointer
        mov     $SEL_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $(stacks0 + BARE_STACK0_BYTES), %esp
        pushq   $SEL_CODE64
        pushq   $boot_processor
        lretq

boot_processor:
        mov     $idt, %edi              /* an address's halves are no constants: put them into the gates here */
        mov     $fault_stubs, %eax
        mov     $VECTORS, %ecx
1:      mov     %eax, %edx
        mov     %dx, (%rdi)
        shr     $16, %edx
        mov     %dx, 6(%rdi)
        add     $16, %rdi
        add     $16, %eax
        dec     %ecx
        jnz     1b
        xor     %r13d, %r13d
        jmp     take_slot

/* ---- 3. Other processors ---- */

        .code16
        .globl  trampoline, trampoline_end
trampoline:                             /* copied to BARE_TRAMPOLINE, entered by a start-up IPI in real mode */
        cli
        cld
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   BARE_TRAMPOLINE + (trampoline_gdt_pointer - trampoline)
        mov     $other_processor, %ebp
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $SEL_CODE32, $to_long_mode
trampoline_gdt_pointer:
        .short  gdt_end - gdt - 1
        .long   gdt
trampoline_end:

        .code32
to_long_mode:                           /* 32-bit protected mode on our GDT; %ebp: where to go on */
        mov     $SEL_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     $CR0_LONG_MODE, %eax
        mov     %eax, %cr0
        ljmp    $SEL_CODE64, $1f
        .code64
1:      mov     %ebp, %ebp              /* the upper half is undefined after the switch */
        jmp     *%rbp

other_processor:
        mov     $1, %r13d
        lock xadd %r13d, slots_taken
        cmp     $BARE_SLOTS, %r13d
        jb      take_slot
1:      hlt                             /* one more than we have room for */
        jmp     1b

/* ---- 4. To ring 3: %r13d is this vCPU's slot ---- */

take_slot:
        lidt    idt_pointer
        mov     %r13d, %esp
        inc     %esp
        imul    $BARE_STACK0_BYTES, %esp, %esp
        add     $stacks0, %esp
        mov     %r13d, %eax
        imul    $TSS_STRIDE, %eax, %eax
        add     $tss, %eax
        mov     %rsp, TSS_RSP0(%rax)
        movw    $TSS_BYTES, TSS_IO_BASE(%rax) /* beyond the limit: no permission bitmap */
        mov     %r13d, %edx
        shl     $4, %edx
        lea     SEL_TSS(%rdx), %ecx
        movw    $(TSS_BYTES - 1), gdt + SEL_TSS(%rdx)
        mov     %eax, gdt + SEL_TSS + 2(%rdx)
        movb    $TSS_AVAILABLE, gdt + SEL_TSS + 5(%rdx) /* over the address's top byte, which is 0 */
        ltr     %cx

        mov     %r13d, %edi
        lea     1(%r13), %eax
        imul    $BARE_STACK_BYTES, %eax, %eax
        lea     stacks - 8(%rax), %rax  /* as after a call */
        mov     $bare_enter, %r10d
enter_ring3:                            /* %rax: stack, %r10: code, %rdi, %rsi, %rdx, %rcx: its arguments */
        pushq   $SEL_USER_DATA
        push    %rax
        pushq   $RFLAGS_RING3
        pushq   $SEL_USER_CODE
        push    %r10
        iretq

/* ---- 5. The gate: bare_gate() of C, in ring 3, then its service in ring 0 ---- */

        .globl  bare_gate
bare_gate:                              /* %rdi: operation, %rsi, %rdx, %rcx: its operands */
gate_call:
        ud2
        ret

gate_serve:                             /* the result in %rax, and in %rdx whether it failed */
        add     $FRAME_RIP, %rsp
        addq    $2, (%rsp)              /* past the UD2 */
        jmp     *gate_services(, %rdi, 8)

gate_read_msr:
        mov     %esi, %ecx
read_msr_instruction:
        rdmsr
        shl     $32, %rdx
        or      %rdx, %rax
        jmp     gate_succeeded

gate_write_msr:
        mov     %esi, %ecx
        mov     %edx, %eax
        shr     $32, %rdx
write_msr_instruction:
        wrmsr
gate_succeeded:
        xor     %edx, %edx
        iretq

gate_failed:                            /* a fault in the service: back to the frame below its own */
        mov     FRAME_RSP(%rsp), %rsp
        xor     %eax, %eax
        mov     $1, %edx
        iretq

gate_read_port:                         /* port, bytes */
        mov     %edx, %ecx
        mov     %esi, %edx
        xor     %eax, %eax
        cmp     $2, %ecx
        je      2f
        ja      4f
        in      %dx, %al
        jmp     gate_succeeded
2:      in      %dx, %ax
        jmp     gate_succeeded
4:      in      %dx, %eax
        jmp     gate_succeeded

gate_write_port:                        /* port, bytes, value */
        mov     %ecx, %eax
        mov     %edx, %ecx
        mov     %esi, %edx
        cmp     $2, %ecx
        je      2f
        ja      4f
        out     %al, %dx
        jmp     gate_succeeded
2:      out     %ax, %dx
        jmp     gate_succeeded
4:      out     %eax, %dx
        jmp     gate_succeeded

gate_write_string:                      /* address, port, bytes */
        rep outsb
        jmp     gate_succeeded

gate_read_mmio:                         /* address */
        mov     (%rsi), %eax
        jmp     gate_succeeded

gate_write_mmio:                        /* address, bytes, value */
        cmp     $1, %edx
        je      1f
        mov     %ecx, (%rsi)
        jmp     gate_succeeded
1:      mov     %cl, (%rsi)
        jmp     gate_succeeded

gate_cpuid:                             /* leaf, subleaf, where the four registers go */
        mov     %rcx, %r8
        mov     %rbx, %r9
        mov     %esi, %eax
        mov     %edx, %ecx
        cpuid
        mov     %eax, (%r8)
        mov     %ebx, 4(%r8)
        mov     %ecx, 8(%r8)
        mov     %edx, 12(%r8)
        mov     %r9, %rbx
        jmp     gate_succeeded

gate_sleep:
        sti                             /* takes effect after the next instruction: no wake-up is missed */
        hlt
        cli
        jmp     gate_succeeded

gate_halt:
        hlt
        jmp     gate_succeeded

triple_fault:
        lidt    no_idt_pointer
        ud2

/* ---- 6. Faults: a stub of 16 bytes a vector leaves vector and error code on the stack ---- */

        .balign 16
fault_stubs:
        .set    vector, 0
        .rept   VECTORS
        .balign 16
        .if     (1 << vector) & VECTORS_WITH_ERROR_CODE
        .else
        pushq   $0
        .endif
        pushq   $vector
        jmp     fault
        .set    vector, vector + 1
        .endr

fault:
        cmpq    $gate_call, FRAME_RIP(%rsp)
        je      gate_serve
        cmpq    $read_msr_instruction, FRAME_RIP(%rsp)
        je      gate_failed
        cmpq    $write_msr_instruction, FRAME_RIP(%rsp)
        je      gate_failed
        cmpq    $BARE_WAKE_VECTOR, FRAME_VECTOR(%rsp)
        je      woken

/* Nothing is returned to: the first vCPU that faults tells it, in ring 3 on a stack of its own. */
        cmpq    $fault_stack, FRAME_RSP(%rsp)
        jb      1f
        cmpq    $fault_stack_end, FRAME_RSP(%rsp)
        jbe     triple_fault            /* in telling it */
1:      mov     $1, %eax
        xchg    %eax, fault_told
        test    %eax, %eax
        jnz     2f
        mov     FRAME_VECTOR(%rsp), %rdi
        mov     FRAME_ERROR(%rsp), %rsi
        mov     FRAME_RIP(%rsp), %rdx
        mov     %cr2, %rcx
        mov     $(fault_stack_end - 8), %eax
        mov     $bare_fault, %r10d
        jmp     enter_ring3
2:      hlt
        jmp     2b

woken:                                  /* out of gate_sleep */
        add     $FRAME_RIP, %rsp
        iretq

/* ---- 7. Tables ---- */

        .section .page_tables, "aw"
        .balign 0x1000
page_directories:
        .set    address, 0
        .rept   PAGES
        .if     address == LAPIC
        .quad   address + PTE_LAPIC
        .else
        .quad   address + PTE_RAM
        .endif
        .set    address, address + 0x200000
        .endr
pdpt:
        .quad   page_directories + PTE_TABLE
        .quad   page_directories + 0x1000 + PTE_TABLE
        .quad   page_directories + 0x2000 + PTE_TABLE
        .quad   page_directories + 0x3000 + PTE_TABLE
        .balign 0x1000
pml4:
        .quad   pdpt + PTE_TABLE
        .balign 0x1000

        .data
        .balign 16
gdt:
        .quad   0
        .quad   0x00cf9b000000ffff      /* SEL_CODE32 */
        .quad   0x00cf93000000ffff      /* SEL_DATA */
        .quad   0x00af9b000000ffff      /* SEL_CODE64 */
        .quad   0x00cff3000000ffff      /* SEL_USER_DATA */
        .quad   0x00affb000000ffff      /* SEL_USER_CODE */
        .fill   BARE_SLOTS * 2, 8, 0    /* SEL_TSS */
gdt_end:
idt:
        .rept   VECTORS
        .short  0, SEL_CODE64
        .byte   0, 0x8e                 /* interrupt gate, only the CPU may use it */
        .short  0
        .quad   0
        .endr
idt_end:
gdt_pointer:
        .short  gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .short  idt_end - idt - 1
        .quad   idt
no_idt_pointer:
        .short  0
        .quad   0
        .balign 8
gate_services:
        .quad   gate_read_msr, gate_write_msr, gate_read_port, gate_write_port, gate_write_string
        .quad   gate_read_mmio, gate_write_mmio, gate_cpuid, gate_sleep, gate_halt, triple_fault

        .globl  boot_protocol, boot_information, slots_taken
slots_taken:
        .long   1                       /* the boot processor has number 0 */
boot_protocol:
        .long   0
boot_information:
        .quad   0
fault_told:
        .long   0

        .bss
        .balign 64
tss:
        .fill   BARE_SLOTS * TSS_STRIDE
stacks0:
        .fill   BARE_SLOTS * BARE_STACK0_BYTES
stacks:
        .fill   BARE_SLOTS * BARE_STACK_BYTES
fault_stack:
        .fill   BARE_STACK_BYTES
fault_stack_end:
        .section .note.GNU-stack, "", @progbits
